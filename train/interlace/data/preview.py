"""What the model will see of each row, as data."""

from typing import Any

from interlace.data.dataset import Outcome
from interlace.data.lengths import expand


def preview_line(outcome: Outcome, image_token_id: int) -> dict[str, Any]:
    """One row of `preview_data.py --json`: `input_ids` and `labels` expanded, as they are trained; a skipped row carries none."""
    entry = outcome.entry
    line: dict[str, Any] = {
        "file": outcome.record.file,
        "index": outcome.record.index,
        "status": "trained" if entry is None else entry.status,
        "reason": None if entry is None else f"{entry.reason}: {entry.detail}",
        "length": None,
        "num_images": None,
    }
    if outcome.row is not None:
        ids, labels, _ = expand(outcome.row.encoded, outcome.row.image_tokens, image_token_id)
        line |= {"length": outcome.row.length, "num_images": len(outcome.row.image_paths), "input_ids": ids.tolist(), "labels": labels.tolist()}
    return line
