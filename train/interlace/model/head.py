"""Hidden states of the supervised rows -> log-probs of their targets, a tile of rows at a time: no (rows, vocabulary) tensor outlives its tile."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

TILE_LOGITS = 1 << 28  # logits at a time: 1 GiB in float32, about 1,800 rows of Qwen's vocabulary


@dataclass(frozen=True)
class RowScores:
    """What the model says of the N supervised rows: `log_probs` (N,) of the targets, float32; `is_top1` (N,) whether the target was the best guess.

    statistics: (3, N), if they were asked for: each row's entropy, mean logit, and log of its summed squared probabilities; without a gradient.
    """

    log_probs: torch.Tensor
    is_top1: torch.Tensor
    statistics: torch.Tensor | None = None


class RowHead(nn.Module):
    """Scores rows by an output layer that stays where it is in the model, tied or not.

    A module of its own, so that engines that share weights out gather the layer's weight once for all tiles, however many they are on this rank.
    """

    def forward(
        self, hidden: torch.Tensor, layer: nn.Linear, targets: torch.Tensor, with_statistics: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The fields of `RowScores`, as a plain tuple: engines look for tensors in what a module returns, to have its weights there for the backward pass.

        Args:
            hidden: (N, width).
            layer: (vocabulary, width) weight, with or without a bias.
            targets: (N,).
        """
        if isinstance(layer, BaseTunerLayer):  # with an adapter on it the weight is not all of it
            logits = layer(hidden)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            statistics = _statistics(logits.detach(), logits.detach().logsumexp(1), logits.detach().softmax(1)) if with_statistics else None
            return logits.log_softmax(1).gather(1, targets[:, None])[:, 0], logits.argmax(1) == targets, statistics
        weight: torch.Tensor = layer.weight
        bias: torch.Tensor | None = layer.bias
        device = hidden.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        settings = torch.is_grad_enabled(), with_statistics
        log_probs, is_top1, statistics = TiledScores.apply(hidden.to(weight.dtype), weight, bias, targets, *settings)  # type: ignore[no-untyped-call]
        return log_probs, is_top1, statistics if with_statistics else None


class TiledScores(torch.autograd.Function):
    """log softmax(hidden @ weight.T + bias) at the targets.

    With a frozen layer the gradient of each row is made along with its score, up to the factor that arrives later: no logits are kept and none computed twice.
    With one that learns, the probabilities of a single tile are kept, those of several computed again.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor, is_training: bool, with_statistics: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(N, width), (vocabulary, width), (vocabulary,), (N,) -> log-probs (N,), is_top1 (N,), statistics (3, N) or (3, 0)."""
        rows_learn, weight_learns = is_training and ctx.needs_input_grad[0], is_training and any(ctx.needs_input_grad[1:3])
        log_probs = torch.empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        is_top1 = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
        statistics = log_probs.new_empty(3, len(hidden) if with_statistics else 0)
        directions, kept = torch.empty_like(hidden) if rows_learn and not weight_learns else None, []
        tiles = _tiles(len(hidden), len(weight))
        for tile in tiles:
            logits = _logits(hidden[tile], weight, bias)
            chosen, total = logits.gather(1, targets[tile, None])[:, 0], logits.logsumexp(1)
            log_probs[tile], is_top1[tile] = chosen - total, logits.argmax(1) == targets[tile]
            keeps = weight_learns and len(tiles) == 1
            if not (with_statistics or keeps or directions is not None):
                continue
            probabilities = (logits.sub(total[:, None]) if with_statistics else logits.sub_(total[:, None])).exp_()
            if with_statistics:
                statistics[:, tile] = _statistics(logits, total, probabilities)
            del logits  # one tile's worth at a time
            if directions is not None:
                torch.mm(_slope(probabilities, targets[tile]).to(weight.dtype), weight, out=directions[tile])
            elif keeps:
                kept = [_slope(probabilities, targets[tile]).to(weight.dtype)]
            del probabilities
        ctx.mark_non_differentiable(is_top1, statistics)
        ctx.save_for_backward(*([directions] if directions is not None else [hidden, weight, bias, targets, *kept]))
        ctx.has_directions = directions is not None
        return log_probs, is_top1, statistics

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        """Gradients of hidden, weight and bias."""
        if ctx.has_directions:
            (directions,) = ctx.saved_tensors
            return directions * gradient[:, None].to(directions.dtype), None, None, None, None, None
        hidden, weight, bias, targets, *kept = ctx.saved_tensors
        rows_learn, weight_learns, bias_learns = ctx.needs_input_grad[:3]
        of_hidden = torch.empty_like(hidden) if rows_learn else None
        # summed over tiles in float32 at least
        of_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32)) if weight_learns else None
        of_bias = torch.zeros_like(of_weight[:, 0]) if bias_learns and of_weight is not None else None
        for tile in _tiles(len(hidden), len(weight)):
            if kept:
                slope = kept[0]
            else:
                logits = _logits(hidden[tile], weight, bias)
                slope = _slope(logits.sub_(logits.logsumexp(1, keepdim=True)).exp_(), targets[tile]).to(weight.dtype)
            slope = slope * gradient[tile, None].to(slope.dtype)
            if of_hidden is not None:
                torch.mm(slope, weight, out=of_hidden[tile])
            if of_weight is not None:
                of_weight += slope.T @ hidden[tile]
            if of_bias is not None:
                of_bias += slope.sum(0)
        return of_hidden, None if of_weight is None else of_weight.to(weight.dtype), None if of_bias is None else of_bias.to(weight.dtype), None, None, None


def _tiles(rows: int, vocabulary: int) -> list[slice]:
    size = max(1, TILE_LOGITS // vocabulary)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    with torch.autocast(hidden.device.type, enabled=False):
        logits = F.linear(hidden, weight, bias)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _statistics(logits: torch.Tensor, total: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """(3, N) of `RowScores`, from logits (N, vocabulary), their log-sum-exp (N,) and their softmax."""
    entropy = total - torch.einsum("nv,nv->n", probabilities, logits)
    return torch.stack([entropy, logits.mean(1), torch.einsum("nv,nv->n", probabilities, probabilities).log()])


def _slope(probabilities: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The gradient of each row's log-prob in its logits, in place of the probabilities: one at the target, less these."""
    slope = probabilities.neg_()
    return slope.scatter_add_(1, targets[:, None], torch.ones_like(targets[:, None], dtype=slope.dtype))
