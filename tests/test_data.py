"""From files to rows: formats, images, lengths, the ledger."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interlace.data.dataset import RowReader, admit
from interlace.data.formats import FORMATS, recognise
from interlace.data.ledger import Entry, Ledger
from interlace.data.lengths import expand, expanded_length, fit
from interlace.data.media import check_image, locate, open_image
from interlace.data.sample import BadRow, Image, Sample, Text
from interlace.data.sources import Record, read_entries, read_rows, select
from interlace.data.template import ChatTemplate, Encoded
from interlace.errors import InputError

# --- formats ---

QUESTION = (Image("a.png"), Text("\nand "), Image("b.png"), Text("?"))


@pytest.mark.parametrize(
    "record",
    [
        {"image": ["a.png", "b.png"], "conversations": [{"from": "human", "value": "<image>\nand <image>?"}, {"from": "gpt", "value": "yes"}]},
        {"image": ["a.png", "b.png"], "conversations": [["<image>\nand <image>?", "yes"]]},
        {"images": ["a.png", "b.png"], "messages": [{"role": "user", "content": "<image>\nand <image>?"}, {"role": "assistant", "content": "yes"}]},
        {
            "images": ["a.png", "b.png"],
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nand "}, {"type": "image"}, {"type": "text", "text": "?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
            ],
        },
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "path": "a.png"},
                        {"type": "text", "text": "\nand "},
                        {"type": "image_url", "image_url": {"url": "b.png"}},
                        {"type": "text", "text": "?"},
                    ],
                },
                {"role": "assistant", "content": "yes"},
            ]
        },
    ],
)
def test_every_format_gives_the_same_sample(record: dict[str, Any]) -> None:
    sample = FORMATS[recognise(record)](record)
    assert [turn.role for turn in sample.turns] == ["user", "assistant"]
    assert sample.turns[0].parts == QUESTION
    assert sample.turns[1].text == "yes"


def test_image_as_string_or_list_and_text_only_rows() -> None:
    turns = [{"from": "human", "value": "<image>x"}, {"from": "gpt", "value": "y"}]
    assert FORMATS["llava"]({"image": "a.png", "conversations": turns}).images == FORMATS["llava"]({"image": ["a.png"], "conversations": turns}).images
    assert FORMATS["llava"]({"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]}).images == ()


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"image": ["a", "b"], "conversations": [["<image>q", "a"]]}, "placeholder_mismatch"),
        ({"image": ["a"], "conversations": [["<image><image>q", "a"]]}, "placeholder_mismatch"),
        ({"image": ["a"], "conversations": [["q", "a"]]}, "placeholder_mismatch"),
        ({"conversations": []}, "empty"),
        ({"conversations": [["q", "  "]]}, "empty_answer"),
        ({"conversations": [{"from": "human", "value": "q"}]}, "no_answer"),
        ({"conversations": [{"from": "robot", "value": "q"}]}, "unknown_role"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "bad_order"),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "loss": float("nan")}]}, "bad_weight"),
        ({"messages": [{"role": "user", "content": [{"type": "sound"}]}]}, "bad_turn"),
        ({"video": "v.mp4", "conversations": [["q", "a"]]}, "video"),
        ({"text": "x"}, "unknown_format"),
        ([], "not_an_object"),
    ],
)
def test_bad_records_are_named(record: Any, reason: str) -> None:
    with pytest.raises(BadRow) as caught:
        FORMATS[recognise(record)](record)
    assert caught.value.reason == reason


def test_a_placeholder_in_an_answer_stays_text() -> None:
    sample = FORMATS["chatml"]({"conversations": [["q", "write <image> here"]]})
    assert sample.turns[1].parts == (Text("write <image> here"),)


# --- sources ---


def test_json_and_jsonl_give_the_same_rows_and_broken_json_names_its_line(tmp_path: Path) -> None:
    rows = [{"a": 1}, {"b": 2}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert read_rows(tmp_path / "rows.json") == read_rows(tmp_path / "rows.jsonl") == rows
    (tmp_path / "cut.json").write_text('[\n{"a": 1},\n{"b"')
    with pytest.raises(InputError, match="line 3"):
        read_rows(tmp_path / "cut.json")
    (tmp_path / "cut.jsonl").write_text('{"a": 1}\n{"b"')
    with pytest.raises(InputError, match="line 2"):
        read_rows(tmp_path / "cut.jsonl")


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"data_files": "nowhere.json"}, "no such file"),
        ({"data_files": "EMPTY"}, "empty"),
        ({"data_files": "NONE"}, "no rows"),
        ({"data_files": "OBJECT"}, "expected a list"),
        ({"data_files": "ROWS", "image_folder": "nowhere"}, "no such folder"),
        ({"data_files": "ROWS", "sampling_strategy": "some:3"}, "sampling_strategy"),
    ],
)
def test_bad_sources_are_named(tmp_path: Path, entry: dict[str, str], expected: str) -> None:
    for name, text in {"EMPTY": "", "NONE": "[]", "OBJECT": "{}", "ROWS": '[{"conversations": [["q", "a"]]}]'}.items():
        (tmp_path / name).write_text(text)
    path = tmp_path / entry["data_files"]
    with pytest.raises(InputError, match=expected):
        read_entries([{**entry, "data_files": str(path)}], 0)


@pytest.mark.parametrize(("strategy", "indices"), [("all", range(7)), ("first:2", [0, 1]), ("end:3", [4, 5, 6]), ("first:10%", [0]), ("end:50%", [3, 4, 5, 6])])
def test_sampling_strategies(strategy: str, indices: Any) -> None:
    records = [Record("f", i, {}, "llava", ()) for i in range(7)]
    assert [record.index for record in select(records, strategy, 0)] == list(indices)


def test_random_sampling_is_seeded_and_keeps_the_order() -> None:
    records = [Record("f", i, {}, "llava", ()) for i in range(100)]
    first, again, other = (select(records, "random:20", seed) for seed in (1, 1, 2))
    assert first == again != other
    assert [record.index for record in first] == sorted({record.index for record in first})


# --- media ---


def gradient(mode: str) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.arange(48 * 32 * 3, dtype=np.uint8).reshape(32, 48, 3)).convert(mode)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("RGB", "png"), ("L", "png"), ("P", "png"), ("1", "png"), ("CMYK", "jpg"), ("RGB", "jpg"), ("RGB", "webp"), ("RGB", "bmp"), ("P", "gif")],
)
def test_every_mode_opens_as_rgb_and_headers_tell_the_size(tmp_path: Path, mode: str, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    gradient(mode).save(path)
    assert check_image(path, 10**6) == (48, 32)
    image = open_image(path)
    assert (image.mode, image.size) == ("RGB", (48, 32))


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    PIL.Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert open_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    PIL.Image.new("LA", (2, 2), (0, 128)).save(tmp_path / "half.png")
    assert abs(open_image(tmp_path / "half.png").getpixel((0, 0))[0] - 127) <= 1  # type: ignore[index]


def test_sixteen_bits_are_scaled_not_cut(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    PIL.Image.fromarray(values).save(tmp_path / "deep.png")
    assert np.abs(np.asarray(open_image(tmp_path / "deep.png"))[..., 0] - values / 257.0).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied_to_size_and_pixels(tmp_path: Path, orientation: int) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    gradient("RGB").save(tmp_path / "x.jpg", exif=exif)
    expected = (32, 48) if orientation >= 5 else (48, 32)
    assert check_image(tmp_path / "x.jpg", 10**6) == expected == open_image(tmp_path / "x.jpg").size


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "bmp"])
def test_truncated_files_are_found_without_training(tmp_path: Path, suffix: str) -> None:
    gradient("RGB").save(tmp_path / f"whole.{suffix}")
    whole = (tmp_path / f"whole.{suffix}").read_bytes()
    (tmp_path / f"cut.{suffix}").write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(BadRow, match="broken_image"):
        check_image(tmp_path / f"cut.{suffix}", 10**6)


def test_what_is_no_image_or_too_large_is_refused_from_the_header(tmp_path: Path) -> None:
    (tmp_path / "page.jpg").write_text("<html>not found</html>")
    (tmp_path / "nothing.png").touch()
    gradient("RGB").save(tmp_path / "large.png")
    for name, limit, reason in (("page.jpg", 10**6, "broken_image"), ("nothing.png", 10**6, "broken_image"), ("large.png", 1000, "too_many_pixels")):
        with pytest.raises(BadRow, match=reason):
            check_image(tmp_path / name, limit)


def test_paths_stay_in_their_folders(tmp_path: Path) -> None:
    inside, beside = tmp_path / "media", tmp_path / "media_evil"
    inside.mkdir()
    beside.mkdir()
    for folder in (inside, beside):
        gradient("RGB").save(folder / "x.png")
    (inside / "link.png").symlink_to(beside / "x.png")
    assert locate("x.png", (inside,)) == inside / "x.png"
    for path in ("../media_evil/x.png", str(beside / "x.png"), "link.png", "/etc/passwd"):
        with pytest.raises(BadRow, match="outside_folder"):
            locate(path, (inside,))
    assert locate(str(beside / "x.png"), (inside, beside)) == beside / "x.png"
    for path, reason in (("y.png", "missing_image"), ("http://127.0.0.1/x.png", "url"), (".", "not_a_file")):
        with pytest.raises(BadRow, match=reason):
            locate(path, (inside,))


# --- lengths ---

IMAGE_ID = 7


@st.composite
def encoded_rows(draw: st.DrawFn) -> tuple[Encoded, list[int]]:
    ids: list[int] = []
    labels: list[int] = []
    ends, tokens = [], []
    for _ in range(draw(st.integers(1, 4))):
        question = draw(st.lists(st.sampled_from([1, 2, IMAGE_ID]), min_size=1, max_size=6))
        answer = draw(st.integers(1, 4))
        ids += [*question, *[3] * answer]
        labels += [-100] * len(question) + [3 if draw(st.booleans()) else -100] * answer
        ends.append(len(ids))
        tokens += [draw(st.integers(1, 9)) for token in question if token == IMAGE_ID]
    labels[-1] = 3
    images = tuple(Image(f"{i}.png") for i in range(len(tokens)))
    return Encoded(np.array(ids, np.int32), np.array(labels, np.int32), np.ones(len(ids), np.float32), images, tuple(ends)), tokens


@settings(max_examples=2000, deadline=None)
@given(row=encoded_rows(), max_length=st.integers(2, 60))
def test_images_stay_whole_answers_survive_and_lengths_hold(row: tuple[Encoded, list[int]], max_length: int) -> None:
    encoded, tokens = row
    try:
        kept, dropped = fit(encoded, tokens, IMAGE_ID, max_length, "drop_turns")
    except BadRow as error:
        first = expand(encoded, tokens, IMAGE_ID)[0][: max_length + 1]
        assert error.reason == "too_long"
        assert len(first) > max_length
        return
    count = len(kept.images)
    ids, labels, weights = expand(kept, tokens[:count], IMAGE_ID)
    assert len(ids) == len(labels) == len(weights) == expanded_length(kept, tokens[:count]) <= max_length
    assert (ids == IMAGE_ID).sum() == sum(tokens[:count])
    assert (labels[1:] >= 0).any()
    assert kept.exchange_ends == encoded.exchange_ends[: len(kept.exchange_ends)]
    assert np.array_equal(kept.input_ids, encoded.input_ids[: len(kept.input_ids)])
    assert bool(dropped) == (len(kept.input_ids) < len(encoded.input_ids))


def test_length_policies(qwen: Any) -> None:
    template = ChatTemplate(qwen, 151646, system_prompt="")
    sample = FORMATS["chatml"]({"image": "x", "conversations": [["<image>a", "b"], ["c", "d"]]})
    encoded = template.encode(sample)
    whole = expanded_length(encoded, [100])
    assert fit(encoded, [100], 151646, whole, "error")[1] == ""
    kept, detail = fit(encoded, [100], 151646, whole - 1, "drop_turns")
    assert "dropped 1 of 2 exchanges" in detail
    assert len(kept.exchange_ends) == 1
    for policy, limit in (("drop_row", whole - 1), ("error", whole - 1), ("drop_turns", 50)):
        with pytest.raises(BadRow, match="too_long"):
            fit(encoded, [100], 151646, limit, policy)  # type: ignore[arg-type]


# --- ledger ---


def planted(tmp_path: Path) -> list[Record]:
    gradient("RGB").save(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:200])
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
    return [Record("rows.json", i, row, recognise(row) if isinstance(row, dict) else "llava", (tmp_path,)) for i, row in enumerate(rows)]


def test_exactly_the_planted_rows_are_reported_and_totals_reconcile(tmp_path: Path, qwen: Any) -> None:
    reader = RowReader(ChatTemplate(qwen, 151646), lambda width, height: 4, 100, "drop_turns", 10**6)
    rows, ledger = admit(reader.read_all(planted(tmp_path), False), "drop_turns", "skip", None)
    assert (ledger.rows, ledger.trained, ledger.shortened, ledger.skipped) == (20, 7, 2, 11)
    assert len(rows) == ledger.trained + ledger.shortened
    reasons = {(entry.index, entry.status, entry.reason) for entry in ledger.entries}
    assert reasons == {
        *((i, "skipped", "broken_image") for i in range(5)),
        *((i, "skipped", "too_long") for i in range(5, 8)),
        *((i, "skipped", "placeholder_mismatch") for i in (8, 9)),
        (10, "shortened", "opening_assistant_turn"),
        (11, "shortened", "too_long"),
        (12, "skipped", "not_an_object"),
    }
    ledger.write(tmp_path / "ledger.json")
    written = json.loads((tmp_path / "ledger.json").read_text())
    assert set(written) == {"rows", "trained", "shortened", "skipped", "entries"}
    assert set(written["entries"][0]) == {"file", "index", "status", "reason", "detail"}


def test_bad_rows_stop_the_run_unless_allowed_and_long_rows_are_not_bad(tmp_path: Path, qwen: Any) -> None:
    reader = RowReader(ChatTemplate(qwen, 151646), lambda width, height: 4, 100, "drop_turns", 10**6)
    outcomes = list(reader.read_all(planted(tmp_path), False))
    with pytest.raises(InputError, match=r"8 of 20 rows cannot be used(.|\n)*rows.json: row 0: broken_image(.|\n)*row 12"):
        admit(outcomes, "drop_turns", "error", None)
    admit(outcomes, "drop_turns", "skip", 8)
    with pytest.raises(InputError, match="max_bad_rows is 7"):
        admit(outcomes, "drop_turns", "skip", 7)
    only_long = [outcome for outcome in outcomes if outcome.record.index in (5, 13)]
    assert admit(only_long, "drop_turns", "error", None)[1].skipped == 1
    with pytest.raises(InputError, match="too_long"):
        admit(only_long, "error", "skip", None)


def test_ledger_counts_reconcile() -> None:
    ledger = Ledger()
    for entry in (None, Entry("f", 1, "shortened", "x", ""), Entry("f", 2, "skipped", "y", ""), None):
        ledger.count(entry)
    assert ledger.rows == 4 == ledger.trained + ledger.shortened + ledger.skipped
    assert "2 trained, 1 shortened, 1 skipped" in ledger.summary()


def test_sample_keeps_parts_in_order() -> None:
    sample: Sample = FORMATS["chatml"]({"image": ["1", "2"], "conversations": [["a<image>b", "c"], ["<image>d", "e"]]})
    assert sample.turns[0].parts == (Text("a"), Image("1"), Text("b"))
    assert sample.images == (Image("1"), Image("2"))


def test_names_that_are_no_paths_and_half_characters_make_bad_rows(tmp_path: Path, qwen: Any) -> None:
    for path in ("iVBORw0KGgo" * 400, "a" * 300, "x\0y.png"):
        with pytest.raises(BadRow, match="bad_image"):
            locate(path, (tmp_path,))
    with pytest.raises(BadRow, match="bad_text"):
        ChatTemplate(qwen, 151646).text_ids("half \ud800 an emoji")


def test_postscript_is_no_image_whatever_its_name(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EOF\n")
    with pytest.raises(BadRow, match="broken_image"):
        check_image(tmp_path / "x.png", 10**6)


def test_rows_and_collators_reach_spawned_workers(tiny_dir: Path) -> None:
    import pickle

    from interlace.data.batch import Collator
    from interlace.model.loading import load_processing

    processing = load_processing(str(tiny_dir))
    processing.template.text_ids("remembered")
    assert pickle.loads(pickle.dumps(Collator(processing.process_images, 3))).image_token_id == 3
