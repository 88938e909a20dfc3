"""Weights as they lie in files, whoever wrote them: what is there is known from headers, and each tensor is read by itself, when it is asked for."""

import hashlib
import json
import math
import pickle
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from interlace.errors import InputError
from interlace.files import set_default_mode

SHARD_BYTES = 1 << 30  # of the files we write; what is held in memory at a time
_SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32}
_SAFETENSORS |= {"U8": torch.uint8, "I8": torch.int8, "BOOL": torch.bool, "I16": torch.int16, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64}
_SAFETENSORS |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
_PADDLE = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "uint16": torch.bfloat16, "int64": torch.int64, "int32": torch.int32}
PADDLE_FILE = "model_state.pdparams"
_LFS_POINTER = b"version https://git-lfs.github.com/"
_BEGINNINGS = {".bin": (b"PK", b"\x80"), ".pdparams": (b"\x80",)}  # zip archives, pickles


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is still in its file: its shape and type, and how to read it, or its beginning (the first entry of its first axis) alone."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]
    load_first: Callable[[], torch.Tensor] | None = None

    @property
    def first(self) -> torch.Tensor:
        """Its beginning."""
        if self.load_first is not None:
            return self.load_first()
        return self.load()[:1] if self.shape else self.load()

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return math.prod(self.shape) * self.dtype.itemsize

    def changed(self, shape: tuple[int, ...], change: Callable[[torch.Tensor], torch.Tensor]) -> "StoredTensor":
        """The same tensor, changed when it is read."""
        return replace(self, shape=shape, load=lambda: change(self.load()), load_first=None)


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Name -> tensor of all weights in a model's folder: safetensors, torch's `.bin` or Paddle's `model_state.pdparams`, in one file or several.

    Raises:
        InputError: there are none, a file is missing or broken, or holds more than tensors (nothing in it is run).
    """
    for pattern, read in (("model.safetensors", safetensors_of), ("pytorch_model.bin", _torch_file), (PADDLE_FILE, _paddle_file)):
        index = folder / f"{pattern}.index.json"
        if (folder / pattern).is_file():  # as transformers looks: an index beside it is of an older model
            return _read(folder / pattern, read)
        if index.is_file():
            return _from_index(index, read)
    raise InputError(f"{folder}: no weights in this folder; expected model.safetensors, pytorch_model.bin or {PADDLE_FILE}, or an index of one of them")


def _from_index(index: Path, read: Callable[[Path], dict[str, StoredTensor]]) -> dict[str, StoredTensor]:
    try:
        places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError) as error:
        raise InputError(f"{index}: no index of weights: {error!r}") from None
    files = sorted(set(places.values()))
    missing = [name for name in files if not (index.parent / name).is_file()]
    if missing:
        raise InputError(f"{index.parent}: {len(missing)} of {len(files)} files of weights are missing: {', '.join(missing)}; fetch the model once more")
    found: dict[str, StoredTensor] = {}
    for name in files:
        found |= _read(index.parent / name, read)
    if absent := sorted(set(places) - set(found)):
        raise InputError(f"{index.parent}: {len(absent)} weights of the index are in no file, {absent[0]} among them")
    return found


class _CodeError(Exception):
    """A file wants code run."""


def _read(path: Path, read: Callable[[Path], dict[str, StoredTensor]]) -> dict[str, StoredTensor]:
    _check_beginning(path)
    try:
        return read(path)
    except _CodeError as error:
        reason = str(error).split("\n", maxsplit=1)[0]
        raise InputError(f"{path}: refused: a file of weights must hold tensors and nothing else, and this one wants code run ({reason})") from None
    except (SafetensorError, pickle.UnpicklingError, OSError, RuntimeError, IndexError, EOFError, ValueError, struct.error) as error:
        reason = str(error).split("\n", maxsplit=1)[0]
        raise InputError(f"{path} cannot be read: {reason}; it may be half-downloaded: fetch it once more") from None


def _check_beginning(path: Path) -> None:
    """Tells what is no such file at all from one that is broken, or wants code run."""
    with path.open("rb") as file:
        start = file.read(len(_LFS_POINTER))
    if start == _LFS_POINTER:
        raise InputError(f"{path} is a git-LFS pointer, which stands for the weights; fetch them with git lfs pull, or hf download")
    if path.suffix in _BEGINNINGS and not start.startswith(_BEGINNINGS[path.suffix]):
        raise InputError(f"{path} cannot be read: it is no file of weights; it may be half-downloaded, or a page of an error: fetch it once more")


def safetensors_of(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file."""

    def load(name: str) -> torch.Tensor:
        with safe_open(path, "pt") as file:
            return file.get_tensor(name)

    def first(name: str) -> torch.Tensor:
        with safe_open(path, "pt") as file:
            return file.get_slice(name)[:1]

    with safe_open(path, "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        if unknown := {part.get_dtype() for part in slices.values()} - set(_SAFETENSORS):
            raise InputError(f"{path}: tensors of a type that is not known: {', '.join(sorted(unknown))}")
        return {
            name: StoredTensor(tuple(part.get_shape()), _SAFETENSORS[part.get_dtype()], partial(load, name), partial(first, name) if part.get_shape() else None)
            for name, part in slices.items()
        }


def _torch_file(path: Path) -> dict[str, StoredTensor]:
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # what is not used stays in the file
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            content = torch.load(path, map_location="cpu", weights_only=True)  # older than torch 1.6
    except pickle.UnpicklingError as error:
        raise _CodeError(str(error)) from None
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, expected tensors by their names")
    tensors = {name: tensor for name, tensor in content.items() if isinstance(tensor, torch.Tensor)}
    return {name: StoredTensor(tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor) for name, tensor in tensors.items()}  # type: ignore[misc]


# --- Paddle: a pickle of {name: numpy array} ---


@dataclass(frozen=True)
class _Bytes:
    """Bytes that were left in the file."""

    offset: int


class _Array:
    """Stands for a numpy array while a pickle is read."""

    def __setstate__(self, state: tuple[Any, tuple[int, ...], np.dtype[Any], bool, "bytes | _Bytes"]) -> None:
        _, self.shape, self.dtype, self.is_fortran, self.data = state

    def read(self, path: Path) -> torch.Tensor:
        """Its contents; 16 bits without a sign are bfloat16, which numpy does not know."""
        order: Any = "F" if self.is_fortran else "C"
        if isinstance(self.data, _Bytes):
            values: Any = np.memmap(path, self.dtype, "r", self.data.offset, self.shape, order)
        else:
            values = np.frombuffer(self.data, self.dtype).reshape(self.shape, order=order)
        tensor = torch.from_numpy(np.array(values, order="C"))
        return tensor.view(torch.bfloat16) if self.dtype.name == "uint16" else tensor


class _ArrayUnpickler(pickle._Unpickler):
    """Reads numpy arrays and plain containers; large contents stay in the file, and nothing else can be made or called."""

    _LARGE = 1 << 16
    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)  # type: ignore[attr-defined]

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return lambda *_: _Array()
        if (module, name) == ("numpy", "ndarray"):
            return _Array
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        if (module, name) == ("_codecs", "encode"):  # how older pickles write bytes
            return lambda text, _: text.encode("latin1")
        raise _CodeError(f"{module}.{name}")

    def _take(self, size: int) -> None:
        reader: Any = self
        frame = reader._unframer.current_frame
        if size < self._LARGE or (frame is not None and frame.tell() < len(frame.getbuffer())):
            reader.append(reader.read(size))
            return
        reader._unframer.current_frame = None
        reader.append(_Bytes(reader._file.tell()))
        reader._file.seek(size, 1)

    def load_binbytes(self) -> None:
        self._take(struct.unpack("<I", self.read(4))[0])  # type: ignore[attr-defined]

    def load_binbytes8(self) -> None:
        self._take(struct.unpack("<Q", self.read(8))[0])  # type: ignore[attr-defined]

    dispatch[pickle.BINBYTES[0]] = load_binbytes
    dispatch[pickle.BINBYTES8[0]] = load_binbytes8


