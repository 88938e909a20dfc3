"""What a run shows and leaves behind: the progress bar, the trackers' copy of the arguments, curves, the final table."""

import importlib.metadata
import json
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from tqdm import tqdm
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

matplotlib.use("Agg")
from matplotlib import pyplot

PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "deepspeed", "safetensors", "pillow", "wandb", "bitsandbytes")


class ProgressBar(ProgressCallback):
    """The training bar, with loss and tokens/s; one compact line per log instead of a dictionary."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Opens the bar; in a file it is written rarely, in a terminal at once."""
        super().on_train_begin(args, state, control)
        if self.training_bar is not None and not sys.stderr.isatty():
            self.training_bar.mininterval = 30

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Shows the latest figures."""
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        if "loss" in logs:
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.4f}, {logs['tokens_per_second']:,.0f} tokens/s", refresh=False)
        words = [f"{name} {_number(logs[name])}" for name in SHOWN if name in logs]
        if words:
            self.training_bar.write(f"step {state.global_step}/{state.max_steps}: {', '.join(words)}")


SHOWN = (
    "loss",
    "token_accuracy",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "images_per_second",
    "data_wait_share",
    "eval_loss",
    "eval_token_accuracy",
)


class ArgumentsToTracker(TrainerCallback):
    """Adds the resolved arguments to an open W&B run; Hugging Face's callback knows only its own."""

    def __init__(self, arguments: Mapping[str, Any]):
        self.arguments = dict(arguments)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Updates the run's configuration."""
        if state.is_world_process_zero and "wandb" in (args.report_to or []):
            import wandb

            if wandb.run is not None:
                wandb.run.config.update({"interlace": self.arguments}, allow_val_change=True)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def environment() -> dict[str, Any]:
    """Versions, commit and hardware, for `environment.json`."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    try:
        words = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        commit = subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip() or None
    except OSError:  # no git on this machine
        commit = None
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "packages": versions,
        "commit": commit,
        "machine": {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads(), "gpus": devices, "cuda": torch.version.cuda},
    }


def draw_curves(history: Sequence[Mapping[str, float]], path: Path) -> None:
    """Draws loss, token accuracy, learning rate and gradient norm over the steps of `trainer_state.log_history` as a picture."""
    panels = (("loss", "eval_loss"), ("token_accuracy", "eval_token_accuracy"), ("learning_rate",), ("grad_norm",))
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for axis, names in zip(axes.flat, panels, strict=True):
        for name in names:
            points = [(entry["step"], entry[name]) for entry in history if name in entry]
            if points:
                axis.plot(*zip(*points, strict=True), label=name.replace("_", " "), marker="o" if len(points) < 20 else None)
        axis.set_xlabel("step")
        axis.set_title(names[0].replace("_", " "))
        axis.grid(alpha=0.3)
        if len(names) > 1 and axis.lines:
            axis.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def print_table(title: str, rows: Sequence[tuple[str, ...]]) -> None:
    """Prints rows of words in columns; figures are aligned to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    tqdm.write(f"\n{title}")
    for row in rows:
        cells = [cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))]
        tqdm.write("  " + "  ".join(cells).rstrip())


def write_json(path: Path, value: Any) -> None:
    """Writes a record of the run as readable JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
