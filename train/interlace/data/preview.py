"""What the model will see of each row: as data, one line per row, and as one HTML page that needs nothing but itself."""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, count, groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from interlace.data.batch import ProcessImages
from interlace.data.ledger import Entry, Ledger, Status
from interlace.data.lengths import ImageIds, expand
from interlace.data.media import open_images
from interlace.data.page import data_uri, filled
from interlace.data.reading import Headers, Outcome, Record, Row
from interlace.data.sample import BadRow, Place
from interlace.data.shards import ArchiveRow
from interlace.data.styles import known_id
from interlace.data.template import IGNORE_INDEX, Encoded
from interlace.data.video import check_video
from interlace.errors import InputError

PAGE = Path(__file__).with_name("preview.html")
_MOST_LETTERS = 4_000  # of a skipped record


@dataclass(frozen=True, slots=True)
class Tokens:
    """A run of text tokens: `ids`, `labels` (-100, or the id itself) and `weights`, one each; `dropped` if the length policy left them out."""

    ids: Sequence[int]
    labels: Sequence[int]
    weights: Sequence[float]
    dropped: bool = False


@dataclass(frozen=True, slots=True)
class Picture:
    """An image at its place, `tokens` times `token_id`.

    `uri` embeds it after processing, `size` (width, height) is its size then, `original` that in its file; `seconds` is the time of a video's frame.
    """

    token_id: int
    tokens: int
    uri: str
    size: tuple[int, int]
    original: tuple[int, int]
    name: str
    seconds: float | None = None


Piece = Tokens | Picture


@dataclass(frozen=True, slots=True)
class Shown:
    """A row on the page: `pieces` in order; a preference pair has its prompt in `pieces` and ("chosen", pieces), ("rejected", pieces) in `answers`.

    A skipped row has no pieces, but the `record` as it stands in the file. `length` is in expanded tokens.
    """

    file: str
    index: int
    status: Status
    reason: str | None = None
    length: int | None = None
    pieces: tuple[Piece, ...] = ()
    answers: tuple[tuple[str, tuple[Piece, ...]], ...] = ()
    record: str | None = None


@dataclass(frozen=True)
class Summary:
    """What the page says of all rows, shown or not: `lengths`, `num_images` and `num_supervised` tokens of each admitted row, (N,) each."""

    config: str
    model: str
    max_length: int
    ledger: Ledger
    lengths: np.ndarray
    num_images: np.ndarray
    num_supervised: np.ndarray


def page(shown: Sequence[Shown], summary: Summary, tokenizer: PreTrainedTokenizerBase) -> str:
    """The HTML page with all that it needs inside. What comes from the data is ASCII in one JSON block, whatever it is."""
    pieces = [piece for row in shown for part in (row.pieces, *dict(row.answers).values()) for piece in part]
    spelled = token_bytes(tokenizer, {token for piece in pieces if isinstance(piece, Tokens) for token in piece.ids})
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special and token in spelled}
    uris: dict[str, int] = {}  # each image once, however often it stands in the rows
    samples = []
    for row in shown:
        sample = {name: getattr(row, name) for name in ("file", "index", "status", "reason", "length", "record")}
        shared = sum(isinstance(piece, Picture) for piece in row.pieces)
        sample["pieces"] = _runs(row.pieces, 1, spelled, special, uris)
        sample["answers"] = [{"name": name, "pieces": _runs(part, 1 + shared, spelled, special, uris)} for name, part in row.answers]
        samples.append(sample)
    texts = {token: text.decode(errors="surrogateescape") for token, text in spelled.items()}
    data = {**_figures(summary), "texts": texts, "special": sorted(special), "pictures": list(uris), "samples": samples}
    return filled(PAGE, data)


def _runs(pieces: Iterable[Piece], number: int, spelled: Mapping[int, bytes], special: set[int], uris: dict[str, int]) -> list[dict[str, Any]]:
    """Pieces as the page's script reads them: tokens in runs that are marked alike, images counted from `number`."""
    runs: list[dict[str, Any]] = []
    for piece in pieces:
        if isinstance(piece, Picture):
            run = {"picture": uris.setdefault(piece.uri, len(uris)), "number": number, "id": piece.token_id, "tokens": piece.tokens}
            runs.append(run | {name: getattr(piece, name) for name in ("name", "size", "original", "seconds")})
            number += 1
            continue
        rows = list(zip(piece.ids, piece.labels, piece.weights, strict=True))
        assert all(label in (IGNORE_INDEX, token) for token, label, _ in rows)
        for (supervised, weight, _), group in groupby(rows, lambda row: (row[1] != IGNORE_INDEX, row[2], row[0] in special)):
            ids = characters([token for token, _, _ in group], spelled)
            runs.append({"ids": ids, "supervised": supervised, "weight": weight, "dropped": piece.dropped})
    return runs


