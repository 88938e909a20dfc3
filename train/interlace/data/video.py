"""Videos: whether they are whole, when each of their frames is shown, which frames are taken, and their pixels.

A video is decided on before training from its container; one picture is decoded, which alone knows its rotation. Training decodes the chosen frames by seeking.

One answer for each oddity:
- The frames are those of the first video stream; cover art is no video. A frame is named by the time it is shown at; frames that share a time are one.
- Variable frame rate: `num_frames` is uniform over frames, `video_fps` over time. The picture of a frame that the decoder leaves out is the one on screen then.
- A file that ends before it says it ends is bad, whichever part is missing, and so is one with a broken packet: nothing is shortened or filled in.
  MPEG-TS, MPEG-PS, ASF, FLV, fragmented mp4 and live recordings do not say where they end: cut between two pieces, they are what is left.
- Pictures that need something before the first keyframe cannot be decoded and do not count; neither do those an edit list cuts off, nor VP8's invisible ones.
- Rotation and mirroring (the display matrix) are applied. Non-square pixels stay as they are stored, interlaced pictures interlaced.
- Colours follow the range and matrix that the video states (BT.601 if none); more than 8 bits become 8 without tone mapping; transparency is laid on white.
- VP8 and VP9 keep transparency in a picture of its own, which is left out. A size that changes midway is scaled to the first.
- AVI keeps no presentation times: H.264 and H.265 with reordered pictures are counted from the beginning there, not sought.
- A frame that rests on one the decoder had to patch up is bad.
Only the containers of `FORMATS` are opened, and only as bytes: a playlist (HLS, DASH, concat, SDP) would name other files and hosts.
"""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from typing import Any, BinaryIO

import av
import numpy as np
import PIL.Image
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from interlace.data.places import open_bytes
from interlace.data.sample import BadRow, Place

FORMATS = "mov,matroska,avi,mpegts,mpeg,flv,asf,gif"  # names of demuxers: mov is mp4 too, matroska webm
_BOXES = frozenset(b"ftyp styp moov moof mdat free skip wide pnot uuid sidx ssix mfra meta pdin prft emsg".split())
# Signs of a, b, c, d in a display matrix, which takes (x, y) to (ax + cy, bx + dy) -> what makes the picture upright
_TURNS: dict[tuple[int, ...], PIL.Image.Transpose] = {
    (-1, 0, 0, 1): PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    (-1, 0, 0, -1): PIL.Image.Transpose.ROTATE_180,
    (0, 1, -1, 0): PIL.Image.Transpose.ROTATE_270,
    (0, -1, 1, 0): PIL.Image.Transpose.ROTATE_90,
    (0, 1, 1, 0): PIL.Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): PIL.Image.Transpose.TRANSVERSE,
}


@dataclass(frozen=True, eq=False, slots=True)
class VideoIndex:
    """What is known of a video without decoding its frames.

    `width`, `height` of its upright pictures; `pts` (n,) int64, the time each frame is shown at in units of `time_base` seconds, rising;
    `duration` from the first frame to the end of the last, in seconds.
    """

    width: int
    height: int
    pts: np.ndarray
    time_base: Fraction
    duration: float


def check_video(place: Place, max_pixels: int) -> VideoIndex:
    """The index of a video. The payload of an mp4 is not read; a container without a full index is read to its end.

    Raises:
        BadRow: `broken_video` (empty, no video, cut off, undecodable), `empty_video` (no video stream, no frames), `too_many_pixels` in a picture.
    """
    with _open(place, max_pixels) as (container, stream, file):
        width, height = stream.codec_context.width, stream.codec_context.height
        if width * height > max_pixels:
            raise BadRow("too_many_pixels", f"{place.path} has {width} x {height} pixels; max_image_pixels is {max_pixels}")
        times, end, first, whole = _scan(container, stream, file)
        time_base = stream.time_base or Fraction(1)
        declared = max(float((stream.duration or 0) * time_base), (container.duration or 0) / av.time_base)
        duration = float((end - times[0]) * time_base) if times else 0.0
        if file.cut or not whole:
            raise BadRow("broken_video", f"{place.path} is {file.cut or 'cut off or damaged'}; it is readable to {duration:.1f} of {declared:.1f} s")
        if first is None or not times:
            raise BadRow("empty_video", f"{place.path} has no frame that can be decoded")
    if _matrix(first)[0] == 0:
        width, height = height, width
    return VideoIndex(width, height, np.array(times, np.int64), time_base, duration)


