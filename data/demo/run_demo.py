"""`make demo`: evaluates the embedded model, teaches it new tasks with LoRA, evaluates again on scans never trained on, chats once, draws a picture; then
preference tuning on pairs that the model cannot tell apart, and what became of the tasks.

Every step is one of the commands a user runs; this script only runs them in order and puts their results side by side.
"""

import argparse
import json
import random
import shlex
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import matplotlib
import PIL.Image

matplotlib.use("Agg")
from matplotlib import pyplot

ROOT = Path(__file__).resolve().parents[2]
FILES = ROOT / "data" / "demo" / "files"
BASE_TASKS, NEW_TASKS = ("name", "name_k", "read", "text"), ("largest", "even", "reverse")


def run(*words: str | Path) -> None:
    """Runs one command of the README, shown as it is."""
    print("\n$ python", shlex.join(map(str, words)), flush=True)
    subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, check=True)


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def chance(rows: list[dict[str, Any]]) -> float:
    """The best score of a guess that knows the task and the number of images, but not what they show: the commonest answer of each."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["metadata"]["num_images"]].append(row["reference"])
    return sum(Counter(answers).most_common(1)[0][1] for answers in groups.values()) / len(rows)


def table(before: dict[str, Any], after: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Scores of every task before and after, with the chance level."""
    lines = [f"{'task':24s}{'before':>9s}{'after':>9s}{'chance':>9s}"]
    for title, tasks in (("known to the base model", BASE_TASKS), ("new", NEW_TASKS)):
        levels = {task: chance([row for row in rows if row["metadata"]["dataset"] == task]) for task in tasks}
        figures = [(before[task]["score"], after[task]["score"], levels[task]) for task in tasks]
        mean = tuple(sum(column) / len(tasks) for column in zip(*figures, strict=True))
        for name, values in [(title, mean), *((f"  {task}", values) for task, values in zip(tasks, figures, strict=True))]:
            lines.append(f"{name:24s}" + "".join(f"{value:9.1%}" for value in values))
    return "\n".join(lines)


