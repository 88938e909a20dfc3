"""Videos, as files written here: what the check finds, which frames are chosen, and that exactly those are decoded."""

import io
import itertools
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
import PIL.Image
import pytest
from av.stream import Disposition

from interlace.data import video
from interlace.data.places import frame_folder
from interlace.data.sample import BadRow, Place
from interlace.data.video import VideoIndex, check_video, choose_frames, choose_numbers, decode_frames

WIDTH, HEIGHT, MAX_PIXELS = 128, 96, 50_000_000


def paint(number: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """A picture that tells its number: eight bars for its bits above, noise and a colour below."""
    pixels = np.random.RandomState(number).randint(90, 160, (height, width, 3), np.uint8)
    for bit in range(8):
        pixels[: height // 2, bit * width // 8 : (bit + 1) * width // 8] = 235 if number >> bit & 1 else 20
    pixels[-height // 4 :] = (number * 7 % 256, 128, 255 - number * 3 % 256)
    return pixels


def number_of(image: PIL.Image.Image) -> int:
    """Reads what `paint` wrote."""
    pixels = np.asarray(image.convert("L"), float)
    height, width = pixels.shape
    return sum(int(pixels[height // 4, (2 * bit + 1) * width // 16] > 128) << bit for bit in range(8))


def write_video(
    path: Path,
    codec: str = "libx264",
    *,
    times: list[int] | None = None,
    time_base: Fraction = Fraction(1, 25),
    size: tuple[int, int] = (WIDTH, HEIGHT),
    pixel_format: str = "yuv420p",
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
    matrix: list[int] | None = None,
    audio: bool = False,
) -> Path:
    """A video of painted frames, by default 60 of them with a keyframe every 12."""
    with av.open(str(path), "w", options=container or {}) as output:
        stream: Any = output.add_stream(codec, rate=25, options={"g": "12", **(options or {})})
        (stream.width, stream.height), stream.pix_fmt = size, pixel_format
        stream.codec_context.time_base = time_base
        if matrix:
            stream.set_display_matrix(matrix)
        sound: Any = output.add_stream("aac", rate=16000) if audio else None
        for number, time in enumerate(times or range(60)):
            frame = av.VideoFrame.from_ndarray(paint(number, *size), format="rgb24")
            frame.pts, frame.time_base = time, time_base
            output.mux(stream.encode(frame))
            if sound:
                heard = av.AudioFrame.from_ndarray(np.zeros((1, 640), np.float32), format="fltp", layout="mono")
                heard.sample_rate, heard.pts = 16000, number * 640
                output.mux(sound.encode(heard))
        output.mux(stream.encode(None))
        if sound:
            output.mux(sound.encode(None))
    return path


def place_of(path: Path) -> Place:
    return Place(str(path))


def library_frames(path: Path) -> list[tuple[int | None, np.ndarray]]:
    """Every frame by decoding the whole file, with its time."""
    with av.open(str(path)) as container:
        return [(frame.pts, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]


def bad(path: Path) -> BadRow:
    with pytest.raises(BadRow) as caught:
        check_video(place_of(path), MAX_PIXELS)
    return caught.value


B_FRAMES = {"bf": "3", "b_strategy": "0", "sc_threshold": "0"}
UNEVEN = np.random.RandomState(0).randint(10, 200, 60).cumsum().tolist()
GAPS = np.random.RandomState(1).randint(1, 5, 59).cumsum().tolist()
CASES: dict[str, dict[str, Any]] = {
    "h264.mp4": {"options": B_FRAMES},
    "faststart.mp4": {"container": {"movflags": "faststart"}},
    "fragmented.mp4": {"container": {"movflags": "frag_keyframe+empty_moov"}},
    "variable.mp4": {"times": UNEVEN, "time_base": Fraction(1, 1000)},
    "late.mp4": {"times": list(range(100, 160))},
    "audio.mp4": {"audio": True},
    "open_gop.mp4": {"options": {"x264-params": "open-gop=1:keyint=12:bframes=3:b-adapt=0:scenecut=0"}},
    "open_gop.ts": {"options": {"x264-params": "open-gop=1:keyint=12:bframes=3:b-adapt=0:scenecut=0"}},
    "no_keyframes.mp4": {"options": {"x264-params": "intra-refresh=1:keyint=12:bframes=0"}},
    "hevc.mp4": {"codec": "libx265", "options": {"x265-params": "open-gop=1:keyint=12:bframes=3:log-level=none"}},
    "ten_bits.mp4": {"pixel_format": "yuv420p10le"},
    "odd.mp4": {"size": (129, 97), "pixel_format": "yuv444p"},
    "one.mp4": {"times": [0]},
    "vp9.mp4": {"codec": "libvpx-vp9"},
    "h264.mkv": {"options": B_FRAMES, "audio": True},
    "live.mkv": {"container": {"live": "1"}},
    "variable.mkv": {"times": UNEVEN, "time_base": Fraction(1, 1000)},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"lag-in-frames": "16", "auto-alt-ref": "6"}},
    "vp8.webm": {"codec": "libvpx", "options": {"lag-in-frames": "16", "auto-alt-ref": "1", "b": "1M"}},
    "one.webm": {"codec": "libvpx-vp9", "times": [0]},
    "mjpeg.avi": {"codec": "mjpeg", "pixel_format": "yuvj420p"},
    "gaps.avi": {"codec": "mjpeg", "pixel_format": "yuvj420p", "times": [0, *GAPS]},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"bf": "2", "b": "2M"}},
    "reordered_h264.avi": {"options": B_FRAMES},
    "h264.ts": {},
    "mpeg2.mpg": {"codec": "mpeg2video", "options": {"bf": "2", "b": "2M"}},
    "h264.flv": {},
    "wmv2.wmv": {"codec": "wmv2", "options": {"b": "2M"}},
    "gif.gif": {"codec": "gif", "pixel_format": "rgb8"},
    "rle.mov": {"codec": "qtrle", "pixel_format": "rgb24"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("videos")


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, folder: Path) -> Path:
    return write_video(folder / request.param, **CASES[request.param])


def test_the_index_names_every_frame(case: Path) -> None:
    index = check_video(place_of(case), MAX_PIXELS)
    times = [time for time, _ in library_frames(case)]
    assert len(index.pts) == len(times) == len(CASES[case.name].get("times", range(60)))
    assert (index.width, index.height) == CASES[case.name].get("size", (WIDTH, HEIGHT))
    if case.name != "reordered_h264.avi":  # which has no presentation times
        assert index.pts.tolist() == times
    written = np.array(CASES[case.name].get("times", range(60))) * float(CASES[case.name].get("time_base", Fraction(1, 25)))
    np.testing.assert_allclose((index.pts - index.pts[0]) * float(index.time_base), written - written[0], atol=0.011)  # ASF, MPEG: ms; GIF: 10 ms


def test_a_frame_is_the_same_alone_together_and_decoded_from_the_start(case: Path) -> None:
    place, expected = place_of(case), [pixels for _, pixels in library_frames(case)]
    pts = check_video(place, MAX_PIXELS).pts.tolist()
    together = decode_frames(place, pts)
    assert [number_of(image) for image in together] == list(range(len(pts)))
    assert all(image.mode == "RGB" and np.array_equal(image, pixels) for image, pixels in zip(together, expected, strict=True))
    for number in range(0, len(pts), 7):
        assert np.array_equal(decode_frames(place, [pts[number]])[0], expected[number]), number
    order = [number % len(pts) for number in (40, 3, 59, 3, 21)]
    for number, image in zip(order, decode_frames(place, [pts[number] for number in order]), strict=True):
        assert np.array_equal(image, expected[number]), number


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The times of the frames that are decoded, as they are."""
    times: list[int] = []
    original = video._Playback._decode

    def counted(*arguments: Any) -> Iterator[tuple[int, av.VideoFrame]]:
        for time, frame in original(*arguments):
            times.append(time)
            yield time, frame

    monkeypatch.setattr(video._Playback, "_decode", counted)
    return times


@pytest.mark.parametrize("name", ["h264.mp4", "open_gop.mp4", "fragmented.mp4", "h264.mkv", "live.mkv", "vp9.webm", "mpeg4.avi"])
def test_only_what_lies_between_a_keyframe_and_a_frame_is_decoded(name: str, folder: Path, decoded: list[int]) -> None:
    path = write_video(folder / f"sought_{name}", **{**CASES[name], "times": list(range(240))})
    pts = check_video(place_of(path), MAX_PIXELS).pts.tolist()
    with av.open(str(path)) as container:
        keyframes = [packet.pts for packet in container.demux(video=0) if packet.is_keyframe]
    wanted = [5, 9, 100, 230]
    assert [number_of(image) for image in decode_frames(place_of(path), [pts[number] for number in wanted])] == wanted
    needed = {time for number in wanted for time in pts[: number + 1] if time >= max(key for key in keyframes if key is not None and key <= pts[number])}
    assert decoded == sorted(needed)
    assert len(decoded) < 40


def test_a_transport_stream_which_has_no_index_is_sought_too(folder: Path, decoded: list[int]) -> None:
    path = write_video(folder / "sought.ts", times=list(range(240)))
    pts = check_video(place_of(path), MAX_PIXELS).pts.tolist()
    assert number_of(decode_frames(place_of(path), [pts[230]])[0]) == 230
    assert len(decoded) < 60


@pytest.mark.parametrize("name", ["h264.mp4", "variable.mp4", "audio.mp4", "mpeg4.mov"])
def test_the_payload_of_an_mp4_is_not_read(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"size": (320, 240), "times": list(range(240)), **CASES.get(name, {"codec": "mpeg4", "options": {"bf": "2", "b": "4M"}})}
    if name == "variable.mp4":
        options["times"] = [10_000 * lap + time for lap in range(4) for time in UNEVEN]
    path = write_video(folder / f"large_{name}", **options)
    read = 0

    class Counted(io.FileIO):
        def read(self, size: int | None = -1) -> bytes:
            nonlocal read
            data = super().read(size) or b""
            read += len(data)
            return data

    @contextmanager
    def counted(place: Place) -> Iterator[BinaryIO]:
        with Counted(place.path) as file:
            yield file  # type: ignore[misc]

    monkeypatch.setattr(video, "open_bytes", counted)
    index = check_video(place_of(path), MAX_PIXELS)
    with av.open(str(path)) as container:
        assert index.pts.tolist() == sorted(packet.pts for packet in container.demux(video=0) if packet.pts is not None)
    assert read < path.stat().st_size / 5


def index_of(times: list[int], time_base: Fraction) -> VideoIndex:
    return VideoIndex(8, 8, np.array(times, np.int64), time_base, 0.0)


def test_uniform_numbers_are_those_of_the_original_code() -> None:
    for count, num_frames in itertools.product([1, 2, 7, 16, 17, 31, 100, 15000], [1, 2, 8, 16, 32]):
        expected = np.linspace(0, count - 1, num_frames, dtype=int).tolist() if count > num_frames else list(range(count))
        assert choose_numbers(count, num_frames) == expected
        index = index_of([7 + 3 * number for number in range(count)], Fraction(1, 30))
        assert choose_frames(index, num_frames) == [7 + 3 * number for number in expected]


def test_video_fps_takes_the_nearest_frames() -> None:
    assert choose_frames(index_of(list(range(250)), Fraction(1, 25)), 100, 1) == list(range(0, 250, 25))
    assert choose_frames(index_of(list(range(250)), Fraction(1, 25)), 4, 1) == [0, 75, 150, 225]
    milliseconds = [round(1000 * number / 30) for number in range(90)]  # as Matroska rounds them
    assert choose_frames(index_of(milliseconds, Fraction(1, 1000)), 1000, 30) == milliseconds
    assert choose_frames(index_of(milliseconds, Fraction(1, 1000)), 1000, 1000) == milliseconds
    assert choose_frames(index_of([5], Fraction(1, 25)), 8, 2) == [5]
    for seed, fps in itertools.product(range(5), [0.3, 1, 4.7]):
        times = np.random.RandomState(seed).randint(1, 2000, 50).cumsum().tolist()
        ticks = [times[0] + 1000 * k / fps for k in range(1 + int((times[-1] - times[0]) / 1000 * fps))]
        nearest = sorted({min(times, key=lambda time: (abs(time - tick), time)) for tick in ticks})
        assert choose_frames(index_of(times, Fraction(1, 1000)), 1000, fps) == nearest


def test_a_folder_of_frames_is_in_natural_order(tmp_path: Path) -> None:
    for name in ("frame_10.jpg", "frame_2.JPG", "frame_1.jpeg", ".frame_0.jpg", "notes.txt", "frame_02.JPG", "²1.jpg"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "frame_3.jpg").mkdir()
    assert [path.name for path in frame_folder(tmp_path)] == ["frame_1.jpeg", "frame_02.JPG", "frame_2.JPG", "frame_10.jpg", "²1.jpg"]
    (tmp_path / "frame_4.jpg").symlink_to(tmp_path / "frame_10.jpg")
    assert len(frame_folder(tmp_path)) == 6
    (tmp_path / "frame_1.png").write_bytes(b"x")  # a depth map beside the pictures, as in ScanNet
    with pytest.raises(BadRow, match=r"bad_video: .*several kinds \(.jpg, .png\)"):
        frame_folder(tmp_path)


def test_a_folder_of_frames_without_frames_or_with_others_is_bad(tmp_path: Path) -> None:
    (tmp_path / "frames").mkdir()
    with pytest.raises(BadRow, match="empty_video"):
        frame_folder(tmp_path / "frames")
    (tmp_path / "secret.png").write_bytes(b"x")
    (tmp_path / "frames" / "1.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(BadRow, match="outside_folder"):
        frame_folder(tmp_path / "frames")


@pytest.mark.parametrize(
    "name", ["h264.mp4", "faststart.mp4", "fragmented.mp4", "audio.mp4", "h264.mkv", "vp9.webm", "vp8.webm", "mjpeg.avi", "mpeg4.avi", "gif.gif"]
)
def test_a_file_without_its_tail_is_bad(name: str, folder: Path, tmp_path: Path) -> None:
    data = write_video(folder / name, **CASES[name]).read_bytes()
    cut = tmp_path / name
    for size in (10, len(data) // 3, len(data) * 9 // 10, len(data) - 1):
        cut.write_bytes(data[:size])
        assert bad(cut).reason == "broken_video", size


def test_the_detail_says_how_far_a_cut_file_can_be_read(tmp_path: Path) -> None:
    path = write_video(tmp_path / "cut.mp4", container={"movflags": "faststart"}, options={"bf": "0"})
    data = path.read_bytes()
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.pos]
    path.write_bytes(data[: packets[30].pos + packets[30].size - 1])
    assert "readable to 1.2 of 2.4 s" in bad(path).detail
    declared = data.index(b"mdat") - 4
    path.write_bytes((data[:declared] + bytes(4) + data[declared + 4 :])[: packets[30].pos])  # "up to the end", and cut between two packets
    assert "readable to 1.2 of 2.4 s" in bad(path).detail
    matroska = write_video(tmp_path / "cut.mkv")
    matroska.write_bytes(matroska.read_bytes()[:-3000])
    assert "of 2.4 s" in bad(matroska).detail


def test_a_broken_last_packet_shows_in_formats_of_unknown_length(folder: Path, tmp_path: Path) -> None:
    data = write_video(folder / "h264.flv").read_bytes()
    (tmp_path / "cut.flv").write_bytes(data[: len(data) // 2])
    assert bad(tmp_path / "cut.flv").reason == "broken_video"


@pytest.mark.parametrize(
    "data", [b"", b"<html><body>404 Not Found</body></html>", bytes(5000), b"\x00\x00\x00\x18ftypmp42"], ids=["empty", "html", "zeros", "head"]
)
def test_what_is_no_video_is_bad(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "video.mp4").write_bytes(data)
    assert bad(tmp_path / "video.mp4").reason == "broken_video"
    with pytest.raises(BadRow, match="broken_video"):
        decode_frames(place_of(tmp_path / "video.mp4"), [0])


def test_a_file_without_a_video_stream_is_empty(tmp_path: Path) -> None:
    for name, cover in (("sound.m4a", False), ("album.m4a", True)):
        with av.open(str(tmp_path / name), "w", format="mp4") as output:
            sound: Any = output.add_stream("aac", rate=16000)
            if cover:
                art: Any = output.add_stream("mjpeg", rate=1)
                art.width, art.height, art.pix_fmt, art.disposition = WIDTH, HEIGHT, "yuvj420p", Disposition.attached_pic
                output.mux(art.encode(av.VideoFrame.from_ndarray(paint(1), format="rgb24").reformat(format="yuvj420p")))
            heard = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            heard.sample_rate = 16000
            output.mux(sound.encode(heard))
            output.mux(sound.encode(None))
        with av.open(str(tmp_path / name)) as container:
            assert len(container.streams.video) == cover
        assert bad(tmp_path / name).reason == "empty_video"


def test_a_playlist_that_points_at_another_file_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "secret.ts", times=[0])
    (tmp_path / "concat.mp4").write_text("ffconcat version 1.0\nfile secret.ts\n")
    with av.open(str(tmp_path / "concat.mp4")) as container:  # the library would follow it
        assert container.streams.video[0].width == WIDTH
    (tmp_path / "hls.mp4").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nsecret.ts\n#EXT-X-ENDLIST\n")
    (tmp_path / "sdp.mp4").write_text("v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n")
    for name in ("concat.mp4", "hls.mp4", "sdp.mp4"):
        assert bad(tmp_path / name).reason == "broken_video"


def test_too_many_pixels(folder: Path) -> None:
    path = write_video(folder / "h264.mp4", **CASES["h264.mp4"])
    with pytest.raises(BadRow, match=f"too_many_pixels.*{WIDTH} x {HEIGHT}"):
        check_video(place_of(path), WIDTH * HEIGHT - 1)
    assert check_video(place_of(path), WIDTH * HEIGHT).width == WIDTH


@pytest.mark.parametrize("signs", [(1, 0, 0, 1), (-1, 0, 0, 1), (1, 0, 0, -1), (-1, 0, 0, -1), (0, 1, -1, 0), (0, -1, 1, 0), (0, 1, 1, 0), (0, -1, -1, 0)])
def test_rotation_and_mirroring(signs: tuple[int, int, int, int], tmp_path: Path) -> None:
    a, b, c, d = (65536 * sign for sign in signs)
    path = write_video(tmp_path / "turned.mp4", times=[0, 1], matrix=[a, b, 0, c, d, 0, 0, 0, 1 << 30])
    stored = library_frames(path)[1][1]
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    shown_x, shown_y = signs[0] * x + signs[2] * y, signs[1] * x + signs[3] * y  # the matrix, as ISO 14496-12 defines it
    shown_x, shown_y = shown_x - shown_x.min(), shown_y - shown_y.min()
    expected = np.zeros((shown_y.max() + 1, shown_x.max() + 1, 3), np.uint8)
    expected[shown_y, shown_x] = stored
    index = check_video(place_of(path), MAX_PIXELS)
    assert (index.height, index.width) == expected.shape[:2]
    assert np.array_equal(decode_frames(place_of(path), [int(index.pts[1])])[0], expected)


def test_bytes_inside_an_archive(folder: Path, tmp_path: Path) -> None:
    path = write_video(folder / "h264.mp4", **CASES["h264.mp4"])
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        for name in ("a.mp4", "b.mp4"):
            archive.add(path, name)
    with tarfile.open(tmp_path / "shard.tar") as archive:
        member = archive.getmember("b.mp4")
    place = Place(str(tmp_path / "shard.tar"), member.offset_data, member.size)
    pts = check_video(place, MAX_PIXELS).pts
    assert pts.tolist() == check_video(place_of(path), MAX_PIXELS).pts.tolist()
    assert [number_of(image) for image in decode_frames(place, pts[[50, 20]].tolist())] == [50, 20]
    with pytest.raises(BadRow, match="broken_video"):
        check_video(Place(place.path, place.offset, place.size - 1), MAX_PIXELS)


@pytest.mark.parametrize(("matrix", "tag", "full"), [("itu601", 6, False), ("itu709", 1, False), ("itu709", 1, True)])
def test_colours_follow_the_stated_matrix_and_range(matrix: str, tag: int, full: bool, tmp_path: Path) -> None:
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0], [200, 120, 40], [30, 90, 160], [128, 128, 128]], np.uint8)
    pixels = np.broadcast_to(colours.repeat(16, 0), (HEIGHT, WIDTH, 3))
    with av.open(str(tmp_path / "colours.mp4"), "w") as output:
        stream: Any = output.add_stream("libx264", rate=25, options={"qp": "0"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv444p"
        stream.codec_context.colorspace, stream.codec_context.color_range = tag, 2 if full else 1
        rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        output.mux(stream.encode(rgb.reformat(format="yuv444p", dst_colorspace=matrix, dst_color_range=2 if full else 1)))
        output.mux(stream.encode(None))
    image = decode_frames(place_of(tmp_path / "colours.mp4"), [0])[0]
    np.testing.assert_allclose(np.asarray(image, int), pixels, atol=4)


def test_an_invisible_picture_of_vp8_does_not_count(tmp_path: Path) -> None:
    path = write_video(tmp_path / "vp8.webm", "libvpx", options={"b": "1M"})
    with av.open(str(path)) as source, av.open(str(tmp_path / "hidden.webm"), "w") as output:
        stream = output.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(source.demux(video=0)):
            if packet.size:
                data = bytearray(bytes(packet))
                data[0] &= 0xFF if number != 20 else 0xEF  # show_frame
                changed: Any = av.Packet(bytes(data))
                changed.pts, changed.dts, changed.time_base, changed.is_keyframe, changed.stream = (
                    packet.pts,
                    packet.dts,
                    packet.time_base,
                    packet.is_keyframe,
                    stream,
                )
                output.mux(changed)
    index = check_video(place_of(tmp_path / "hidden.webm"), MAX_PIXELS)
    images = decode_frames(place_of(tmp_path / "hidden.webm"), index.pts.tolist())
    assert [number_of(image) for image in images] == [number for number in range(60) if number != 20]


def test_pictures_that_nothing_can_decode_do_not_count(tmp_path: Path) -> None:
    path = write_video(tmp_path / "whole.ts", **CASES["open_gop.ts"])
    data = path.read_bytes()
    (tmp_path / "joined_late.ts").write_bytes(data[len(data) // 3 // 188 * 188 :])
    pts = check_video(place_of(tmp_path / "joined_late.ts"), MAX_PIXELS).pts.tolist()
    assert [number_of(image) for image in decode_frames(place_of(tmp_path / "joined_late.ts"), pts)] == list(range(24, 60))
    edited = write_video(tmp_path / "edited.mp4", times=list(range(-7, 53)), container={"avoid_negative_ts": "disabled"})
    pts = check_video(place_of(edited), MAX_PIXELS).pts.tolist()
    assert [number_of(image) for image in decode_frames(place_of(edited), pts)] == list(range(7, 60))


def test_a_damaged_picture_is_bad_and_harms_no_frame_before_it(tmp_path: Path) -> None:
    path = write_video(tmp_path / "damaged.mp4", options={"bf": "0", "sc_threshold": "0", "g": "30"})
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.pos]
    data = bytearray(path.read_bytes())
    start = packets[40].pos + packets[40].size // 2
    data[start : start + 200] = bytes(200)
    path.write_bytes(data)
    pts = check_video(place_of(path), MAX_PIXELS).pts.tolist()
    assert [number_of(image) for image in decode_frames(place_of(path), [pts[39], pts[5]])] == [39, 5]
    for number in (40, 45):
        with pytest.raises(BadRow, match="broken_video"):
            decode_frames(place_of(path), [pts[number]])


def test_a_time_that_is_no_frame_of_the_video_is_bad(folder: Path) -> None:
    path = write_video(folder / "h264.mp4", **CASES["h264.mp4"])
    pts = check_video(place_of(path), MAX_PIXELS).pts.tolist()
    for time in (pts[0] - 1, pts[20] + 1, pts[-1] + 1):
        with pytest.raises(BadRow, match="broken_video"):
            decode_frames(place_of(path), [pts[3], time])


def test_a_keyframe_that_needs_earlier_pictures_is_no_start(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "refreshed.mp4"), "w") as output:
        stream: Any = output.add_stream("libx264", rate=25, options={"x264-params": "intra-refresh=1:keyint=40:bframes=0"})
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        for number in range(200):
            blocks = np.random.RandomState(number // 3).randint(0, 255, (30, 40, 3), np.uint8).repeat(8, 0).repeat(8, 1)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(blocks, format="rgb24")))
        output.mux(stream.encode(None))
    expected = library_frames(tmp_path / "refreshed.mp4")
    with av.open(str(tmp_path / "refreshed.mp4")) as container:
        assert sum(packet.is_keyframe for packet in container.demux(video=0)) > 1
    for number in (45, 150, 182, 199):
        time, pixels = expected[number]
        assert time is not None
        assert np.array_equal(decode_frames(place_of(tmp_path / "refreshed.mp4"), [time])[0], pixels)


def test_a_size_that_changes_midway_is_scaled_to_the_first(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "sizes.ts"), "w") as output:
        stream: Any = output.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for part, (width, height) in enumerate([(WIDTH, HEIGHT), (2 * WIDTH, 2 * HEIGHT)]):
            encoder: Any = av.CodecContext.create("libx264", "w")
            encoder.width, encoder.height, encoder.pix_fmt, encoder.time_base = width, height, "yuv420p", Fraction(1, 25)
            encoder.options = {"bf": "0"}
            for number in range(20 * part, 20 * part + 20):
                frame = av.VideoFrame.from_ndarray(paint(number, width, height), format="rgb24")
                frame.pts, frame.time_base = number, Fraction(1, 25)
                for packet in encoder.encode(frame.reformat(format="yuv420p")) + (encoder.encode(None) if number % 20 == 19 else []):
                    packet.stream, packet.time_base = stream, Fraction(1, 25)
                    output.mux(packet)
    place = place_of(tmp_path / "sizes.ts")
    assert {pixels.shape[1] for _, pixels in library_frames(tmp_path / "sizes.ts")} == {WIDTH, 2 * WIDTH}
    index = check_video(place, MAX_PIXELS)
    images = decode_frames(place, index.pts.tolist())
    assert {image.size for image in images} == {(index.width, index.height)} == {(WIDTH, HEIGHT)}
    assert [number_of(image) for image in images] == list(range(40))
    assert np.array_equal(decode_frames(place, [int(index.pts[30])])[0], images[30])


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    layers = []
    for left in (0, 10, 20):
        layer = PIL.Image.new("RGBA", (40, 30), (0, 0, 0, 0))
        layer.paste((255, 0, 0, 255), (left, 0, left + 10, 30))
        layers.append(layer)
    layers[0].save(tmp_path / "moving.gif", save_all=True, append_images=layers[1:], duration=100, disposal=2)
    pts = check_video(place_of(tmp_path / "moving.gif"), MAX_PIXELS).pts.tolist()
    for layer, image in zip(layers, decode_frames(place_of(tmp_path / "moving.gif"), pts), strict=True):
        white = PIL.Image.new("RGBA", layer.size, (255, 255, 255, 255))
        assert np.array_equal(image, PIL.Image.alpha_composite(white, layer).convert("RGB"))
