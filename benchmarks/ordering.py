"""What the plan's order does to what is learned: `python benchmarks/ordering.py` with `train/` on PYTHONPATH; about an hour on two cores.

The demo's LoRA run and evaluation, over several seeds, as a user starts them; only the rows or their order differ:
- `plain` and `planned`: the demo's rows, 64 in a step, as a shuffle gives them, or as the plan packs, sorts by cost and deals them (four micro-batches of 16).
- `separate` and `shared`: as many rows, those of the new tasks as four to six questions about each scene; each row by itself, or `share_prefix`, so that a
  step sees a quarter or fewer of the scenes that a shuffle would give it.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits

from interlace.data import demo
from interlace.errors import run_script

ROOT = Path(__file__).resolve().parents[1]
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"per_device_train_batch_size": 64, "packing": False},
    "planned": {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 4, "packing": True},
    "separate": {"per_device_train_batch_size": 64},
    "shared": {"per_device_train_batch_size": 64, "share_prefix": True},
}


def scenes() -> Iterator[dict[str, Any]]:
    """The demo's rows, but those of its new tasks ask about scenes: two to four different digits; what is in each image, the largest, how many are even, all of
    them in reverse order."""
    target, rows = load_digits().target, json.loads((demo.prepare() / "train.json").read_text())
    images_of: dict[int, list[str]] = {digit: [] for digit in range(10)}
    for image in sorted({image for row in rows for image in row.get("image", [])}):
        images_of[int(target[int(Path(image).name[:4])])].append(image)
    known = [row for row in rows if row["metadata"]["dataset"] in demo.BASE_TASKS]
    yield from known
    randomness, scene, count = random.Random("scenes"), 0, len(known)
    while count < len(rows):
        digits = randomness.sample(range(10), randomness.randint(2, 4))
        letters = demo.LETTERS[: len(digits)]
        images = [randomness.choice(images_of[digit]) for digit in digits]
        turns = [(f"What digit is in image {letter}?", f"image {letter}: {digit}") for letter, digit in zip(letters, digits, strict=True)]
        turns += [("Read all images in reverse order.", " ".join(map(str, reversed(digits))))]
        turns += [("Which digit is the largest?", f"digit {max(digits)}")]
        turns += [("How many images show an even digit?", f"{sum(digit % 2 == 0 for digit in digits)} of {len(digits)}")]
        start = "".join(f"Image {letter}: <image>\n" for letter in letters)
        for number, (question, answer) in enumerate(turns):
            talk = [{"from": "human", "value": start + question}, {"from": "gpt", "value": answer}]
            yield {"id": f"scene-{scene}-{number}", "image": images, "conversations": talk}
        scene, count = scene + 1, count + len(turns)


def train(variant: str, config: Path) -> None:
    """One run; `plain` without what the plan does to the order."""
    from interlace.arguments import SCHEMA_PATH, resolve
    from interlace.data.packing import MicroBatch, Plan
    from interlace.training import planning, supervised

    class Plain(Plan):
        def steps(self, epoch: int) -> list[list[MicroBatch]]:
            return [[batch] for batch in self._packed(epoch)]

    if variant == "plain":
        planning.Plan = Plain  # type: ignore[misc]
    torch.set_num_threads(1)
    values = json.loads(config.read_text())
    arguments, problems = resolve(values, json.loads(SCHEMA_PATH.read_text())["properties"], dict.fromkeys(values, "benchmark"))
    assert not problems, problems
    run_script(lambda: supervised.finetune(arguments))  # which ends the processes that read


def measure(variant: str, seed: int, folder: Path) -> dict[str, Any]:
    """Loss over the last tenth of the steps, loss and accuracy on rows never trained on; a run that is there already is not made again."""
    out = folder / f"{variant}_{seed}"
    if not (out / "test" / "metrics.json").is_file():
        run(variant, seed, folder, out)
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    losses, steps = [entry["loss"] for entry in history if "loss" in entry], max(entry["step"] for entry in history)
    tasks = json.loads((out / "test" / "metrics.json").read_text())["datasets"]
    return {
        "steps": steps,
        "loss": statistics.mean(losses[-len(losses) // 10 :]),
        "eval_loss": [entry["eval_loss"] for entry in history if "eval_loss" in entry][-1],
        "known": statistics.mean(tasks[task]["score"] for task in demo.BASE_TASKS),
        **{task: tasks[task]["score"] for task in demo.NEW_TASKS},
    }


def run(variant: str, seed: int, folder: Path, out: Path) -> None:
    """Trains and evaluates, as a user would."""
    config = json.loads((ROOT / "configs" / "lora_sft_argument.json").read_text()) | VARIANTS[variant]
    del config["$schema"]
    config |= {"output_dir": str(out), "seed": seed, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_steps": 10}
    if variant in ("separate", "shared"):
        config["dataset"] |= {"train": [{"data_files": str(folder / "scenes.json"), "image_folder": str(demo.prepare())}]}
    (folder / f"{out.name}.json").write_text(json.dumps(config))
    question = ["--data-files", "demo", "--split", "test", "--batch-size", "100", "--max-new-tokens", "32", "--output-dir", str(out / "test")]
    commands = [
        [__file__, "--train", variant, str(folder / f"{out.name}.json")],
        [str(ROOT / "train" / "evaluate_model.py"), "--model-path", str(out), *question],
    ]
    for command in commands:
        with (folder / f"{out.name}.log").open("a") as log:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=log, stderr=subprocess.STDOUT, env=environment)


def spread(values: list[float], digits: int = 4, unit: float = 1) -> str:
    """Mean and standard deviation over seeds."""
    return f"{statistics.mean(values) * unit:.{digits}f} ± {statistics.stdev(values) * unit:.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--folder", type=Path, help="keeps the runs; those that are there are not made again")
    parser.add_argument("--train", nargs=2, metavar=("VARIANT", "CONFIG"))
    options = parser.parse_args()
    if options.train:
        train(options.train[0], Path(options.train[1]))
        return
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(2) as pool:
        folder = options.folder or Path(name)
        (folder / "scenes.json").write_text(json.dumps(list(scenes())))
        runs = {(variant, seed): pool.submit(measure, variant, seed, folder) for seed in range(1, 1 + options.seeds) for variant in options.only}
        results = {key: found.result() for key, found in runs.items()}
    head = ["variant", "optimizer steps", "training loss at the end", "loss on test rows", "known tasks, %", *(f"{task}, %" for task in demo.NEW_TASKS)]
    lines = [f"# Order of rows and what is learned: the demo, {options.seeds} seeds, mean ± standard deviation; torch {torch.__version__}"]
    lines += ["", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for variant in options.only:
        found = [result for (name, _), result in results.items() if name == variant]
        columns = {key: [result[key] for result in found] for key in found[0]}
        cells = [variant, str(columns["steps"][0]), spread(columns["loss"]), spread(columns["eval_loss"])]
        lines.append(f"| {' | '.join([*cells, *(spread(columns[task], 1, 100) for task in ('known', *demo.NEW_TASKS))])} |")
    lines += ["", *(f"- {variant}, seed {seed}: {json.dumps(result)}" for (variant, seed), result in results.items()), ""]
    path = Path(__file__).parent / "results" / f"ordering_cpu_{date.today()}.md"
    path.write_text("\n".join(lines))
    print("\n".join(lines), path, sep="\n")


if __name__ == "__main__":
    main()
