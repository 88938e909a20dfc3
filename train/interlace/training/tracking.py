"""What a run shows and leaves behind: the progress bar, the trackers' copy of the arguments, curves, the final table."""

import copy
import importlib.metadata
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import matplotlib
import torch
from tqdm import tqdm
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import WandbCallback, get_reporting_integration_callbacks

from interlace.arguments import is_main_process
from interlace.errors import InputError
from interlace.redaction import SECRET_NAME, readable, without_secrets
from interlace.training.answering import Example
from interlace.training.clock import PREFERENCE_PHASES

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
    "rewards/accuracies",
    "rewards/margins",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "images_per_second",
    "data_wait_share",
    "mfu",
    "eval_loss",
    "eval_token_accuracy",
    "eval_score",
    "eval_rewards/accuracies",
    "eval_rewards/margins",
    "eval_rewards/blank_gap",
    "eval_rewards/swapped_gap",
)


class GuardedTracker(TrainerCallback):
    """Passes the Trainer's events on to a tracker, with arguments that hold no secret. A tracker that raises is left out for the rest of the run.

    It hears of the end of training when the run's report is there, too: `end_of_trackers`.

    Args:
        tracker: a callback of `report_to`.
    """

    def __init__(self, tracker: TrainerCallback):
        self.tracker: TrainerCallback | None = tracker
        self._shown: TrainingArguments | None = None  # the arguments without secrets: made once, not at every step
        self._end: Callable[[], None] | None = None

    def _pass_on(self, event: str, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        if self.tracker is None:
            return
        if self._shown is None:
            self._shown = copy.copy(args)
            for name, value in vars(args).items():
                if isinstance(value, str | list | dict):
                    setattr(self._shown, name, None if SECRET_NAME.search(name) else without_secrets(value))
        try:
            getattr(self.tracker, event)(self._shown, state, control, **more)
        except Exception as error:  # noqa: BLE001 whatever a tracker's code raises, it must not end the run
            name, self.tracker = type(self.tracker).__name__.removesuffix("Callback").removesuffix("Tracker"), None
            reason = readable(f"{type(error).__name__}: {error}".splitlines()[0])
            tqdm.write(f"{name} failed at step {state.global_step} and is left out for the rest of the run: {reason}")

    on_init_end = partialmethod(_pass_on, "on_init_end")
    on_train_begin = partialmethod(_pass_on, "on_train_begin")
    on_step_end = partialmethod(_pass_on, "on_step_end")
    on_log = partialmethod(_pass_on, "on_log")
    on_evaluate = partialmethod(_pass_on, "on_evaluate")
    on_predict = partialmethod(_pass_on, "on_predict")
    on_save = partialmethod(_pass_on, "on_save")
    on_push_begin = partialmethod(_pass_on, "on_push_begin")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        """Remembers it for `end`."""
        self._end = partial(self._pass_on, "on_train_end", args, state, control, **more)

    def end(self) -> None:
        """Passes on that training has ended, if it has."""
        end, self._end = self._end, None
        if end is not None:
            end()


@contextmanager
def end_of_trackers(callbacks: Sequence[TrainerCallback]) -> Iterator[None]:
    """Whatever happens inside, the trackers among these callbacks hear of the end of training behind it."""
    try:
        yield
    finally:
        for callback in callbacks:
            if isinstance(callback, GuardedTracker):
                callback.end()


def time_budget(history: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Lines of the final table: how long a step took in the mean, where its time went, and the MFU, from the Trainer's log."""
    logged = [entry for entry in history if "data_seconds" in entry]
    if not logged:
        return []
    phases = [phase for phase in PREFERENCE_PHASES if f"{phase}_seconds" in logged[0]]
    seconds = {phase: sum(entry[f"{phase}_seconds"] for entry in logged) / len(logged) for phase in phases}
    whole = sum(seconds.values())
    shares = ", ".join(f"{phase} {value / whole:.0%}" for phase, value in seconds.items() if round(value / whole, 2))
    lines = [("seconds per step", f"{whole:.3g}"), ("of these", shares)]
    utilisation = [entry["mfu"] for entry in logged if "mfu" in entry]
    return lines + ([("MFU", f"{sum(utilisation) / len(utilisation):.1%}")] if utilisation else [])


def guarded_trackers(args: TrainingArguments, record: Mapping[str, Any], examples: Sequence[Example] = ()) -> list[TrainerCallback]:
    """The trackers that `report_to` names, and takes them out of `args`, so that the Trainer adds none of its own.

    Args:
        record: the resolved arguments without secrets, for a tracker that keeps them.
        examples: answers of the latest evaluation, for a tracker that shows pictures.

    Raises:
        InputError: a tracker that is not known or not installed.
    """
    try:
        kinds = get_reporting_integration_callbacks(args.report_to)
        trackers = [_wandb_tracker(record, examples) if kind is WandbCallback else kind() for kind in kinds]
    except (ValueError, RuntimeError, ImportError) as error:
        raise InputError(f"report_to: {error}") from error
    args.report_to = []
    return [GuardedTracker(tracker) for tracker in trackers]


def _wandb_tracker(record: Mapping[str, Any], examples: Sequence[Example]) -> TrainerCallback:
    from interlace.training.weights_and_biases import WandbTracker  # imports wandb, which other runs need not wait for

    return WandbTracker(record, examples)


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
    """Draws loss, token accuracy, learning rate and gradient norm over the steps of `trainer_state.log_history` as a picture; of pairs, rewards too."""
    panels: list[tuple[str, ...]] = [("loss", "eval_loss"), ("token_accuracy", "eval_token_accuracy"), ("learning_rate",), ("grad_norm",)]
    if any("rewards/margins" in entry for entry in history):
        panels[2:2] = [("rewards/accuracies", "eval_rewards/accuracies", "eval_logps/accuracies")]
        panels[3:3] = [("rewards/margins", "eval_rewards/margins", "eval_rewards/margins_blank", "eval_rewards/margins_swapped")]
    figure, axes = pyplot.subplots(2, len(panels) // 2, figsize=(5.5 * len(panels) // 2, 7), layout="constrained")
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


def say(text: str) -> None:
    """Prints a line on the main process, above any progress bar."""
    if is_main_process():
        tqdm.write(text)


def print_table(title: str, rows: Sequence[tuple[str, ...]]) -> None:
    """Prints rows of words in columns; figures are aligned to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    tqdm.write(f"\n{title}")
    for row in rows:
        cells = [cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))]
        tqdm.write("  " + "  ".join(cells).rstrip())
