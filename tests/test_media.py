"""Images: one documented answer for every oddity, with real files; where media may lie; downloads."""

import gzip
import hashlib
import http.server
import io
import json
import os
import resource
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import PIL.Image
import pytest

from interlace.data.download import UrlPolicy, checked_address, download
from interlace.data.media import check_image, open_image, open_images
from interlace.data.places import Finder, MediaFolder, locate
from interlace.data.sample import BadRow, Image, Place, Video


def gradient(mode: str = "RGB") -> PIL.Image.Image:
    return PIL.Image.fromarray(np.arange(48 * 32 * 3, dtype=np.uint8).reshape(32, 48, 3)).convert(mode)


def check(path: Path, limit: int = 10**6) -> tuple[int, int]:
    return check_image(Place(str(path)), limit)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(open_image(Place(str(path))))


# --- every mode ---


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        pair.split(".")
        for pair in ["RGB.png", "L.png", "P.png", "1.png", "CMYK.jpg", "RGB.jpg", "L.jpg", "RGB.webp", "RGB.bmp", "P.gif", "RGB.tif", "CMYK.tif", "RGB.ppm"]
    ],
)
def test_every_mode_opens_as_rgb_and_headers_tell_the_size(tmp_path: Path, mode: str, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    gradient(mode).save(path)
    assert check(path) == (48, 32)
    image = open_image(Place(str(path)))
    assert (image.mode, image.size) == ("RGB", (48, 32))
    if suffix in ("png", "bmp", "ppm", "tif"):
        assert np.array_equal(np.asarray(image), np.asarray(gradient(mode).convert("RGB")))


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    PIL.Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert pixels(tmp_path / "clear.png")[0, 0].tolist() == [255, 255, 255]
    PIL.Image.new("LA", (2, 2), (0, 128)).save(tmp_path / "half.png")
    assert abs(int(pixels(tmp_path / "half.png")[0, 0, 0]) - 127) <= 1
    palette = PIL.Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 9, 99, 199])
    palette.save(tmp_path / "palette.png", transparency=1)
    assert pixels(tmp_path / "palette.png")[0, 0].tolist() == [255, 255, 255]


def test_sixteen_bits_are_scaled_not_cut(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    PIL.Image.fromarray(values).save(tmp_path / "deep.png")
    assert np.abs(pixels(tmp_path / "deep.png")[..., 0] - values / 257.0).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_exif_rotation_is_applied_to_size_and_pixels(tmp_path: Path, orientation: int, suffix: str) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    picture = np.zeros((32, 48, 3), np.uint8)
    picture[:16, :24] = 255  # the upper left quarter is white
    PIL.Image.fromarray(picture).save(tmp_path / f"x.{suffix}", exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    expected = (32, 48) if orientation >= 5 else (48, 32)
    found = open_image(Place(str(tmp_path / f"x.{suffix}")))
    assert check(tmp_path / f"x.{suffix}") == expected == found.size
    # where EXIF says that the stored upper left corner belongs: (top, left) of the upright picture
    top, left = {1: (1, 1), 2: (1, 0), 3: (0, 0), 4: (0, 1), 5: (1, 1), 6: (1, 0), 7: (0, 0), 8: (0, 1)}[orientation]
    grey = np.asarray(found.convert("L"))
    corner = grey[4 if top else -5, 4 if left else -5]
    assert corner > 200 and (grey > 200).mean() == pytest.approx(0.25, abs=0.03)


def test_of_an_animation_the_first_frame_is_used(tmp_path: Path) -> None:
    frames = [PIL.Image.new("RGB", (8, 8), color) for color in ("red", "blue", "green", "white")]
    for suffix in ("gif", "webp", "png"):
        path = tmp_path / f"x.{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:], **({"lossless": True} if suffix == "webp" else {}))
        assert check(path) == (8, 8)
        assert pixels(path)[0, 0].tolist() == [255, 0, 0]


def test_progressive_jpeg_is_read_and_a_cut_one_is_bad(tmp_path: Path) -> None:
    picture = PIL.Image.effect_noise((320, 240), 80).convert("RGB")
    picture.save(tmp_path / "whole.jpg", progressive=True)
    assert check(tmp_path / "whole.jpg") == (320, 240)
    assert np.array_equal(pixels(tmp_path / "whole.jpg"), np.asarray(PIL.Image.open(tmp_path / "whole.jpg")))
    data = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(BadRow, match="broken_image"):
        check(tmp_path / "cut.jpg")
    with pytest.raises(BadRow, match="broken_image"):
        pixels(tmp_path / "cut.jpg")  # never filled with grey
    (tmp_path / "tail.jpg").write_bytes(data + bytes(500))  # cameras and editors append things
    assert check(tmp_path / "tail.jpg") == (320, 240)


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "bmp", "tif", "ppm"])
def test_truncated_files_are_found_without_training(tmp_path: Path, suffix: str) -> None:
    gradient().save(tmp_path / f"whole.{suffix}")
    whole = (tmp_path / f"whole.{suffix}").read_bytes()
    (tmp_path / f"cut.{suffix}").write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(BadRow, match="broken_image"):
        check(tmp_path / f"cut.{suffix}")


