"""Segment attention: every backend against the naive dense mask, forward and backward. Kernels of a GPU are in test_cuda; here, what surrounds them."""

import functools
import itertools
from typing import Any

import pytest
import torch

from interlace.data.batch import Segment
from interlace.errors import InputError
from interlace.model import attention_kernels
from interlace.model.attention import Backend, Forest, Runs, dense_mask, interface, sdpa_segments
from interlace.model.attention_kernels import FlashKernel, choose, flash_segments, flex_segments, problem, varlen_segments

FORESTS = {
    "roots": [Segment(0, 5), Segment(5, 10), Segment(10, 13), Segment(13, 18)],
    "trunks and leaves": [Segment(0, 6), Segment(6, 9, 0), Segment(9, 14, 0), Segment(14, 20), Segment(20, 22, 3)],
    "grandchildren": [Segment(0, 4), Segment(4, 7, 0), Segment(7, 9, 1), Segment(9, 10, 1)],
    "children apart": [Segment(0, 3), Segment(3, 4, 0), Segment(4, 9), Segment(9, 11, 2), Segment(11, 12, 0)],
}
CPU = torch.device("cpu")


class NaiveKernel(FlashKernel):
    """Attention over packed sequences by plain products, its backward pass from a given output and log-sum-exp as flash attention computes it."""

    def scores(self, q: torch.Tensor, k: torch.Tensor, is_causal: bool, scale: float, window: int | None = None) -> torch.Tensor:
        found = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)) * scale
        if is_causal:
            found = found.masked_fill(~torch.ones(found.shape[1:], dtype=torch.bool).tril(found.shape[2] - found.shape[1]), float("-inf"))
        if window is not None:  # aligned to the bottom right, too
            assert is_causal
            found = found.masked_fill(torch.ones(found.shape[1:], dtype=torch.bool).tril(found.shape[2] - found.shape[1] - window), float("-inf"))
        return found

    def sequences(self, runs: Runs) -> list[tuple[slice, slice]]:
        ends = [[slice(*pair) for pair in itertools.pairwise(values.tolist())] for values in (runs.query_ends, runs.key_ends)]
        assert max(run.stop - run.start for run in ends[0]) == runs.longest_query
        assert max(run.stop - run.start for run in ends[1]) == runs.longest_key
        return list(zip(*ends, strict=True))

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, runs: Runs, is_causal: bool, scale: float) -> Any:
        out, lse = torch.zeros_like(q), torch.zeros(q.shape[1], q.shape[0], dtype=q.dtype)
        for queries, keys in self.sequences(runs):
            scores = self.scores(q[queries], k[keys], is_causal, scale, runs.window)
            lse[:, queries] = scores.logsumexp(2)
            out[queries] = torch.einsum("hqk,khd->qhd", scores.softmax(2), v[keys].repeat_interleave(q.shape[1] // v.shape[1], 1))
        return out, lse, ("extra",)

    def backward(self, gradient: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, runs: Runs, is_causal: bool, scale: float, extra: Any) -> Any:
        assert extra == ("extra",)
        repeat = q.shape[1] // k.shape[1]
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for queries, keys in self.sequences(runs):
            p = (self.scores(q[queries], k[keys], is_causal, scale, runs.window) - lse[:, queries, None]).exp()
            wide_k, wide_v = (x[keys].repeat_interleave(repeat, 1) for x in (k, v))
            ds = p * (torch.einsum("qhd,khd->hqk", gradient[queries], wide_v) - (gradient[queries] * out[queries]).sum(2).T[..., None]) * scale
            dq[queries] += torch.einsum("hqk,khd->qhd", ds, wide_k)
            dk[keys] += torch.einsum("hqk,qhd->khd", ds, q[queries]).unflatten(1, (-1, repeat)).sum(2)
            dv[keys] += torch.einsum("hqk,qhd->khd", p, gradient[queries]).unflatten(1, (-1, repeat)).sum(2)
        return dq, dk, dv


def naive_flash_attn(
    q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int, *, softmax_scale: float | None, causal: bool, window_size: Any = (-1, -1)
) -> torch.Tensor:
    """`flash_attn_varlen_func` as its documentation describes it: the causal mask is aligned to the bottom right, a window of (left, right) besides it."""
    assert causal and window_size[1] <= 0
    window = None if window_size[0] < 0 else window_size[0] + 1
    runs = Runs(None, None, cu_q, cu_k, max_q, max_k)
    pieces = []
    for queries, keys in NaiveKernel().sequences(runs):
        scores = NaiveKernel().scores(q[queries], k[keys], True, q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale, window)
        pieces.append(torch.einsum("hqk,khd->qhd", scores.softmax(2), v[keys].repeat_interleave(q.shape[1] // v.shape[1], 1)))
    return torch.cat(pieces)


FUNCTIONS: dict[str, Backend] = {
    "sdpa": sdpa_segments,
    "merged kernels": functools.partial(varlen_segments, kernel=NaiveKernel()),
    "copied keys": functools.partial(flash_segments, function=naive_flash_attn),
}


def draw(heads: int, groups: int, length: int, size: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, count, length, size, dtype=torch.float64, requires_grad=True) for count in (heads, groups, groups)]


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: list[Segment], scale: float) -> torch.Tensor:
    wide_k, wide_v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    weights = (q @ wide_k.transpose(2, 3) * scale).masked_fill(~dense_mask(segments, segments[-1].end), float("-inf")).softmax(-1)
    return (weights @ wide_v).transpose(1, 2)


@pytest.mark.parametrize("backend", FUNCTIONS)
@pytest.mark.parametrize("name", FORESTS)
@pytest.mark.parametrize(("heads", "groups", "size"), itertools.product((4,), (4, 2, 1), (8, 16)))
def test_backends_equal_the_naive_dense_mask(backend: str, name: str, heads: int, groups: int, size: int) -> None:
    segments = FORESTS[name]
    q, k, v = draw(heads, groups, segments[-1].end, size)
    out, _ = interface(FUNCTIONS[backend])(torch.nn.Identity(), q, k, v, None, scaling=0.3, segments=Forest(segments, CPU))
    expected = naive(q, k, v, segments, 0.3)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    direction = torch.randn_like(expected)
    for one, other in zip(torch.autograd.grad(out, (q, k, v), direction), torch.autograd.grad(expected, (q, k, v), direction), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", FORESTS)
@pytest.mark.parametrize("groups", [4, 2])
def test_flex_attention_equals_the_naive_dense_mask(name: str, groups: int) -> None:
    """Forward: on CPUs it knows no backward pass."""
    segments = FORESTS[name]
    q, k, v = (tensor.detach().float() for tensor in draw(4, groups, segments[-1].end, 16))
    out = flex_segments(q, k, v, Forest(segments, CPU), 0.3)
    torch.testing.assert_close(out, naive(q, k, v, segments, 0.3), rtol=1e-5, atol=1e-5)


def test_keys_of_a_trunk_are_there_once_however_many_children_see_them() -> None:
    above = Forest([Segment(0, 100), *(Segment(100 + 5 * i, 105 + 5 * i, 0) for i in range(8))], CPU).above
    assert above is not None and above.keys is not None and above.queries is not None
    assert above.keys.tolist() == list(range(100)) and above.queries.tolist() == list(range(100, 140))
    assert Forest([Segment(0, 100), Segment(100, 120)], CPU).above is None


def test_dense_mask_by_hand() -> None:
    mask = dense_mask([Segment(0, 2), Segment(2, 3, 0), Segment(3, 5, 0), Segment(5, 6)], 6).int().tolist()
    assert mask == [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0], [1, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 1]]


def test_queries_and_keys_take_the_type_of_the_values() -> None:
    """As full tuning under autocast hands them over: kernels want one type."""
    seen: list[torch.dtype] = []

    def note(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> torch.Tensor:
        seen.extend([query.dtype, key.dtype, value.dtype])
        return query

    q, k, v = (tensor.detach().float() for tensor in draw(4, 2, 5, 8))
    interface(note)(torch.nn.Identity(), q, k, v.bfloat16(), None, segments=Forest([Segment(0, 5)], CPU))
    assert seen == [torch.bfloat16] * 3


# --- which one is used ---


def test_a_cpu_takes_sdpa_and_what_it_lacks_is_refused_with_what_would_work() -> None:
    assert choose("auto", CPU, torch.float32, 4, 2, 16) == choose("sdpa", CPU, torch.float32, 4, 2, 16) == "sdpa"
    for backend in ("varlen", "flex", "flash_attention_2", "flash_attention_3"):
        with pytest.raises(InputError, match=rf"attention: {backend} cannot be used on cpu with bfloat16: .+; these would work: auto, sdpa"):
            choose(backend, CPU, torch.bfloat16, 4, 2, 16)


def test_a_kernel_that_aligns_its_mask_in_another_way_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The causal mask of a child on its ancestors at the top left instead of the bottom right: results without any error."""

    def top_left(q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, *rest: Any, softmax_scale: float | None, causal: bool) -> torch.Tensor:
        pieces = []
        for queries, keys in NaiveKernel().sequences(Runs(None, None, cu_q, cu_k, *rest)):
            scores = NaiveKernel().scores(q[queries], k[keys], False, q.shape[-1] ** -0.5)
            scores = scores.masked_fill(~torch.ones(scores.shape[1:], dtype=torch.bool).tril(), float("-inf"))
            pieces.append(torch.einsum("hqk,khd->qhd", scores.softmax(2), v[keys].repeat_interleave(q.shape[1] // v.shape[1], 1)))
        return torch.cat(pieces)

    backends = {"flash_attention_2": lambda: functools.partial(flash_segments, function=naive_flash_attn), "sdpa": lambda: sdpa_segments}
    monkeypatch.setattr(attention_kernels, "BACKENDS", backends)
    assert problem("flash_attention_2", CPU, torch.float32, 4, 2, 16) is None
    backends["flash_attention_2"] = lambda: functools.partial(flash_segments, function=top_left)
    with pytest.raises(InputError, match=r"its results are \d+\.\d\d% off on this device; these would work: auto, sdpa"):
        choose("flash_attention_2", CPU, torch.float32, 4, 2, 16)
