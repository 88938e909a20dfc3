"""Losses on log-probs of supervised tokens."""

import torch


def supervised_loss(log_probs: torch.Tensor, weights: torch.Tensor, total_weight: torch.Tensor | float) -> torch.Tensor:
    """Weighted negative log-likelihood, divided by the whole optimizer step's token weight.

    Summed over micro-batches and ranks it is the mean loss per supervised token of the step.

    Args:
        log_probs, weights: (N,) of one micro-batch.
        total_weight: sum of the weights of all micro-batches of the step, over ranks and accumulation.
    """
    return -(log_probs * weights).sum() / total_weight
