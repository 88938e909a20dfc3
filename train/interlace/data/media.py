"""Images: whether they are whole, how large they are, and their pixels.

One answer for each oddity: EXIF rotation is applied; transparency is laid on white; 16 bits are scaled to 8; palettes, CMYK and grey become RGB;
of an animation the first frame is used; a truncated file is bad, never filled in.
"""

import os
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import PIL.Image

from interlace.data.places import open_bytes
from interlace.data.sample import BadRow, Place
from interlace.data.video import decode_frames

_TAIL_BYTES = 64
# What is decoded: Pillow would also run Ghostscript for a PostScript file, whatever its name
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_ORIENTATION_TAG = 0x0112
_TURNS = {  # EXIF orientation -> what makes the picture upright
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}


def check_image(place: Place, max_pixels: int) -> tuple[int, int]:
    """(width, height) after EXIF rotation, from the header; the end mark shows that the file is whole, and where it is missing a full decode decides.

    Raises:
        BadRow: empty, no image, truncated, or more than `max_pixels`.
    """
    try:
        with open_bytes(place) as file, _opened(file) as image:
            width, height = image.size
            if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
                raise BadRow("bad_image", f"{place.path} holds measurements (32 bits per pixel) with no range of brightness; save it with 8 or 16 bits")
            if width * height > max_pixels:
                raise BadRow("too_many_pixels", f"{place.path} has {width} x {height} pixels; max_image_pixels is {max_pixels}")
            if _orientation(image) in (5, 6, 7, 8):
                width, height = height, width
            if not _has_end_mark(file, image.format):
                image.load()
    except PIL.Image.DecompressionBombError as error:
        raise BadRow("too_many_pixels", f"{place.path}: {error}") from None
    except PIL.UnidentifiedImageError:
        empty = Path(place.path).stat().st_size == 0 if place.size < 0 else place.size == 0
        raise BadRow("broken_image", f"{place.path} is {'empty' if empty else 'no image that can be read'}") from None
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error) as error:  # what Pillow's decoders raise for damaged files
        raise BadRow("broken_image", f"{place.path}: {error}") from None
    return width, height


@contextmanager
def _opened(file: BinaryIO) -> Iterator[PIL.Image.Image]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
        with PIL.Image.open(file, formats=FORMATS) as image:
            yield image


def _orientation(image: PIL.Image.Image) -> int:
    """The EXIF orientation, from what stands before the pixels: asking Pillow for a PNG's EXIF would decode all of it."""
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):  # Pillow turns a TIFF itself
        return 1
    orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    return orientation if isinstance(orientation, int) else 1


def _has_end_mark(file: BinaryIO, image_format: str | None) -> bool:
    size = file.seek(0, os.SEEK_END)
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
            file.seek(4)
            return int.from_bytes(file.read(4), "little") + 8 <= size
    file.seek(0)
    return False


def open_images(places: Sequence[Place]) -> list[PIL.Image.Image]:
    """The pixels of images and video frames as 8-bit RGB, upright, in order; each video is opened once.

    Raises:
        BadRow: one that cannot be decoded.
    """
    images: dict[Place, PIL.Image.Image] = {}
    videos: dict[Place, list[Place]] = {}
    for place in places:
        if place.pts is None:
            images[place] = open_image(place)
        else:
            videos.setdefault(Place(place.path, place.offset, place.size), []).append(place)
    for video, frames in videos.items():
        images.update(zip(frames, decode_frames(video, [frame.pts for frame in frames if frame.pts is not None]), strict=True))
    return [images[place] for place in places]


def open_image(place: Place) -> PIL.Image.Image:
    """The pixels of an image as 8-bit RGB, upright.

    Raises:
        BadRow: it cannot be decoded.
    """
    try:
        with open_bytes(place) as file, _opened(file) as opened:
            orientation = _orientation(opened)
            opened.load()
            image = opened.copy()
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error) as error:
        raise BadRow("broken_image", f"{place.path}: {error}") from None
    if image.mode in ("I;16", "I;16B", "I;16L") or (image.mode == "I" and opened.format in ("PNG", "PPM")):  # what Pillow makes of 16 bits
        image = PIL.Image.fromarray(np.rint(np.asarray(image) / 257.0).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", layer.size, (255, 255, 255, 255)), layer)
    if orientation in _TURNS:
        image = image.transpose(_TURNS[orientation])
    return image.convert("RGB")
