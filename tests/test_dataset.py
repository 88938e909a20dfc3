"""Rows as the model will see them: lengths, videos, mixtures, the ledger, the store on disk."""

import dataclasses
import io
import json
import os
import pickle
import shutil
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interlace.data import dataset as dataset_module
from interlace.data import places
from interlace.data.batch import Collator, NumberedRows
from interlace.data.dataset import Rows, ledger_of, make_stores
from interlace.data.formats import FORMATS
from interlace.data.ledger import Entry, Ledger, check_ledger
from interlace.data.lengths import expand, expanded_length, fit
from interlace.data.packing import Plan, PlanLoader
from interlace.data.places import MediaFolder, locate
from interlace.data.reading import Headers, Outcome, Record, Row, RowReader, records_of
from interlace.data.sample import BadRow, Sample
from interlace.data.sources import Source, read_entries
from interlace.data.store import Store, to_batch
from interlace.data.template import ChatTemplate, Encoded
from interlace.errors import InputError
from interlace.model.loading import load_processing
from tests.conftest import write_rows

IMAGE_ID = 151646
Read = Callable[..., tuple[Rows, Ledger]]


def picture(path: Path, size: tuple[int, int] = (8, 6), color: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", size, (color % 256, 50, 90)).save(path)


def video(path: Path, frames: int, size: tuple[int, int] = (64, 48), fps: int = 10) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for i in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), i * 255 // frames, np.uint8), format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture
def reader(qwen: Any, tmp_path: Path) -> RowReader:
    return RowReader(ChatTemplate(qwen, IMAGE_ID), lambda sizes: [4] * len(sizes), "4", 100, "drop_turns", 10**6, MediaFolder(tmp_path / "cache" / "media"))


@pytest.fixture
def read(reader: RowReader, tmp_path: Path) -> Read:
    def read_rows(entry: dict[str, Any] | list[dict[str, Any]], workers: int = 0, **changes: Any) -> tuple[Rows, Ledger]:
        sources = read_entries(entry if isinstance(entry, list) else [entry], 0)
        stores = make_stores(sources, dataclasses.replace(reader, **changes), tmp_path / "cache", workers, False)
        return Rows(stores, [source.weight for source in sources]), ledger_of(stores)

    return read_rows


def outcome(reader: RowReader, value: Any, folder: Path) -> Outcome:
    return reader.read(Record(Source("rows.json", "rows", None, (folder,), (folder,)), 0, value), Headers())


# --- lengths ---


@st.composite
def encoded_rows(draw: st.DrawFn) -> tuple[Encoded, list[int]]:
    ids: list[int] = []
    labels: list[int] = []
    ends, starts, tokens = [], [], []
    for _ in range(draw(st.integers(1, 4))):
        question = draw(st.lists(st.sampled_from([1, 2, IMAGE_ID]), min_size=1, max_size=6))
        answer = draw(st.integers(1, 4))
        starts.append(len(ids) + len(question))
        ids += [*question, *[3] * answer]
        labels += [-100] * len(question) + [3 if draw(st.booleans()) else -100] * answer
        ends.append(len(ids))
        tokens += [draw(st.integers(1, 9)) for token in question if token == IMAGE_ID]
    labels[-1] = 3
    arrays = np.array(ids, np.int32), np.array(labels, np.int32), np.ones(len(ids), np.float32)
    return Encoded(*arrays, len(tokens), tuple(ends), tuple(starts)), tokens


