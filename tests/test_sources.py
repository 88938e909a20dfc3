"""Files, archives, tables and mixtures -> rows: each kind gives the same rows, damage is named, nothing is guessed."""

import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from interlace.data.readers import read_rows
from interlace.data.sample import BadRow, Place
from interlace.data.shards import ArchiveRow
from interlace.data.sources import Source, choose, expand, read_entries
from interlace.errors import InputError

ROWS = [{"id": i, "conversations": [[f"q {i} é 图", "a"]], "image": None} for i in range(300)]


def values(path: Path) -> list[Any]:
    rows = list(read_rows(path))
    assert [index for index, _, _ in rows] == list(range(len(rows)))
    positions = [position for _, _, position in rows]
    assert positions == sorted(positions) and 0 <= positions[0] <= positions[-1] <= 1
    return [value for _, value, _ in rows]


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


# --- readers ---


def test_json_jsonl_gz_and_parquet_give_the_same_rows(tmp_path: Path) -> None:
    text, lines = json.dumps(ROWS, ensure_ascii=False, indent=1), "\n\n".join(json.dumps(row) for row in ROWS)
    (tmp_path / "a.json").write_text(text)
    (tmp_path / "bom.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (tmp_path / "b.jsonl").write_text(lines + "\n\n")
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    (tmp_path / "lines.json").write_text(lines)  # one object per line under the other name, as many tools write it
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "d.json.gz").write_bytes(gzip.compress(text.encode()))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "e.parquet")
    for path in tmp_path.iterdir():
        assert values(path) == ROWS, path.name


