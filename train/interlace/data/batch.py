"""`PackedBatch`: one row of real tokens, a forest of segments, and the collation of rows into it."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import PIL.Image
import torch

from interlace.data.lengths import ImageIds, expand
from interlace.data.media import open_images
from interlace.data.positions import grid_positions
from interlace.data.reading import Row
from interlace.data.sample import BadRow, Place
from interlace.errors import InputError

Expanded = tuple[np.ndarray, np.ndarray, np.ndarray]  # ids, labels, weights of a row, each image as all of its tokens
Image = tuple[Place, int]  # with its number of tokens, since that decides how it is processed
Grid = Callable[[tuple[int, int]], tuple[int, int]]  # an image's (height, width) -> rows and columns of its tokens


class FindFeatures(Protocol):
    """Features that a frozen vision tower made of an image earlier."""

    def key(self, place: Place, image_tokens: int) -> str:
        """Names the features of an image."""

    def find(self, key: str) -> tuple[torch.Tensor, tuple[int, int]] | None:
        """(tiles, tokens, vision width) and (height, width) of the image, or None."""


class ProcessImages(Protocol):
    """RGB images and the number of tokens of each -> pixel values of all tiles, (tiles, ..), the tiles of each image one behind the other."""

    def __call__(self, images: Sequence[PIL.Image.Image], image_tokens: Sequence[int] | None = None) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens `start` to `end` (exclusive), which also attend to all tokens of segment number `parent` and its ancestors (-1: none)."""

    start: int
    end: int
    parent: int = -1


