"""Segment attention by kernels of a GPU, each held against the dense mask on the device itself before it is used."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.flex_attention import flex_attention

from interlace.data.batch import Segment
from interlace.errors import InputError
from interlace.model.attention import Backend, Forest, Runs, dense_mask, register, runs_of, sdpa_segments

# A trunk with two leaves and a grandchild among rows of their own; tokens enough for several blocks of any kernel
TRIAL = (Segment(0, 150), Segment(150, 400), Segment(400, 431, 1), Segment(431, 590, 1), Segment(590, 600, 3), Segment(600, 601), Segment(601, 777))
TRIAL_WINDOW = 70  # less than a row of it, more than a leaf
TRIAL_IMAGES = (range(7, 20), range(21, 130), range(160, 300), range(431, 440), range(650, 700))  # some longer than the window


class FlashKernel:
    """The flash attention that comes with torch, as `torch.nn.attention.varlen` calls it: over packed sequences of unequal length.

    q: (queries, heads, size); k, v: (keys, key-value heads, size).
    """

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, runs: Runs, is_causal: bool, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[Any, ...]]:
        """Output (queries, heads, size); log-sum-exp of the scores (heads, queries), float32; what `backward` wants besides."""
        ends = (runs.query_ends, runs.key_ends, runs.longest_query, runs.longest_key)
        causal, window = self._window(runs, is_causal)
        out, lse, state, *_ = torch.ops.aten._flash_attention_forward(q, k, v, *ends, 0.0, causal, False, scale=scale, **window)
        return out, lse, (state,)

    def _window(self, runs: Runs, is_causal: bool) -> tuple[bool, dict[str, int]]:
        """As `varlen_attn` does: a window says itself that it ends where the query stands."""
        return (is_causal, {}) if runs.window is None else (False, {"window_size_left": runs.window - 1, "window_size_right": 0})

    def backward(
        self,
        gradient: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        runs: Runs,
        is_causal: bool,
        scale: float,
        extra: tuple[Any, ...],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of q, k and v, for an output and log-sum-exp that may cover more keys than are given here."""
        ends = (runs.query_ends, runs.key_ends, runs.longest_query, runs.longest_key)
        unused = torch.empty(0, device=q.device)
        causal, window = self._window(runs, is_causal)
        found: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = torch.ops.aten._flash_attention_backward(
            gradient, q, k, v, out, lse, *ends, 0.0, causal, *extra, unused, scale=scale, **window
        )
        return found


FLASH = FlashKernel()


class SegmentAttention(torch.autograd.Function):
    """Every segment on itself, children on their ancestors, the two merged by their log-sum-exps: no key is copied for each child that sees it.

    The backward pass of either part is that of the whole: flash attention takes the probabilities from the merged log-sum-exp (as ring attention does,
    arXiv 2310.01889).
    """

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, own: Runs, above: Runs | None, scale: float, kernel: FlashKernel) -> torch.Tensor:
        """(T, heads, size), (keys, key-value heads, size) twice -> (T, heads, size)."""
        out, lse, extra = kernel.forward(q, k, v, own, True, scale)
        extra_above: tuple[Any, ...] = ()
        if above is not None:
            assert above.queries is not None and above.keys is not None
            seen, seen_lse, extra_above = kernel.forward(q[above.queries], k[above.keys], v[above.keys], above, False, scale)
            own_lse = lse[:, above.queries]
            both = torch.logaddexp(own_lse, seen_lse)
            own_share, seen_share = ((part - both).exp().T[..., None] for part in (own_lse, seen_lse))
            out = out.index_copy(0, above.queries, (out[above.queries] * own_share + seen * seen_share).to(out.dtype))
            lse = lse.index_copy(1, above.queries, both)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rest = own, above, scale, kernel, extra, extra_above
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        """The gradients of q, k and v."""
        q, k, v, out, lse = ctx.saved_tensors
        own, above, scale, kernel, extra, extra_above = ctx.rest
        gradient = gradient.contiguous()
        dq, dk, dv = kernel.backward(gradient, q, k, v, out, lse, own, True, scale, extra)
        if above is not None:
            at, of = above.queries, above.keys
            parts = kernel.backward(gradient[at], q[at], k[of], v[of], out[at], lse[:, at].contiguous(), above, False, scale, extra_above)
            dq, dk, dv = dq.index_add(0, at, parts[0]), dk.index_add(0, of, parts[1]), dv.index_add(0, of, parts[2])
        return dq, dk, dv, None, None, None, None


def varlen_segments(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Forest,
    scale: float,
    dropout: float = 0.0,
    kernel: FlashKernel = FLASH,
) -> torch.Tensor:
    """As `sdpa_segments`, by torch's flash attention over sequences of unequal length; 16-bit types on CUDA."""
    assert dropout == 0.0
    _check_causal(segments)
    q, k, v = _packed(query, key, value)
    own, above = segments.own, segments.above
    if segments.window is not None and above is not None:  # it reaches as far up as a child's place lets it: the ancestors are copied in front of each child
        own, above = segments.paths, None
        k, v = k[own.keys], v[own.keys]
    out: torch.Tensor = SegmentAttention.apply(q, k, v, own, above, scale, kernel)  # type: ignore[no-untyped-call]
    return out[None]