def test_what_is_no_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "page.jpg").write_text("<html>not found</html>")
    (tmp_path / "nothing.png").touch()
    (tmp_path / "x.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EOF\n")  # Pillow would run Ghostscript
    for name, expected in (("page.jpg", "no image"), ("nothing.png", "empty"), ("x.png", "no image")):
        with pytest.raises(BadRow, match=f"broken_image.*{expected}"):
            check(tmp_path / name)


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1)])
def test_extreme_shapes_are_known_beforehand(tmp_path: Path, size: tuple[int, int]) -> None:
    PIL.Image.new("RGB", size).save(tmp_path / "x.png")
    assert check(tmp_path / "x.png") == size == open_image(Place(str(tmp_path / "x.png"))).size


def bomb(side: int) -> bytes:
    """A real PNG of side x side black pixels: some ten kilobytes that unpack to gigabytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    squeeze = zlib.compressobj(9)
    line = bytes(1 + (side + 7) // 8)
    packed = b"".join(squeeze.compress(line) for _ in range(side)) + squeeze.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def test_a_decompression_bomb_is_refused_by_its_header_alone(tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(bomb(50_000))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadRow, match="too_many_pixels"):
        check(tmp_path / "bomb.png", 50_000_000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 << 10  # KiB
    gradient().save(tmp_path / "large.png")
    with pytest.raises(BadRow, match="too_many_pixels"):
        check(tmp_path / "large.png", 1000)


def test_a_slice_of_a_file_is_read_and_nothing_around_it(tmp_path: Path) -> None:
    data = io.BytesIO()
    gradient().save(data, "PNG")
    (tmp_path / "archive").write_bytes(b"x" * 777 + data.getvalue() + b"y" * 100)
    place = Place(str(tmp_path / "archive"), 777, len(data.getvalue()))
    assert check_image(place, 10**6) == (48, 32)
    assert np.array_equal(np.asarray(open_image(place)), np.asarray(gradient()))
    with pytest.raises(BadRow, match="broken_image"):
        check_image(Place(place.path, 777, place.size - 30), 10**6)
    assert [image.size for image in open_images([place, place])] == [(48, 32)] * 2


# --- places ---


def test_paths_stay_in_their_folders(tmp_path: Path) -> None:
    inside, beside = tmp_path / "media", tmp_path / "media_evil"
    inside.mkdir()
    beside.mkdir()
    for folder in (inside, beside):
        gradient().save(folder / "x.png")
    (inside / "link.png").symlink_to(beside / "x.png")
    (inside / "door").symlink_to(beside)
    assert locate("x.png", (inside,)) == str(inside / "x.png") == locate(str(inside / "x.png"), (inside,)) == locate("../media/x.png", (inside,))
    for path in ("../media_evil/x.png", str(beside / "x.png"), "link.png", "door/x.png", "/etc/passwd", "../../../../../../etc/passwd", ".."):
        with pytest.raises(BadRow, match="outside_folder"):
            locate(path, (inside,))
    assert locate(str(beside / "x.png"), (inside, beside)) == locate("link.png", (inside, beside)) == str(beside / "x.png")
    os.mkfifo(inside / "pipe")
    (inside / "zero").symlink_to("/dev/zero")
    for path, reason in (("y.png", "missing_image"), (".", "not_a_file"), ("pipe", "not_a_file"), ("zero", "outside_folder")):
        with pytest.raises(BadRow, match=reason):
            locate(path, (inside,))
    with pytest.raises(BadRow, match="missing_video"):
        locate("y.mp4", (inside,), "video")
    assert locate(".", (tmp_path, inside), "video") == str(tmp_path)  # a folder of frames


def test_odd_names_are_names(tmp_path: Path) -> None:
    for name in ("sp ace.png", "图 é.png", "new\nline.png", "#?%&.png", "-x.png", "{a,b}.png"):
        gradient().save(tmp_path / name)
        assert locate(name, (tmp_path,)) == str(tmp_path / name)
        assert check(tmp_path / name) == (48, 32)


def test_names_that_are_no_paths(tmp_path: Path) -> None:
    for path, reason in (("iVBORw0KGgo" * 400, "bad_image"), ("x\0y.png", "bad_image"), ("a" * 300, "missing_image")):
        with pytest.raises(BadRow, match=reason):
            locate(path, (tmp_path,))


def test_embedded_bytes_are_kept_once_whoever_asks(tmp_path: Path) -> None:
    folder = MediaFolder(tmp_path / "kept")
    first, again, other = folder.keep(b"abc"), folder.keep(b"abc"), folder.keep(b"abd")
    assert first == again != other
    assert Path(first.path).read_bytes() == b"abc"
    assert len([path for path in (tmp_path / "kept").rglob("*") if path.is_file()]) == 2
    finder = Finder((tmp_path,), (tmp_path,), folder, {"m.png": Place("/archive.tar", 512, 3)})
    assert finder.find(Image("whatever", b"abc"), "image") == first
    assert finder.find(Image("m.png"), "image") == Place("/archive.tar", 512, 3)
    with pytest.raises(BadRow, match=r"url: .*allow_urls"):
        finder.find(Image("http://127.0.0.1/x.png"), "image")
    with pytest.raises(BadRow, match="url"):
        finder.find(Video("file:///etc/passwd"), "video")


# --- downloads ---


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[str]]]:
    """A loopback server; its address and the paths it was asked for."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    asked: list[str] = []
    picture = io.BytesIO()
    gradient().save(picture, "PNG")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(f"{self.headers['Host'].rpartition(':')[0]}{self.path}")
            if self.path.startswith("/to/"):
                self.send_response(302)
                self.send_header("Location", self.path.removeprefix("/to/") or "/")
                self.end_headers()
                return
            self.send_response(404 if self.path == "/nothing" else 200)
            if self.path == "/packed":
                self.send_header("Content-Encoding", "gzip")
            self.end_headers()
            try:
                if self.path == "/endless":
                    for _ in range(10_000):
                        self.wfile.write(bytes(1 << 16))
                elif self.path == "/packed":
                    self.wfile.write(gzip.compress(bytes(50_000_000)))
                elif self.path == "/slow":
                    for _ in range(50):
                        self.wfile.write(b"x")
                        stop.wait(0.1)
                else:
                    self.wfile.write(picture.getvalue())
            except OSError:
                pass  # the client has heard enough

        def log_message(self, *_: Any) -> None:
            pass

    stop = threading.Event()
    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=served.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{served.server_port}", asked
    stop.set()
    served.shutdown()
    served.server_close()


