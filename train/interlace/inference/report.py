"""`evaluation.html`: scores, what changing the images did, the comparison with an earlier model, and rows with their pictures, in one page."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interlace.data.media import open_images
from interlace.data.page import data_uri, filled
from interlace.data.reading import Outcome
from interlace.data.sample import Image, Place, Sample, Text, media_of
from interlace.files import write_whole
from interlace.inference.comparison import RIGHT, change
from interlace.inference.diagnostics import Ablated, insensitive
from interlace.inference.metrics import dataset_of, num_images_of, row_scores

PAGE = Path(__file__).with_name("evaluation.html")
KINDS = ("lost", "gained", "insensitive", "wrong", "right", "unscored")  # a row is of the first kind that fits
_LARGEST_SIDE = 512  # of a picture, in pixels
_MOST_SIDES = 1600  # in pixels, of all pictures of a row: a row of many frames shows smaller ones
_MOST_LETTERS = 4_000  # of a text


@dataclass(frozen=True)
class Evaluation:
    """What a report tells: `predictions` and their `metrics`, and, where there are any, one outcome or one earlier prediction for each of them.

    `model`, `data` and `earlier_model` are names; `comparison`, `ablated` and `diagnosis` are what `comparison` and `diagnostics` give.
    """

    model: str
    data: str
    predictions: Sequence[Mapping[str, Any]]
    metrics: Mapping[str, Any]
    outcomes: Sequence[Outcome] | None = None
    earlier_model: str = ""
    earlier: Sequence[Mapping[str, Any]] | None = None
    comparison: Mapping[str, Any] | None = None
    ablated: Sequence[Ablated] = ()
    diagnosis: Mapping[str, Any] | None = None


def write_report(folder: Path, evaluation: Evaluation, most_rows: int) -> list[Path]:
    """Writes `evaluation.html`; returns the paths of all that an evaluation has written. See `report`."""
    write_whole(folder / "evaluation.html", report(evaluation, most_rows))
    there = {"comparison.json": evaluation.comparison, "diagnostics.json": evaluation.diagnosis}
    names = ["predictions.jsonl", "metrics.json", *(name for name, findings in there.items() if findings is not None), "evaluation.html"]
    return [folder / name for name in names]


def report(evaluation: Evaluation, most_rows: int) -> str:
    """The HTML page, with up to `most_rows` rows, drawn evenly from each of `KINDS`.

    Raises:
        BadRow: an image that cannot be opened.
    """
    predictions, earlier = evaluation.predictions, evaluation.earlier
    scores = row_scores(predictions)
    before = [None] * len(scores) if earlier is None else row_scores(earlier)
    same = set(insensitive(evaluation.ablated, predictions))
    kinds = [_kind(*row) for row in zip(before, scores, (number in same for number in range(len(scores))), strict=True)]
    numbers = chosen(kinds, most_rows)
    answers: dict[int, list[Ablated]] = {number: [] for number in numbers}
    for ablated in evaluation.ablated:
        if ablated.number in answers:
            answers[ablated.number].append(ablated)
    uris: dict[str, int] = {}  # each picture once, however often it stands in the rows
    rows = []
    for number in numbers:
        row, old, new = predictions[number], before[number], scores[number]
        shown: dict[str, Any] = {
            "id": str(row["id"]),
            "dataset": dataset_of(row),
            "num_images": num_images_of(row),
            "score": new,
            "before": old,
            "kind": kinds[number],
        }
        shown |= {"is_right": None if new is None else new >= RIGHT, "insensitive": number in same}
        shown |= {"change": None if old is None or new is None else change(old, new)}
        shown |= {"reference": _cut(row["reference"]), "answer": _cut(row["prediction"])}
        shown |= {"earlier": None if earlier is None else _cut(earlier[number]["prediction"])}
        shown |= {"turns": [] if evaluation.outcomes is None else _turns(evaluation.outcomes[number], uris)}
        shown |= {"ablated": [[found.ablation, found.image, _cut(found.prediction["prediction"]), found.score] for found in answers[number]]}
        rows.append(shown)
    names = {"model": evaluation.model, "data": evaluation.data, "earlier_model": evaluation.earlier_model}
    findings = {"metrics": evaluation.metrics, "comparison": _without_rows(evaluation.comparison), "diagnosis": _without_rows(evaluation.diagnosis)}
    return filled(PAGE, {**names, **findings, "kinds": Counter(kinds), "num_rows": len(predictions), "pictures": list(uris), "rows": rows})


def _kind(before: float | None, score: float | None, is_insensitive: bool) -> str:
    if before is not None and score is not None and change(before, score) in ("lost", "gained"):
        return change(before, score)
    if is_insensitive:
        return "insensitive"
    return "unscored" if score is None else "right" if score >= RIGHT else "wrong"


def chosen(kinds: Sequence[str], most: int) -> list[int]:
    """Numbers of up to `most` rows, rising: as many of each kind, what a kind lacks going to the others, and evenly spread over the rows of a kind."""
    members = {kind: [number for number, other in enumerate(kinds) if other == kind] for kind in KINDS}
    numbers: list[int] = []
    for place, group in enumerate(sorted(members.values(), key=len)):
        share = min(len(group), (most - len(numbers)) // (len(members) - place))
        numbers += [group[i * len(group) // share] for i in range(share)]
    return sorted(numbers)


def _turns(outcome: Outcome, uris: dict[str, int]) -> list[dict[str, Any]]:
    """The turns before the last answer: {role, parts}, a part being a text or {picture, number, name}, pictures where the data has them."""
    sample, row = outcome.sample, outcome.row
    assert isinstance(sample, Sample) and row is not None
    places = list(row.images)
    pictures: list[dict[str, Any]] = []
    side = min(_LARGEST_SIDE, max(_MOST_SIDES // max(len(places), 1), 64))
    for place, image in zip(places, open_images(places), strict=True):
        image.thumbnail((side, side))
        pictures.append(
            {"picture": uris.setdefault(data_uri(image), len(uris)), "number": len(pictures) + 1, "name": Path(place.path).name, "size": image.size}
        )
    turns, at, left = [], 0, len(media_of(sample.turns))
    for turn in sample.turns[:-1]:
        parts: list[Any] = []
        for part in turn.parts:
            if isinstance(part, Text):
                parts.append(_cut(part.text))
                continue
            left -= 1
            count = 1 if isinstance(part, Image) else _num_frames(places[at : len(places) - left])
            parts += pictures[at : at + count]
            at += count
        turns.append({"role": turn.role, "parts": parts})
    return turns


def _num_frames(places: Sequence[Place]) -> int:
    """How many of these are frames of the video that the first one is from: of the same file, or the same folder."""
    sources = [place.path if place.pts is not None else str(Path(place.path).parent) for place in places]
    return next((number for number, source in enumerate(sources) if source != sources[0]), len(sources))


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_LETTERS else f"{text[:_MOST_LETTERS]} ... ({len(text):,} letters)"


def _without_rows(findings: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Findings without the lists of rows, which may be long and are in the files beside the page."""
    if findings is None:
        return None
    same = findings.get("insensitive")
    kept = {name: value for name, value in findings.items() if name not in ("rows", "insensitive")}
    return kept if same is None else kept | {"rows": findings["rows"], "insensitive": {name: value for name, value in same.items() if name != "rows"}}