def flash_segments(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Forest,
    scale: float,
    dropout: float = 0.0,
    *,
    function: Callable[..., Any],
) -> torch.Tensor:
    """As `sdpa_segments`, by `flash_attn_varlen_func` of the user's own FlashAttention 2 or 3; a child's ancestors are copied in front of it."""
    assert dropout == 0.0
    _check_causal(segments)
    q, k, v = _packed(query, key, value)
    runs = segments.paths if segments.has_parents else segments.own
    if runs.keys is not None:
        k, v = k[runs.keys], v[runs.keys]
    window = {} if runs.window is None else {"window_size": (runs.window - 1, 0)}
    out = function(q, k, v, runs.query_ends, runs.key_ends, runs.longest_query, runs.longest_key, softmax_scale=scale, causal=True, **window)
    found: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return found[None]


def _check_causal(segments: Forest) -> None:
    if segments.image_of is not None:
        raise ValueError("no token can attend to a later one, as those of an image do in this model")


def _packed(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(1, heads, T, size) -> (T, heads, size) of each."""
    return tuple(tensor[0].transpose(0, 1).contiguous() for tensor in tensors)


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=True)
    return compiled


def flex_segments(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Forest, scale: float, dropout: float = 0.0) -> torch.Tensor:
    """As `sdpa_segments`, by FlexAttention, compiled at first use; any floating point type on CUDA."""
    assert dropout == 0.0
    flex: Any = _compiled_flex() if query.is_cuda else flex_attention
    out: torch.Tensor = flex(query, key, value, block_mask=segments.block_mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1])
    return out.transpose(1, 2).contiguous()


def _flash_attention_2() -> Backend:
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

    return functools.partial(flash_segments, function=flash_attn_varlen_func)


def _flash_attention_3() -> Backend:
    from flash_attn_interface import flash_attn_varlen_func  # type: ignore[import-not-found]

    return functools.partial(flash_segments, function=flash_attn_varlen_func)


# Best first: what `auto` tries on a GPU
BACKENDS: dict[str, Callable[[], Backend]] = {
    "flash_attention_3": _flash_attention_3,
    "varlen": lambda: varlen_segments,
    "flash_attention_2": _flash_attention_2,
    "flex": lambda: flex_segments,
    "sdpa": lambda: sdpa_segments,
}


def problem(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    window: int | None = None,
    sees_whole_images: bool = False,
) -> str | None:
    """Why a backend cannot be used for these shapes on this device: what it raises, or how far it is off the dense mask. None if it can.

    Args:
        window: of a layer with a sliding window; see `Forest`. sees_whole_images: see `Family`.
    """
    try:
        image_of = runs_of(torch.tensor([place for image in TRIAL_IMAGES for place in image]), TRIAL[-1].end).to(device) if sees_whole_images else None
        function, forest, length = BACKENDS[name](), Forest(TRIAL, device, image_of=image_of).within(window), TRIAL[-1].end
        generator = torch.Generator().manual_seed(0)
        q, k, v = (
            torch.randn(1, heads, length, head_size, generator=generator).to(device, dtype).requires_grad_()
            for heads in (num_heads, num_kv_heads, num_kv_heads)
        )
        direction = torch.randn(1, length, num_heads, head_size, generator=generator).to(device)
        out = function(q, k, v, forest, head_size**-0.5, 0.0)
        found = (out, *torch.autograd.grad(out, (q, k, v), direction.to(dtype)))
        # in float64, which no setting makes less exact
        expected = _naive(
            q.detach().double(), k.detach().double(), v.detach().double(), dense_mask(TRIAL, length, window, image_of).to(device), direction.double()
        )
    except (RuntimeError, ImportError, TypeError, AttributeError, ValueError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    allowed = 2e-2 if dtype is torch.bfloat16 else 5e-3 if dtype is torch.float16 else 1e-4
    off = max(float((one.detach().double() - other).norm() / other.norm()) for one, other in zip(found, expected, strict=True))
    return None if off <= allowed else f"its results are {off:.2%} off on this device"


def _naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, direction: torch.Tensor) -> tuple[torch.Tensor, ...]:
    q, k, v = (tensor.requires_grad_() for tensor in (q, k, v))
    wide_k, wide_v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], 1) for tensor in (k, v))
    weights = (q @ wide_k.transpose(2, 3) * q.shape[-1] ** -0.5).masked_fill(~mask, float("-inf")).softmax(-1)
    out = (weights @ wide_v).transpose(1, 2)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), direction)


def choose(
    wanted: str,
    device: torch.device,
    dtype: torch.dtype,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    has_windows: bool = False,
    sees_whole_images: bool = False,
) -> str:
    """The backend for `attention`: on the CPU per-segment SDPA; on a GPU the first that gives the dense mask's results there.

    Args:
        has_windows: some layers attend to a sliding window; it is tried with one, too. sees_whole_images: see `Family`; it is tried with images.

    Raises:
        InputError: the one that was asked for does not; says which would.
    """

    def why_not(name: str) -> str | None:
        found = problem(name, device, dtype, num_heads, num_kv_heads, head_size, None, sees_whole_images)
        if found is None and has_windows:
            found = problem(name, device, dtype, num_heads, num_kv_heads, head_size, TRIAL_WINDOW, sees_whole_images)
            found = found and f"with the model's sliding window, {found}"
        return found

    if wanted == "sdpa" or (wanted == "auto" and device.type != "cuda"):
        return "sdpa"
    if wanted == "auto":
        return next((name for name in BACKENDS if why_not(name) is None), "sdpa")
    why = why_not(wanted)
    if why is None:
        return wanted
    others = ", ".join(name for name in BACKENDS if name != wanted and why_not(name) is None)
    raise InputError(f"attention: {wanted} cannot be used on {device.type} with {str(dtype).removeprefix('torch.')}: {why}; these would work: auto, {others}")


def install(name: str) -> str:
    """Makes a backend known to transformers; the name to give to `set_attn_implementation`."""
    return register(name, BACKENDS[name]())
