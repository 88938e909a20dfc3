"""Answers of an evaluation that is under way, on disk: one that was ended goes on where it was."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from interlace.data.reading import Outcome
from interlace.model.hub import local_folder
from interlace.model.loading import base_of, resolve_model_path


class PartialPredictions:
    """A file for each rank in the output folder, a line for each answer. Another model, other rows or settings have files of another name.

    Args:
        output_dir: made if it is not there.
        fingerprint: of all that the answers depend on; see `fingerprint_of`.
        rank: whose file is written; those of all ranks are read.
    """

    def __init__(self, output_dir: Path, fingerprint: str, rank: int):
        output_dir.mkdir(parents=True, exist_ok=True)
        self.fingerprint = fingerprint
        self._folder, self._stem, self._path = output_dir, f"predictions.{fingerprint}", output_dir / f"predictions.{fingerprint}.{rank}.partial"

    def read(self) -> dict[int, str]:
        """Number of the row -> answer, as far as there are any."""
        found = {}
        for path in self._folder.glob(f"{self._stem}.*.partial"):
            for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
                with suppress(json.JSONDecodeError):  # half a line, which was being written when the run ended
                    number, answer = json.loads(line)
                    found[number] = answer
        return found

    def add(self, answers: Mapping[int, str]) -> None:
        """Keeps answers of some rows."""
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(f"\n{json.dumps([number, answer])}" for number, answer in answers.items())

    def remove(self) -> None:
        """Deletes the files of all ranks, once the predictions are written."""
        for path in self._folder.glob(f"{self._stem}.*.partial"):
            path.unlink(missing_ok=True)


def kept_answers(options: Mapping[str, Any], outcomes: Sequence[Outcome], rank: int) -> tuple[PartialPredictions, PartialPredictions]:
    """Where the answers to some rows are kept, and those to the same rows with images changed.

    Args:
        options: of evaluate_model.py.
    """
    answered = fingerprint_of(options["model_path"], outcomes, {name: options[name] for name in ("max_new_tokens", "dtype", "load_in_4bit", "load_in_8bit")})
    changed = f"{answered}-{options['seed']}-{options['diagnose_rows']}-{'-'.join(options['diagnose'] or ())}"
    return PartialPredictions(options["output_dir"], answered, rank), PartialPredictions(options["output_dir"], changed, rank)


def fingerprint_of(model_path: str, outcomes: Sequence[Outcome], settings: Mapping[str, Any]) -> str:
    """A hash of the model's files by name, size and time, of the rows and their media by name, and of settings: 16 hexadecimal digits."""
    path = resolve_model_path(model_path)
    content = hashlib.sha256(json.dumps(dict(settings), sort_keys=True).encode())
    for folder in dict.fromkeys(map(local_folder, (path, base_of(path)))):
        files = sorted(file for file in folder.iterdir() if file.is_file())
        content.update(repr([(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]).encode())
    for outcome in outcomes:
        assert outcome.row is not None
        row = outcome.row
        content.update(repr((row.file, row.index, row.images, row.image_tokens)).encode() + row.encoded.input_ids.tobytes())
    return content.hexdigest()[:16]
