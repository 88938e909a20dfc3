"""Scores of predictions against references."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Prediction = Mapping[str, Any]  # id, prediction, reference, metadata


def exact_match(prediction: str, reference: str) -> float:
    """1 if both are the same text, white space around them aside; else 0."""
    return float(prediction.strip() == reference.strip())


def score(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """The contents of `metrics.json`: overall, per data set (`metadata.dataset`) and per number of images.

    Scores are means in 0..1; `overall` weighs every row the same.
    """

    def grouped(key: Callable[[Prediction], str]) -> dict[str, dict[str, Any]]:
        groups = defaultdict(list)
        for row in predictions:
            groups[key(row)].append(exact_match(row["prediction"], row["reference"]))
        return {name: {"score": sum(scores) / len(scores), "metric": "exact_match", "count": len(scores)} for name, scores in sorted(groups.items())}

    return {
        "overall": next(iter(grouped(lambda row: "overall").values())),
        "datasets": grouped(lambda row: str(row["metadata"].get("dataset", "all"))),
        "categories": {},
        "num_images": grouped(lambda row: str(row["metadata"].get("num_images", "unknown"))),
    }
