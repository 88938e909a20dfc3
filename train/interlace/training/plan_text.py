"""What `plan_run.py` shows: histograms, tables, figures in words."""

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from interlace.arguments import Arguments
from interlace.data.dataset import Rows
from interlace.training.fitting import Fit, shown
from interlace.training.forecast import Disk, Machine, Sharding, Speed
from interlace.training.preflight import Checked, RunForecast

GIB = 2**30
WORLDS = (1, 2, 4, 8)
_EXAMPLES = 5
_BAR = 40  # characters
_BLOCKS = " ▏▎▍▌▋▊▉█"


def show(*paragraphs: Sequence[str]) -> None:
    """Prints paragraphs of lines, each with an empty line before it; empty ones are left out."""
    for lines in paragraphs:
        if lines:
            print("\n" + "\n".join(lines), flush=True)


def describe_rows(name: str, checked: Checked, max_length: int) -> list[str]:
    """Totals, a warning if many are too long, reasons and examples."""
    warning = checked.ledger.too_long_warning(max_length)
    lines = [f"{name}: {checked.ledger.summary()}", *([warning] if warning else [])]
    lines += [f"  {entry.status}: {entry.file}: row {entry.index}: {entry.reason}: {entry.detail}" for entry in islice(checked.ledger.entries, _EXAMPLES)]
    more = checked.ledger.skipped + checked.ledger.shortened - _EXAMPLES
    return lines + ([f"  and {more:,} more"] if more > 0 else [])