def draw(run_dir: Path, rows: list[dict[str, Any]], records: dict[str, Any], text: str, path: Path) -> None:
    """One picture: loss, the table, and a few test rows with the answers given."""
    history = json.loads((run_dir / "trainer_state.json").read_text())["log_history"]
    figure = pyplot.figure(figsize=(13, 6.5), layout="constrained")
    grid = figure.add_gridspec(3, 4, height_ratios=[3, 1.2, 1.2])
    curve, words = figure.add_subplot(grid[0, :2]), figure.add_subplot(grid[0, 2:])
    for name in ("loss", "eval_loss"):
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        curve.plot(*zip(*points, strict=True), label={"loss": "training", "eval_loss": "validation"}[name], marker="o" if name == "eval_loss" else None)
    curve.set(xlabel="step", title="loss per supervised token", yscale="log")
    curve.legend()
    words.axis("off")
    words.text(0, 1, text, family="monospace", fontsize=10, va="top")
    shown = random.Random(1).sample([row for row in rows if row["metadata"]["dataset"] in (*NEW_TASKS, "read")], 8)
    for place, row in enumerate(shown):
        axis, record = figure.add_subplot(grid[1 + place // 4, place % 4]), records[row["id"]]
        images = [PIL.Image.open(FILES / name) for name in record["image"]]
        strip = PIL.Image.new("L", (36 * 4 - 4, 32), 255)  # always as wide as four
        for i, image in enumerate(images):
            strip.paste(image, (36 * i, 0))
        axis.imshow(strip, cmap="gray", vmin=0, vmax=255)
        axis.axis("off")
        right = row["prediction"] == row["reference"]
        question = record["conversations"][0]["value"].rsplit("\n", 1)[-1]
        axis.set_title(
            f"{question}\n{row['prediction']}" + ("" if right else f"   (right: {row['reference']})"), fontsize=9, color="black" if right else "firebrick"
        )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def prefer(sft: Path, output: Path, question: list[str], options: argparse.Namespace) -> str:
    """The second stage, on the merged model of the first: pairs of a right reading and a near miss on negatives. Returns its table."""
    shutil.rmtree(output / "merged", ignore_errors=True)
    run("train/merge_adapter.py", "--adapter-path", sft, "--output-dir", output / "merged")
    dataset = {name: [{"data_files": "demo", "split": split}] for name, split in (("train", "preference"), ("eval", f"preference_{options.split}"))}
    overrides = ["--model_name_or_path", output / "merged", "--output_dir", output / "lora_dpo", "--overwrite_output_dir", "true", "--seed", str(options.seed)]
    run("train/preference_finetune.py", "configs/lora_dpo_argument.json", *overrides, "--dataset", json.dumps(dataset), "--eval_on_start", "true")
    run("train/evaluate_model.py", "--model-path", output / "lora_dpo", *question, "--output-dir", output / "after_dpo")
    history = json.loads((output / "lora_dpo" / "trainer_state.json").read_text())["log_history"]
    first, *_, last = [entry for entry in history if "eval_loss" in entry]
    scores = [json.loads((output / name / "metrics.json").read_text())["overall"]["score"] for name in ("after", "after_dpo")]
    likelier = [entry["eval_logps/accuracies"] for entry in (first, last)]
    margins = ", ".join(f"{last[f'eval_rewards/margins{name}']:.2f} {word}" for name, word in (("", "true"), ("_blank", "blank"), ("_swapped", "swapped")))
    lines = [f"{'pairs on negatives':36s}{'before':>9s}{'after':>9s}", f"{'right reading likelier':36s}" + "".join(f"{value:9.1%}" for value in likelier)]
    lines += [
        f"{'reward accuracy':45s}{last['eval_rewards/accuracies']:9.1%}",
        f"{'all seven tasks, exact match':36s}" + "".join(f"{score:9.1%}" for score in scores),
    ]
    return "\n".join([*lines, f"reward margin with images: {margins}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"))
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--split", choices=("validation", "test"), default="test", help="choose settings on `validation`")
    options = parser.parse_args()
    output, adapter = options.output, options.output / "lora_sft"
    question = ["--data-files", "demo", "--split", options.split, "--batch-size", "100", "--max-new-tokens", "32"]
    run("train/evaluate_model.py", "--model-path", "demo", *question, "--output-dir", output / "before")
    overrides = ["--output_dir", adapter, "--overwrite_output_dir", "true", "--seed", str(options.seed)]
    run("train/supervised_finetune.py", "configs/lora_sft_argument.json", *overrides)
    run("train/evaluate_model.py", "--model-path", adapter, *question, "--output-dir", output / "after")
    records = {row["id"]: row for row in json.loads((FILES / f"{options.split}.json").read_text())}
    rows = read_rows(output / "after" / "predictions.jsonl")
    before, after = (json.loads((output / name / "metrics.json").read_text())["datasets"] for name in ("before", "after"))
    asked = next(row for row in rows if row["metadata"]["dataset"] == "reverse" and row["metadata"]["num_images"] == 3)
    text = records[asked["id"]]["conversations"][0]["value"]
    files = [(FILES / name).relative_to(ROOT) for name in records[asked["id"]]["image"]]
    run("train/predict_multiround.py", "--model-path", adapter, "--image-file", *files, "--query", text)
    summary = table(before, after, rows)
    draw(adapter, rows, records, summary, output / "demo.png")
    preferences = prefer(adapter, output, question, options)
    summary += f"\n\n{preferences}"
    (output / "table.txt").write_text(summary + "\n")
    minutes = json.loads((adapter / "train_results.json").read_text())["train_runtime"] / 60
    print(f"\nOn scans never trained on, after {minutes:.1f} minutes of training:\n\n{summary}\n\nThe picture: {output / 'demo.png'}")
    print(f"Talk to it: .venv/bin/python train/predict_multiround.py --model-path {adapter}")


if __name__ == "__main__":
    main()
