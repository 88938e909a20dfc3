"""The rows the model will see: every record read, checked and accounted for before training."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from interlace.data.formats import FORMATS
from interlace.data.ledger import Entry, Ledger
from interlace.data.lengths import TooLong, expanded_length, fit
from interlace.data.media import check_image, locate
from interlace.data.sample import BadRow, Sample
from interlace.data.sources import Record, read_entries
from interlace.data.template import ChatTemplate, Encoded
from interlace.errors import InputError

ImageTokens = Callable[[int, int], int]
_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Row:
    """An admitted row. `image_paths` are absolute; `image_tokens` counts the tokens of each; `length` is in expanded tokens."""

    file: str
    index: int
    encoded: Encoded
    image_paths: tuple[str, ...]
    image_tokens: tuple[int, ...]
    length: int

    @property
    def supervised_tokens(self) -> int:
        """How many tokens the loss of this row counts (the first token of a row has no predecessor to predict it)."""
        return int((self.encoded.labels[1:] >= 0).sum())


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one record: its sample and row if it is admitted, and the ledger entry if it is not simply trained."""

    record: Record
    sample: Sample | None
    row: Row | None
    entry: Entry | None


@dataclass(frozen=True)
class RowReader:
    """Turns records into rows.

    Args:
        template: writes the prompt.
        image_tokens: (width, height) -> number of tokens of an image.
        max_length, too_long: the length policy, in expanded tokens.
        max_image_pixels: larger images are bad.
    """

    template: ChatTemplate
    image_tokens: ImageTokens
    max_length: int
    too_long: TooLong
    max_image_pixels: int

    def read(self, record: Record, checked: dict[Path, tuple[int, int] | BadRow]) -> Outcome:
        """The outcome of one record; `checked` remembers the images already opened."""
        try:
            if not isinstance(record.value, dict):
                raise BadRow("not_an_object", f"expected an object, got {type(record.value).__name__}")
            sample = FORMATS[record.format](record.value)
            located = {image: locate(image.path, record.roots) for image in sample.images}
            sizes = {path: self._size(path, checked) for path in located.values()}
            encoded, paths = self.template.encode(sample), [located[image] for image in sample.images]
            tokens = [self.image_tokens(*sizes[path]) for path in paths]
            kept, shortened = fit(encoded, tokens, self.template.image_token_id, self.max_length, self.too_long)
        except BadRow as error:
            return Outcome(record, None, None, Entry(record.file, record.index, "skipped", error.reason, error.detail))
        count = len(kept.images)
        tokens, names = tokens[:count], tuple(str(path) for path in paths[:count])
        row = Row(record.file, record.index, kept, names, tuple(tokens), expanded_length(kept, tokens))
        reason = "too_long" if shortened else "opening_assistant_turn" if sample.note else None
        detail = "; ".join(text for text in (sample.note, shortened) if text)
        return Outcome(record, sample, row, Entry(record.file, record.index, "shortened", reason, detail) if reason else None)

    def _size(self, path: Path, checked: dict[Path, tuple[int, int] | BadRow]) -> tuple[int, int]:
        if path not in checked:
            try:
                checked[path] = check_image(path, self.max_image_pixels)
            except BadRow as error:
                checked[path] = error
        size = checked[path]
        if isinstance(size, BadRow):
            raise size
        return size

    def read_all(self, records: Sequence[Record], show_progress: bool) -> Iterable[Outcome]:
        """The outcomes of all records, in order, with a progress bar."""
        checked: dict[Path, tuple[int, int] | BadRow] = {}
        for record in tqdm(records, desc="checking rows", unit="row", disable=not show_progress, leave=False):
            yield self.read(record, checked)


def admit(outcomes: Iterable[Outcome], too_long: TooLong, bad_rows: Literal["error", "skip"], max_bad_rows: int | None) -> tuple[list[Row], Ledger]:
    """The rows to train on and the ledger of all; over-long rows are no bad rows.

    Raises:
        InputError: bad rows (or over-long ones) that the policy does not allow, listed with file and index; or no row is left.
    """
    rows: list[Row] = []
    ledger, bad = Ledger(), []
    for outcome in outcomes:
        if outcome.row is not None:
            rows.append(outcome.row)
        ledger.count(outcome.entry)
        if outcome.entry is not None and outcome.entry.status == "skipped" and (outcome.entry.reason != "too_long" or too_long == "error"):
            bad.append(outcome.entry)
    allowed = 0 if bad_rows == "error" else max_bad_rows
    fatal = bad if allowed is not None and len(bad) > allowed else [entry for entry in bad if entry.reason == "too_long"]
    if fatal:
        lines = [f"{entry.file}: row {entry.index}: {entry.reason}: {entry.detail}" for entry in fatal[:_SHOWN]]
        more = f"\n  and {len(fatal) - _SHOWN} more" if len(fatal) > _SHOWN else ""
        remedy = "mend them, or set bad_rows: skip to leave them out and list them" if bad_rows == "error" else f"max_bad_rows is {max_bad_rows}"
        raise InputError(f"{len(fatal)} of {ledger.rows} rows cannot be used; {remedy}\n  " + "\n  ".join(lines) + more)
    if not rows:
        raise InputError(f"no row is left to use: {ledger.summary()}")
    return rows, ledger


def load_rows(entries: list[Mapping[str, Any]], reader: RowReader, data: Mapping[str, Any], seed: int, show_progress: bool) -> tuple[list[Row], Ledger]:
    """Reads, checks and admits the rows of dataset entries by the keys `bad_rows` and `max_bad_rows` of `data`."""
    outcomes = reader.read_all(read_entries(entries, seed), show_progress)
    return admit(outcomes, reader.too_long, data["bad_rows"], data["max_bad_rows"])


def distinct_images(rows: Iterable[Row]) -> list[str]:
    """Every image path of some rows once, in order of first use."""
    return list(dict.fromkeys(path for row in rows for path in row.image_paths))