@settings(max_examples=2_000, deadline=None)
@given(row=encoded_rows(), max_length=st.integers(2, 60))
def test_images_stay_whole_answers_survive_and_lengths_hold(row: tuple[Encoded, list[int]], max_length: int) -> None:
    encoded, tokens = row
    try:
        kept, dropped = fit(encoded, tokens, IMAGE_ID, max_length, "drop_turns")
    except BadRow as error:
        assert error.reason == "too_long"
        assert expanded_length(encoded, tokens) > max_length
        first = int((encoded.input_ids[: encoded.exchange_ends[0]] == IMAGE_ID).sum())
        short = encoded.exchange_ends[0] - first + sum(tokens[:first])
        assert short > max_length or (encoded.labels[1 : encoded.exchange_ends[0]] < 0).all()
        return
    count = kept.num_images
    ids, labels, weights = expand(kept, tokens[:count], IMAGE_ID)
    assert len(ids) == len(labels) == len(weights) == expanded_length(kept, tokens[:count]) <= max_length
    runs = [int(n) for n in tokens[:count]]
    assert (ids == IMAGE_ID).sum() == sum(runs) and (kept.input_ids == IMAGE_ID).sum() == len(runs)
    assert (labels[1:] >= 0).any() and not (labels[ids == IMAGE_ID] >= 0).any()
    assert kept.exchange_ends == encoded.exchange_ends[: len(kept.exchange_ends)]
    assert np.array_equal(kept.input_ids, encoded.input_ids[: len(kept.input_ids)])
    assert bool(dropped) == (len(kept.input_ids) < len(encoded.input_ids))
    # the most that fits: one exchange more would be too long
    if dropped:
        nxt = encoded.exchange_ends[len(kept.exchange_ends)]
        images = int((encoded.input_ids[:nxt] == IMAGE_ID).sum())
        assert nxt - images + sum(tokens[:images]) > max_length


WORDS = st.text(st.sampled_from("ab é图\n<|im_end|>?"), min_size=1, max_size=12)


@st.composite
def records(draw: st.DrawFn) -> dict[str, Any]:
    turns, images, videos = [], [], []
    for _ in range(draw(st.integers(1, 4))):
        question = ""
        for _ in range(draw(st.integers(0, 3))):
            kind = draw(st.sampled_from(["image", "image", "video"]))
            (images if kind == "image" else videos).append(draw(st.integers(0, 4)))
            question += f"{draw(st.sampled_from(['', ' and ', chr(10)]))}<{kind}>"
        turns += [{"from": "human", "value": question + draw(WORDS)}, {"from": "gpt", "value": draw(WORDS) + "."}]
    files = {"images": [f"{i}.png" for i in images], "videos": [f"clip{i}" for i in videos]}
    return {**{name: value for name, value in files.items() if value}, "conversations": turns}


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    for i in range(5):
        picture(folder / f"{i}.png", (4 + i, 8), i)
        for frame in range(1 + 3 * i):
            picture(folder / f"clip{i}" / f"frame_{frame}.png", (4 + i, 8), frame)
    return folder


@pytest.fixture(scope="module")
def wide_reader(qwen: Any, tmp_path_factory: pytest.TempPathFactory) -> RowReader:
    kept = MediaFolder(tmp_path_factory.mktemp("kept"))
    return RowReader(ChatTemplate(qwen, IMAGE_ID), lambda sizes: [width for width, _ in sizes], "width", 60, "fewer_frames", 10**6, kept, num_frames=6)


HEADERS = Headers()


def order_of(row: Row) -> list[str]:
    """The images and videos of a row in order, the frames of a video as one."""
    names = [Path(place.path).parent.name if "clip" in place.path else Path(place.path).name for place in row.images]
    return [name for i, name in enumerate(names) if i == 0 or name != names[i - 1]]


@settings(max_examples=10_000, deadline=None)
@given(record=records(), max_length=st.integers(24, 120), too_long=st.sampled_from(["drop_turns", "fewer_frames", "drop_row"]))
def test_whole_rows_keep_their_images_order_and_answers_whatever_is_cut(
    media: Path, wide_reader: RowReader, record: dict[str, Any], max_length: int, too_long: Any
) -> None:
    reader = dataclasses.replace(wide_reader, max_length=max_length, too_long=too_long)
    found = reader.read(Record(Source("r.json", "r", None, (media,), (media,)), 0, record), HEADERS)
    whole = dataclasses.replace(wide_reader, max_length=10**6).read(found.record, HEADERS)
    assert whole.row is not None
    if found.row is None:
        assert found.entry is not None and found.entry.reason == "too_long" and whole.row.length > max_length
        return
    row = found.row
    ids, labels, _ = expand(row.encoded, row.image_tokens, IMAGE_ID)
    assert len(ids) == row.length <= max_length
    assert len(row.images) == len(row.image_tokens) == row.encoded.num_images
    assert (ids == IMAGE_ID).sum() == sum(row.image_tokens)
    assert row.image_tokens == tuple(PIL.Image.open(place.path).size[0] for place in row.images)
    assert (labels[1:] >= 0).any()
    assert order_of(row) == order_of(whole.row)[: len(order_of(row))]
    text = row.encoded.input_ids[row.encoded.input_ids != IMAGE_ID]
    other = whole.row.encoded.input_ids[whole.row.encoded.input_ids != IMAGE_ID]
    assert np.array_equal(text, other[: len(text)])
    if whole.row.length <= max_length:
        assert found.entry is None and np.array_equal(row.encoded.input_ids, whole.row.encoded.input_ids) and row.images == whole.row.images
    elif too_long == "fewer_frames" and len(text) == len(other):
        assert found.entry is not None and found.entry.reason == "fewer_frames" and len(row.images) < len(whole.row.images)
    else:
        assert found.entry is not None and found.entry.reason == "too_long" and too_long != "drop_row"


