"""Segment attention: a token attends to the earlier tokens of its own segment and to all tokens of its ancestors.

A layer with a sliding window leaves out what lies farther back along that path than its window. Of some models the tokens of an image attend to the later
ones of that image, too.

One function per backend; `interface` gives it the signature of transformers' attention functions, where the `Forest` arrives as the keyword `segments`.
`attention_kernels` holds those that need a GPU.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface

from interlace.data.batch import Segment


def ancestors(segments: Sequence[Segment], number: int) -> list[int]:
    """The segment numbers from the root down to `number`, itself included."""
    path = [number]
    while segments[path[0]].parent >= 0:
        path.insert(0, segments[path[0]].parent)
    return path


def depths(segments: Sequence[Segment]) -> list[int]:
    """How many tokens stand before each segment along its path."""
    found: list[int] = []
    for segment in segments:
        found.append(found[segment.parent] + segments[segment.parent].end - segments[segment.parent].start if segment.parent >= 0 else 0)
    return found


def window_of(attention: Any) -> int | None:
    """How many tokens a token attends to in a layer, itself included, by the attention module of the layer; None: all before it.

    It is what the module itself tells the attention function (`sliding_window`): some know it, some read it from a configuration that holds for all layers.
    """
    if attention.config.model_type in ("mistral", "phi3"):
        window: int | None = attention.config.sliding_window
        return window
    return getattr(attention, "sliding_window", None)


def runs_of(positions: torch.Tensor, length: int) -> torch.Tensor:
    """(length,) which run of neighbours among some ascending positions each place is in; -1 for none. Nothing is asked of a GPU."""
    is_first = torch.cat([positions.new_ones(1), (positions.diff() != 1).long()])
    return torch.full((length,), -1, device=positions.device).index_copy(0, positions, is_first.cumsum(0) - 1)


def dense_mask(segments: Sequence[Segment], length: int, window: int | None = None, image_of: torch.Tensor | None = None) -> torch.Tensor:
    """The rule as a (length, length) boolean mask, True = attend; for tests and for backends that want a mask. Arguments as of `Forest`."""
    mask = torch.zeros(length, length, dtype=torch.bool)
    for number, segment in enumerate(segments):
        path = [place for other in ancestors(segments, number) for place in range(segments[other].start, segments[other].end)]
        for place in range(segment.start, segment.end):
            own = path.index(place)
            mask[place, path[: own + 1] if window is None else path[max(0, own + 1 - window) : own + 1]] = True
            if image_of is not None and image_of[place] >= 0:
                mask[place, place:] |= image_of[place:].cpu() == image_of[place].cpu()
    return mask


@dataclass(frozen=True)
class Runs:
    """Which queries see which keys, as kernels for sequences of unequal length want it.

    queries, keys: positions in the batch, run after run; None for all of them in order. query_ends, key_ends: (runs + 1,) where each begins and the last one
    ends, int32. longest_query, longest_key: tokens. window: how many keys a query sees at most, up to the one it stands on; None: all.
    """

    queries: torch.Tensor | None
    keys: torch.Tensor | None
    query_ends: torch.Tensor
    key_ends: torch.Tensor
    longest_query: int
    longest_key: int
    window: int | None = None


class Forest:
    """The segments of one batch on a device, in the forms that backends want, each made once.

    Args:
        segments: cover the batch's T tokens without gaps.
        rows: the distinct positions that the last layer is asked for; None for all.
        window: how many tokens a token attends to at most, itself included, counted along its path; None for all.
        image_of: (T,) which image each token is a part of, -1 for none, where its tokens attend to each other in both directions; it lies in one segment.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        device: torch.device,
        rows: torch.Tensor | None = None,
        window: int | None = None,
        image_of: torch.Tensor | None = None,
    ):
        self.segments, self.device, self.rows, self.window, self.image_of = tuple(segments), device, rows, window, image_of
        self._windows: dict[int, Forest] = {}
        self._masks: dict[int, torch.Tensor] = {}

    def within(self, window: int | None) -> "Forest":
        """The same for a layer with a sliding window; itself where no path is longer than that, so that every backend does."""
        if window is None or window >= self.longest_path:
            return self
        if window not in self._windows:
            self._windows[window] = Forest(self.segments, self.device, self.rows, window, self.image_of)
        return self._windows[window]

    @cached_property
    def longest_path(self) -> int:
        """Tokens."""
        return max(depth + segment.end - segment.start for depth, segment in zip(depths(self.segments), self.segments, strict=True))

    @property
    def is_causal(self) -> bool:
        """Whether a token sees all tokens before it on its path, and no others."""
        return self.window is None and self.image_of is None

    def mask(self, number: int) -> torch.Tensor:
        """(tokens of a segment, tokens of its path): which of them attend to which."""
        if number not in self._masks:
            segment, path = self.segments[number], torch.arange(sum(end - start for start, end in self._path(number)), device=self.device)
            back = path[segment.start - segment.end :, None] - path
            seen = back >= 0
            if self.image_of is not None:
                own = self.image_of[segment.start : segment.end]
                seen[:, segment.start - segment.end :] |= (own[:, None] == own) & (own >= 0)
            self._masks[number] = seen if self.window is None else seen & (back < self.window)
        return self._masks[number]

    @cached_property
    def has_parents(self) -> bool:
        """Whether any segment sees more than itself."""
        return any(segment.parent >= 0 for segment in self.segments)

    @cached_property
    def own(self) -> Runs:
        """Every segment on itself, causal."""
        ranges = [(segment.start, segment.end) for segment in self.segments]
        return self._runs([[pair] for pair in ranges], [[pair] for pair in ranges], whole=True)

    @cached_property
    def above(self) -> Runs | None:
        """Children on all of their ancestors' tokens, not causal; neighbours with the same parent are one run, so that its keys are there once."""
        queries, keys = [], []
        for parent, run in groupby(self.segments, key=lambda segment: segment.parent):
            if parent >= 0:
                queries.append([(segment.start, segment.end) for segment in run])
                keys.append(self._path(parent))
        return self._runs(queries, keys) if queries else None

    @cached_property
    def paths(self) -> Runs:
        """Every segment on itself and its ancestors in one, causal with the last query on the last key."""
        queries = [[(segment.start, segment.end)] for segment in self.segments]
        return self._runs(queries, [self._path(number) for number in range(len(self.segments))])

    @cached_property
    def block_mask(self) -> BlockMask:
        """The rule as FlexAttention wants it."""
        of = torch.repeat_interleave(torch.tensor([segment.end - segment.start for segment in self.segments])).to(self.device)
        starts = torch.tensor([depth - segment.start for depth, segment in zip(depths(self.segments), self.segments, strict=True)], device=self.device)
        place, window, image_of = torch.arange(len(of), device=self.device) + starts[of], self.window, self.image_of
        sees = torch.zeros(len(self.segments), len(self.segments), dtype=torch.bool)
        for number in range(len(self.segments)):
            sees[number, ancestors(self.segments, number)] = True
        sees = sees.to(self.device)

        def rule(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            seen = (query >= key) & sees[of[query], of[key]]
            if image_of is not None:
                seen = seen | ((image_of[query] == image_of[key]) & (image_of[key] >= 0))
            return seen if window is None else seen & (place[query] - place[key] < window)

        return create_block_mask(rule, None, None, len(of), len(of), device=str(self.device), _compile=self.device.type == "cuda")

    def _path(self, number: int) -> list[tuple[int, int]]:
        return [(self.segments[n].start, self.segments[n].end) for n in ancestors(self.segments, number)]

    def _runs(self, queries: Sequence[Sequence[tuple[int, int]]], keys: Sequence[Sequence[tuple[int, int]]], whole: bool = False) -> Runs:
        sizes = [[sum(end - start for start, end in run) for run in runs] for runs in (queries, keys)]
        ends = [torch.tensor([0, *size], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(self.device, non_blocking=True) for size in sizes]
        places = [
            None if whole else torch.cat([torch.arange(*pair) for run in runs for pair in run]).to(self.device, non_blocking=True) for runs in (queries, keys)
        ]
        return Runs(places[0], places[1], ends[0], ends[1], max(sizes[0]), max(sizes[1]), self.window)


# query (1, heads, T, head size); key, value (1, key-value heads, T, head size), all of one type; the forest over the T tokens; the scale of the scores;
# the share of probabilities that is dropped -> (1, T, heads, head size)
Backend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Forest, float, float], torch.Tensor]


