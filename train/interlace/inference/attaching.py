"""Images and videos that a person hands to a dialogue: found, checked, and cut into the frames that the model sees.

Paths are opened wherever they point, as the person at the machine means it. Whoever answers over a network has to confine them first.
"""

import glob
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import PIL.Image

from interlace.data.download import UrlPolicy, is_url
from interlace.data.media import check_image, open_images
from interlace.data.places import MediaFolder, frame_folder
from interlace.data.sample import BadRow, Image, Place, Video
from interlace.data.video import check_video, choose_frames, choose_numbers
from interlace.errors import InputError
from interlace.inference.generation import MOST_PIXELS
from interlace.inference.sampling import check_frames


@dataclass(frozen=True, slots=True)
class Frame:
    """An image, or a frame of a video, as it was when it was attached: where it lies, its (width, height), and the file's time of change and size."""

    place: Place
    size: tuple[int, int]
    stamp: tuple[int, int]


def _frame(place: Place, size: tuple[int, int]) -> Frame:
    return Frame(place, size, _stamp(place))


def _stamp(place: Place) -> tuple[int, int]:
    stat = Path(place.path).stat()
    return stat.st_mtime_ns, stat.st_size


def open_frames(frames: Sequence[Frame]) -> list[PIL.Image.Image]:
    """Their pixels, RGB.

    Raises:
        BadRow: one cannot be decoded, is gone, or is not the file any more that was attached.
    """
    for frame in frames:
        try:
            is_same = _stamp(frame.place) == frame.stamp
        except OSError:
            raise BadRow("missing_image", f"{frame.place.path} is gone, and the model has to look at it again") from None
        if not is_same:
            raise BadRow("changed_image", f"{frame.place.path} has changed since it was attached; /undo the questions about it, and attach it again")
    return open_images([frame.place for frame in frames])


class Attachments:
    """Finds media. What comes from URLs or as bytes is kept in a folder that goes away with this object.

    Args:
        num_frames, video_fps: which frames of a video are taken, as in training.
        max_pixels: of an image or a frame.
    """

    def __init__(self, num_frames: int = 16, video_fps: float | None = None, max_pixels: int = MOST_PIXELS):
        check_frames(num_frames, video_fps)
        self.num_frames, self.video_fps, self.max_pixels = num_frames, video_fps, max_pixels
        self._folder = tempfile.TemporaryDirectory(prefix="interlace-dialogue-")
        self._kept = MediaFolder(Path(self._folder.name), UrlPolicy())

    def images(self, names: Iterable[str]) -> list[Image]:
        """Images from paths, patterns (`scans/*.png`) and URLs, checked.

        Raises:
            InputError: those that are no readable images, all of them named.
        """
        images = [Image(path) for name in names for path in _paths(name)]
        self._check(images)
        return images

    def videos(self, names: Iterable[str]) -> list[Video]:
        """The same for videos: files or folders of frames."""
        videos = [Video(path) for name in names for path in _paths(name)]
        self._check(videos)
        return videos

    def _check(self, items: Sequence[Image | Video]) -> None:
        problems = []
        for item in items:
            try:
                self.frames(item)
            except BadRow as error:
                problems.append(error.detail)
        if problems:
            raise InputError("\n".join(problems))

    def frames(self, item: Image | Video) -> tuple[Frame, ...]:
        """What the model sees of a medium, in order. No image is decoded whose end mark is there.

        Raises:
            BadRow: it cannot be found or read.
        """
        if isinstance(item, Image):
            place = self._find(item, "image")
            return (_frame(place, check_image(place, self.max_pixels)),)
        if item.frames:
            places = [self._find(frame, "image") for frame in item.frames]
        else:
            place = self._find(item, "video")
            if not Path(place.path).is_dir():
                index = check_video(place, self.max_pixels)
                chosen = choose_frames(index, self.num_frames, self.video_fps)
                return tuple(_frame(replace(place, pts=pts), (index.width, index.height)) for pts in chosen)
            places = [Place(str(path)) for path in frame_folder(Path(place.path))]
        places = [places[number] for number in choose_numbers(len(places), self.num_frames)]
        return tuple(_frame(place, check_image(place, self.max_pixels)) for place in places)

    def _find(self, item: Image | Video, kind: str) -> Place:
        if item.data is not None:
            return self._kept.keep(item.data)
        if is_url(item.path):
            return self._kept.fetch(item.path)
        try:
            path = Path(item.path).resolve()
            if path.is_file() or (kind == "video" and path.is_dir()):
                return Place(str(path))
        except (OSError, ValueError) as error:  # too long, or with a null byte
            raise BadRow(f"bad_{kind}", f"{item.path[:80]!r} is no file name: {error}") from None
        raise BadRow(f"missing_{kind}", f"{item.path}: no such {kind}")


def _paths(name: str) -> list[str]:
    """The files of a pattern, in order; a name that is a file, a URL or no pattern is itself."""
    if is_url(name):
        return [name]
    name = str(Path(name).expanduser())
    return [name] if not glob.has_magic(name) or Path(name).exists() else sorted(glob.glob(name)) or [name]
