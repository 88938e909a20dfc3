"""Predictions of any origin with the references of a data set."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interlace.data.ledger import Entry, Ledger, check_ledger
from interlace.data.reading import Record, parse, records_of
from interlace.data.sample import BadRow, Sample, Video, media_of
from interlace.data.sources import read_entries
from interlace.errors import InputError
from interlace.inference.metrics import check_rows
from interlace.inference.predictions import few, told_apart


@dataclass(frozen=True)
class Expected:
    """What a data set says of a row: where it stands, its reference, its metadata."""

    where: str
    reference: str
    metadata: Mapping[str, Any]


def name_of(record: Record, sample: Sample) -> str:
    """A row's own id, or its file's name and its place there."""
    return sample.identifier or f"{Path(record.file).name}:{record.index}"


def read_expected(entry: Mapping[str, Any]) -> dict[str, Expected]:
    """The rows of a dataset entry by their ids, which are told apart; opens no image and needs no tokenizer.

    Raises:
        InputError: bad rows, listed with file and index.
    """
    entries: list[Entry | None] = []
    names: list[str] = []
    rows: list[Expected] = []
    for record in records_of(read_entries([entry], 0)):
        try:
            sample = parse(record)[1]
        except BadRow as error:
            entries.append(Entry(record.file, record.index, "skipped", error.reason, error.detail))
            continue
        assert isinstance(sample, Sample)
        media = media_of(sample.turns)
        count = {} if any(isinstance(item, Video) for item in media) else {"num_images": len(media)}  # how many frames a video gives is not known here
        metadata = {"dataset": record.source.name, **sample.metadata, **count}
        entries.append(None)
        names.append(name_of(record, sample))
        rows.append(Expected(f"{record.file}: row {record.index}", sample.turns[-1].text, metadata))
    check_ledger(Ledger.of(entries), "error", "error", None)
    return dict(zip(told_apart(names), rows, strict=True))


def with_references(predictions: Sequence[Mapping[str, Any]], expected: Mapping[str, Expected]) -> tuple[list[dict[str, Any]], int]:
    """The predictions with reference and metadata of the data, and how many had another reference before.

    Raises:
        InputError: ids that do not match, predictions that had other references throughout, or rows that cannot be scored.
    """
    check_rows((row.where, row.metadata) for row in expected.values())
    given = {str(row["id"]): row for row in predictions}
    missing = [name for name in expected if name not in given]
    unknown = [name for name in given if name not in expected]
    if missing or unknown:
        found = [f"no prediction for {few(missing, 'row')}"] * bool(missing) + [f"the data have no row for {few(unknown, 'prediction')}"] * bool(unknown)
        raise InputError(f"the predictions are not those of these data: {'; '.join(found)}")
    others = [name for name, row in given.items() if row.get("reference") not in (None, "", expected[name].reference)]
    if len(others) == len(given) > 1:
        raise InputError(
            "the predictions are not those of these data: the ids match, but every prediction names another reference than its row; "
            "if the data's are right, leave `reference` out of the predictions"
        )
    rows = []
    for name, row in given.items():
        kept = {key: row["metadata"][key] for key in ("num_images", "default_metric") if key in row["metadata"]}
        rows.append({**row, "reference": expected[name].reference, "metadata": {**row["metadata"], **expected[name].metadata, **kept}})
    return rows, len(others)
