"""The reference model of preference tuning: what the policy was before its first step, and its log-probs."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import nn

from interlace.data.batch import PackedBatch


class Reference(Protocol):
    """Where the log-probs of the reference come from."""

    def log_probs(self, policy: Callable[..., Any], values: dict[str, Any], batch: PackedBatch, view: str) -> torch.Tensor:
        """(N,) log-probs of a batch's supervised rows, without a gradient.

        Args:
            policy: the model that is trained; values: what it is called with.
            view: which rows the batch is of; see `Stored`.
        """


class AdapterOff:
    """A new adapter's reference: the policy without it, whole parts that learn beside it (the projector) included."""

    def __init__(self, peft: PeftModel):
        self.peft = peft

    @torch.no_grad()
    def log_probs(self, policy: Callable[..., Any], values: dict[str, Any], batch: PackedBatch, view: str) -> torch.Tensor:
        """See `Reference`."""
        learns = [(parameter, parameter.requires_grad) for parameter in self.peft.parameters()]
        try:
            with self.peft.disable_adapter():
                log_probs: torch.Tensor = policy(**values).log_probs
        finally:
            for parameter, was in learns:  # PEFT switches on all that it has switched off, what is to stay frozen as well
                parameter.requires_grad_(was)
        return log_probs


class AsItBegan:
    """A continued adapter's reference: the policy with what learns as it was at first, a copy that lies beside it.

    Args:
        packed: the policy, before its first step.
    """

    def __init__(self, packed: nn.Module):
        self.first = [(parameter, parameter.detach().clone()) for parameter in packed.parameters() if parameter.requires_grad]

    @torch.no_grad()
    def log_probs(self, policy: Callable[..., Any], values: dict[str, Any], batch: PackedBatch, view: str) -> torch.Tensor:
        """See `Reference`."""
        with self._in_place():
            log_probs: torch.Tensor = policy(**values).log_probs
        return log_probs

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        self.first = [(parameter, value.to(parameter.device)) for parameter, value in self.first]
        now = [(parameter, parameter.data) for parameter, _ in self.first]
        for parameter, value in self.first:
            parameter.data = value.to(parameter.dtype)
        try:
            yield
        finally:
            for parameter, value in now:
                parameter.data = value


def copied_dtype(packed: nn.Module, dtype: torch.dtype) -> dict[nn.Parameter, torch.dtype]:
    """What a `FrozenCopy` keeps each weight in: linear layers in the type of the run, what autocast leaves alone (norms, embeddings) as it is."""
    linear = {module.weight for module in packed.modules() if isinstance(module, nn.Linear)}
    linear -= {module.weight for module in packed.modules() if isinstance(module, nn.Embedding)}
    return {parameter: dtype if parameter in linear else parameter.dtype for parameter in packed.parameters()}


def copy_bytes(packed: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of a `FrozenCopy`."""
    return sum(parameter.numel() * kept.itemsize for parameter, kept in copied_dtype(packed, dtype).items())


class FrozenCopy:
    """A fully tuned model's reference: a copy of it, in the type that the run computes in.

    Its log-probs are those of the policy before its first step, to the last bit: linear layers are rounded once where autocast rounds them every time.

    Args:
        packed: the policy, before its first step.
        dtype: what the run computes in.
        is_rounded: an engine has the whole policy in that type, in place of autocast.
    """

    def __init__(self, packed: nn.Module, dtype: torch.dtype, is_rounded: bool):
        memo = {}
        for parameter, kept in copied_dtype(packed, dtype).items():
            memo[id(parameter)] = nn.Parameter(parameter.detach().to(dtype if is_rounded else kept, copy=True), requires_grad=False)
        self.module: nn.Module = copy.deepcopy(packed, memo).eval()  # type: ignore[arg-type]
        self.autocast = None if is_rounded or dtype is torch.float32 else dtype

    @torch.no_grad()
    def log_probs(self, policy: Callable[..., Any], values: dict[str, Any], batch: PackedBatch, view: str) -> torch.Tensor:
        """See `Reference`."""
        with torch.autocast(batch.rows.device.type, self.autocast, enabled=self.autocast is not None):
            log_probs: torch.Tensor = self.module(**values).log_probs
        return log_probs


class Stored:
    """Log-probs that were computed before.

    Args:
        starts: view -> (rows + 1,) where each row's values begin; a view is `train`, `eval`, or one of the evaluation's others.
        values: view -> (supervised tokens of all rows,), the chosen answer's before the rejected one's.
    """

    def __init__(self, starts: dict[str, torch.Tensor], values: dict[str, torch.Tensor]):
        self.starts, self.values = starts, values

    def log_probs(self, policy: Callable[..., Any], values: dict[str, Any], batch: PackedBatch, view: str) -> torch.Tensor:
        """See `Reference`."""
        numbers = [max(number, ~number) for number in batch.row_numbers[:: batch.sequences_per_row]]
        starts, stored = self.starts[view], self.values[view]
        found = torch.cat([stored[int(starts[number]) : int(starts[number + 1])] for number in numbers])
        assert len(found) == len(batch.targets) and not found.isnan().any()
        return found.to(batch.rows.device)