def choose_frames(index: VideoIndex, num_frames: int, video_fps: float | None = None) -> list[int]:
    """The times of the frames to take, rising, in units of `time_base`.

    Without `video_fps`, `choose_numbers` of all frames; with it, of the frames nearest to every 1 / `video_fps` seconds from the first.
    """
    pts = index.pts
    if video_fps is not None:
        times = (pts - pts[0]) * float(index.time_base)
        ticks = np.arange(0, times[-1] + 1e-6, 1 / video_fps)
        pts = pts[np.unique(np.searchsorted((times[1:] + times[:-1]) / 2, ticks))]
    return [int(pts[number]) for number in choose_numbers(len(pts), num_frames)]


def choose_numbers(count: int, num_frames: int) -> list[int]:
    """Which of `count` frames to take: all if there are no more than `num_frames`, else evenly from the first to the last.

    Source: LLaVA-NeXT, llava/train/train.py, `np.linspace(0, total - 1, num_frames, dtype=int)`.
    """
    return list(range(count)) if count <= num_frames else [int(number) for number in np.linspace(0, count - 1, num_frames)]


def decode_frames(place: Place, pts: Sequence[int]) -> list[PIL.Image.Image]:
    """The frames of a video on screen at the times `pts`, in that order, as 8-bit RGB, upright; the same for a time whatever else is asked for.

    Raises:
        BadRow: `broken_video`, one cannot be decoded.
    """
    wanted = sorted(set(pts))
    images = _decode(place, wanted, seeking=True)
    missing = [time for time in wanted if time not in images]
    if missing:  # what cannot be sought, or does not decode from where the container says it would
        images |= _decode(place, missing, seeking=False)
    if len(images) < len(wanted):
        raise BadRow("broken_video", f"{place.path} is damaged: {len(wanted) - len(images)} of {len(wanted)} frames cannot be decoded")
    return [images[time] for time in pts]


def _decode(place: Place, wanted: Sequence[int], seeking: bool) -> dict[int, PIL.Image.Image]:
    """Those of the wanted frames, rising, that could be decoded. Seeks where a keyframe lies between two of them."""
    images = {}
    with _open(place) as (container, stream, _):
        size = stream.codec_context.width, stream.codec_context.height
        starts = [_keyframe_before(container, stream, time) if seeking else None for time in wanted]
        playback, began = None if seeking else _Playback(container, stream, sought=False), 0
        for time, start in zip(wanted, starts, strict=True):
            if start is not None and (playback is None or start[0] > began):
                container.seek(start[1], stream=stream)
                playback, began = _Playback(container, stream, sought=True), start[0]
            frame = playback.frame_at(time) if playback is not None else None
            if frame is not None:
                images[time] = _upright(frame, size)
    return images


def _keyframe_before(container: InputContainer, stream: VideoStream, time: int) -> tuple[int, int] | None:
    """The time of the last keyframe shown at or before `time`, and where to seek for it; None where it cannot be sought.

    Reads one packet and decodes nothing. Seeking goes by the order of decoding, or lands somewhere near: if too late, again from further back.
    """
    if _keeps_no_times(container, stream):
        return None
    at = time
    for back in (1, *(round((1 << power) / (stream.time_base or 1)) for power in range(13))):  # one tick; 1, 2, 4 .. seconds
        try:
            container.seek(at, stream=stream)
        except av.FFmpegError:
            return None
        shown, packet = next(_packets(container, stream), (math.inf, None))
        if shown <= time:
            return int(shown), at
        at = min(time, time if packet is None or packet.dts is None else packet.dts) - back
    return None