def bins_of(values: np.ndarray, most: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """(counts, edges) of a histogram of whole numbers, in at most `most` bins of equal, whole width; the last edge is not included."""
    low, high = int(values.min()), int(values.max())
    width = -(-(high - low + 1) // most)
    return np.histogram(values, np.arange(low, high + width + 1, width))


def histogram(title: str, values: np.ndarray) -> list[str]:
    """Bars of blocks, one line for each bin."""
    counts, edges = bins_of(values)
    lines = [f"{title}: {values.min():,} to {values.max():,}, mean {values.mean():,.1f}, {values.sum():,} in all"]
    names = [f"{low:,}" if high - low == 1 else f"{low:,}-{high - 1:,}" for low, high in pairwise(edges)]
    width = max(map(len, names))
    for name, count in zip(names, counts, strict=True):
        eighths = round(count / counts.max() * _BAR * 8)
        bar = "█" * (eighths // 8) + _BLOCKS[eighths % 8].strip()
        lines.append(f"  {name.rjust(width)}  {bar or ('▏' if count else '')} {count:,}".rstrip())
    return lines


def draw_histograms(path: str, rows: Rows, max_length: int) -> None:
    """Tokens and images per row as a picture, with `max_length` where it is near."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, name, values, colour in ((axes[0], "tokens", rows.lengths, "#4477aa"), (axes[1], "images", rows.num_images, "#cc6677")):
        counts, edges = bins_of(values, 50)
        axis.bar(edges[:-1] - 0.5, counts, 0.9 * np.diff(edges), align="edge", color=colour)
        axis.set(xlabel=f"{name} per row", ylabel="rows", title=f"{values.min():,} to {values.max():,}, mean {values.mean():,.1f}")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.spines[["top", "right"]].set_visible(False)
    if max_length < 1.2 * rows.lengths.max():
        axes[0].axvline(max_length, color="black", linestyle="--", linewidth=1, label=f"max_length {max_length:,}")
        axes[0].legend(frameon=False)
    figure.savefig(path, dpi=120)


def describe_steps(forecast: RunForecast) -> list[str]:
    """The plan in figures."""
    plan, mean = forecast.plan, forecast.mean
    devices = f"{forecast.world_size} devices, " if forecast.world_size > 1 else ""
    total, trainable = sum(part[1] for part in forecast.parts), sum(part[2] for part in forecast.parts)
    rows = plan.rows_per_epoch / forecast.steps_per_epoch
    return [
        f"plan: {forecast.total_steps:,} steps, {forecast.steps_per_epoch:,} per epoch, of {rows:,.1f} rows",
        f"  {devices}{plan.accumulation} micro-batch{'es' if plan.accumulation > 1 else ''} per step and device, of {mean.num_tokens:,.0f} tokens "
        f"(at most {plan.budget:,}), {mean.num_rows:,.0f} of them supervised, with {mean.num_images:.1f} images",
        f"  {trainable:,} of {total:,} parameters learn; {forecast.step_flops / 1e12:,.3g} TFLOP per step and device",
    ]


def describe_memory(forecast: RunForecast, machine: Machine) -> list[str]:
    """Memory by part, how it goes down with devices and ZeRO stages, and whether it fits."""
    memory = forecast.memory(machine)
    lines = [f"memory: {size(memory.total)} per device at the fullest moment of a step"]
    lines += ["  " + ", ".join(f"{name} {size(value)}" for name, value in asdict(memory).items() if value)]
    lines += ["  devices (GiB each)" + "".join(f"{world:10}" for world in WORLDS)]
    lines += [f"  {name:18}" + "".join(f"{value / GIB:10.2f}" for value in values) for name, values in sharded(forecast, machine).items()]
    verdict = "fits" if forecast.fits(machine) else "DOES NOT FIT"
    return [*lines, f"  {verdict}: {machine.name}, {size(machine.memory)}, of which a tenth is to stay free"]


def sharded(forecast: RunForecast, machine: Machine) -> dict[str, list[int]]:
    """Bytes of one device under DDP and each stage of ZeRO, for each number of devices in `WORLDS`."""
    stages = {"DDP": (0, False), "ZeRO 1": (1, False), "ZeRO 2": (2, False), "ZeRO 3": (3, False), "ZeRO 3 offloaded": (3, True)}
    return {name: [forecast.memory(machine, Sharding(world, stage, off, off)).total for world in WORLDS] for name, (stage, off) in stages.items()}


def describe_time(forecast: RunForecast, speed: Speed | None) -> list[str]:
    """Seconds of a step and of the run, if they were measured."""
    if speed is None:
        return []
    seconds = forecast.step_seconds(speed)
    tokens, flops = (value / seconds for value in (forecast.mean.num_tokens * forecast.plan.accumulation, forecast.step_flops))
    return [
        f"time: {duration(seconds)} per step, {duration(seconds * forecast.steps_per_epoch)} per epoch, {duration(seconds * forecast.total_steps)} in all "
        "(without evaluation and saving)",
        f"  {tokens:,.0f} tokens/s, {flops / 1e12:,.3g} TFLOP/s per device",
    ]


def describe_fit(fit: Fit, arguments: Arguments, machine: Machine, output: Path | None) -> list[str]:
    """What to change, and where it was written."""
    changes = shown(fit.changes, arguments)
    lines = [f"fit: {size(fit.memory.total)} of {size(machine.memory)} with", *(f"  {change}" for change in changes or ["nothing changed"])]
    return [*lines, f"  in {output}" if output else "  which --fit machine writes"]


def describe_disk(disk: Disk, output_dir: Path) -> list[str]:
    """Bytes in `output_dir`, against what is free there."""
    folder = next(path for path in (output_dir.resolve(), *output_dir.resolve().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    verdict = "" if disk.total < free else ": TOO LITTLE; set save_total_limit, or choose another output_dir"
    return [f"disk: {size(disk.total)} at most, {size(disk.checkpoint)} per checkpoint; {size(free)} are free{verdict}"]


def size(count: float) -> str:
    """Bytes in words: `1.23 GiB`, `45 MiB`, `6 KiB`."""
    return f"{count / GIB:,.2f} GiB" if count >= 0.1 * GIB else f"{count / 2**20:,.0f} MiB" if count >= 2**20 else f"{count / 1024:,.0f} KiB"


def duration(seconds: float) -> str:
    """Seconds in words: `0.42 s`, `3.1 min`, `2.5 h`, `4.0 days`."""
    for least, unit, name in ((172_800, 86_400, "days"), (7200, 3600, "h"), (120, 60, "min")):
        if seconds >= least:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.3g} s"


def as_json(checked: Checked, forecast: RunForecast, machine: Machine, speed: Speed | None) -> dict[str, Any]:
    """Everything that is shown, for programs: counts, bytes, seconds."""
    ledger, memory = checked.ledger, forecast.memory(machine)
    result: dict[str, Any] = {name: getattr(ledger, name) for name in ("rows", "trained", "shortened", "skipped")}
    result |= {"reasons": dict(ledger.reasons), "refusal": checked.refusal}
    for name in ("lengths", "num_images", "supervised"):
        values = getattr(checked.rows, name)
        counts, edges = bins_of(values, 50)
        figures = {"min": int(values.min()), "mean": float(values.mean()), "max": int(values.max()), "sum": int(values.sum())}
        result[name] = figures | {"edges": edges.tolist(), "counts": counts.tolist()}
    return result | {
        "devices": forecast.world_size,
        "steps_per_epoch": forecast.steps_per_epoch,
        "total_steps": forecast.total_steps,
        "gradient_accumulation_steps": forecast.plan.accumulation,
        "tokens_per_batch": forecast.plan.budget,
        "memory_bytes": asdict(memory) | {"total": memory.total},
        "sharded_bytes": {name: dict(zip(WORLDS, values, strict=True)) for name, values in sharded(forecast, machine).items()},
        "machine_bytes": machine.memory,
        "fits": forecast.fits(machine),
        "disk_bytes": asdict(forecast.disk),
        "step_flops": forecast.step_flops,
        "step_seconds": None if speed is None else forecast.step_seconds(speed),
    }
