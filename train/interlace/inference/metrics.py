"""Scores of predictions against references."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
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


def score(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """The contents of `metrics.json`: overall, per data set (`metadata.dataset`), per category of LLaVA-Interleave Bench and per number of images.

    Scores are means in 0..1; `overall` weighs every row the same, a category and `average` every data set and category. Rows that a rule leaves out are
    counted as `skipped`.
    """
    datasets = _grouped(predictions, lambda row: str(row["metadata"].get("dataset", "all")))
    categories = _categories(datasets)
    complete = {"average": sum(value["score"] for value in categories.values()) / len(CATEGORIES)} if _is_complete(categories) else {}
    return {
        "overall": next(iter(_grouped(predictions, lambda row: "overall").values())),
        "datasets": datasets,
        "categories": categories,
        **complete,
        "num_images": _grouped(predictions, lambda row: str(row["metadata"].get("num_images", "unknown"))),
    }


def _grouped(predictions: Sequence[Prediction], key: Callable[[Prediction], str]) -> dict[str, dict[str, Any]]:
    groups = defaultdict(list)
    for row in predictions:
        groups[key(row)].append(row)
    return {name: _scored(rows) for name, rows in sorted(groups.items())}


def _rule(question_type: Any) -> tuple[str, Rule]:
    return RULES.get(question_type if isinstance(question_type, str) else None, RULES[None])


def _scored(rows: Sequence[Prediction]) -> dict[str, Any]:
    """Score, metric and count of some rows."""
    rules = [_rule(row["metadata"].get("question_type")) for row in rows]
    found = [rule(row["prediction"], row["reference"]) for (_, rule), row in zip(rules, rows, strict=True)]
    counted = [value for value in found if value is not None]
    names = sorted({name for name, _ in rules})
    scored: dict[str, Any] = {"score": sum(counted) / max(len(counted), 1), "metric": ", ".join(names), "count": len(counted)}
    if len(counted) < len(rows):
        scored["skipped"] = len(rows) - len(counted)
    if names == ["choice_accuracy"]:
        scored["lenient"] = sum(lenient_choice_accuracy(row["prediction"], row["reference"]) for row in rows) / len(rows)
    return scored


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