def token_bytes(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> dict[int, bytes]:
    """The UTF-8 bytes that each id stands for, which may be part of a character; of byte-level and SentencePiece vocabularies alike."""
    sentence_piece = known_id(tokenizer, "<0x00>") is not None
    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    added = tokenizer.added_tokens_decoder
    spelled = {}
    for token in sorted(ids):
        text = str(tokenizer.convert_ids_to_tokens(token))
        if token in added:
            spelled[token] = added[token].content.encode()
        elif sentence_piece:
            spelled[token] = bytes([int(text[3:5], 16)]) if text.startswith("<0x") else text.replace("\u2581", " ").encode()
        else:
            spelled[token] = bytes(byte_of[letter] for letter in text)
    return spelled


def characters(ids: Sequence[int], spelled: Mapping[int, bytes]) -> list[int | list[Any]]:
    """Tokens in the smallest groups that are whole characters: the id where a group is one token, else [text, id, id, ..].

    A byte that belongs to no character counts as one, written as Python's `surrogateescape` does.
    """
    text = b"".join(spelled[token] for token in ids).decode(errors="surrogateescape")
    ends = set(accumulate(len(character.encode(errors="surrogateescape")) for character in text))
    groups: list[int | list[Any]] = []
    group: list[int] = []
    end = 0
    for token in ids:
        group.append(token)
        end += len(spelled[token])
        if end in ends:
            groups.append(token if len(group) == 1 else [b"".join(spelled[number] for number in group).decode(errors="surrogateescape"), *group])
            group = []
    assert not group
    return groups


def _figures(summary: Summary) -> dict[str, Any]:
    """The numbers above the rows; lengths in about 20 steps of a round width, images by their count."""
    lengths, num_images, ledger = summary.lengths, summary.num_images, summary.ledger
    data: dict[str, Any] = {"config": summary.config, "model": summary.model, "max_length": summary.max_length}
    data |= {"counts": {name: getattr(ledger, name) for name in ("rows", "trained", "shortened", "skipped")}, "lengths": {"step": 1, "bars": []}, "images": []}
    data["reasons"] = [[*why, rows] for why, rows in Counter((entry.status, entry.reason) for entry in ledger.entries).most_common()]
    data |= {"num_images": int(num_images.sum()), "num_tokens": int(lengths.sum()), "num_supervised": int(summary.num_supervised.sum())}
    if len(lengths):
        shortest, longest = int(lengths.min()), int(lengths.max())
        step = next(digit * 10**power for power in count() for digit in (1, 2, 5) if longest - shortest <= 20 * digit * 10**power)
        bars = enumerate(np.bincount(lengths // step - shortest // step).tolist(), shortest // step)
        data |= {"shortest": shortest, "longest": longest, "lengths": {"step": step, "bars": [[number * step, rows] for number, rows in bars]}}
        data["images"] = list(enumerate(np.bincount(num_images).tolist()))
    return data


def choose(traits: Sequence[np.ndarray], most: int) -> list[int]:
    """Numbers of up to `most` rows, rising, the same every time: one row for every value of every trait, the first trait first, then evenly from the rest.

    `traits` are (rows,) arrays.
    """
    chosen: list[int] = []
    for trait in traits:
        _, first_rows = np.unique(trait, return_index=True)
        covered = set(trait[chosen].tolist())
        chosen += [number for number in sorted(first_rows.tolist()) if trait[number] not in covered][: most - len(chosen)]
    rest = np.setdiff1d(np.arange(len(traits[0])), chosen)
    more = min(most - len(chosen), len(rest))
    return sorted([*chosen, *(int(rest[i * len(rest) // more]) for i in range(more))])


@dataclass(frozen=True)
class Viewer:
    """Turns what became of a record into what the page shows.

    Args:
        process_images: RGB images -> pixel values, as they enter the model.
        picture: pixel values of one image of this (width, height) -> (3, height, width), all of it as far as the model sees it.
        mean, std: what these were normalised with, per channel.
        image_token_id: the id that stands for an image.
        image_ids: the ids of an image; None for a run of `image_token_id`.
    """

    process_images: ProcessImages
    picture: Callable[[torch.Tensor, tuple[int, int]], torch.Tensor]
    mean: Sequence[float]
    std: Sequence[float]
    image_token_id: int
    image_ids: ImageIds | None = None

    def shown(self, outcome: Outcome, headers: Headers) -> Shown:
        """A row as the page shows it; `headers` are those it was read with, and know the times of video frames.

        Raises:
            InputError: an image that passed all checks cannot be decoded.
        """
        record, entry, row = outcome.record, outcome.entry, outcome.row
        reason = None if entry is None else f"{entry.reason}: {entry.detail}"
        shown = Shown(record.file, record.index, "trained" if entry is None else entry.status, reason)
        if row is None:
            return replace(shown, record=_excerpt(record.value))
        pictures = iter(self._pictures(row, record, headers))
        bounds = pairwise([0, *row.encoded.leaf_starts, len(row.encoded.input_ids)])
        prompt, *answers = (tuple(self._pieces(row.encoded, start, end, pictures)) for start, end in bounds)
        if outcome.dropped is not None:
            prompt = (*prompt, _tokens(outcome.dropped, slice(None), dropped=True))
        return replace(shown, length=row.length, pieces=prompt, answers=tuple(zip(("chosen", "rejected"), answers, strict=False)))

    def _pieces(self, encoded: Encoded, start: int, end: int, pictures: Iterator[Picture]) -> Iterator[Piece]:
        for at in [*(start + np.flatnonzero(encoded.input_ids[start:end] == self.image_token_id)).tolist(), end]:
            if at > start:
                yield _tokens(encoded, slice(start, at))
            if at < end:
                yield next(pictures)
            start = at + 1

    def _pictures(self, row: Row, record: Record, headers: Headers) -> Iterator[Picture]:
        if not row.images:
            return
        try:
            images = open_images(row.images)
        except BadRow as error:
            raise InputError(f"{row.file}: row {row.index}: {error.reason}: {error.detail}") from None
        for place, tokens, image in zip(row.images, row.image_tokens, images, strict=True):
            picture = self.picture(self.process_images([image], [tokens]), image.size)
            after = restored(picture.numpy(), self.mean, self.std)
            name = _short_name(place, (*record.source.image_roots, *record.source.video_roots))
            seconds = None
            if place.pts is not None:
                video = headers.of(replace(place, pts=None), check_video, sys.maxsize)
                seconds = float((place.pts - int(video.pts[0])) * video.time_base)
            ids = (self.image_token_id,) if self.image_ids is None else self.image_ids(tokens)
            token_id = self.image_token_id if self.image_token_id in ids else ids[0]  # of a frame, where a video has an id of its own
            yield Picture(token_id, tokens, data_uri(after), after.size, image.size, name, seconds)


def _tokens(encoded: Encoded, part: slice, dropped: bool = False) -> Tokens:
    return Tokens(encoded.input_ids[part].tolist(), encoded.labels[part].tolist(), encoded.weights[part].tolist(), dropped)


def _short_name(place: Place, roots: Iterable[Path]) -> str:
    """A medium's path within its folder; an archive's member by where it begins."""
    path = Path(place.path)
    root = next((root.resolve() for root in roots if path.is_relative_to(root.resolve())), path.parent)
    return f"{path.relative_to(root)}" + (f", from byte {place.offset:,}" if place.size >= 0 else "")


def _excerpt(value: Any) -> str:
    """A record for reading: indented, without what is not text, cut where it grows long."""
    value = value.value if isinstance(value, ArchiveRow) else value
    text = str(value) if isinstance(value, BadRow) else json.dumps(value, ensure_ascii=False, indent=1, default=_described)
    return text if len(text) <= _MOST_LETTERS else f"{text[:_MOST_LETTERS]} ... ({len(text):,} letters)"


def _described(value: Any) -> str:
    return f"{len(value):,} bytes" if isinstance(value, bytes) else str(value)


def restored(pixel_values: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> PIL.Image.Image:
    """The picture in normalised (3, height, width) pixel values: what is left of an image after resizing and padding."""
    pixels = pixel_values.transpose(1, 2, 0) * np.asarray(std) + np.asarray(mean)
    return PIL.Image.fromarray(np.rint(pixels * 255).clip(0, 255).astype(np.uint8))


def preview_line(file: str, row: Row | None, entry: Entry | None, image_token_id: int, image_ids: ImageIds | None = None) -> dict[str, Any]:
    """One row of `preview_data.py --json`, its ids expanded, as they are trained; one of `row` and `entry` may be None.

    `input_ids` and `labels`; for a preference pair `prompt_ids`, `chosen_ids` and `rejected_ids`; none for a skipped row.
    """
    known = row or entry
    assert known is not None
    line: dict[str, Any] = {"file": file, "index": known.index, "status": "trained" if entry is None else entry.status}
    line |= {"reason": None if entry is None else f"{entry.reason}: {entry.detail}", "length": None, "num_images": None}
    if row is None:
        return line
    line |= {"length": row.length, "num_images": len(row.images)}
    ids, labels, _ = expand(row.encoded, row.image_tokens, image_token_id, image_ids)
    if not row.encoded.leaf_starts:
        return line | {"input_ids": ids.tolist(), "labels": labels.tolist()}
    widths = np.ones(len(row.encoded.input_ids), np.int64)
    widths[row.encoded.input_ids == image_token_id] = row.image_tokens
    chosen, rejected = (int(widths[:start].sum()) for start in row.encoded.leaf_starts)
    return line | {"prompt_ids": ids[:chosen].tolist(), "chosen_ids": ids[chosen:rejected].tolist(), "rejected_ids": ids[rejected:].tolist()}