def test_length_policies(qwen: Any) -> None:
    template = ChatTemplate(qwen, IMAGE_ID, system_prompt="")
    sample = FORMATS["chatml"]({"image": "x", "conversations": [["<image>a", "b"], ["c", "d"]]})
    assert isinstance(sample, Sample)
    encoded = template.encode(sample)
    whole = expanded_length(encoded, [100])
    assert fit(encoded, [100], IMAGE_ID, whole, "error")[1] == ""
    kept, detail = fit(encoded, [100], IMAGE_ID, whole - 1, "drop_turns")
    assert "dropped 1 of 2 exchanges" in detail
    assert len(kept.exchange_ends) == len(kept.answer_starts) == 1
    for policy, limit in (("drop_row", whole - 1), ("error", whole - 1), ("drop_turns", 50), ("fewer_frames", 50)):
        with pytest.raises(BadRow, match="too_long"):
            fit(encoded, [100], IMAGE_ID, limit, policy)  # type: ignore[arg-type]


# --- videos ---


def test_a_video_is_so_many_images_at_its_place(reader: RowReader, tmp_path: Path) -> None:
    video(tmp_path / "v.mp4", 40)
    value = {"video": "v.mp4", "conversations": [["before <video> after", "a"]]}
    row = outcome(dataclasses.replace(reader, num_frames=5), value, tmp_path).row
    assert row is not None
    assert [place.path for place in row.images] == [str(tmp_path / "v.mp4")] * 5
    times = [place.pts for place in row.images]
    assert times == sorted(times) and len(set(times)) == 5  # type: ignore[type-var]
    images = {"images": ["x.png"] * 5, "conversations": [["before " + "<image>" * 5 + " after", "a"]]}
    picture(tmp_path / "x.png")
    same = outcome(reader, images, tmp_path).row
    assert same is not None and np.array_equal(same.encoded.input_ids, row.encoded.input_ids)


def test_frame_folders_lists_and_rates(reader: RowReader, tmp_path: Path) -> None:
    for i in range(12):
        picture(tmp_path / "clip" / f"frame_{i}.png")
    video(tmp_path / "v.mp4", 40, fps=10)

    def names(value: Any, **changes: Any) -> list[str]:
        row = outcome(dataclasses.replace(reader, **changes), {"video": value, "conversations": [["<video>q", "a"]]}, tmp_path).row
        assert row is not None
        return [Path(place.path).stem for place in row.images]

    assert names("clip", num_frames=4) == ["frame_0", "frame_3", "frame_7", "frame_11"]  # numpy.linspace(0, 11, 4), cut to whole numbers
    assert names([f"clip/frame_{i}.png" for i in range(3)]) == ["frame_0", "frame_1", "frame_2"]
    assert len(names("v.mp4", video_fps=2.0)) == 8
    assert len(names("v.mp4", video_fps=2.0, num_frames=3)) == 3
    (tmp_path / "clip" / "frame_1.png").unlink()
    (tmp_path / "clip" / "frame_1.png").symlink_to("/etc/hostname")
    bad = outcome(dataclasses.replace(reader, num_frames=20), {"video": "clip", "conversations": [["<video>q", "a"]]}, tmp_path)
    assert bad.entry is not None and bad.entry.reason == "outside_folder"