def _paddle_file(path: Path) -> dict[str, StoredTensor]:
    with path.open("rb") as file:
        reader: Any = _ArrayUnpickler(file)
        reader._file = file
        content = reader.load()
    if not isinstance(content, dict):
        raise pickle.UnpicklingError(f"a {type(content).__name__}, not a table of weights")
    if "UnpackBigParamInfor@@" in content:
        raise InputError(f"{path}: weights cut into pieces, as pickle protocols below 4 need; save it with paddle.save(.., protocol=4)")
    arrays = {name: value for name, value in content.items() if isinstance(value, _Array)}
    if unknown := {str(array.dtype) for array in arrays.values()} - set(_PADDLE):
        raise InputError(f"{path}: weights of type {', '.join(sorted(unknown))}; expected {', '.join(_PADDLE)} (uint16 for bfloat16)")
    size = path.stat().st_size
    for name, array in arrays.items():
        if isinstance(array.data, _Bytes) and array.data.offset + math.prod(array.shape) * array.dtype.itemsize > size:
            raise EOFError(f"it ends within {name}")
    return {name: StoredTensor(tuple(array.shape), _PADDLE[str(array.dtype)], partial(array.read, path)) for name, array in arrays.items()}


def fingerprint(tensors: Mapping[str, StoredTensor]) -> str:
    """A hash of the names and the beginnings of weights, the same in every floating point type that holds them."""
    content = hashlib.sha256()
    for name in sorted(tensors):
        content.update(name.encode() + tensors[name].first.float().numpy().tobytes())
    return content.hexdigest()[:32]


# --- writing ---


def write_sharded(tensors: Mapping[str, StoredTensor], folder: Path, progress: Callable[[Iterable[Any]], Iterable[Any]] = iter) -> None:
    """Writes weights as safetensors, at most about `SHARD_BYTES` of them in memory at a time; one file, or several with an index.

    Args:
        progress: wraps the files on their way.
    """
    shards = [[name for name, _ in group] for _, group in groupby(_numbered(tensors), lambda pair: pair[1])]
    names = ["model.safetensors"] if len(shards) == 1 else [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, 1 + len(shards))]
    for name, shard in progress(list(zip(names, shards, strict=True))):
        save_file({key: tensors[key].load().contiguous() for key in shard}, folder / name, {"format": "pt"})
        set_default_mode(folder / name)
    if len(shards) > 1:
        places = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}, "weight_map": dict(sorted(places.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _numbered(tensors: Mapping[str, StoredTensor]) -> Iterator[tuple[str, int]]:
    """(name, number of its file), in order."""
    number = used = 0
    for name, tensor in tensors.items():
        if used and used + tensor.nbytes > SHARD_BYTES:
            number, used = number + 1, 0
        used += tensor.nbytes
        yield name, number