@dataclass(frozen=True)
class PackedBatch:
    """A micro-batch of T tokens without padding.

    input_ids: (1, T). position_ids: (1, T), or (3, 1, T) in time, rows and columns; they count along the path from the root segment.
    segments: the forest; tokens attend within their segment and to its ancestors only.
    rows: (P,) distinct positions before a supervised token. targets: (N,) these tokens; row_index: (N,) which of the positions each stands behind: the first
    tokens of several leaves stand behind the end of their trunk. weights: (N,) in the loss.
    sequence_index: (N,) which sequence of the batch each target belongs to; row_numbers: data set row of each sequence. sequences_per_row: 2 for preference
    pairs, whose chosen and rejected answers are neighbouring sequences; else 1.
    image_index: (M,) which of the K distinct images stands at each image place, in order of the places; image_positions: (total image tokens,)
    positions in `input_ids` that image features fill.
    pixel_values: (tiles, ..), the tiles of each of the K images one behind the other, or None. A tile is what the model's vision tower takes: a picture of
    its size (channels, height, width), which an image may be cut into, or the patches of one token.
    cached_features: (tiles, tokens, vision width) of the images that `is_cached` names, whose pixels are left out then; feature_keys: of all K images.
    image_sizes: (height, width) of each of the K images before processing; image_tokens: number of tokens of each that features fill. A model that cuts
    images puts their tiles together by both; where there are none, every tile is an image. image_grids: rows and columns of the tokens of each, for a model
    that sees them.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    segments: tuple[Segment, ...]
    rows: torch.Tensor
    row_index: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    sequence_index: torch.Tensor
    row_numbers: tuple[int, ...]
    pixel_values: torch.Tensor | None
    image_index: torch.Tensor
    image_positions: torch.Tensor
    image_sizes: tuple[tuple[int, int], ...] = ()
    image_tokens: tuple[int, ...] = ()
    image_grids: tuple[tuple[int, int], ...] = ()
    cached_features: torch.Tensor | None = None
    is_cached: tuple[bool, ...] = ()
    feature_keys: tuple[str, ...] = ()
    sequences_per_row: int = 1

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[1]

    @property
    def num_images(self) -> int:
        return len(self.image_index)

    @property
    def new_grids(self) -> tuple[tuple[int, int], ...]:
        """`image_grids` of the images whose pixels are here."""
        return tuple(itertools.compress(self.image_grids, [not cached for cached in self.is_cached] or itertools.repeat(True)))

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "PackedBatch":
        tensors = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return dataclasses.replace(self, **{name: change(value) for name, value in tensors.items() if isinstance(value, torch.Tensor)})  # type: ignore[arg-type]

    def to(self, device: torch.device) -> "PackedBatch":
        """The same batch on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "PackedBatch":
        """The same batch in page-locked memory; called by `DataLoader`."""
        return self._map(torch.Tensor.pin_memory)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Tokens `start` to `end` of row number `row` (a position among those being packed), behind piece number `parent` (-1: none).

    `sequence` tells the answers of a row apart.
    """

    row: int
    start: int
    end: int
    parent: int = -1
    sequence: int = 0


@dataclass(frozen=True)
class Collator:
    """Rows -> `PackedBatch`. Opens and processes each distinct image once.

    Args:
        process_images: makes pixel values of images; see `ProcessImages`.
        image_token_id: the id that image features replace.
        share_prefix: rows that begin with the same images and text become one trunk with a leaf for each; else each row is one segment.
        features: where features may be found; images that have some are not opened.
        image_ids: the ids of an image; None for a run of `image_token_id`.
        grid: rows and columns of an image's tokens, for models whose positions tell them; None for others.
        video_token_id: another id that features replace: those of the frames of videos; None for models that see them as images.
    """

    process_images: ProcessImages
    image_token_id: int
    share_prefix: bool = False
    features: FindFeatures | None = None
    image_ids: ImageIds | None = None
    grid: Grid | None = None
    video_token_id: int | None = None

    def __call__(self, numbered: Sequence[tuple[int, Row]]) -> PackedBatch | InputError:
        """The batch, or what is wrong with an image: an error raised in a worker process would reach the user with two tracebacks."""
        try:
            return self.pack(numbered)
        except InputError as error:
            return error

    def pack(self, numbered: Sequence[tuple[int, Row]]) -> PackedBatch:
        """The rows as one batch; those that share a prefix stand together.

        Raises:
            InputError: an image that was whole by its header cannot be decoded.
        """
        rows = [row for _, row in numbered]
        expanded = [expand(row.encoded, row.image_tokens, self.image_token_id, self.image_ids) for row in rows]
        pieces = self._pieces(rows, expanded)
        ends = np.cumsum([piece.end - piece.start for piece in pieces]).tolist()
        segments = tuple(Segment(end - (piece.end - piece.start), end, piece.parent) for piece, end in zip(pieces, ends, strict=True))
        input_ids = np.concatenate([expanded[piece.row][0][piece.start : piece.end] for piece in pieces])
        places, targets, weights, sequence = self._supervised(pieces, segments, expanded)
        distinct, index = places.unique(return_inverse=True)
        images = distinct_images(rows)
        number = {image: i for i, image in enumerate(images)}
        keys, found = self._found(images)
        missing = [image for image, known in zip(images, found, strict=True) if known is None]
        pixel_values, missing_sizes = self._pixels(missing, rows) if missing else (None, ())
        new_sizes = iter(missing_sizes)
        sizes = tuple(next(new_sizes) if known is None else known[1] for known in found)
        grids = () if self.grid is None else tuple(map(self.grid, sizes))
        shown = [[number[image] for image in self._images_of(piece, rows, expanded)] for piece in pieces]
        cached = [known[0] for known in found if known is not None]
        is_parent = {piece.parent for piece in pieces}
        order = [piece.row for number, piece in enumerate(pieces) if number not in is_parent]
        return PackedBatch(
            input_ids=torch.from_numpy(input_ids).long()[None],
            position_ids=self._positions(pieces, expanded, [[grids[i] for i in images] for images in shown] if grids else None),
            segments=segments,
            rows=distinct,
            row_index=index,
            targets=targets,
            weights=weights,
            sequence_index=sequence,
            row_numbers=tuple(numbered[row][0] for row in order),
            pixel_values=pixel_values,
            image_index=torch.tensor([i for images in shown for i in images], dtype=torch.long),
            image_positions=torch.from_numpy(np.flatnonzero(self._is_filled(input_ids))),
            image_sizes=sizes,
            image_tokens=tuple(self._num_filled(tokens) for _, tokens in images),
            image_grids=grids,
            cached_features=torch.cat(cached) if cached else None,
            is_cached=tuple(known is not None for known in found),
            feature_keys=keys,
            sequences_per_row=2 if rows[0].encoded.leaf_starts else 1,
        )

    def _found(self, images: Sequence[Image]) -> tuple[tuple[str, ...], list[tuple[torch.Tensor, tuple[int, int]] | None]]:
        """The keys of all images, and what is known of each."""
        if self.features is None:
            return (), [None] * len(images)
        try:
            keys = tuple(self.features.key(*image) for image in images)
        except OSError:  # an image that has gone: opening it will tell
            return (), [None] * len(images)
        return keys, [self.features.find(key) for key in keys]

    def _pieces(self, rows: Sequence[Row], expanded: Sequence[Expanded]) -> list[_Piece]:
        """Each row as one piece, or a trunk and a leaf for each of the rows that share it, or for each answer of a pair."""
        groups: dict[object, list[int]] = {}
        for number, row in enumerate(rows):
            groups.setdefault(row.prefix if self.share_prefix and row.prefix_images else number, []).append(number)
        pieces: list[_Piece] = []
        for numbers in groups.values():
            if len(numbers) == 1:
                pieces += self._pieces_of(numbers[0], rows[numbers[0]], len(expanded[numbers[0]][0]), len(pieces))
                continue
            trunk, parent = _common(numbers, expanded), len(pieces)
            pieces.append(_Piece(numbers[0], 0, trunk))
            pieces += [_Piece(number, trunk, len(expanded[number][0]), parent) for number in numbers]
        return pieces

    def _pieces_of(self, number: int, row: Row, length: int, first: int) -> list[_Piece]:
        """One row that shares nothing, as pieces from number `first` on: one, or a pair's two answers behind their prompt, if they follow the same one."""
        if not row.encoded.leaf_starts:
            return [_Piece(number, 0, length)]
        chosen, rejected = (self._expanded_place(row, start) for start in row.encoded.leaf_starts)
        trunk = [_Piece(number, 0, chosen)] if chosen else []
        parent = first if chosen else -1
        return [*trunk, _Piece(number, chosen, rejected, parent), _Piece(number, rejected, length, parent, 1)]

    def _expanded_place(self, row: Row, place: int) -> int:
        """Where a place among the ids of a row is, once each image is as long as its tokens."""
        before = int(np.count_nonzero(row.encoded.input_ids[:place] == self.image_token_id))
        return place - before + sum(row.image_tokens[:before])

    def _positions(self, pieces: Sequence[_Piece], expanded: Sequence[Expanded], grids: Sequence[Sequence[tuple[int, int]]] | None) -> torch.Tensor:
        """`position_ids` of a batch; grids: of the images that stand in each piece, None in a batch without images or for a model that does not see them."""
        if self.grid is None:
            starts: list[int] = []
            for piece in pieces:
                starts.append(starts[piece.parent] + pieces[piece.parent].end - pieces[piece.parent].start if piece.parent >= 0 else 0)
            return torch.cat([torch.arange(piece.end - piece.start) + start for piece, start in zip(pieces, starts, strict=True)])[None]
        found: list[np.ndarray] = []
        ends: list[int] = []
        for i, piece in enumerate(pieces):
            is_filled = self._is_filled(expanded[piece.row][0][piece.start : piece.end])
            positions, end = grid_positions(is_filled, grids[i] if grids else (), ends[piece.parent] if piece.parent >= 0 else 0)
            found.append(positions)
            ends.append(end)
        return torch.from_numpy(np.concatenate(found, axis=1))[:, None]

    def _is_filled(self, ids: np.ndarray) -> np.ndarray:
        """Which of some expanded ids features fill."""
        is_image: np.ndarray = ids == self.image_token_id
        return is_image if self.video_token_id is None else is_image | (ids == self.video_token_id)

    def _num_filled(self, tokens: int) -> int:
        """How many of an image's tokens are filled by features."""
        if self.image_ids is None:
            return tokens
        ids = self.image_ids(tokens)
        return ids.count(self.image_token_id) + (0 if self.video_token_id is None else ids.count(self.video_token_id))

    def _supervised(
        self, pieces: Sequence[_Piece], segments: Sequence[Segment], expanded: Sequence[Expanded]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(N,) each: the position before every supervised token, the token, its weight, and which sequence it belongs to."""
        found: list[tuple[np.ndarray, ...]] = []
        sequences: dict[tuple[int, int], int] = {}
        for piece, segment in zip(pieces, segments, strict=True):
            _, labels, weights = (values[piece.start : piece.end] for values in expanded[piece.row])
            inside = np.flatnonzero(labels >= 0)
            if piece.parent < 0:
                inside = inside[inside > 0]  # the first token of a row has no predecessor
            before = segment.start + inside - 1
            before[inside == 0] = segments[piece.parent].end - 1
            if len(inside):
                number = sequences.setdefault((piece.row, piece.sequence), len(sequences))
                found.append((before, labels[inside], weights[inside], np.full(len(inside), number)))
        places, targets, weight, sequence = (torch.from_numpy(np.concatenate(values)) for values in zip(*found, strict=True))
        return places.long(), targets.long(), weight, sequence.long()

    def _images_of(self, piece: _Piece, rows: Sequence[Row], expanded: Sequence[Expanded]) -> Iterator[Image]:
        """The images of a row that stand in a piece of it: images are whole, so their tokens tell."""
        ends = np.cumsum([self._num_filled(tokens) for tokens in rows[piece.row].image_tokens])
        first, last = (np.count_nonzero(self._is_filled(expanded[piece.row][0][:place])) for place in (piece.start, piece.end))
        return itertools.islice(_images(rows[piece.row]), int(np.searchsorted(ends, first, "right")), int(np.searchsorted(ends, last, "right")))

    def _pixels(self, images: list[Image], rows: Sequence[Row]) -> tuple[torch.Tensor, tuple[tuple[int, int], ...]]:
        places = list(dict.fromkeys(place for place, _ in images))
        try:
            opened = dict(zip(places, open_images(places), strict=True))
            pixel_values = self.process_images([opened[place] for place, _ in images], [tokens for _, tokens in images])
        except BadRow as error:
            users = [row for row in rows if any(place.path in error.detail for place in row.images)] or [row for row in rows if row.images]
            names = ", ".join(f"{row.file}: row {row.index}" for row in users)
            raise InputError(f"{names}: {error.detail}; its header was whole when the run began. Mend the file, or start again with bad_rows: skip") from None
        return pixel_values, tuple((opened[place].height, opened[place].width) for place, _ in images)


def _common(numbers: Sequence[int], expanded: Sequence[Expanded]) -> int:
    """How many tokens these rows begin with alike: none of them supervised, and a token left for each row."""
    limits = [min(int(np.argmax(labels >= 0)), len(ids) - 1) for ids, labels, _ in (expanded[number] for number in numbers)]
    shortest = min(limits)
    first = expanded[numbers[0]][0][:shortest]
    different = [np.flatnonzero(expanded[number][0][:shortest] != first) for number in numbers[1:]]
    return min([shortest, *(int(places[0]) for places in different if len(places))])


def _images(row: Row) -> Iterator[Image]:
    return zip(row.images, row.image_tokens, strict=True)


def distinct_images(rows: Sequence[Row]) -> list[Image]:
    """Every image of some rows once, with its number of tokens, in order of first use; one that comes with another number is processed in another way."""
    return list(dict.fromkeys(image for row in rows for image in _images(row)))


class NumberedRows(torch.utils.data.Dataset[tuple[int, Row]]):
    """Rows with their number, for a `DataLoader` whose collator opens the images."""

    def __init__(self, rows: Sequence[Row]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[int, Row]:
        """Row `index`; for `~index` the same row at zero weight, a filler of the plan."""
        if index >= 0:
            return index, self.rows[index]
        row = self.rows[~index]
        return index, dataclasses.replace(row, encoded=dataclasses.replace(row.encoded, weights=row.encoded.weights * 0))