class _Playback:
    """What is on screen, from the keyframe on at which a container stands; decodes as far as is asked for."""

    def __init__(self, container: InputContainer, stream: VideoStream, sought: bool):
        self.fed: list[int] = []  # the times of the packets that were decoded, a keyframe's first
        self.shown: tuple[int, VideoFrame] | None = None
        self.ahead: tuple[int, VideoFrame] | None = None
        self.patched = False  # what is shown rests on a frame that the decoder had to patch up
        self.frames = self._decode(container, stream, sought)

    def frame_at(self, time: int) -> VideoFrame | None:
        """The frame on screen at `time`, which must not be before the time asked for last; None if it cannot be decoded from here."""
        while self.shown is None or self.shown[0] < time:
            self.ahead = self.ahead or next(self.frames, None)
            if self.ahead is None or self.ahead[0] > time:
                break
            self.shown, self.ahead = self.ahead, None
            self.patched = self.shown[1].is_corrupt or (self.patched and not self.shown[1].key_frame)
        return self.shown[1] if self.shown is not None and time in self.fed and not self.patched else None

    def _decode(self, container: InputContainer, stream: VideoStream, sought: bool) -> Iterator[tuple[int, VideoFrame]]:
        counted, number = _keeps_no_times(container, stream), 0
        for time, packet in chain(_packets(container, stream), [(None, None)]):
            if time is not None:
                self.fed.append(time)
            for frame in stream.decode(packet):  # None at the end: what the decoder still holds
                shown_at = self.fed[number] if counted or frame.pts is None else frame.pts
                number += 1
                if number == 1 and sought and shown_at > self.fed[0]:
                    return  # no keyframe in truth, such as a picture refreshed bit by bit
                yield shown_at, frame


def _upright(frame: VideoFrame, size: tuple[int, int]) -> PIL.Image.Image:
    transparent = any(component.is_alpha for component in frame.format.components)
    image = PIL.Image.fromarray(frame.to_ndarray(width=size[0], height=size[1], format="rgba" if transparent else "rgb24", threads=1))
    if transparent:
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")
    turn = _TURNS.get(_matrix(frame))
    return image if turn is None else image.transpose(turn)


def _matrix(frame: VideoFrame) -> tuple[int, ...]:
    """The signs of a, b, c, d in the frame's display matrix (rows a b u, c d v, x y w)."""
    data: Any = frame.side_data.get("DISPLAYMATRIX")
    return (1, 0, 0, 1) if data is None else tuple(np.sign(np.frombuffer(data, np.int32)[[0, 1, 3, 4]]).tolist())


def _scan(container: InputContainer, stream: VideoStream, file: "_SparseFile") -> tuple[list[int], int, VideoFrame | None, bool]:
    """The times of the frames, rising; the end of the last one; the first picture; whether all packets are whole. Stops at one that is not."""
    entries = stream.index_entries
    indexed = "mov" in container.format.name and 0 < stream.frames == len(entries)
    whole = not indexed or entries[-1].pos + entries[-1].size <= file.size
    times: set[int] = set()
    first, start, end = None, None, 0
    for time, packet in _packets(container, stream):
        start = time if start is None else start
        if first is None:
            first = next(iter(stream.decode(packet)), None)
            file.sparse = indexed and first is not None
        if packet.is_corrupt:
            whole = False
            break
        invisible = stream.codec_context.name == "vp8" and not memoryview(packet)[0] & 0x10  # show_frame, RFC 6386 section 9.1
        if time >= start and not packet.is_discard and not invisible:
            times.add(time)
            end = max(end, time + (packet.duration or 0))
    return sorted(times), end, first or next(iter(stream.decode(None)), None), whole


def _packets(container: InputContainer, stream: VideoStream) -> Iterator[tuple[int, Packet]]:
    """The packets from the first keyframe on, each with the time its picture is shown at."""
    time, started, keeps_no_times = 0, False, _keeps_no_times(container, stream)
    for packet in container.demux(stream):
        stamp = packet.dts if keeps_no_times or packet.pts is None else packet.pts
        time = time if stamp is None else stamp  # none: the second field of a picture
        started = started or packet.is_keyframe
        if started and packet.size:  # AVI repeats a frame by an empty packet, which would end the decoding
            yield time, packet


