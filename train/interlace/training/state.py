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
    tensors, starts = {}, {}
    for fragment in fragments:
        name = f"{fragment.name}{_SPACE}{fragment.key}"
        tensors[name], starts[name] = fragment.values.contiguous(), fragment.start
    save_file(tensors, path, {"starts": json.dumps(starts), "scalars": json.dumps(scalars)})


class OptimizerFiles:
    """The optimizer's state in a checkpoint, from however many ranks.

    Args:
        folder: the checkpoint.

    Raises:
        InputError: a rank's file is missing or cannot be read.
    """

    def __init__(self, folder: Path):
        paths = sorted(folder.glob(_OPTIMIZER_FILES))
        if not paths or len(paths) != int(paths[0].stem.rsplit("-", 1)[1]):
            raise InputError(f"{folder}: {len(paths)} files of the optimizer's state are there, not all; set allow_partial_resume: true to start it afresh")
        self._files: list[Any] = []
        self._runs: dict[tuple[str, str], list[tuple[int, int, Any]]] = {}  # (start, end, file) of each (parameter, key)
        self.scalars: dict[str, dict[str, float]] = {}
        for path in paths:
            try:
                file = safe_open(path, "pt")
                metadata = file.metadata() or {}
                starts, scalars = json.loads(metadata["starts"]), json.loads(metadata["scalars"])
            except (SafetensorError, OSError, ValueError, KeyError) as error:
                raise InputError(f"{path}: cannot be read: {error}") from error
            for name, start in starts.items():
                parameter, key = name.split(_SPACE)
                size = torch.Size(file.get_slice(name).get_shape()).numel()
                self._runs.setdefault((parameter, key), []).append((start, start + size, file))
            self.scalars |= scalars

    def keys(self, parameter: str) -> list[str]:
        """The keys of a parameter's state that are tensors."""
        return [key for name, key in self._runs if name == parameter]

    @property
    def parameters(self) -> set[str]:
        """The parameters that have any state."""
        return {name for name, _ in self._runs} | set(self.scalars)

    def whole(self, parameter: str, key: str) -> torch.Tensor:
        """A tensor that one rank has written whole, in its own shape."""
        ((_, _, file),) = self._runs[parameter, key]
        return file.get_tensor(f"{parameter}{_SPACE}{key}")  # type: ignore[no-any-return]

    def read(self, parameter: str, key: str, start: int, length: int) -> torch.Tensor:
        """Elements `start` to `start + length` of a flattened tensor, (length,).

        Raises:
            InputError: the checkpoint does not hold them.
        """
        pieces, at = [], start
        for first, last, file in sorted(self._runs.get((parameter, key), []), key=lambda run: run[0]):
            if first <= at < last and at < start + length:
                end = min(last, start + length)
                name = f"{parameter}{_SPACE}{key}"
                if last - first == end - at:
                    pieces.append(file.get_tensor(name).flatten())
                else:
                    run = file.get_slice(name)
                    pieces.append(run[at - first : end - first] if len(run.get_shape()) == 1 else file.get_tensor(name).flatten()[at - first : end - first])
                at = end
        if at != start + length:
            raise InputError(f"the checkpoint's optimizer state holds no {key} of {parameter} from element {at} on: it belongs to another model or optimizer")
        return torch.cat(pieces) if len(pieces) != 1 else pieces[0]


def write_json_state(path: Path, state: Mapping[str, Any]) -> None:
    """Writes numbers, words and lists of them; anything else in a schedule's state is a function that is made anew."""
    path.write_text(json.dumps(state), encoding="utf-8")


def read_json_state(path: Path) -> dict[str, Any] | None:
    """What `write_json_state` wrote; None if it is not there."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a schedule's state that JSON can hold exactly."""
    return {name: value for name, value in state.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))
