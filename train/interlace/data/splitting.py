"""A packed batch that is too large for the memory -> two, whose losses and gradients add up to its own."""

import dataclasses
from collections.abc import Sequence

import torch

from interlace.data.batch import PackedBatch, Segment


def split(batch: PackedBatch) -> tuple[PackedBatch, PackedBatch] | None:
    """Two batches with about half of the tokens each, between two rows; None for a single row. Rows that shared a trunk on both sides have it twice then."""
    apart = batch.sequences_per_row
    parents = {segment.parent for segment in batch.segments}
    leaves = [number for number in range(len(batch.segments)) if number not in parents]  # one for each sequence, in order
    if len(leaves) <= apart:
        return None
    ends = torch.tensor([batch.segments[leaf].end for leaf in leaves[apart - 1 : -1 : apart]])
    first = (int((ends - batch.num_tokens / 2).abs().argmin()) + 1) * apart
    return _select(batch, leaves, range(first)), _select(batch, leaves, range(first, len(leaves)))


def _select(batch: PackedBatch, leaves: Sequence[int], sequences: range) -> PackedBatch:
    """The batch of some neighbouring sequences alone."""
    wanted: set[int] = set()
    for sequence in sequences:
        number = leaves[sequence]
        while number >= 0:
            wanted.add(number)
            number = batch.segments[number].parent
    numbers = sorted(wanted)
    segments: list[Segment] = []
    for number in numbers:
        old, start = batch.segments[number], segments[-1].end if segments else 0
        segments.append(Segment(start, start + old.end - old.start, numbers.index(old.parent) if old.parent >= 0 else -1))
    tokens = torch.cat([torch.arange(batch.segments[number].start, batch.segments[number].end) for number in numbers])
    place = torch.full((batch.num_tokens,), -1)
    place[tokens] = torch.arange(len(tokens))
    chosen = (batch.sequence_index >= sequences.start) & (batch.sequence_index < sequences.stop)
    distinct, index = place[batch.rows[batch.row_index[chosen]]].unique(return_inverse=True)
    is_inside = place[batch.image_positions] >= 0
    selected = dataclasses.replace(
        batch,
        input_ids=batch.input_ids[:, tokens],
        position_ids=batch.position_ids[..., tokens],
        segments=tuple(segments),
        rows=distinct,
        row_index=index,
        targets=batch.targets[chosen],
        weights=batch.weights[chosen],
        sequence_index=batch.sequence_index[chosen] - sequences.start,
        row_numbers=batch.row_numbers[sequences.start : sequences.stop],
        image_index=batch.image_index[_places_inside(batch, is_inside)],
        image_positions=place[batch.image_positions[is_inside]],
    )
    return _without_unused_images(selected)


def _places_inside(batch: PackedBatch, is_inside: torch.Tensor) -> torch.Tensor:
    """(M,) which image places have their tokens inside; `is_inside` says it of each token."""
    lengths = torch.tensor(batch.image_tokens, dtype=torch.long)[batch.image_index]
    return is_inside[lengths.cumsum(0) - lengths] if len(lengths) else torch.zeros(0, dtype=torch.bool)


def _without_unused_images(batch: PackedBatch) -> PackedBatch:
    """Leaves out the images that no place shows any more; all stay where images are cut into tiles, unless none is shown."""
    used = batch.image_index.unique()
    count = len(batch.image_tokens)
    is_cached = torch.tensor(batch.is_cached or [False] * count, dtype=torch.bool)
    if not len(used):
        nothing: dict[str, tuple[()]] = dict.fromkeys(("image_sizes", "image_tokens", "image_grids", "is_cached", "feature_keys"), ())
        return dataclasses.replace(batch, pixel_values=None, cached_features=None, **nothing)  # type: ignore[arg-type]
    tiles = sum(len(tensor) for tensor in (batch.pixel_values, batch.cached_features) if tensor is not None)
    if len(used) == count or tiles != count:
        return batch
    keep = torch.zeros(count, dtype=torch.bool)
    keep[used] = True
    new, cached = keep[~is_cached], keep[is_cached]
    number = keep.long().cumsum(0) - 1
    kept = used.tolist()
    return dataclasses.replace(
        batch,
        image_index=number[batch.image_index],
        pixel_values=batch.pixel_values[new] if batch.pixel_values is not None and new.any() else None,
        cached_features=batch.cached_features[cached] if batch.cached_features is not None and cached.any() else None,
        image_sizes=tuple(batch.image_sizes[i] for i in kept),
        image_tokens=tuple(batch.image_tokens[i] for i in kept),
        image_grids=tuple(batch.image_grids[i] for i in kept) if batch.image_grids else (),
        is_cached=tuple(batch.is_cached[i] for i in kept) if batch.is_cached else (),
        feature_keys=tuple(batch.feature_keys[i] for i in kept) if batch.feature_keys else (),
    )
