"""Images: where they lie, whether they are whole, how large they are, and their pixels.

One answer for each oddity: EXIF rotation is applied; transparency is laid on white; 16 bits are scaled to 8; palettes, CMYK and grey become RGB;
of an animation the first frame is used; a truncated file is bad, never filled in.
"""

import struct
import warnings
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps

from interlace.data.sample import BadRow

_TAIL_BYTES = 64
_LONGEST_PATH = 1024
# What is decoded: Pillow would also run Ghostscript for a PostScript file, whatever its name
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_ROTATED = {5, 6, 7, 8}  # EXIF orientations that swap width and height
_ORIENTATION_TAG = 0x0112


@lru_cache(maxsize=100_000)
def locate(path: str, roots: tuple[Path, ...]) -> Path:
    """The absolute path of an image written as `path`: under the first of `roots` that has it, never outside all of them.

    Raises:
        BadRow: a URL; outside the roots; missing; no regular file.
    """
    if "\0" in path or len(path.encode("utf-8", "replace")) > _LONGEST_PATH:
        raise BadRow("bad_image", f"{path[:80]!r} is no file name")
    if "://" in path or path.startswith("data:"):
        raise BadRow("url", f"{path[:80]!r}: images must be files; URLs and embedded data are not opened")
    folders = [root.resolve() for root in roots]
    try:
        candidates = [(folder / path).resolve() for folder in folders]
    except OSError as error:
        raise BadRow("bad_image", f"{path[:80]!r} is no file name: {error.strerror}") from None
    inside = [place for place in candidates if any(place.is_relative_to(folder) for folder in folders)]
    if not inside:
        raise BadRow("outside_folder", f"{path!r} lies outside {', '.join(map(str, roots))}; name its folder in `image_folder` or `media_roots`")
    for place in inside:
        try:
            found = place.is_file()
        except OSError as error:
            raise BadRow("bad_image", f"{path[:80]!r} is no file name: {error.strerror}") from None
        if found:
            return place
        if place.exists():
            raise BadRow("not_a_file", f"{place} is no regular file")
    raise BadRow("missing_image", f"{inside[0]} does not exist")


def check_image(path: Path, max_pixels: int) -> tuple[int, int]:
    """(width, height) after EXIF rotation, from the header; the end mark shows that the file is whole, and where it is missing a full decode decides.

    Raises:
        BadRow: empty, no image, truncated, or more than `max_pixels`.
    """
    if path.stat().st_size == 0:
        raise BadRow("broken_image", f"{path} is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
            with PIL.Image.open(path, formats=FORMATS) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise BadRow("too_many_pixels", f"{path} has {width} x {height} pixels; max_image_pixels is {max_pixels}")
                if image.getexif().get(_ORIENTATION_TAG) in _ROTATED:
                    width, height = height, width
                if not _has_end_mark(path, image.format):
                    image.load()
    except PIL.Image.DecompressionBombError as error:
        raise BadRow("too_many_pixels", f"{path}: {error}") from None
    except PIL.UnidentifiedImageError:
        raise BadRow("broken_image", f"{path} is no image that can be read") from None
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error) as error:  # what Pillow's decoders raise for damaged files
        raise BadRow("broken_image", f"{path}: {error}") from None
    return width, height


def _has_end_mark(path: Path, image_format: str | None) -> bool:
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(12)
        file.seek(max(0, size - _TAIL_BYTES))
        tail = file.read()
    match image_format:
        case "JPEG":
            return b"\xff\xd9" in tail
        case "PNG":
            return b"IEND\xaeB`\x82" in tail
        case "GIF":
            return tail.rstrip(b"\x00").endswith(b";")
        case "WEBP":
            return int.from_bytes(head[4:8], "little") + 8 <= size
    return False


def open_image(path: str | Path) -> PIL.Image.Image:
    """The pixels of an image file as 8-bit RGB, upright."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
        with PIL.Image.open(path, formats=FORMATS) as opened:
            opened.load()
            image = PIL.ImageOps.exif_transpose(opened)
    if image.mode in ("I;16", "I;16B", "I;16L", "I"):
        image = PIL.Image.fromarray(np.rint(np.asarray(image) / 257.0).clip(0, 255).astype(np.uint8))
    if image.mode == "F":
        image = PIL.Image.fromarray(np.asarray(image).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", layer.size, (255, 255, 255, 255)), layer)
    return image.convert("RGB")
