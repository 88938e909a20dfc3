"""Two models' answers to the same questions: what got better, what got worse, and how sure that is."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from interlace.errors import InputError
from interlace.files import write_json
from interlace.inference.metrics import dataset_of, grouped, num_images_of, row_scores
from interlace.inference.predictions import few, read_predictions

Prediction = Mapping[str, Any]  # id, reference, metadata; answered ones have `prediction`
RESAMPLES = 10_000
RIGHT = 0.5  # a row with this score or more counts as right
_FEW_VALUES = 32  # scores are mostly 0 or 1
_MOST_DRAWN = 10_000_000  # rows at a time
_MOST_EXAMPLES = 100  # of rows that both models get wrong


def mean_interval(values: np.ndarray, seed: int = 0) -> tuple[float, float] | None:
    """The 95% percentile bootstrap interval of the mean of (N,) values, from 10,000 resamples; None for fewer than two values."""
    if len(values) < 2:
        return None
    means = np.concatenate(list(_resampled_means(values, np.random.default_rng(seed))))
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def _resampled_means(values: np.ndarray, draws: np.random.Generator) -> Iterator[np.ndarray]:
    distinct, counts = np.unique(values, return_counts=True)
    if len(distinct) <= _FEW_VALUES:  # how often each comes is one draw: the same distribution, and no work per row
        yield draws.multinomial(len(values), counts / len(values), RESAMPLES) @ distinct / len(values)
        return
    size = max(_MOST_DRAWN // len(values), 1)
    for start in range(0, RESAMPLES, size):
        yield values[draws.integers(0, len(values), (min(size, RESAMPLES - start), len(values)))].mean(axis=1)


def read_earlier(path: Path, output_dir: Path) -> list[dict[str, Any]]:
    """Another model's predictions: a file, or the `predictions.jsonl` of an output folder.

    Raises:
        InputError: it cannot be read, or it is what `output_dir` is about to overwrite.
    """
    file = path / "predictions.jsonl" if path.is_dir() else path
    if file.resolve() == (output_dir / "predictions.jsonl").resolve():
        raise InputError(f"--compare-with {path}: the new predictions would overwrite these; expected another --output-dir")
    return read_predictions(file)


def matched(earlier: Sequence[Prediction], rows: Sequence[Prediction]) -> list[dict[str, Any]]:
    """The earlier prediction of each row, in the order of `rows` and with their metadata, which say how both are scored: the same ids and references.

    Raises:
        InputError: a row on one side only, or with another reference: predictions of another set.
    """
    known, wanted = ({str(row["id"]): row for row in side} for side in (earlier, rows))
    different = [name for name, row in wanted.items() if name in known and known[name]["reference"] != row["reference"]]
    problems = [
        ("no earlier prediction for", [name for name in wanted if name not in known], "row"),
        ("no row for", [name for name in known if name not in wanted], "earlier prediction"),
        ("another reference in", different, "row"),
    ]
    if any(names for _, names, _ in problems):
        lines = "\n  ".join(f"{what} {few(names, noun)}" for what, names, noun in problems if names)
        raise InputError(f"these are not two models' answers to the same questions; expected the same ids and references:\n  {lines}")
    return [{**known[name], "metadata": row["metadata"]} for name, row in wanted.items()]


def change(before: float, after: float) -> str:
    """What became of a row, by its scores: gained, lost, or as before: both_right, both_wrong."""
    if before != after:
        return "gained" if after > before else "lost"
    return "both_right" if after >= RIGHT else "both_wrong"


def compare(earlier: Sequence[Prediction], predictions: Sequence[Prediction], seed: int = 0) -> dict[str, Any]:
    """The contents of `comparison.json`; `earlier` is matched to `predictions`, row by row.

    `overall`, and per data set and number of images: mean scores `before` and `after`, their `difference` with its 95% `interval` (paired bootstrap over
    rows; null for a single one), and how many rows `gained`, `lost`, or are `both_right` or `both_wrong`. `rows` names all that gained or lost, and some that
    both get wrong. Rows that a rule leaves out for either model are left out.
    """
    scored = zip(earlier, predictions, row_scores(earlier), row_scores(predictions), strict=True)
    rows = [(old, new, before, after) for old, new, before, after in scored if before is not None and after is not None]

    def summary(members: Sequence[tuple[Prediction, Prediction, float, float]]) -> dict[str, Any]:
        scores = np.array([row[2:] for row in members]).reshape(-1, 2)
        before, after = scores.mean(axis=0).tolist() if len(scores) else (0.0, 0.0)
        found = {"count": len(scores), "before": before, "after": after, "difference": after - before}
        changes = Counter(change(*row[2:]) for row in members)
        kinds = {kind: changes[kind] for kind in ("gained", "lost", "both_right", "both_wrong")}
        return found | {"interval": mean_interval(scores[:, 1] - scores[:, 0], seed), **kinds}

    examples = defaultdict(list)
    for old, new, before, after in rows:
        texts = {"id": new["id"], "dataset": dataset_of(new), "reference": new["reference"], "before": old["prediction"], "after": new["prediction"]}
        examples[change(before, after)].append(texts | {"score_before": before, "score_after": after})
    groups = {
        "datasets": grouped(rows, lambda row: dataset_of(row[1]), summary),
        "num_images": grouped(rows, lambda row: num_images_of(row[1]), summary),
    }
    named = {"gained": examples["gained"], "lost": examples["lost"], "both_wrong": examples["both_wrong"][:_MOST_EXAMPLES]}
    return {"seed": seed, "resamples": RESAMPLES, "overall": summary(rows), **groups, "rows": named}


def write_comparison(output_dir: Path, earlier: Sequence[Prediction], predictions: Sequence[Prediction], seed: int = 0) -> dict[str, Any]:
    """Writes `comparison.json`; returns what is in it, see `compare`."""
    comparison = compare(earlier, predictions, seed)
    write_json(output_dir / "comparison.json", comparison)
    return comparison


def comparison_table(comparison: Mapping[str, Any]) -> str:
    """The comparison as aligned lines of text."""
    rows = [("overall", comparison["overall"])]
    rows += [(f"  {name}", value) for name, value in comparison["datasets"].items()]
    rows += [(f"  {name} image{'' if name == '1' else 's'}", value) for name, value in comparison["num_images"].items()]
    if not comparison["overall"]["count"]:
        return "no row has a score of its own that could be compared: BLEU and CIDEr are of all rows together"
    lines = [f"{'compared, 95% interval':28s} {'before':>7s} {'after':>7s} {'change':>7s} {'':17s} {'gained':>7s} {'lost':>7s}"]
    for name, value in rows:
        scores = f"{value['before']:7.1%} {value['after']:7.1%} {value['difference']:+7.1%} {interval_text(value['interval']):17s}"
        lines.append(f"{name:28s} {scores} {value['gained']:7,} {value['lost']:7,}")
    return "\n".join(lines)


def interval_text(interval: Sequence[float] | None) -> str:
    """`-1.2% to +3.4%`; nothing for None."""
    return "" if interval is None else f"{interval[0]:+.1%} to {interval[1]:+.1%}"
