"""The loss of every row in every epoch, from the log-probs that training computes anyway.

A micro-batch's sums stay on the device until the trainer logs or saves. Each rank keeps those of its own rows; sums add up, over ranks and over the parts of
a run that was interrupted, so each rank's file in a checkpoint is simply what it has, and whoever resumes takes all of them.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from interlace.files import set_default_mode

_FILES = "row_losses-?????-of-?????.safetensors"
_MOST_WAITING = 4096  # micro-batches between two looks at the device: a run that never logs keeps no more there
Parts = dict[int, tuple[np.ndarray, np.ndarray]]  # epoch -> rows (M,), and their sums of loss and of weight (2, M)


def row_losses_file(rank: int, world_size: int) -> str:
    """The name of a rank's file in a checkpoint."""
    return f"row_losses-{rank:05d}-of-{world_size:05d}.safetensors"


def row_sums(log_probs: torch.Tensor, weights: torch.Tensor, sequence_index: torch.Tensor, num_sequences: int) -> torch.Tensor:
    """(2, sequences) in float32: each sequence's sums of loss and of weight.

    Args:
        log_probs, weights, sequence_index: (N,) as in `PackedBatch` and `RowScores`.
    """
    sums = torch.zeros(2, num_sequences, dtype=torch.float32, device=log_probs.device)
    terms = torch.stack([-log_probs.detach().float() * weights, weights.float()])
    return sums.index_add_(1, sequence_index, terms)


class RowLosses:
    """Sums of loss and weight of each row and epoch, (2, rows) in float32 for each epoch, of the rows that this rank has trained on.

    Args:
        num_rows: of the data set.
        fingerprint: of its rows; sums of other rows are not taken up.
    """

    def __init__(self, num_rows: int, fingerprint: str):
        self.num_rows, self.fingerprint = num_rows, fingerprint
        self.is_whole = True  # from the run's first step on: a row without a loss was not trained
        self._epochs: dict[int, np.ndarray] = {}
        self._waiting: list[tuple[int, torch.Tensor, tuple[int, ...]]] = []

    def add(self, epoch: int, sums: torch.Tensor, row_numbers: Sequence[int]) -> None:
        """Notes a micro-batch; nothing waits for the device.

        Args:
            sums: (2, sequences) loss and weight of each sequence.
            row_numbers: data set row of each sequence; a filler's is negative.
        """
        self._waiting.append((epoch, sums, tuple(row_numbers)))
        if len(self._waiting) >= _MOST_WAITING:
            self.look()

    def look(self) -> None:
        """Takes what waits on the device into the sums: one transfer for all."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        sizes = [len(numbers) for _, _, numbers in waiting]
        parts = torch.cat([sums for _, sums, _ in waiting], 1).cpu().split(sizes, 1)
        for (epoch, _, numbers), part in zip(waiting, parts, strict=True):
            self._take(epoch, np.array(numbers), part.numpy())

    def _take(self, epoch: int, numbers: np.ndarray, sums: np.ndarray) -> None:
        table = self._epochs.setdefault(epoch, np.zeros((2, self.num_rows), np.float32))
        real = numbers >= 0
        for values, more in zip(table, sums, strict=True):
            np.add.at(values, numbers[real], more[real])

    def parts(self) -> Parts:
        """All that this rank knows, as copies."""
        self.look()
        rows = {epoch: np.flatnonzero(table[1] > 0) for epoch, table in self._epochs.items()}
        return {epoch: (numbers, self._epochs[epoch][:, numbers]) for epoch, numbers in rows.items()}

    def take(self, parts: Parts) -> None:
        """Adds what another rank, or an earlier part of the run, knows."""
        for epoch, (numbers, sums) in parts.items():
            self._take(epoch, numbers, sums)

    def write(self, path: Path, parts: Parts) -> None:
        """Writes parts for a checkpoint."""
        tensors = {f"{epoch} rows": torch.from_numpy(numbers) for epoch, (numbers, _) in parts.items()}
        tensors |= {f"{epoch} sums": torch.from_numpy(np.ascontiguousarray(sums)) for epoch, (_, sums) in parts.items()}
        save_file(tensors, path, {"rows": self.fingerprint, "epochs": " ".join(map(str, parts)), "whole": str(self.is_whole)})
        set_default_mode(path)

    def take_up(self, folder: Path) -> bool:
        """Adds what the files of all ranks in a checkpoint hold; False if there are none, or they are of other rows, which are left alone."""
        files = sorted(folder.glob(_FILES))
        self.is_whole &= bool(files)
        for path in files:
            with safe_open(path, "pt") as file:
                known = file.metadata()
                if known["rows"] != self.fingerprint:
                    self.is_whole = False
                    return False
                self.is_whole &= known.get("whole") != "False"
                epochs = [int(epoch) for epoch in known["epochs"].split()]
                self.take({epoch: (file.get_tensor(f"{epoch} rows").numpy(), file.get_tensor(f"{epoch} sums").numpy()) for epoch in epochs})
        return bool(files)

    def means(self) -> tuple[list[int], np.ndarray]:
        """The epochs, and (rows, epochs) each row's mean loss per token: NaN where it was not trained, infinite where its loss was not finite."""
        self.look()
        epochs = sorted(self._epochs)
        found = np.full((self.num_rows, len(epochs)), np.nan, np.float32)
        for column, epoch in enumerate(epochs):
            losses, weights = self._epochs[epoch]
            seen = weights > 0
            mean = losses[seen] / weights[seen]
            found[seen, column] = np.where(np.isfinite(mean), mean, np.inf)
        return epochs, found
