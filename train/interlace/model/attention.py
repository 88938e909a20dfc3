"""Segment attention: a token attends to the earlier tokens of its own segment and to all tokens of its ancestors.

One function per backend, all of the signature of transformers' attention interface; `segments` arrives as a keyword of the model's forward.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface

from interlace.data.batch import Segment

NAME = "interlace_segments"


def ancestors(segments: Sequence[Segment], number: int) -> list[int]:
    """The segment numbers from the root down to `number`, itself included."""
    path = [number]
    while segments[path[0]].parent >= 0:
        path.insert(0, segments[path[0]].parent)
    return path


def dense_mask(segments: Sequence[Segment], length: int) -> torch.Tensor:
    """The rule as a (length, length) boolean mask, True = attend; for tests and for backends that want a mask."""
    mask = torch.zeros(length, length, dtype=torch.bool)
    for number, segment in enumerate(segments):
        own = slice(segment.start, segment.end)
        mask[own, own] = torch.ones(segment.end - segment.start, segment.end - segment.start, dtype=torch.bool).tril()
        for other in ancestors(segments, number)[:-1]:
            mask[own, segments[other].start : segments[other].end] = True
    return mask


def sdpa_segments(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: Sequence[Segment] = (),
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Scaled dot product attention per segment; root segments of equal length go in one call. Runs on any device, needs no (T, T) mask.

    Args:
        query: (1, heads, T, head size); key, value: (1, key-value heads, T, head size).
        attention_mask: must be None; the segments say it all.
        segments: the forest over the T tokens, which it covers without gaps.

    Returns:
        (1, T, heads, head size), and None for the attention weights.
    """
    assert attention_mask is None and query.shape[0] == 1
    grouped = query.shape[1] != key.shape[1]
    q, k, v = query[0], key[0], value[0]  # (heads, T, head size)
    pieces: list[torch.Tensor | None] = [None] * len(segments)
    roots: dict[int, list[int]] = defaultdict(list)
    for number, segment in enumerate(segments):
        if segment.parent < 0:
            roots[segment.end - segment.start].append(number)
    for length, numbers in roots.items():
        if len(numbers) == 1:
            chosen = [x[None, :, segments[numbers[0]].start : segments[numbers[0]].end] for x in (q, k, v)]
        else:
            index = torch.cat([torch.arange(segments[n].start, segments[n].end, device=q.device) for n in numbers])
            chosen = [x.index_select(1, index).unflatten(1, (len(numbers), length)).transpose(0, 1) for x in (q, k, v)]
        out = F.scaled_dot_product_attention(chosen[0], chosen[1], chosen[2], is_causal=True, dropout_p=dropout, scale=scaling, enable_gqa=grouped)
        for number, piece in zip(numbers, out, strict=True):
            pieces[number] = piece
    for number, segment in enumerate(segments):
        if segment.parent >= 0:
            path = [slice(segments[n].start, segments[n].end) for n in ancestors(segments, number)]
            keys, values = (torch.cat([x[:, place] for place in path], dim=1)[None] for x in (k, v))
            own = segment.end - segment.start
            mask = torch.ones(own, keys.shape[2], dtype=torch.bool, device=q.device).tril(keys.shape[2] - own)
            leaf = F.scaled_dot_product_attention(q[None, :, segment.start : segment.end], keys, values, mask, dropout, scale=scaling, enable_gqa=grouped)
            pieces[number] = leaf[0]
    output = torch.cat([piece for piece in pieces if piece is not None], dim=1)
    return output.transpose(0, 1)[None].contiguous(), None


AttentionInterface.register(NAME, sdpa_segments)
