"""Where the files of a model are: in a folder, or on the hub, from which they are fetched."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from interlace.errors import InputError

_OTHER_WEIGHTS = ["*.onnx", "*.gguf", "*.msgpack", "*.h5", "*.pth", "original/*"]  # of no use here, though the hub may have them


def local_folder(path: str, may_fetch: bool = True, patterns: Sequence[str] | None = None) -> Path:
    """The folder of a model: itself, or where the hub's files are kept, fetched first if need be.

    Args:
        patterns: of the files that are wanted; None for all that may be of use.

    Raises:
        InputError: nothing is kept, and nothing may or can be fetched.
    """
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(
            snapshot_download(path, local_files_only=not may_fetch, allow_patterns=list(patterns) if patterns else None, ignore_patterns=_OTHER_WEIGHTS)
        )
    except (OSError, HFValidationError) as error:
        reason = str(error).split("\n", maxsplit=1)[0]
        raise InputError(f"{path} is no folder here, and cannot be had from the hub: {reason}; check the name, and the connection") from None


def file_of(path: str, name: str) -> Path | None:
    """A small file of a model, from its folder or the hub; None where there is none."""
    if Path(path).is_dir():
        return Path(path) / name if (Path(path) / name).is_file() else None
    try:
        return Path(hf_hub_download(path, name))
    except (OSError, ValueError, HfHubHTTPError):
        return None
