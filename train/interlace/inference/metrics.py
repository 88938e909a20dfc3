"""Scores of predictions against references."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from interlace.inference.interleave_bench import CATEGORIES, choice_accuracy, lenient_choice_accuracy, rouge_l

Prediction = Mapping[str, Any]  # id, prediction, reference, metadata
Rule = Callable[[str, str], float | None]  # prediction, reference -> 0..1, or None where a row does not count


def exact_match(prediction: str, reference: str) -> float:
    """1 if both are the same text, white space around them aside; else 0."""
    return float(prediction.strip() == reference.strip())


# `metadata.question_type` -> what its metric is called, and the rule; exact match without one
RULES: Mapping[str | None, tuple[str, Rule]] = {
    None: ("exact_match", exact_match),
    "open-ended": ("rouge_l", rouge_l),
    "multi-choice": ("choice_accuracy", choice_accuracy),
}


@dataclass(frozen=True)
class _Scored:
    """A row with its metric's name and its score: None where the rule leaves it out; `lenient` of a multiple choice."""

    metadata: Mapping[str, Any]
    metric: str
    score: float | None
    lenient: float | None


def score(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """The contents of `metrics.json`: overall, per data set (`metadata.dataset`), per category of LLaVA-Interleave Bench and per number of images.

    Scores are means in 0..1; `overall` weighs every row the same, a category and `average` every data set and category. Rows that a rule leaves out are
    counted as `skipped`.
    """
    rows = [_scored(row) for row in predictions]
    datasets = _grouped(rows, lambda row: str(row.metadata.get("dataset", "all")))
    categories = _categories(datasets)
    complete = {"average": sum(value["score"] for value in categories.values()) / len(CATEGORIES)} if _is_complete(categories) else {}
    return {
        "overall": _summary(rows),
        "datasets": datasets,
        "categories": categories,
        **complete,
        "num_images": _grouped(rows, lambda row: str(row.metadata.get("num_images", "unknown"))),
    }


def _scored(row: Prediction) -> _Scored:
    kind = row["metadata"].get("question_type")
    metric, rule = RULES.get(kind if isinstance(kind, str) else None, RULES[None])
    texts = row["prediction"], row["reference"]
    return _Scored(row["metadata"], metric, rule(*texts), lenient_choice_accuracy(*texts) if rule is choice_accuracy else None)


def _grouped(rows: Sequence[_Scored], key: Callable[[_Scored], str]) -> dict[str, dict[str, Any]]:
    groups = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return {name: _summary(members) for name, members in sorted(groups.items())}


def _summary(rows: Sequence[_Scored]) -> dict[str, Any]:
    """Score, metric and count of some rows."""
    counted = [row.score for row in rows if row.score is not None]
    lenient = [row.lenient for row in rows if row.lenient is not None]
    metrics = sorted({row.metric for row in rows})
    found: dict[str, Any] = {"score": sum(counted) / max(len(counted), 1), "metric": ", ".join(metrics), "count": len(counted)}
    if len(counted) < len(rows):
        found["skipped"] = len(rows) - len(counted)
    if len(lenient) == len(rows):
        found["lenient"] = sum(lenient) / len(rows)
    return found


def _categories(datasets: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Those of which there is a data set: the unweighted mean over the data sets; `missing` names those that a published figure rests on besides."""
    found: dict[str, dict[str, Any]] = {}
    for name, members in CATEGORIES.items():
        there = [member for member in members if member in datasets and datasets[member]["count"]]
        if there:
            parts = [datasets[member] for member in there]
            metrics = sorted({part["metric"] for part in parts})
            found[name] = {
                "score": sum(part["score"] for part in parts) / len(parts),
                "metric": ", ".join(metrics),
                "count": sum(part["count"] for part in parts),
            }
            found[name] |= {"missing": missing} if (missing := [member for member in members if member not in there]) else {}
    return found


def _is_complete(categories: Mapping[str, Mapping[str, Any]]) -> bool:
    return len(categories) == len(CATEGORIES) and not any("missing" in value for value in categories.values())


def row_scores(predictions: Sequence[Prediction]) -> list[float | None]:
    """The score of each row by its own rule, 0..1; None where the rule leaves it out."""
    return [_scored(row).score for row in predictions]
