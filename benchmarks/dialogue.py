"""A dialogue of 20 turns about 10 images: tokens and seconds of each turn with what the model remembers, and with everything read again.

    PYTHONPATH=train python benchmarks/dialogue.py [--model-path P] [--max-new-tokens N]

By default of a mini model with random weights, whose images are 196 tokens and whose parts are to each other as those of the 0.5B. Both ways give the same
answers, which is checked. Without the memory is `Generator.answer`: transformers' `generate` on the whole conversation.
"""

import argparse
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import PIL.Image
import torch
import transformers
from forecast import make_model
from transformers import SiglipImageProcessorPil

from interlace.data.demo import MODEL
from interlace.data.template import ChatTemplate
from interlace.inference.dialogue import Dialogue
from interlace.inference.generation import load_generator
from interlace.model.loading import Processing, load_processing
from interlace.model.saving import save_model, save_processing

TURNS, IMAGES = 20, 10


def make_mini(folder: Path) -> str:
    """Writes the mini model, with the demo's tokenizer; returns where it is."""
    folder.mkdir()
    demo, model = load_processing(str(MODEL)), make_model()
    model.resize_token_embeddings(len(demo.tokenizer))
    model.config.image_token_id = demo.config.image_token_id
    side = model.config.vision_config.image_size
    images = SiglipImageProcessorPil(size={"height": side, "width": side})
    save_model(model, folder)
    save_processing(Processing(demo.tokenizer, images, ChatTemplate(demo.tokenizer, demo.config.image_token_id), model.config), folder)
    return str(folder)


def surroundings(device: torch.device) -> str:
    """Where this is measured."""
    name = torch.accelerator.current_accelerator() if device.type != "cpu" else platform.processor() or platform.machine()
    return f"on {name}, {torch.get_num_threads()} threads; torch {torch.__version__}, transformers {transformers.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-path", help="default: the mini model")
    parser.add_argument("--max-new-tokens", type=int, default=16)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        generator = load_generator(options.model_path or make_mini(Path(folder) / "mini"))
        print(f"{options.model_path or 'a mini model'} {surroundings(generator.device)}\n")
        print("| turn | images so far | tokens: remembered | all again | seconds: remembered | all again | times less |\n|---|---|---|---|---|---|---|")
        dialogue, totals = Dialogue(generator, options.max_new_tokens), np.zeros(4)
        for turn in range(TURNS):
            if turn % 2 == 0 and turn // 2 < IMAGES:
                path = Path(folder) / f"{turn}.png"
                PIL.Image.fromarray(np.random.RandomState(turn).randint(0, 255, (480, 640, 3), np.uint8)).save(path)
                dialogue.attach([str(path)])
            before = list(dialogue.context.tokens)
            start = time.perf_counter()
            answer = dialogue.ask(f"Question {turn}: what is to be seen here, and what was there before?")
            seconds = time.perf_counter() - start
            prompt = generator.prompt(dialogue.turns[:-1])
            start = time.perf_counter()
            (again,) = generator.answer([prompt], options.max_new_tokens)
            seconds_again = time.perf_counter() - start
            if answer != again:
                print(f"turn {turn + 1}: the answers differ: {answer!r}, {again!r}")
            read = dialogue.context.tokens
            known = next((i for i, (old, new) in enumerate(zip(before, read, strict=False)) if old != new), len(before))
            row = np.array([len(read) - known, len(read), seconds, seconds_again])
            totals += row
            print(f"| {turn + 1} | {len(prompt.images)} | {row[0]:.0f} | {row[1]:.0f} | {row[2]:.3f} | {row[3]:.3f} | {row[3] / row[2]:.1f} |", flush=True)
    print(f"| all | {IMAGES} | {totals[0]:.0f} | {totals[1]:.0f} | {totals[2]:.2f} | {totals[3]:.2f} | {totals[3] / totals[2]:.1f} |")


if __name__ == "__main__":
    main()
