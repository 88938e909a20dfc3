"""Files of predictions: read, and written with their scores; the scores as a table. Needs neither torch nor a model."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from interlace.errors import InputError
from interlace.files import write_json, write_whole
from interlace.inference.interleave_bench import PUBLISHED
from interlace.inference.metrics import check_rows, score

_SHOWN = 5


def few(names: Sequence[str], noun: str) -> str:
    """The first few names, and how many more there are: `2 ids (a, b)`."""
    more = f", and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return f"{len(names):,} {noun}{'s' * (len(names) != 1)} ({', '.join(names[:_SHOWN])}{more})"


def told_apart(names: Sequence[str]) -> list[str]:
    """The names, those that come again with `#2`, `#3`, .. behind them: data sets may use an id, such as their image's, for several rows."""
    taken, found = set(names), []
    counts = dict.fromkeys(names, 0)
    for name in names:
        counts[name] += 1
        new = name
        while counts[name] > 1 and new in taken:
            new = f"{name}#{counts[name]}"
            counts[name] += new in taken
        taken.add(new)
        found.append(new)
    return found


def read_predictions(path: Path, metric: str | None = None, needs_reference: bool = True) -> list[dict[str, Any]]:
    """Reads `predictions.jsonl`; with `needs_reference` false, id and prediction are enough.

    Args:
        metric: of rows that do not say how they are scored, from now on; None for the one that they were scored by.

    Raises:
        InputError: missing, broken, without its keys, an id that comes twice, or rows that cannot be scored.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8: {error.reason} at byte {error.start}") from None
    rows = [(f"{path}: line {number}", _prediction(line, f"{path}: line {number}", needs_reference)) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise InputError(f"{path}: no predictions")
    repeated = [name for name, count in Counter(str(row["id"]) for _, row in rows).items() if count > 1]
    if repeated:
        raise InputError(f"{path}: {few(repeated, 'id')} more than once; expected one prediction for each row")
    for _, row in rows:
        row["metadata"] |= {"default_metric": metric} if metric else {}
    check_rows((where, row["metadata"]) for where, row in rows)
    return [row for _, row in rows]


def _prediction(line: str, where: str, needs_reference: bool) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: no valid JSON: {error}") from None
    if isinstance(row, dict) and not needs_reference:
        row.setdefault("metadata", {})
    texts = [row.get(name) for name in ("prediction", *(["reference"] if needs_reference else []))] if isinstance(row, dict) else [None]
    if not all(isinstance(text, str) for text in texts) or not isinstance(row.get("id"), (str, int)) or not isinstance(row.get("metadata"), dict):
        raise InputError(f"{where}: expected id, prediction (text), reference (text; or --data-files, which has them) and metadata (object)")
    return row


def write_scores(output_dir: Path, predictions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Writes `predictions.jsonl` and `metrics.json`; returns the metrics."""
    output_dir.mkdir(parents=True, exist_ok=True)
    write_whole(output_dir / "predictions.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in predictions))
    metrics = score(predictions)
    write_json(output_dir / "metrics.json", metrics)
    return metrics


def metrics_table(metrics: dict[str, Any]) -> str:
    """The metrics as aligned lines of text."""
    rows = [("overall", metrics["overall"])]
    rows += [(f"  {name}", value) for name, value in metrics["datasets"].items()]
    rows += [(f"  {name} image{'' if name == '1' else 's'}", value) for name, value in metrics["num_images"].items()]
    for group, words in (("sources", "source"), ("tasks", "task"), ("decisive_image", "decisive image"), ("by_metric", "metric")):
        rows += [(f"  {words} {name}", value) for name, value in metrics.get(group, {}).items()]
    lines = [f"{name:28s} {value['score']:7.1%}  of {value['count']:,}{_remarks(value)}" for name, value in rows]
    return "\n".join(lines + _bench_table(metrics))


def _remarks(value: dict[str, Any]) -> str:
    words = [f", {value['lenient']:.1%} by a lenient reading" if "lenient" in value else ""]
    words += [f", {value['accuracy_at_0.5']:.1%} with an IoU of 0.5" if "accuracy_at_0.5" in value else ""]
    words += [f", CIDEr {100 * value['cider']:.1f}" if "cider" in value else ""]
    words += [f", {value['skipped']:,} without a reference left out" if "skipped" in value else "", f"  ({value['metric']})"]
    return "".join(words)


def _bench_table(metrics: dict[str, Any]) -> list[str]:
    """Categories of LLaVA-Interleave Bench beside what its authors published."""
    if not metrics["categories"]:
        return []
    lines = ["", f"{'LLaVA-Interleave Bench':28s} {'here':>7s} {''.join(f'{size:>7s}' for size in PUBLISHED)}  (published, arXiv 2407.07895)"]
    here = {name: f"{value['score']:.1%}" for name, value in metrics["categories"].items()}
    here |= {"mean of all nine": f"{metrics['average']:.1%}"} if "average" in metrics else {}
    for name, figure in {**here, "in_domain_average": ""}.items():
        published = "".join(f"{row[name]:7.1%}" if name in row else f"{'':7s}" for row in PUBLISHED.values())
        missing = metrics["categories"].get(name, {}).get("missing", ())
        lines.append(f"  {name:26s} {figure:>7s} {published}{'  without ' * bool(missing)}{', '.join(missing)}".rstrip())
    return lines