def test_fewer_frames_keeps_every_turn(reader: RowReader, tmp_path: Path) -> None:
    video(tmp_path / "v.mp4", 40)
    value = {"video": "v.mp4", "conversations": [["<video>q", "a"], ["more", "b"]]}
    found = outcome(dataclasses.replace(reader, max_length=70, too_long="fewer_frames"), value, tmp_path)
    assert found.row is not None and found.entry is not None
    assert (found.entry.status, found.entry.reason) == ("shortened", "fewer_frames")
    assert 1 < len(found.row.images) < 16 and 66 < found.row.length <= 70
    assert f"at most {len(found.row.images)} of 16 frames" in found.entry.detail
    assert len(found.row.encoded.exchange_ends) == 2


# --- the ledger ---


def planted(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    PIL.Image.effect_noise((32, 24), 80).save(folder / "good.png")
    (folder / "cut.png").write_bytes((folder / "good.png").read_bytes()[:300])
    (folder / "empty.png").touch()
    rows: list[Any] = [{"image": "good.png", "conversations": [["<image>q", "a"]]} for _ in range(20)]
    for i in range(5):
        rows[i] = {"image": "cut.png", "conversations": [["<image>q", "a"]]}
    for i in range(5, 8):
        rows[i] = {"conversations": [["q " * 200, "a"]]}
    for i in range(8, 10):
        rows[i] = {"image": ["good.png"], "conversations": [["<image><image>q", "a"]]}
    rows[10] = {"conversations": [{"from": "gpt", "value": "hello"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    rows[11] = {"conversations": [["q", "a"], ["more " * 200, "b"]]}
    rows[12] = 5
    rows[13] = {"prompt": "q", "chosen": "a", "rejected": "b"}
    rows[14] = {"image": "empty.png", "conversations": [["<image>q", "a"]]}
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


def test_exactly_the_planted_rows_are_reported_and_totals_reconcile(tmp_path: Path, read: Read) -> None:
    rows, ledger = read({"data_files": str(planted(tmp_path / "data"))})
    assert (ledger.rows, ledger.trained, ledger.shortened, ledger.skipped) == (20, 5, 2, 13)
    assert len(rows) == ledger.trained + ledger.shortened
    assert [row.index for row in rows] == [10, 11, 15, 16, 17, 18, 19]
    assert {(entry.index, entry.status, entry.reason) for entry in ledger.entries} == {
        *((i, "skipped", "broken_image") for i in range(5)),
        *((i, "skipped", "too_long") for i in range(5, 8)),
        *((i, "skipped", "placeholder_mismatch") for i in (8, 9)),
        (10, "shortened", "opening_assistant_turn"),
        (11, "shortened", "too_long"),
        (12, "skipped", "not_an_object"),
        (13, "skipped", "preference_row"),
        (14, "skipped", "broken_image"),
    }
    ledger.write(tmp_path / "ledger.json")
    written = json.loads((tmp_path / "ledger.json").read_text())
    assert set(written) == {"rows", "trained", "shortened", "skipped", "entries"}
    assert written["entries"] == [dataclasses.asdict(entry) for entry in ledger.entries]


def test_bad_rows_stop_the_run_unless_allowed_and_long_rows_are_not_bad(tmp_path: Path, read: Read) -> None:
    _, ledger = read({"data_files": str(planted(tmp_path / "data"))})
    with pytest.raises(InputError, match=r"10 of 20 rows cannot be used(.|\n)*rows.json: row 0: broken_image(.|\n)*row 12"):
        check_ledger(ledger, "drop_turns", "error", None)
    check_ledger(ledger, "drop_turns", "skip", None)
    check_ledger(ledger, "drop_turns", "skip", 10)
    with pytest.raises(InputError, match="max_bad_rows is 9"):
        check_ledger(ledger, "drop_turns", "skip", 9)
    with pytest.raises(InputError, match=r"3 of 20 rows cannot be used(.|\n)*too_long"):
        check_ledger(ledger, "error", "skip", None)
    only_bad = Ledger.of([Entry("f", 0, "skipped", "broken_image", "")])
    with pytest.raises(InputError, match="no row is left"):
        check_ledger(only_bad, "drop_turns", "skip", None)


def test_ledger_counts_reconcile() -> None:
    ledger = Ledger.of([None, Entry("f", 1, "shortened", "x", ""), Entry("f", 2, "skipped", "y", ""), None])
    assert ledger.rows == 4 == ledger.trained + ledger.shortened + ledger.skipped
    assert "2 trained, 1 shortened, 1 skipped" in ledger.summary()


# --- the store ---


def table(rows: Rows) -> list[tuple[Any, ...]]:
    return [(row.index, row.encoded.input_ids.tolist(), row.encoded.labels.tolist(), row.encoded.weights.tolist(), row.images, row.length) for row in rows]


def mixed(folder: Path, count: int) -> list[dict[str, Any]]:
    """Entries over two files with good, bad, shortened and preference rows."""
    planted(folder)
    lines = [json.dumps({"image": "good.png", "conversations": [[f"<image>q{i}", f"a{i}"]]}) for i in range(count)] + ["{broken"]
    (folder / "lines.jsonl").write_text("\n".join(lines))
    return [{"data_files": str(folder / "lines.jsonl")}, {"data_files": str(folder / "rows.json"), "sampling_strategy": "random:12"}]


@pytest.mark.parametrize("too_long", ["drop_turns", "drop_row"])
def test_many_rows_that_are_too_long_are_loudly_said(tmp_path: Path, read: Read, too_long: str) -> None:
    turns = [{"from": "human", "value": "a " * 9}, {"from": "gpt", "value": "b " * 9}] * 2
    short = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    for count, is_said in ((2, True), (1, False)):  # of ten rows: a tenth may be
        (tmp_path / "rows.json").write_text(json.dumps([{"conversations": turns}] * count + [{"conversations": short}] * (10 - count)))
        whole, _ = read({"data_files": str(tmp_path / "rows.json")})
        most = int(whole.lengths.max()) - 1
        _, ledger = read({"data_files": str(tmp_path / "rows.json")}, max_length=most, too_long=too_long)
        warning = ledger.too_long_warning(most)
        assert bool(warning) is is_said
        if is_said:
            assert f"2 of 10 rows are too long for max_length {most}" in warning and f"set max_length to {most + 1}" in warning


def test_rows_and_ledger_are_the_same_for_any_number_of_workers(tmp_path: Path, read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = mixed(tmp_path / "data", 50)
    monkeypatch.setattr(dataset_module, "_ROWS_PER_CHUNK", 7)
    alone, ledger = read(entries)
    monkeypatch.setattr(dataset_module, "_SMALL_BYTES", 0)
    for workers in (1, 2, 3):
        for folder in (tmp_path / "cache" / "rows").iterdir():
            folder.rename(tmp_path / f"{folder.name}-{workers}")
        rows, other = read(entries, workers=workers)
        assert table(rows) == table(alone)
        assert list(other.entries) == list(ledger.entries) and other.summary() == ledger.summary()


@pytest.mark.parametrize("kind", ["supervised", "preference"])
def test_rows_on_disk_are_the_rows_that_were_read(tmp_path: Path, reader: RowReader, read: Read, kind: Any) -> None:
    entries = [*mixed(tmp_path / "data", 30), {"data_files": str(tmp_path / "data" / "rows.json")}]
    rows, _ = read(entries, kind=kind)
    every = list(dataclasses.replace(reader, kind=kind).outcomes(records_of(read_entries(entries, 0))))
    direct = [found.row for found in every if found.row is not None]
    assert direct
    assert len(direct) == len(rows)
    assert [row.file for row in rows] == [row.file for row in direct]
    for stored, expected in zip(rows, direct, strict=True):
        assert (stored.index, stored.images, stored.image_tokens, stored.length) == (expected.index, expected.images, expected.image_tokens, expected.length)
        assert stored.encoded.leaf_starts == expected.encoded.leaf_starts
        for name in ("input_ids", "labels", "weights"):
            assert np.array_equal(getattr(stored.encoded, name), getattr(expected.encoded, name)), name
    assert rows.lengths.tolist() == [row.length for row in direct]
    assert rows.supervised.tolist() == [row.supervised_tokens for row in direct]
    assert rows.num_images.tolist() == [len(row.images) for row in direct]


def test_weights_of_labels_survive_the_store(tmp_path: Path, reader: RowReader) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a b c", "loss": 0.25}]
    turns += [{"role": "user", "content": "r"}, {"role": "assistant", "content": "d", "loss": False}, {"role": "user", "content": "s"}]
    for policy in ("assistant", "llava_next", "last_turn"):
        template = ChatTemplate(reader.template.tokenizer, IMAGE_ID, label_policy=policy)  # type: ignore[arg-type]
        found = outcome(dataclasses.replace(reader, template=template), {"messages": [*turns, {"role": "assistant", "content": "e"}]}, tmp_path)
        assert found.row is not None
        folder = tmp_path / policy
        folder.mkdir()
        batch = to_batch([found])
        (folder / "source.json").write_text('{"made": 1.0, "content": ""}')
        with pa.ipc.new_file(str(folder / "rows.arrow"), batch.schema) as writer:
            writer.write_batch(batch)
        stored = Store(folder, "rows.json").row(0).encoded
        assert np.array_equal(stored.labels, found.row.encoded.labels)
        supervised = stored.labels >= 0
        assert np.array_equal(stored.weights[supervised], found.row.encoded.weights[supervised])


def test_rows_are_made_once_and_again_only_when_something_changed(tmp_path: Path, read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data"
    picture(data / "x.png")
    (data / "rows.json").write_text(json.dumps([{"image": "x.png", "conversations": [["<image>q", "a"]]}]))
    entry = {"data_files": str(data / "rows.json")}
    made: list[int] = []
    build = dataset_module._build
    monkeypatch.setattr(dataset_module, "_build", lambda sources, *rest: (made.append(len(sources)), build(sources, *rest))[1])
    read(entry)
    read(entry)
    read({"data_files": [str(data / "rows.json")], "weight": 2.0})  # the same rows
    assert made == [1]
    read(entry, max_length=99)
    read(entry, num_frames=3)
    assert made == [1] * 3
    os.utime(data / "x.png", ns=(1, time.time_ns()))
    read(entry)
    assert made == [1] * 4
    (data / "rows.json").write_text(json.dumps([{"image": "x.png", "conversations": [["<image>q", "b"]]}]))
    rows, _ = read(entry)
    assert made == [1] * 5 and len(rows) == 1
    (data / "x.png").unlink()
    assert read(entry)[1].skipped == 1
    read(entry)  # the same run believes its own finding ..
    assert made == [1] * 6
    picture(data / "x.png")
    monkeypatch.setattr(dataset_module.psutil, "Process", lambda: type("Later", (), {"create_time": lambda self: time.time() + 5})())
    assert read(entry)[1].skipped == 0  # .. a later one looks again
    assert made == [1] * 7


def test_a_frame_added_to_a_folder_is_noticed(tmp_path: Path, read: Read) -> None:
    data = tmp_path / "data"
    for i in range(3):
        picture(data / "clip" / f"{i}.png")
    (data / "rows.json").write_text(json.dumps([{"video": "clip", "conversations": [["<video>q", "a"]]}]))
    entry = {"data_files": str(data / "rows.json")}
    assert len(read(entry)[0][0].images) == 3
    picture(data / "clip" / "3.png")
    assert len(read(entry)[0][0].images) == 4


def test_a_link_that_leads_elsewhere_is_noticed(tmp_path: Path, read: Read) -> None:
    data = tmp_path / "data"
    for version in (1, 2):
        picture(data / f"v{version}" / "x.png", (8 * version, 8), version)
    (data / "now").symlink_to("v1")
    (data / "rows.json").write_text(json.dumps([{"image": "now/x.png", "conversations": [["<image>q", "a"]]}]))
    entry = {"data_files": str(data / "rows.json")}
    assert read(entry)[0][0].images[0].path == str(data / "v1" / "x.png")
    (data / "now").unlink()
    (data / "now").symlink_to("v2")
    locate.cache_clear()  # another process would not remember either
    places._real_folder.cache_clear()
    assert read(entry)[0][0].images[0].path == str(data / "v2" / "x.png")


def test_a_file_that_cannot_be_read_stops_all_and_leaves_nothing_half_made(tmp_path: Path, read: Read) -> None:
    (tmp_path / "good.json").write_text(json.dumps([{"conversations": [["q", "a"]]}]))
    (tmp_path / "cut.json").write_text('[{"conversations": [["q", "a"]]}, {"conv')
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(InputError) as caught:
        read([{"data_files": str(tmp_path / f"{name}.json")} for name in ("good", "cut", "other")])
    assert "cut.json: line 1" in str(caught.value) and "other.json: expected a list" in str(caught.value)
    stores = [folder for folder in (tmp_path / "cache" / "rows").iterdir() if folder.is_dir()]
    assert [json.loads((folder / "source.json").read_text())["file"] for folder in stores] == [str(tmp_path / "good.json")]


def test_embedded_images_archives_and_tables_give_the_same_rows_as_files(tmp_path: Path, read: Read) -> None:
    data = tmp_path / "data"
    picture(data / "x.png", (8, 6), 77)
    encoded = (data / "x.png").read_bytes()
    turns = [["<image>q", "a"]]
    (data / "rows.json").write_text(json.dumps([{"image": "x.png", "conversations": turns}]))
    pq.write_table(pa.Table.from_pylist([{"image": {"bytes": encoded, "path": "x.png"}, "conversations": turns}]), data / "rows.parquet")
    with tarfile.open(data / "rows.tar", "w") as archive:
        for name, content in (("0.json", json.dumps({"conversations": turns}).encode()), ("0.png", encoded)):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    found = [read({"data_files": str(data / f"rows.{suffix}")})[0][0] for suffix in ("json", "parquet", "tar")]
    ids = [row.encoded.input_ids.tolist() for row in found]
    assert ids[0] == ids[1] == ids[2]
    from interlace.data.media import open_images

    pictures = [np.asarray(image) for image in open_images([row.images[0] for row in found])]
    assert all(np.array_equal(pictures[0], other) for other in pictures)


def test_preference_rows_are_a_prompt_and_two_answers(tmp_path: Path, reader: RowReader) -> None:
    picture(tmp_path / "x.png")
    pair_reader = dataclasses.replace(reader, kind="preference")
    row = outcome(pair_reader, {"image": "x.png", "prompt": "<image>q", "chosen": "yes", "rejected": "no no"}, tmp_path).row
    assert row is not None
    start, second = row.encoded.leaf_starts
    prompt, chosen, rejected = np.split(row.encoded.input_ids, [start, second])
    for answer, text in ((chosen, "yes"), (rejected, "no no")):
        single = outcome(reader, {"image": "x.png", "conversations": [["<image>q", text]]}, tmp_path).row
        assert single is not None
        both = [*prompt.tolist(), *answer.tolist()]
        assert both == single.encoded.input_ids[: len(both)].tolist()
        labels = [*[-100] * len(prompt), *answer.tolist()]
        assert labels == single.encoded.labels[: len(both)].tolist()
    assert row.length == len(row.encoded.input_ids) + 3
    picture(tmp_path / "y.png")
    own = {"image": "x.png", "rejected_images": ["y.png"], "query": "<image>q", "response": "yes", "rejected_response": "no"}
    same = outcome(pair_reader, own | {"rejected_images": ["x.png"]}, tmp_path).row  # the same prompt after all
    assert same is not None and same.encoded.leaf_starts[0] > 0 and len(same.images) == 1
    apart = outcome(pair_reader, own, tmp_path).row
    assert apart is not None and apart.encoded.leaf_starts[0] == 0 and len(apart.images) == 2
    wrong = outcome(pair_reader, {"conversations": [["q", "a"]]}, tmp_path).entry
    assert wrong is not None and wrong.reason == "no_preference_row"


# --- mixtures ---


def test_weights_are_copies_per_epoch_and_fractions_are_drawn_anew() -> None:
    copies = [1.0] * 10 + [2.0] * 5 + [0.3] * 10 + [1.5] * 4
    sources = [0] * 10 + [1] * 5 + [2] * 10 + [3] * 4
    plan = Plan([3] * 29, [3] * 29, 12, None, 3, 0, world_size=2, copies=copies, sources=sources)

    def times(epoch: int) -> np.ndarray:
        rows = [row for step in plan.steps(epoch) for batch in step for row in batch if row >= 0]
        return np.bincount(rows, minlength=29)

    first, again, second = times(0), times(0), times(1)
    assert np.array_equal(first, again)
    for drawn in (first, second):
        assert (drawn[:10] == 1).all() and (drawn[10:15] == 2).all()
        assert drawn[15:25].sum() == 3 and drawn[15:25].max() == 1
        assert drawn[25:].sum() == 6 and set(drawn[25:]) <= {1, 2}
    assert not np.array_equal(first, second)
    assert plan.rows_per_epoch == first.sum()
    for epoch in range(3):  # each source gives its own share, and one row at least
        plan = Plan([3] * 22, [3] * 22, 12, None, 3, epoch, copies=[0.5] * 20 + [0.1] * 2, sources=[0] * 10 + [1] * 10 + [2] * 2)
        drawn = np.bincount(plan._drawn(epoch), minlength=22)
        assert [drawn[:10].sum(), drawn[10:20].sum(), drawn[20:].sum()] == [5, 5, 1]


def test_rows_reach_other_processes_and_answer_without_the_whole_file(tmp_path: Path, read: Read) -> None:
    rows, _ = read(mixed(tmp_path / "data", 30))
    there = pickle.loads(pickle.dumps(rows))
    assert table(there) == table(rows)
    assert len(pickle.dumps(rows)) < 20_000
    row: Row = there[3]
    assert row.supervised_tokens > 0


def test_an_image_that_breaks_behind_its_header_is_named_with_its_row(tmp_path: Path, read: Read) -> None:
    data = tmp_path / "data"
    data.mkdir()
    PIL.Image.effect_noise((64, 64), 80).save(data / "x.png")
    content = bytearray((data / "x.png").read_bytes())
    content[200:400] = bytes(200)
    (data / "x.png").write_bytes(content)  # header and end mark are whole
    (data / "rows.json").write_text(json.dumps([{"conversations": [["q", "a"]]}, {"image": "x.png", "conversations": [["<image>q", "a"]]}]))
    rows, ledger = read({"data_files": str(data / "rows.json")})
    assert ledger.skipped == 0
    found = Collator(lambda images: torch.zeros(len(images), 3, 2, 2), IMAGE_ID)([(0, rows[0]), (1, rows[1])])
    assert isinstance(found, InputError) and "rows.json: row 1: " in str(found) and "x.png" in str(found)
    loader = PlanLoader(NumberedRows(rows), batch_size=2, collate_fn=Collator(lambda images: torch.zeros(1), IMAGE_ID))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="row 1"):
        next(iter(loader))


def test_collators_reach_spawned_workers(tiny_dir: Path) -> None:
    processing = load_processing(str(tiny_dir))
    processing.template.text_ids("remembered")
    assert pickle.loads(pickle.dumps(Collator(processing.process_images, 3))).image_token_id == 3


def test_the_fingerprint_knows_the_rows_and_their_order_and_not_where_they_lie(tmp_path: Path, read: Read) -> None:
    """Edited, dropped, reordered or given another image: another fingerprint; the same rows in another folder: the same."""

    def fingerprint(folder: Path) -> str:
        return read([{"data_files": str(folder / "rows.json")}])[0].fingerprint

    rows = json.loads(write_rows(tmp_path / "a", 6).read_text())
    first = fingerprint(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert fingerprint(tmp_path / "b") == first
    edited, pictured = json.loads(json.dumps(rows)), json.loads(json.dumps(rows))
    edited[0]["conversations"][-1]["value"] = "otherwise"
    old = pictured[1]["image"][0]
    pictured[1]["image"][0] = "other.png"
    for name, changed in {"dropped": rows[:-1], "reordered": rows[::-1], "edited": edited, "another image": pictured}.items():
        shutil.copytree(tmp_path / "a", tmp_path / name)
        shutil.copy(tmp_path / name / old, tmp_path / name / "other.png")
        (tmp_path / name / "rows.json").write_text(json.dumps(changed))
        assert fingerprint(tmp_path / name) != first, name
