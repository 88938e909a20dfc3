"""What a checkpoint holds beside the weights: optimizer, schedule, and how far the training log has come; safetensors and JSON, nothing that runs code.

The optimizer's state lies in one file per rank, as flat runs of each parameter's elements, whatever engine wrote it. So a run may go on with another
number of ranks or another sharding: each rank reads the runs that it owns now.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from interlace.errors import InputError
from interlace.files import set_default_mode
from interlace.training.fragments import Fragment

SCHEDULER_FILE = "scheduler.json"
PROGRESS_FILE = "progress.json"
_OPTIMIZER_FILES = "optimizer-?????-of-?????.safetensors"
_SPACE = "\n"  # between a parameter's name and the key of its state


def optimizer_file(rank: int, world_size: int) -> str:
    """The name of a rank's file."""
    return f"optimizer-{rank:05d}-of-{world_size:05d}.safetensors"


def write_fragments(path: Path, fragments: Iterable[Fragment], scalars: Mapping[str, Mapping[str, float]]) -> None:
    """Writes one rank's share of the optimizer's state.

    Args:
        scalars: parameter -> key -> number, such as the step.
    """
    tensors, places = {}, {}
    for fragment in fragments:
        name = f"{fragment.name}{_SPACE}{fragment.key}"
        tensors[name], places[name] = fragment.values.contiguous(), [fragment.start, list(fragment.shape)]
    save_file(tensors, path, {"places": json.dumps(places), "scalars": json.dumps(scalars)})
    set_default_mode(path)


class OptimizerFiles:
    """The optimizer's state in a checkpoint, from however many ranks.

    `shapes` holds the shape of each whole tensor: parameter -> key -> shape; `scalars` the numbers: parameter -> key -> number.

    Args:
        folder: the checkpoint.

    Raises:
        InputError: a rank's file cannot be read.
    """

    def __init__(self, folder: Path):
        paths = sorted(folder.glob(_OPTIMIZER_FILES))
        self._runs: dict[tuple[str, str], list[tuple[int, int, Any]]] = {}  # (start, end, file) of each (parameter, key)
        self.shapes: dict[str, dict[str, tuple[int, ...]]] = {}
        self.scalars: dict[str, dict[str, float]] = {}
        for path in paths:
            try:
                file = safe_open(path, "pt")
                metadata = file.metadata() or {}
                places, scalars = json.loads(metadata["places"]), json.loads(metadata["scalars"])
            except (SafetensorError, OSError, ValueError, KeyError) as error:
                raise InputError(f"{path}: cannot be read: {error}") from error
            for name, (start, shape) in places.items():
                parameter, key = name.split(_SPACE)
                (size,) = file.get_slice(name).get_shape()
                self._runs.setdefault((parameter, key), []).append((start, start + size, file))
                self.shapes.setdefault(parameter, {})[key] = tuple(shape)
            self.scalars |= scalars

    @staticmethod
    def are_complete(folder: Path) -> bool:
        """Whether every rank's file is there."""
        paths = sorted(folder.glob(_OPTIMIZER_FILES))
        return bool(paths) and len(paths) == int(paths[0].stem.rsplit("-", 1)[1])

    def read(self, parameter: str, key: str, start: int, length: int) -> torch.Tensor:
        """Elements `start` to `start + length` of a flattened tensor, (length,).

        Raises:
            InputError: the checkpoint does not hold them.
        """
        pieces, at = [], start
        for first, last, file in sorted(self._runs.get((parameter, key), []), key=lambda run: run[0]):
            if first <= at < min(last, start + length):
                end = min(last, start + length)
                pieces.append(file.get_slice(f"{parameter}{_SPACE}{key}")[at - first : end - first])
                at = end
        if at != start + length:
            raise InputError(f"the checkpoint's optimizer state holds no {key} of {parameter} from element {at} on: it belongs to another model or optimizer")
        return torch.cat(pieces) if len(pieces) != 1 else pieces[0]


def read_json_state(path: Path) -> dict[str, Any] | None:
    """The content of a JSON file; None if it is not there."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a schedule's state that JSON can hold exactly."""
    return {name: value for name, value in state.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))