def test_a_download_needs_permission_for_a_private_host(server: tuple[str, list[str]], tmp_path: Path) -> None:
    address, asked = server
    with pytest.raises(BadRow, match="no public address"):
        download(f"{address}/x.png", UrlPolicy())
    with pytest.raises(BadRow, match="not in allowed_url_hosts"):
        download(f"{address}/x.png", UrlPolicy(("example.org",)))
    assert asked == []
    folder = MediaFolder(tmp_path, UrlPolicy(("127.0.0.1",)))
    place = folder.fetch(f"{address}/x.png")
    assert check_image(place, 10**6) == (48, 32)
    assert folder.fetch(f"{address}/x.png") == place
    assert asked == ["127.0.0.1/x.png"]  # once


def test_every_redirect_is_checked_before_it_is_followed(server: tuple[str, list[str]]) -> None:
    address, asked = server
    policy = UrlPolicy(("127.0.0.1",))
    assert download(f"{address}/to//x.png", policy)
    for target, reason in (
        ("http://localhost:1/x.png", "not in allowed_url_hosts"),
        ("http://169.254.169.254/latest", "not in"),
        ("file:///etc/passwd", "only http"),
    ):
        with pytest.raises(BadRow, match=reason):
            download(f"{address}/to/{target}", policy)
    with pytest.raises(BadRow, match="redirects"):
        download(f"{address}/to//to//to//to//to//to//x.png", policy)
    assert all(path.startswith("127.0.0.1/") for path in asked)


