"""Everything that is wrong with real data, planted in one mixture: found before training, named by file and row, left out only when told to."""

import json
import os
import tarfile
from pathlib import Path
from typing import Any

import av
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import fast_first
from tests.test_media import bomb
from tests.test_scripts import config_file, refused, run
from tests.test_sources import add

GOOD = {"image": "good.png", "conversations": [["<image>q", "a"]]}
Q, A = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}


def pictured(path: Any) -> dict[str, Any]:
    return {"image": path, "conversations": [["<image>q", "a"]]}


def filmed(path: Any) -> dict[str, Any]:
    return {"video": path, "conversations": [["<video>q", "a"]]}


# what stands in the row, and the reason that the ledger must give for it
ROWS: list[tuple[Any, str]] = [
    (5, "not_an_object"),
    (["a", "list"], "not_an_object"),
    (None, "not_an_object"),
    ({}, "unknown_format"),
    ({"conversations": []}, "empty"),
    ({"conversations": [Q]}, "no_answer"),
    ({"conversations": [Q, Q, A]}, "bad_order"),
    ({"conversations": [{"from": "narrator", "value": "x"}, A]}, "unknown_role"),
    ({"conversations": [Q, {"from": "gpt", "value": " \n"}]}, "empty_answer"),
    ({"conversations": [Q, {"from": "gpt", "value": None}]}, "bad_turn"),
    ({"image": "good.png", "conversations": [Q, A]}, "placeholder_mismatch"),  # listed but never used
    ({"image": ["good.png"] * 4, "conversations": [["<image><image>q", "a"]]}, "placeholder_mismatch"),  # as in a released M4 record
    ({"image": "good.png", "conversations": [{"from": "system", "value": "<image>"}, Q, A]}, "image_outside_user_turn"),
    (pictured(["good.png", 7]), "bad_image"),
    (pictured({"width": 3}), "bad_image"),
    (pictured(["good.png", None]), "bad_image"),
    ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "loss": float("nan")}]}, "bad_weight"),
    ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "loss": False}]}, "nothing_supervised"),
    (pictured("../../etc/passwd"), "outside_folder"),
    (pictured("/etc/passwd"), "outside_folder"),
    (pictured("link.png"), "outside_folder"),
    (pictured("http://127.0.0.1/x.png"), "url"),
    (pictured("missing.png"), "missing_image"),
    (pictured("pipe"), "not_a_file"),
    (pictured("empty.png"), "broken_image"),
    (pictured("page.jpg"), "broken_image"),
    (pictured("cut.png"), "broken_image"),
    (pictured("bomb.png"), "too_many_pixels"),
    (pictured("data:image/png;base64,!!!"), "bad_image"),
    (pictured("x\0y.png"), "bad_image"),
    (filmed("missing.mp4"), "missing_video"),
    (filmed("empty.mp4"), "broken_video"),
    (filmed("cut.mp4"), "broken_video"),
    (filmed("page.mp4"), "broken_video"),
    (filmed("page.jpg"), "broken_image"),  # a video of one frame
    (filmed("sound.wav"), "broken_video"),
    (filmed("no_frames"), "empty_video"),
    ({"audio": "sound.wav", "conversations": [Q, A]}, "audio"),
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, "preference_row"),
    ({"messages": [Q], "conversations": [Q, A]}, "ambiguous"),
]
ODD_NAMES = ("sp ace.png", "图片 é.png", "new\nline.png", "#1?.png", "{a,b}.png", "-x.png")