def test_a_long_list_is_read_across_chunks_whatever_stands_at_the_seams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"n": i, "t": 'a "quoted" \\ text \u00e9\u4e2d\U0001f600' * (i % 5), "f": 1.5e-3, "b": [True, None, {}]} for i in range(60)]
    for indent in (None, 2):
        (tmp_path / "x.json").write_text(json.dumps(rows, ensure_ascii=indent is None, indent=indent))
        for size in (1, 7, 64, 1000):
            monkeypatch.setattr("interlace.data.readers._CHUNK_BYTES", size)
            assert values(tmp_path / "x.json") == rows


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[\n{"a": 1},\n{"b"', "line 3"),
        ('[\n{"a": 1}\n{"b": 2}]', "line 3, column 1: expected a comma"),
        ('[\n{"a": 1}]\n x', "line 3, column 2: there is more behind"),
        ('[\n{"a": 1},\n{"b": nope}\n]' + " " * 100, "line 3, column 7"),
        ('[\n{"a": 1},\n{"b": "never closed}\n]', "line 3, column 21: Invalid control"),
        ('[\n{"a": 1},\n{"b": "never closed}', "line 3, column 7: Unterminated"),
        ('[{"a": 1},', "Expecting value"),
        ("", "empty"),
        ("  \n ", "empty"),
        ("[]", "no rows"),
        ('{"data": [1]}', "expected a list of records; got dict with the keys data"),
        ("hello", "no JSON either"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_broken_json_names_its_place(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(InputError, match=expected) as caught:
        values(tmp_path / "x.json")
    assert "x.json" in str(caught.value)


def test_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.json").write_bytes('[{"a": "é"}]'.encode("latin-1"))
    with pytest.raises(InputError, match="not UTF-8 at byte 8"):
        values(tmp_path / "latin.json")
    (tmp_path / "wide.json").write_bytes('[{"a": 1}]'.encode("utf-16"))
    with pytest.raises(InputError, match="UTF-16"):
        values(tmp_path / "wide.json")
    (tmp_path / "mixed.jsonl").write_bytes(b'{"a": 1}\n' + '{"a": "é"}\n'.encode("latin-1") + b'{"a": 3}\n')
    first, second, third = values(tmp_path / "mixed.jsonl")
    assert (first, third) == ({"a": 1}, {"a": 3})
    assert isinstance(second, BadRow) and second.reason == "bad_text" and "line 2" in second.detail


def test_a_broken_line_is_one_bad_row_and_the_others_stay(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n{"b"\n\n{"a": 3}\n')
    first, second, third = values(tmp_path / "x.jsonl")
    assert (first, third) == ({"a": 1}, {"a": 3})
    assert isinstance(second, BadRow) and second.reason == "bad_json" and "line 2" in second.detail


def test_a_cut_archive_ends_with_a_bad_row_that_says_so(tmp_path: Path) -> None:
    packed = gzip.compress("\n".join(json.dumps(row) for row in ROWS).encode())
    (tmp_path / "x.jsonl.gz").write_bytes(packed[: len(packed) * 2 // 3])
    rows = values(tmp_path / "x.jsonl.gz")
    assert rows[:-1] == ROWS[: len(rows) - 1]
    assert isinstance(rows[-1], BadRow) and rows[-1].reason == "broken_archive"
    whole = json.dumps(ROWS).encode()
    (tmp_path / "x.json.gz").write_bytes(gzip.compress(whole)[:-20])
    with pytest.raises(InputError, match="breaks off"):
        values(tmp_path / "x.json.gz")


def shard(path: Path, mode: str = "w") -> None:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for i in range(5):
            add(archive, f"s/{i}.json", json.dumps({"id": i, "conversations": [["<image><image>q", "a"]]}).encode())
            add(archive, f"s/{i}.0.png", b"first" * (i + 1))
            add(archive, f"s/{i}.1.png", b"second")
        add(archive, "s/caption.jpg", b"picture")
        add(archive, "s/caption.txt", b"A cat.\n")


def test_webdataset_shards_keep_media_where_they_are(tmp_path: Path) -> None:
    shard(tmp_path / "x.tar")
    rows = values(tmp_path / "x.tar")
    assert len(rows) == 6 and all(isinstance(row, ArchiveRow) for row in rows)
    assert rows[2].value == {"id": 2, "conversations": [["<image><image>q", "a"]], "image": ["s/2.0.png", "s/2.1.png"]}
    place = rows[2].members["s/2.0.png"]
    assert isinstance(place, Place)
    assert (tmp_path / "x.tar").read_bytes()[place.offset : place.offset + place.size] == b"first" * 3
    assert rows[2].members["2.0.png"] == place  # named with or without its folder
    assert rows[5].value == {"conversations": [["<image>", "A cat."]], "image": ["s/caption.jpg"]}
    shard(tmp_path / "y.tar.gz", "w:gz")
    packed = values(tmp_path / "y.tar.gz")
    assert [row.value for row in packed] == [row.value for row in rows]
    assert packed[2].members["s/2.0.png"] == b"first" * 3


@pytest.mark.parametrize("cut", [0.3, 0.55, 0.8, "end"])
def test_a_tar_cut_off_in_the_middle_is_named_and_its_whole_rows_stay(tmp_path: Path, cut: Any) -> None:
    shard(tmp_path / "x.tar")
    data, whole = (tmp_path / "x.tar").read_bytes(), values(tmp_path / "x.tar")
    data = data.rstrip(b"\0") if cut == "end" else data
    (tmp_path / "x.tar").write_bytes(data if cut == "end" else data[: int(len(data.rstrip(b"\0")) * cut)])
    rows = values(tmp_path / "x.tar")
    assert isinstance(rows[-1], BadRow) and rows[-1].reason == "broken_archive"
    assert [row.value for row in rows[:-1]] == [row.value for row in whole[: len(rows) - 1]]
    assert len(rows) <= len(whole)


def test_pictures_of_a_shard_come_in_natural_order(tmp_path: Path) -> None:
    names = ["0001.jpg", *(f"0001.{i}.jpg" for i in (1, 2, 10, 11))]
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        add(archive, "0001.json", json.dumps({"conversations": [["<image>" * 5, "a"]]}).encode())
        for name in reversed(names):
            add(archive, name, b"x")
        add(archive, "0002.txt", b"a caption whose picture is gone")
    first, second = values(tmp_path / "x.tar")
    assert first.value["image"] == names
    assert isinstance(second, BadRow) and second.reason == "missing_image"


def test_a_shard_damaged_in_the_middle_or_joined_to_another_is_named(tmp_path: Path) -> None:
    for name in ("x", "y"):
        shard(tmp_path / f"{name}.tar")
    data = bytearray((tmp_path / "x.tar").read_bytes())
    (tmp_path / "joined.tar").write_bytes(bytes(data) + (tmp_path / "y.tar").read_bytes())
    data[data.index(b"s/3.json")] ^= 1  # one bit of a header
    (tmp_path / "x.tar").write_bytes(data)
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(bytes(data)))
    for name in ("x.tar", "x.tar.gz", "joined.tar"):
        last = values(tmp_path / name)[-1]
        assert isinstance(last, BadRow) and last.reason == "broken_archive", name


def test_parquet_with_image_bytes_and_saved_datasets(tmp_path: Path) -> None:
    import datasets

    rows = [{"image": {"bytes": b"x" * i, "path": f"{i}.png"}, "question": "q", "chosen": "a", "rejected": "b"} for i in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    assert values(tmp_path / "x.parquet") == rows
    dataset = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image(decode=True))
    dataset.save_to_disk(tmp_path / "saved")
    assert values(tmp_path / "saved") == rows  # still encoded
    datasets.DatasetDict({"train": dataset}).save_to_disk(tmp_path / "dict")
    with pytest.raises(InputError, match="splits train"):
        values(tmp_path / "dict")
    assert values(tmp_path / "dict" / "train") == rows


def test_what_is_no_data_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a,b")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 nothing")
    (tmp_path / "x.tar").write_bytes(b"no archive at all")
    (tmp_path / "folder").mkdir()
    for name, expected in (("x.csv", "unknown kind of file"), ("x.parquet", "no complete parquet"), ("x.tar", "no complete tar"), ("folder", "glob")):
        with pytest.raises(InputError, match=expected):
            values(tmp_path / name)


# --- entries ---


def taken(sources: list[Source]) -> list[tuple[str, int]]:
    return [(Path(source.file).name, index) for source in sources for index, _, _ in source.rows()]


@pytest.fixture
def three(tmp_path: Path) -> Path:
    for name, count in (("a", 4), ("b", 3), ("c", 5)):
        (tmp_path / f"{name}.json").write_text(json.dumps(ROWS[:count]))
    return tmp_path


def test_paths_lists_globs_and_braces(three: Path) -> None:
    def names(data_files: Any) -> list[str]:
        return [Path(file).name for file in expand(data_files)]

    assert names(str(three / "*.json")) == ["a.json", "b.json", "c.json"]
    assert names([str(three / "c.json"), str(three / "a.json")]) == ["c.json", "a.json"]
    assert names(str(three / "{c,a}.json")) == ["c.json", "a.json"]
    odd = three / "sp ace {x,y} 图\n.json"
    odd.write_text("[1]")
    assert expand(str(odd)) == [str(odd)]  # a file that is really named so
    with pytest.raises(InputError, match=r"no such file"):
        expand(str(three / "{a,nowhere}.json"))


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"data_files": "nowhere.json"}, "no such file"),
        ({"data_files": "a.json", "image_folder": "nowhere"}, "no such folder"),
        ({"data_files": "a.json", "video_folder": "nowhere"}, "no such folder"),
        ({"data_files": "a.json", "media_roots": ["nowhere"]}, "no such folder"),
        ({"data_files": "a.json", "sampling_strategy": "some:3"}, "sampling_strategy"),
        ({"data_files": "a.json", "sampling_strategy": "first:-1"}, "sampling_strategy"),
        ({"data_files": "a.json", "split": "train"}, "`split` goes with"),
        ({"data_files": "a.json", "weight": 0}, "weight"),
        ({"data_files": "a.json", "weight": float("nan")}, "weight"),
        ({"data_files": "mix.yaml"}, "expected `datasets`"),
        ({"data_files": "no.yaml"}, "no valid yaml"),
        ({"data_files": "typo.yaml"}, "unknown keys json_paht"),
        ({"data_files": "both.yaml", "sampling_strategy": "first:1"}, "sampling_strategy is also in the dataset entry"),
    ],
)
def test_bad_entries_are_named(three: Path, entry: dict[str, Any], expected: str) -> None:
    (three / "mix.yaml").write_text("a: b")
    (three / "no.yaml").write_text("a: [")
    (three / "typo.yaml").write_text("datasets:\n - json_path: a.json\n   json_paht: x\n")
    (three / "both.yaml").write_text("datasets:\n - json_path: a.json\n   sampling_strategy: first:2\n")
    with pytest.raises(InputError, match=expected):
        read_entries([{**entry, "data_files": str(three / entry["data_files"])}], 0)


def test_all_bad_entries_are_named_at_once(three: Path) -> None:
    with pytest.raises(InputError) as caught:
        read_entries([{"data_files": str(three / "x.json")}, {"data_files": str(three / "a.json")}, {"data_files": str(three / "y.json")}], 0)
    assert "x.json" in str(caught.value) and "y.json" in str(caught.value)


def test_a_hub_id_that_cannot_be_had_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    with pytest.raises(InputError, match="somebody/something: neither a file here nor a data set that the hub gives"):
        read_entries([{"data_files": "somebody/something", "split": "train"}], 0)


def test_a_hub_data_set_is_read_with_its_media_still_encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = [{"image": {"bytes": b"x" * (i + 1), "path": f"{i}.png"}, "question": "q", "chosen": "a", "rejected": "b"} for i in range(100)]
    dataset = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    (tmp_path / "owner" / "name").mkdir(parents=True)  # `datasets` looks for owner/name here before it asks the hub
    dataset.to_parquet(tmp_path / "owner" / "name" / "validation-00000-of-00001.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (source,) = read_entries([{"data_files": "owner/name", "split": "validation"}], 0)
    assert (source.file, source.name) == ("owner/name:validation", "owner/name")
    assert [(index, value) for index, value, _ in source.rows()] == list(enumerate(rows))
    (first,) = read_entries([{"data_files": "owner/name", "split": "validation", "sampling_strategy": "end:3"}], 0)
    assert [index for index, _, _ in first.rows()] == [97, 98, 99]
    assert source.content_hash() == read_entries([{"data_files": "owner/name", "split": "validation"}], 0)[0].content_hash()
    with pytest.raises(InputError, match="owner/name: neither a file here"):
        read_entries([{"data_files": "owner/name", "split": "nonsense"}], 0)


def test_strategies_over_all_files_of_an_entry(three: Path) -> None:
    def rows(strategy: str, seed: int = 0) -> list[tuple[str, int]]:
        return taken(read_entries([{"data_files": str(three / "*.json"), "sampling_strategy": strategy}], seed))

    whole = rows("all")
    assert whole == [(f"{name}.json", i) for name, count in (("a", 4), ("b", 3), ("c", 5)) for i in range(count)]
    assert rows("first:5") == whole[:5]
    assert rows("first:2") == whole[:2]
    assert rows("end:6") == whole[-6:]
    assert rows("first:10%") == whole[:2]  # 1.2, rounded up
    assert rows("end:50%") == whole[-6:]
    assert rows("random:7", 1) == rows("random:7", 1) != rows("random:7", 2)
    assert set(rows("random:7")) < set(whole) and rows("random:7") == sorted(rows("random:7"), key=whole.index)
    assert rows("first:100") == whole


def test_percentages_are_rounded_up_as_llava_next_does() -> None:
    for total in (1, 7, 10, 99, 1000):
        for percent in (1, 10, 30, 33.3, 70, 100):
            assert len(choose(total, f"first:{percent}%", 0)) == int(np.ceil(np.round(total * percent / 100, 6)))


def test_yaml_mixtures_as_llava_next_writes_them(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mixture = three / "mix.yaml"
    mixture.write_text(
        "datasets:\n"
        f"  - json_path: {three}/{{c,a}}.json\n    sampling_strategy: first:6\n"
        "  - json_path: b.json\n    sampling_strategy: 'end:1'\n    weight: 0.5\n"
    )
    sources = read_entries([{"data_files": str(mixture), "weight": 1.0, "sampling_strategy": "all"}], 0)
    assert taken(sources) == [*((("c.json"), i) for i in range(5)), ("a.json", 0), ("b.json", 2)]
    assert [source.weight for source in sources] == [1.0, 1.0, 0.5]
    monkeypatch.chdir(three)
    assert taken(read_entries([{"data_files": "mix.yaml"}], 0)) == taken(sources)  # relative to the current folder, else to the mixture's


def test_folders_of_an_entry(three: Path) -> None:
    for name in ("pictures", "clips", "more"):
        (three / name).mkdir()
    file = str(three / "a.json")
    (plain,) = read_entries([{"data_files": file}], 0)
    assert plain.image_roots == plain.video_roots == (three,)
    both = {"image_folder": str(three / "pictures"), "video_folder": str(three / "clips"), "media_roots": [str(three / "more")]}
    (source,) = read_entries([{"data_files": file, **both}], 0)
    assert source.image_roots == (three / "pictures", three / "more") and source.video_roots == (three / "clips", three / "more")
    (one,) = read_entries([{"data_files": file, "image_folder": str(three / "pictures")}], 0)
    assert one.video_roots == (three / "pictures",)


def test_content_hashes_change_with_the_content_only(three: Path) -> None:
    def hash_of(name: str) -> str:
        return read_entries([{"data_files": str(three / name)}], 0)[0].content_hash()

    (three / "copy.json").write_bytes((three / "a.json").read_bytes())
    assert hash_of("a.json") == hash_of("copy.json") != hash_of("b.json")
    (three / "a.json").write_text((three / "a.json").read_text().replace("q 0", "q 9"))
    assert hash_of("a.json") != hash_of("copy.json")
