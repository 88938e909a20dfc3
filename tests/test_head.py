"""The rows-only head against full logits: scores, gradients, and what it keeps in memory."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from interlace.model import head
from interlace.model.head import RowHead, RowScores

VOCABULARY, WIDTH, ROWS = 50, 8, 23


def draw(bias: bool, learns: bool, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, nn.Linear, torch.Tensor]:
    torch.manual_seed(0)
    layer = nn.Linear(WIDTH, VOCABULARY, bias=bias, dtype=dtype).requires_grad_(learns)
    return torch.randn(ROWS, WIDTH, dtype=dtype, requires_grad=True), layer, torch.randint(VOCABULARY, (ROWS,))


@pytest.fixture(params=[1, 7, 23, 100], ids=lambda rows: f"tiles of {rows}")
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(head, "TILE_LOGITS", request.param * VOCABULARY)
    return int(request.param)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("learns", [False, True])
def test_scores_and_gradients_equal_full_logits(tile: int, bias: bool, learns: bool) -> None:
    hidden, layer, targets = draw(bias, learns)
    scores = RowScores(*RowHead()(hidden, layer, targets))
    logits = F.linear(hidden, layer.weight, layer.bias)
    expected = logits.log_softmax(1)[torch.arange(ROWS), targets]
    torch.testing.assert_close(scores.log_probs, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(scores.is_top1, logits.argmax(1) == targets)
    direction, inputs = torch.randn(ROWS, dtype=torch.float64), [hidden, *(layer.parameters() if learns else [])]
    for one, other in zip(torch.autograd.grad(scores.log_probs, inputs, direction), torch.autograd.grad(expected, inputs, direction), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_a_layer_that_learns_under_frozen_rows(tile: int) -> None:
    hidden, layer, targets = draw(True, True)
    hidden = hidden.detach()
    RowHead()(hidden, layer, targets)[0].sum().backward()
    expected = nn.Linear(WIDTH, VOCABULARY, dtype=torch.float64)
    expected.load_state_dict(layer.state_dict())
    expected(hidden).log_softmax(1)[torch.arange(ROWS), targets].sum().backward()
    torch.testing.assert_close(layer.weight.grad, expected.weight.grad)
    torch.testing.assert_close(layer.bias.grad, expected.bias.grad)


def test_an_adapter_on_the_layer_counts() -> None:
    hidden, layer, targets = draw(False, False)
    adapted = get_peft_model(nn.Sequential(layer), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)).base_model.model[0]
    scores = RowScores(*RowHead()(hidden, adapted, targets))
    expected = adapted(hidden).log_softmax(1)[torch.arange(ROWS), targets]
    torch.testing.assert_close(scores.log_probs, expected)
    scores.log_probs.sum().backward()
    assert all(parameter.grad is not None for name, parameter in adapted.named_parameters() if "lora_" in name)


def test_autocast_scores_as_a_plain_layer_does() -> None:
    """bfloat16 products of float32 weights, softmax in float32."""
    hidden, layer, targets = draw(False, True, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = RowScores(*RowHead()(hidden, layer, targets))
        expected = layer(hidden).float().log_softmax(1)[torch.arange(ROWS), targets]
    torch.testing.assert_close(scores.log_probs, expected)
    found, other = (torch.autograd.grad(values.sum(), [hidden, layer.weight]) for values in (scores.log_probs, expected))
    for one, two in zip(found, other, strict=True):
        assert (one - two).norm() <= 1e-2 * two.norm()
    assert found[1].dtype == torch.float32


@pytest.mark.parametrize(("learns", "kept"), [(False, ROWS * WIDTH), (True, ROWS * WIDTH + VOCABULARY * WIDTH + ROWS)])
def test_no_logits_are_kept_for_the_backward_pass_of_several_tiles(monkeypatch: pytest.MonkeyPatch, learns: bool, kept: int) -> None:
    monkeypatch.setattr(head, "TILE_LOGITS", 5 * VOCABULARY)
    hidden, layer, targets = draw(False, learns)
    saved: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        RowHead()(hidden, layer, targets)
    assert sum(saved) == kept


@pytest.mark.parametrize(("rows_per_tile", "learns", "products"), [(100, False, 2), (5, False, 2), (100, True, 3), (5, True, 4)])
def test_products_that_are_run(monkeypatch: pytest.MonkeyPatch, rows_per_tile: int, learns: bool, products: int) -> None:
    """Scores and the gradient of rows and layer; logits again only where several tiles learn."""
    monkeypatch.setattr(head, "TILE_LOGITS", rows_per_tile * VOCABULARY)
    hidden, layer, targets = draw(False, learns, torch.float32)
    with FlopCounterMode(display=False) as counter:
        RowHead()(hidden, layer, targets)[0].sum().backward()
    assert counter.get_total_flops() == products * 2 * ROWS * WIDTH * VOCABULARY


def test_without_gradients_nothing_is_made_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, layer, targets = draw(False, False, torch.float32)
    slopes: list[Any] = []
    monkeypatch.setattr(head, "_slope", lambda *values: slopes.append(values))
    with torch.no_grad():
        RowHead()(hidden, layer, targets)
    assert not slopes
