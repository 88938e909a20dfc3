"""Does a model look at the images, at the right one, in their order? What its answers say that it gave with images changed, see `ablations`."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from interlace.files import write_json
from interlace.inference.comparison import RESAMPLES, interval_text, mean_interval
from interlace.inference.metrics import dataset_of, grouped, num_images_of


@dataclass(frozen=True)
class Ablated:
    """The answer to row `number` with images changed; `image` says which, from 1, where it was one of them; a video counts as one.

    `before` and `score` are the scores of the answers to the row as it is and as it was changed.
    """

    ablation: str
    number: int
    image: int | None
    prediction: Mapping[str, Any]
    before: float
    score: float


def insensitive(ablated: Sequence[Ablated], predictions: Sequence[Mapping[str, Any]]) -> list[int]:
    """Numbers of the rows whose answer is the same when all their images are grey."""
    return [row.number for row in ablated if row.ablation == "all_blanked" and row.prediction["prediction"] == predictions[row.number]["prediction"]]


def diagnosis(ablated: Sequence[Ablated], predictions: Sequence[Mapping[str, Any]], seed: int = 0) -> dict[str, Any]:
    """The contents of `diagnostics.json`.

    For every ablation `overall`, and per data set, number of images and, where one image was changed, which: how many rows (`count`), their `score` so and
    `before`, as they are, the `drop` between with its 95% `interval` (paired bootstrap over rows, each the mean over its images; null for a single one),
    and the share of answers that `changed`. `insensitive`: the rows whose answer was the same when all images were grey.
    """
    ablations = {}
    for name in dict.fromkeys(row.ablation for row in ablated):
        rows = [row for row in ablated if row.ablation == name]

        def summary(members: Sequence[Ablated]) -> dict[str, Any]:
            by_row = defaultdict(list)
            for row in members:
                by_row[row.number].append((row.before, row.score, row.prediction["prediction"] != predictions[row.number]["prediction"]))
            before, score, changed = np.array([np.mean(values, axis=0) for values in by_row.values()]).T
            found = {"count": len(by_row), "before": before.mean(), "score": score.mean(), "drop": (before - score).mean(), "changed": changed.mean()}
            return {key: int(value) if key == "count" else float(value) for key, value in found.items()} | {"interval": mean_interval(before - score, seed)}

        ablations[name] = {
            "overall": summary(rows),
            "datasets": grouped(rows, lambda row: dataset_of(predictions[row.number]), summary),
            "num_images": grouped(rows, lambda row: num_images_of(predictions[row.number]), summary),
            "images": grouped(rows, lambda row: row.image, summary),
        }
    same = insensitive(ablated, predictions)
    of = sum(row.ablation == "all_blanked" for row in ablated)
    right = sum(row.before for row in ablated if row.ablation == "all_blanked" and row.number in set(same))
    names = [{"id": predictions[number]["id"], "dataset": dataset_of(predictions[number])} for number in same]
    found = {"count": len(same), "of": of, "score": right / max(len(same), 1), "rows": names}
    return {"seed": seed, "resamples": RESAMPLES, "rows": len({row.number for row in ablated}), "ablations": ablations, "insensitive": found}


def write_diagnosis(output_dir: Path, ablated: Sequence[Ablated], predictions: Sequence[Mapping[str, Any]], seed: int = 0) -> dict[str, Any]:
    """Writes `diagnostics.json`; returns what is in it, see `diagnosis`."""
    diagnosed = diagnosis(ablated, predictions, seed)
    write_json(output_dir / "diagnostics.json", diagnosed)
    return diagnosed


def diagnosis_table(diagnosed: Mapping[str, Any]) -> str:
    """The diagnosis as aligned lines of text."""
    lines = [f"{'images changed, 95% interval':28s} {'before':>7s} {'so':>7s} {'drop':>7s}"]
    for name, values in diagnosed["ablations"].items():
        for group, value in [(name, values["overall"]), *((f"  image {image}", value) for image, value in values["images"].items())]:
            lines.append(
                f"{group:28s} {value['before']:7.1%} {value['score']:7.1%} {value['drop']:+7.1%} {interval_text(value['interval']):17s} of {value['count']:,}"
            )
    same = diagnosed["insensitive"]
    if same["of"]:
        lines.append(f"{same['count']:,} of {same['of']:,} answers are the same when all images are grey")
    return "\n".join(lines)