def sdpa_segments(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Forest, scale: float, dropout: float = 0.0) -> torch.Tensor:
    """Scaled dot product attention per segment; root segments of equal length go in one call where attention is causal. Runs on any device, needs no (T, T)
    mask. See `Backend`."""
    forest, grouped = segments.segments, query.shape[1] != key.shape[1]
    q, k, v = query[0], key[0], value[0]
    pieces: list[torch.Tensor | None] = [None] * len(forest)
    roots: dict[int, list[int]] = defaultdict(list)
    for number, segment in enumerate(forest):
        if segment.parent < 0 and segments.is_causal:
            roots[segment.end - segment.start].append(number)
    for length, numbers in roots.items():
        if len(numbers) == 1:
            chosen = [x[None, :, forest[numbers[0]].start : forest[numbers[0]].end] for x in (q, k, v)]
        else:
            index = torch.cat([torch.arange(forest[n].start, forest[n].end, device=q.device) for n in numbers])
            chosen = [x.index_select(1, index).unflatten(1, (len(numbers), length)).transpose(0, 1) for x in (q, k, v)]
        out = F.scaled_dot_product_attention(chosen[0], chosen[1], chosen[2], is_causal=True, dropout_p=dropout, scale=scale, enable_gqa=grouped)
        for number, piece in zip(numbers, out, strict=True):
            pieces[number] = piece
    for number, segment in enumerate(forest):
        if pieces[number] is None:
            path = [slice(forest[n].start, forest[n].end) for n in ancestors(forest, number)]
            keys, values = (torch.cat([x[:, place] for place in path], dim=1)[None] for x in (k, v))
            own, mask = q[None, :, segment.start : segment.end], segments.mask(number)
            pieces[number] = F.scaled_dot_product_attention(own, keys, values, mask, dropout, scale=scale, enable_gqa=grouped)[0]
    output = torch.cat([piece for piece in pieces if piece is not None], dim=1)
    return output.transpose(0, 1)[None].contiguous()


def interface(backend: Backend) -> Callable[..., tuple[torch.Tensor, None]]:
    """A backend with the signature of transformers' attention functions."""

    def attend(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        segments: Forest,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        assert attention_mask is None and query.shape[0] == 1  # the segments say it all
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        # autocast leaves rotated queries and keys in float32
        return backend(query.to(value.dtype), key.to(value.dtype), value, segments.within(sliding_window), scale, dropout), None

    return attend


def register(name: str, backend: Backend) -> str:
    """Makes a backend known to transformers; the name to give to `set_attn_implementation`."""
    AttentionInterface.register(f"interlace_{name}", interface(backend))
    return f"interlace_{name}"