def test_downloads_have_limits(server: tuple[str, list[str]]) -> None:
    address, _ = server
    with pytest.raises(BadRow, match=r"url_error: .*more than 100000 bytes"):
        download(f"{address}/endless", UrlPolicy(("127.0.0.1",), max_bytes=100_000))
    with pytest.raises(BadRow, match=r"url_error: .*not done after"):
        download(f"{address}/slow", UrlPolicy(("127.0.0.1",), timeout_seconds=0.5))
    with pytest.raises(BadRow, match=r"url_error: .*404"):
        download(f"{address}/nothing", UrlPolicy(("127.0.0.1",)))
    packed = download(f"{address}/packed", UrlPolicy(("127.0.0.1",), max_bytes=100_000))
    assert len(packed) < 100_000  # taken as it comes: what it would unpack to never enters memory
    with pytest.raises(BadRow, match="url_error"):
        download("http://127.0.0.1:9/x.png", UrlPolicy(("127.0.0.1",)))


PRIVATE = ("127.0.0.1", "localhost", "10.0.0.1", "[::1]", "169.254.169.254", "0.0.0.0", "224.0.0.1")
TRANSLATED = ("[64:ff9b::7f00:1]", "[2002:7f00:1::]", "[::127.0.0.1]", "[::ffff:127.0.0.1]")  # IPv6 names of 127.0.0.1


@pytest.mark.parametrize("url", [f"http://{host}/x" for host in (*PRIVATE, *TRANSLATED)])
def test_private_addresses_are_not_asked(url: str) -> None:
    with pytest.raises(BadRow, match="no public address"):
        checked_address(httpx.URL(url), UrlPolicy())


def test_workers_of_two_processes_may_keep_the_same_bytes(tmp_path: Path) -> None:
    code = (
        "from interlace.data.places import MediaFolder; from pathlib import Path; import sys\nprint(MediaFolder(Path(sys.argv[1])).keep(b'x' * 3_000_000).path)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "train")}
    running = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    paths = {process.communicate(timeout=60)[0].strip() for process in running}
    (path,) = paths
    assert hashlib.sha256(Path(path).read_bytes()).hexdigest() == Path(path).name
    assert json.dumps(sorted(file.name for file in Path(path).parent.iterdir())) == json.dumps([Path(path).name])
