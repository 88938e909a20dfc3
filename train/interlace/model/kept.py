"""What a model has in its authors' layout and the hub's has no place for: kept beside the hub's files, in one folder, for the way back."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from interlace.files import set_default_mode, write_json
from interlace.model.layouts import VISION, read_settings
from interlace.model.original import Original
from interlace.model.tokenizer_files import copy_tokenizer
from interlace.model.weight_files import StoredTensor, fingerprint, safetensors_of

KEPT = "llava_original"  # serving tools read every weight that lies beside a model, but none in folders below
_SETTINGS, _WEIGHTS, _TOWER = "config.json", "weights.safetensors", "vision_tower.json"
_GENERATION = "generation_config.json"


def keep_aside(original: Original, folder: Path) -> None:
    """Writes it into a model's folder in hub layout."""
    kept = folder / KEPT
    kept.mkdir(exist_ok=True)
    write_json(kept / _SETTINGS, original.settings)
    write_json(kept / _TOWER, {"fingerprint": fingerprint(_tower(original.tensors))})
    if original.kept:
        save_file({name: tensor.load().contiguous() for name, tensor in original.kept.items()}, kept / _WEIGHTS, {"format": "pt"})
        set_default_mode(kept / _WEIGHTS)
    copy_text_files(original.folder, kept)


def hand_on(source: Path, folder: Path) -> None:
    """Copies what is kept of one model in hub layout to another that was made of it; of a port, SentencePiece's file, which newer libraries do not write."""
    if (source / KEPT).is_dir():
        shutil.copytree(source / KEPT, folder / KEPT, copy_function=shutil.copyfile, dirs_exist_ok=True)
    elif (source / "tokenizer.model").is_file():
        (folder / KEPT).mkdir(exist_ok=True)
        shutil.copyfile(source / "tokenizer.model", folder / KEPT / "tokenizer.model")


def has_original(folder: Path) -> bool:
    """Whether a model in hub layout was made of one in its authors'."""
    return (folder / KEPT / _SETTINGS).is_file()


def kept_settings(folder: Path, tensors: Mapping[str, StoredTensor]) -> dict[str, Any] | None:
    """The original config.json of a model in hub layout, if there was one; it says when the vision tower is no longer the one of that model.

    Args:
        tensors: the model's weights by their names on the hub.
    """
    kept = folder / KEPT
    if not has_original(folder):
        return None
    settings = read_settings(kept / _SETTINGS)
    if read_settings(kept / _TOWER)["fingerprint"] != fingerprint(_tower(tensors)):
        settings["unfreeze_mm_vision_tower"] = True  # without it the authors' towers load their published weights in place of the file's
    return settings


def kept_weights(folder: Path) -> dict[str, StoredTensor]:
    """Weights of the original that the hub layout has no place for, by their original names."""
    path = folder / KEPT / _WEIGHTS
    return safetensors_of(path) if path.is_file() else {}


def copy_text_files(source: Path, folder: Path) -> None:
    """Copies the files of a tokenizer, and how its model generates."""
    copy_tokenizer(source, folder)
    if (source / _GENERATION).is_file():
        shutil.copyfile(source / _GENERATION, folder / _GENERATION)


def _tower(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(VISION)}
