"""The end of a finished run: its row report and its page. The model stands by then, and nothing that goes wrong here takes it back."""

import json
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path

import torch

from interlace.arguments import Arguments
from interlace.data.dataset import Rows
from interlace.data.ledger import Ledger
from interlace.data.sources import Source
from interlace.errors import InputError
from interlace.files import write_whole
from interlace.redaction import readable, without_secrets
from interlace.training.checkpoint import REPORT_FILE
from interlace.training.preflight import forecast_run
from interlace.training.report import Peak, Story, page
from interlace.training.row_report import DROP_LIST, Measured, RowReport, measure
from interlace.training.tracking import say
from interlace.training.trainer import PackedTrainer


def tell(
    trainer: PackedTrainer, arguments: Arguments, sources: Sequence[Source], ledger: Ledger, output_dir: Path, metrics: Mapping[str, float], resident: int
) -> Callable[[], None]:
    """What writes the row report and `report.html` of a finished run, from what all ranks say here; it takes its time, so nobody should wait for it.

    Args:
        metrics: of the training.
        resident: bytes of this process before the model was loaded.

    Raises:
        Stopped: the run was asked to stop while it scored rows with blank images.
    """
    measured = None
    if trainer.row_losses is not None:
        try:
            measured = measure(trainer, arguments["row_report_images"] if arguments["row_report"] == "images" else 0)
        except InputError as error:  # on all ranks alike
            say(f"warning: no row report: {error}")
    peaks = trainer.survival.ranks.gather(peak_bytes(trainer.args.device))

    def write() -> None:
        try:
            _write(trainer, arguments, sources, ledger, output_dir, metrics, measured, max(peaks), resident)
        except Exception as error:  # noqa: BLE001 whatever is wrong with a page, the model is there
            say(f"warning: the model is whole, but the run's report could not be written: {readable(f'{type(error).__name__}: {error}'.splitlines()[0])}")

    return write if trainer.survival.ranks.is_main else lambda: None


def _write(
    trainer: PackedTrainer,
    arguments: Arguments,
    sources: Sequence[Source],
    ledger: Ledger,
    output_dir: Path,
    metrics: Mapping[str, float],
    measured: Measured | None,
    peak: int,
    resident: int,
) -> None:
    rows, checkpoint, report = trainer.train_rows.rows, trainer.survival.checkpoint, None
    assert isinstance(rows, Rows)
    if measured is not None:
        report = RowReport.of(rows, trainer.train_rows.plan, measured)
        report.write(output_dir, sources)
        counts = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in report.counts().items() if count) or "none stands out"
        say(f"  rows to look at                  {output_dir / DROP_LIST} ({counts})")
    story = Story(
        output_dir=output_dir,
        arguments=without_secrets(arguments),
        ledger=ledger,
        history=trainer.state.log_history,
        steps=trainer.state.global_step,
        minutes=metrics["train_runtime"] / 60,
        since=0 if checkpoint is None else checkpoint.step,
        environment=json.loads((output_dir / "environment.json").read_text(encoding="utf-8")),
        peak=forecast_peak(trainer, rows, arguments, peak, resident),
        rows=report,
        processing=trainer.processing,
    )
    write_whole(output_dir / REPORT_FILE, page(story))
    say(f"  the run's story                  {output_dir / REPORT_FILE}")


def peak_bytes(device: torch.device) -> int:
    """The most bytes that this process has had so far: what torch has allocated on a GPU, or its resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def forecast_peak(trainer: PackedTrainer, rows: Rows, arguments: Arguments, measured: int, resident: int) -> Peak:
    """The measured peak beside what `plan_run.py` forecasts for this run; on a CPU with what was `resident` before the model was loaded."""
    device = "cuda" if trainer.args.device.type == "cuda" else "cpu"
    config = trainer.processing.config
    try:
        forecast = forecast_run(rows, trainer.train_rows.plan, arguments, trainer.args, config, trainer.survival.ranks.world_size)
        memory = forecast.memory_on(device)
    except (ValueError, RuntimeError, KeyError, TypeError, NotImplementedError) as error:  # an operation that cannot be rehearsed
        return Peak(device, measured, None, f"{type(error).__name__}: {error}".splitlines()[0])
    parts = {item.name: int(getattr(memory, item.name)) for item in fields(memory) if item.name != "host"}
    runtime = parts.pop("runtime")  # torch does not count a GPU's
    return Peak(device, measured, parts if device == "cuda" else {**parts, "runtime": runtime, "before the model was loaded": resident})