def plant(folder: Path) -> list[dict[str, Any]]:
    """Files with all of `ROWS` among good rows; returns the dataset entries."""
    noise = PIL.Image.effect_noise((48, 32), 80)
    for name in ("good.png", *ODD_NAMES):
        noise.save(folder / name)
    (folder / "link.png").symlink_to("/etc/hostname")
    os.mkfifo(folder / "pipe")
    (folder / "empty.png").touch()
    (folder / "empty.mp4").touch()
    (folder / "no_frames").mkdir()
    for name in ("page.jpg", "page.mp4"):
        (folder / name).write_text("<html>404</html>")
    (folder / "cut.png").write_bytes((folder / "good.png").read_bytes()[:500])
    (folder / "bomb.png").write_bytes(bomb(50_000))
    with av.open(str(folder / "whole.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(20):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), i * 12, np.uint8), format="rgb24")))
        container.mux(stream.encode())
    (folder / "cut.mp4").write_bytes((folder / "whole.mp4").read_bytes()[:-400])
    with av.open(str(folder / "sound.wav"), "w") as container:
        sound = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.rate = 8000
        container.mux([*sound.encode(frame), *sound.encode()])
    good = [GOOD, filmed("whole.mp4"), *map(pictured, ODD_NAMES)]
    rows = [*good, *(row for row, _ in ROWS)]
    (folder / "rows.json").write_text("\ufeff" + json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    lines = [json.dumps(GOOD).encode(), b"{broken", b'{"conversations": [["caf\xe9", "a"]]}', json.dumps(GOOD).encode()]
    (folder / "lines.jsonl").write_bytes(b"\n".join(lines))
    pq.write_table(pa.Table.from_pylist([{"picture": b"x", "caption": "a cat"}]), folder / "other.parquet")
    with tarfile.open(folder / "cut.tar", "w") as archive:
        for i in range(3):
            add(archive, f"{i}.json", json.dumps({"conversations": [["<image>q", "a"]]}).encode())
            add(archive, f"{i}.png", (folder / "good.png").read_bytes())
    data = (folder / "cut.tar").read_bytes()
    (folder / "cut.tar").write_bytes(data[: data.rindex(b"2.png") + 900])
    return [{"data_files": str(folder / name)} for name in ("rows.json", "lines.jsonl", "other.parquet", "cut.tar")]


EXPECTED = {
    **{("rows.json", i): reason for i, (_, reason) in enumerate(ROWS, 2 + len(ODD_NAMES))},
    ("lines.jsonl", 1): "bad_json",
    ("lines.jsonl", 2): "bad_text",
    ("other.parquet", 0): "unknown_format",
    ("cut.tar", 2): "broken_archive",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bad")


@pytest.fixture(scope="module")
def entries(folder: Path) -> list[dict[str, Any]]:
    return plant(folder)


def test_all_of_it_is_named_before_anything_is_written(entries: list[dict[str, Any]], tmp_path: Path) -> None:
    config = config_file(tmp_path, dataset={"train": entries}, use_cpu=True)
    message = refused(run("supervised_finetune.py", config), tmp_path)
    assert f"{len(EXPECTED)} of {2 + len(ODD_NAMES) + len(ROWS) + 4 + 1 + 3} rows cannot be used" in message
    assert "rows.json: row 8: not_an_object" in message and "bad_rows: skip" in message and "more" in message


def test_exactly_these_rows_are_left_out_and_listed_when_told_to(entries: list[dict[str, Any]], tmp_path: Path) -> None:
    config = config_file(tmp_path, dataset={"train": entries}, use_cpu=True, bad_rows="skip", max_steps=1, save_strategy="no", num_frames=4, lora=True)
    done = run("supervised_finetune.py", config)
    assert done.returncode == 0, done.stderr[-2000:]
    ledger = json.loads((tmp_path / "run" / "ledger.json").read_text())
    assert {(Path(entry["file"]).name, entry["index"]): entry["reason"] for entry in ledger["entries"]} == EXPECTED
    assert {entry["status"] for entry in ledger["entries"]} == {"skipped"}
    assert ledger["skipped"] == len(EXPECTED) and ledger["rows"] == ledger["trained"] + ledger["skipped"]
    assert all(len(entry["detail"]) > 3 for entry in ledger["entries"])
    config = config_file(tmp_path, dataset={"train": entries}, output_dir=str(tmp_path / "other"), bad_rows="skip", max_bad_rows=len(EXPECTED) - 1)
    done = run("supervised_finetune.py", config)
    assert done.returncode == 2 and f"max_bad_rows is {len(EXPECTED) - 1}" in done.stderr


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    fast_first(
        [
            ("cut.json", b'[{"conversations": [["q", "a"]]}, {"conv', "line 1"),
            ("latin.json", '[{"conversations": [["é", "a"]]}]'.encode("latin-1"), "not UTF-8 at byte"),
            ("wide.json", '[{"conversations": [["q", "a"]]}]'.encode("utf-16"), "UTF-16"),
            ("empty.json", b"", "empty"),
            ("object.json", b'{"rows": []}', "expected a list of records"),
            ("rows.csv", b"a,b", "unknown kind of file"),
            ("cut.parquet", b"PAR1xxxx", "no complete parquet"),
        ],
        2,
    ),
)
def test_files_that_cannot_be_read_at_all_stop_every_run(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    config = config_file(tmp_path, dataset={"train": [{"data_files": str(tmp_path / name)}]}, bad_rows="skip")
    message = refused(run("preview_data.py", config), tmp_path)
    assert expected in message and name in message
