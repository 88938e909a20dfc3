"""`PackedBatch`: one row of real tokens, a forest of segments, and the collation of rows into it."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import PIL.Image
import torch

from interlace.data.lengths import expand
from interlace.data.media import open_images
from interlace.data.reading import Row
from interlace.data.sample import BadRow, Place
from interlace.errors import InputError

ProcessImages = Callable[[list[PIL.Image.Image]], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens `start` to `end` (exclusive), which also attend to all tokens of segment number `parent` and its ancestors (-1: none)."""

    start: int
    end: int
    parent: int = -1


@dataclass(frozen=True)
class PackedBatch:
    """A micro-batch of T tokens without padding.

    input_ids, position_ids: (1, T); positions count along the path from the root segment.
    segments: the forest; tokens attend within their segment and to its ancestors only.
    rows: (N,) positions whose next token is supervised; targets: (N,) that token; weights: (N,) its weight in the loss.
    sequence_index: (N,) which sequence of the batch each of them belongs to; row_numbers: data set row of each sequence.
    pixel_values: (K, channels, height, width), each distinct image once, or None; image_index: (M,) which of the K stands at each image place,
    in order of the places; image_positions: (total image tokens,) positions in `input_ids` that image features fill.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    segments: tuple[Segment, ...]
    rows: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    sequence_index: torch.Tensor
    row_numbers: tuple[int, ...]
    pixel_values: torch.Tensor | None
    image_index: torch.Tensor
    image_positions: torch.Tensor

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[1]

    @property
    def num_images(self) -> int:
        return len(self.image_index)

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "PackedBatch":
        tensors = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return dataclasses.replace(self, **{name: change(value) for name, value in tensors.items() if isinstance(value, torch.Tensor)})  # type: ignore[arg-type]

    def to(self, device: torch.device) -> "PackedBatch":
        """The same batch on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "PackedBatch":
        """The same batch in page-locked memory; called by `DataLoader`."""
        return self._map(torch.Tensor.pin_memory)


@dataclass(frozen=True)
class Collator:
    """Rows -> `PackedBatch`, each row one segment. Opens and processes each distinct image once.

    Args:
        process_images: RGB images -> (K, channels, height, width).
        image_token_id: the id that image features replace.
    """

    process_images: ProcessImages
    image_token_id: int

    def __call__(self, numbered: Sequence[tuple[int, Row]]) -> PackedBatch | InputError:
        """The batch, or what is wrong with an image: an error raised in a worker process would reach the user with two tracebacks."""
        try:
            return self.pack(numbered)
        except InputError as error:
            return error

    def pack(self, numbered: Sequence[tuple[int, Row]]) -> PackedBatch:
        """The rows as one batch.

        Raises:
            InputError: an image that was whole by its header cannot be decoded.
        """
        rows = [row for _, row in numbered]
        pieces = [expand(row.encoded, row.image_tokens, self.image_token_id) for row in rows]
        segments, start = [], 0
        for ids, _, _ in pieces:
            segments.append(Segment(start, start + len(ids)))
            start += len(ids)
        input_ids, labels, weights = (torch.cat([torch.from_numpy(piece[i]) for piece in pieces]) for i in range(3))
        supervised = labels >= 0
        supervised[[segment.start for segment in segments]] = False  # no predecessor in its segment
        targets = supervised.nonzero()[:, 0]
        sequence = torch.repeat_interleave(torch.tensor([segment.end - segment.start for segment in segments]))
        places = distinct_images(rows)
        number = {place: i for i, place in enumerate(places)}
        return PackedBatch(
            input_ids=input_ids.long()[None],
            position_ids=torch.cat([torch.arange(segment.end - segment.start) for segment in segments])[None],
            segments=tuple(segments),
            rows=targets - 1,
            targets=labels[targets].long(),
            weights=weights[targets],
            sequence_index=sequence[targets],
            row_numbers=tuple(index for index, _ in numbered),
            pixel_values=self._pixels(places, rows) if places else None,
            image_index=torch.tensor([number[place] for row in rows for place in row.images], dtype=torch.long),
            image_positions=(input_ids == self.image_token_id).nonzero()[:, 0],
        )

    def _pixels(self, places: list[Place], rows: Sequence[Row]) -> torch.Tensor:
        try:
            return self.process_images(open_images(places))
        except BadRow as error:
            users = ", ".join(f"{row.file}: row {row.index}" for row in rows if any(place.path in error.detail for place in row.images))
            raise InputError(f"{users}: {error.detail}; its header was whole when the run began. Mend the file, or start again with bad_rows: skip") from None


def distinct_images(rows: Sequence[Row]) -> list[Place]:
    """Every image place of some rows once, in order of first use."""
    return list(dict.fromkeys(place for row in rows for place in row.images))


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
