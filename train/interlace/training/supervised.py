"""Supervised fine-tuning, from checked arguments to a folder with the result."""

from collections.abc import Callable
from typing import Any

from interlace.arguments import Arguments
from interlace.training.run import run
from interlace.training.trainer import PackedTrainer


def finetune(arguments: Arguments) -> None:
    """Trains and saves; see `run`."""
    run(arguments, "supervised", _prepare)


def _prepare(*_: Any) -> Callable[..., PackedTrainer]:
    return PackedTrainer
