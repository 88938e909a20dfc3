"""Questions about the same scenes: an evaluation that computes a scene once, against one that reads it again for every question.

    PYTHONPATH=train python benchmarks/evaluation.py [--model-path P] [--scenes N] [--questions N] [--images N] [--batch-size N]

Both answer in batches, with transformers' `generate`; both give the same answers, which is checked. The model is that of `dialogue.py`.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from dialogue import make_mini, surroundings

from interlace.data.reading import Outcome
from interlace.inference.evaluation import LIMITS, predict, read_questions
from interlace.inference.generation import load_generator

WORDS = ("What digit is in image A?", "Read all images in order.", "Is the digit even?", "What digit is the largest?")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-path", help="default: the mini model")
    for name, default in (("scenes", 4), ("questions", 16), ("images", 6), ("batch-size", 16), ("max-new-tokens", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        generator = load_generator(options.model_path or make_mini(Path(folder) / "mini"))
        rows = []
        for scene in range(options.scenes):
            names = [f"{scene}-{image}.png" for image in range(options.images)]
            for number, name in enumerate(names):
                pixels = np.random.RandomState(scene * options.images + number).randint(0, 255, (240, 320, 3), np.uint8)
                PIL.Image.fromarray(pixels).save(Path(folder) / name)
            for number in range(options.questions):
                question = "<image>\n" * options.images + f"{number}. {WORDS[number % len(WORDS)]}"
                rows.append({"image": names, "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "digit 3"}]})
        (Path(folder) / "rows.json").write_text(json.dumps(rows))
        shared = read_questions({"data_files": str(Path(folder) / "rows.json")}, generator, LIMITS | {"max_length": 1_000_000})
        ways = {"each question alone": [alone(outcome) for outcome in shared], "scenes once": shared}
        print(f"{options.model_path or 'a mini model'} {surroundings(generator.device)}")
        print(f"\n{options.scenes} scenes of {options.images} images, {options.questions} questions each, batches of {options.batch_size}\n")
        print("| | images encoded | tokens read | seconds | times less |\n|---|---|---|---|---|")
        answers, first = [], 0.0
        for name, outcomes in ways.items():
            counts = count(generator)
            start = time.perf_counter()
            predictions = predict(generator, outcomes, options.batch_size, options.max_new_tokens)
            seconds = time.perf_counter() - start
            first = first or seconds
            answers.append([prediction["prediction"] for prediction in predictions])
            print(f"| {name} | {counts['images']:,} | {counts['tokens']:,} | {seconds:.1f} | {first / seconds:.1f} |", flush=True)
        print(f"\nanswers that differ: {sum(one != other for one, other in zip(*answers, strict=True))} of {len(rows)}")


def alone(outcome: Outcome) -> Outcome:
    """The question without what it shares with others."""
    assert outcome.row is not None
    return replace(outcome, row=replace(outcome.row, prefix_ids=0, prefix_images=0))


def count(generator: object) -> dict[str, int]:
    """Images that the tower sees and tokens that the language model reads from now on, padding included; what is generated is not counted."""
    model, counts = generator.model.model, {"images": 0, "tokens": 0}  # type: ignore[attr-defined]

    def of_images(_: torch.nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
        counts["images"] += len(args[0] if args else kwargs["pixel_values"])

    def of_tokens(_: torch.nn.Module, args: tuple[()], kwargs: dict[str, torch.Tensor]) -> None:
        rows, length = kwargs["inputs_embeds"].shape[:2]
        counts["tokens"] += rows * length * (length > 1)

    model.vision_tower.register_forward_pre_hook(of_images, with_kwargs=True)
    model.language_model.register_forward_pre_hook(of_tokens, with_kwargs=True)
    return counts


if __name__ == "__main__":
    main()
