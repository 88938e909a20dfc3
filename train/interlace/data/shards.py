"""WebDataset shards: the members of a tar archive -> rows; pictures of an uncompressed archive stay where they are."""

import gzip
import json
import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interlace.data.sample import IMAGE_SUFFIXES, VIDEO_SUFFIXES, BadRow, Place
from interlace.errors import InputError

_CHUNK_BYTES = 1 << 20
_LARGEST_MEMBER = 256 << 20


@dataclass(frozen=True, slots=True)
class ArchiveRow:
    """A record from an archive and the media that lie beside it there, by name: where they are, or (from a compressed one) their bytes."""

    value: Any
    members: Mapping[str, Place | bytes]


def tar_rows(path: Path) -> Iterator[tuple[int, Any, float]]:
    """A WebDataset shard: members that share a name up to the first dot make one row (`0001.json`, `0001.jpg`, `0001.1.jpg`, ..)."""
    packed = not path.name.lower().endswith(".tar")
    size, index = path.stat().st_size, 0
    key, position = "", 0.0
    group: dict[str, bytes | Place] = {}
    try:
        with tarfile.open(path, "r:gz" if packed else "r:") as archive:
            for member in archive:
                if not packed and member.offset_data + member.size > size:
                    raise tarfile.ReadError(f"{member.name} is cut off")
                if packed and member.size > _LARGEST_MEMBER:
                    raise tarfile.ReadError(f"{member.name} has {member.size:,} bytes; members of a compressed archive may have {_LARGEST_MEMBER:,}")
                if not member.isfile() or member.name.rpartition("/")[2].startswith("."):
                    continue
                folder, _, name = member.name.rpartition("/")
                stem = f"{folder}/{name.partition('.')[0]}" if folder else name.partition(".")[0]
                if group and stem != key:
                    yield index, _tar_row(group), position
                    index, group = index + 1, {}
                key, position = stem, 0.0 if packed else member.offset_data / size
                is_text = name.lower().endswith((".json", ".txt"))
                extracted = archive.extractfile(member) if packed or is_text else None
                group[member.name] = extracted.read() if extracted else Place(str(path.resolve()), member.offset_data, member.size)
            _check_tar_end(archive)
        if group:
            yield index, _tar_row(group), 1.0
            index += 1
    except (tarfile.ReadError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        if index == 0 and not group:
            raise InputError(f"{path}: no complete tar archive: {error}") from None
        yield index, BadRow("broken_archive", f"the archive breaks off at {key or 'its beginning'}: {error}; what follows is lost"), 1.0
        index += 1
    if index == 0:
        raise InputError(f"{path}: the archive holds no rows")


def _check_tar_end(archive: tarfile.TarFile) -> None:
    """Only zeros may follow the last member: `tarfile` stops without a word at a damaged header, and at the end mark of the first of two joined archives."""
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    length = 0
    while piece := archive.fileobj.read(_CHUNK_BYTES):
        if piece.strip(b"\0"):
            raise tarfile.ReadError("no member begins where one should, but the file goes on")
        length += len(piece)
    if length < 1024:
        raise tarfile.ReadError("its end mark is missing")


def _member_order(name: str) -> tuple[list[str | int], str]:
    """`1.jpg` before `1.2.jpg` before `1.10.jpg`."""
    middle = name.rpartition("/")[2].partition(".")[2].rpartition(".")[0]
    return [int(part) if i % 2 else part for i, part in enumerate(re.split("([0-9]+)", middle))], name


def _tar_row(group: Mapping[str, bytes | Place]) -> Any:
    """The record of a shard's sample: its json; media it does not name are its images and videos, by name. A text alone is a caption."""
    texts = {name: value for name, value in group.items() if isinstance(value, bytes) and name.lower().endswith((".json", ".txt"))}
    media = {name: value for name, value in group.items() if name not in texts}
    record = next((_member_json(name, value) for name, value in texts.items() if name.endswith(".json")), None)
    if isinstance(record, BadRow):
        return record
    images, videos = (sorted((name for name in media if name.lower().endswith(suffixes)), key=_member_order) for suffixes in (IMAGE_SUFFIXES, VIDEO_SUFFIXES))
    if record is None:
        caption = next((value.decode("utf-8", "replace") for name, value in texts.items() if name.endswith(".txt")), None)
        if caption is None:
            return BadRow("unknown_format", f"neither .json nor .txt among {', '.join(sorted(group))}")
        if not images and not videos:
            return BadRow("missing_image", f"a caption without its picture: {', '.join(sorted(group))}")
        record = {"conversations": [["<image>" * len(images) + "<video>" * len(videos), caption.strip()]]}
    if isinstance(record, dict):
        for name, names in (("image", images), ("video", videos)):
            if names and not any(record.get(key) for key in (name, f"{name}s")):
                record[name] = names
    short = {name.rpartition("/")[2]: value for name, value in media.items()}
    return ArchiveRow(record, {**short, **media})


def _member_json(name: str, value: bytes) -> Any:
    try:
        return json.loads(value.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        return BadRow("bad_json", f"{name}: {error}")