def _keeps_no_times(container: InputContainer, stream: VideoStream) -> bool:
    context = stream.codec_context
    return container.format.name == "avi" and context.name in ("h264", "hevc") and context.reorder_depth > 0


class _SparseFile:
    """The bytes of a video. Once `sparse` they read as zeros and the disk is left alone: times need no payload.

    `size` is in bytes; `cut` says how much of it is there, "" if nothing is known to be missing.
    """

    def __init__(self, file: BinaryIO):
        self.file, self.tell, self.sparse = file, file.tell, False
        self.size = file.seek(0, os.SEEK_END)
        end = _declared_end(file, self.size)
        file.seek(0)
        self.cut = f"cut off after {self.size:,} of {end:,} bytes" if end > self.size else ""

    def read(self, count: int) -> bytes:
        if not self.sparse:
            return self.file.read(count)
        count = max(0, min(count, self.size - self.file.tell()))
        self.file.seek(count, os.SEEK_CUR)
        return bytes(count)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self.file.seek(min(offset, self.size), whence)  # a damaged file sends one anywhere


def _declared_end(file: BinaryIO, size: int) -> int:
    """Where the outermost pieces of a file say they end, in bytes, be it beyond its `size`; 0 if it has none that say so."""
    file.seek(0)
    if file.read(4) == b"GIF8":
        file.seek(max(0, size - 16))
        return size if file.read().rstrip(b"\0").endswith(b";") else size + 1
    position = 0
    while True:
        file.seek(position)
        length = _declared_length(file.read(16))
        if length < 8:
            return position
        position += length


def _declared_length(head: bytes) -> int:
    """The length of an mp4 box, a RIFF chunk or a Matroska element from its first 16 bytes; 0 for anything else, or if it does not know."""
    if head[4:8] in _BOXES:
        return int.from_bytes(head[8:16] if head.startswith(b"\0\0\0\1") else head[:4])
    if head.startswith(b"RIFF"):
        return 8 + int.from_bytes(head[4:8], "little")
    if head.startswith((b"\x1aE\xdf\xa3", b"\x18S\x80g")):  # EBML header, Segment; the leading zeros of a length tell how many bytes it has
        width = 9 - int.from_bytes(head[4:5]).bit_length()
        unknown = (1 << 7 * width) - 1
        value = int.from_bytes(head[4 : 4 + width]) & unknown
        return 0 if value == unknown else 4 + width + value
    return 0


@contextmanager
def _open(place: Place, max_pixels: int | None = None) -> Iterator[tuple[InputContainer, VideoStream, _SparseFile]]:
    """A container with its first video stream. Pictures of more than `max_pixels` are not decoded.

    Raises:
        BadRow: empty, no video, no video stream, no decoder; and whatever the library finds wrong until the container is closed.
    """
    limit, cut = {} if max_pixels is None else {"max_pixels": str(max_pixels)}, ""
    try:
        with open_bytes(place) as opened:
            file = _SparseFile(opened)
            cut = file.cut and f"; it is {file.cut}"
            if file.size == 0:
                raise BadRow("broken_video", f"{place.path} is empty")
            with av.open(file, "r", options={"format_whitelist": FORMATS, **limit}, metadata_errors="replace") as container:
                streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
                if not streams:
                    raise BadRow("broken_video" if cut else "empty_video", f"{place.path} has no video stream{cut}")
                if streams[0].codec_context is None:
                    raise BadRow("broken_video", f"{place.path}: there is no decoder for its video stream")
                streams[0].codec_context.thread_count = 1  # the data workers are parallel already
                streams[0].codec_context.options = limit
                yield container, streams[0], file
    except (av.FFmpegError, OSError) as error:
        raise BadRow("broken_video", f"{place.path} is no video that can be read: {error.strerror}{cut}") from None
