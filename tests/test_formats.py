"""Records of every format -> samples and pairs; their JSON Schemas."""

import base64
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from referencing import Registry, Resource

from interlace.data.formats import FORMATS, recognise
from interlace.data.sample import BadRow, Image, PreferencePair, Sample, Text, Video, media_of

DATA = Path(__file__).parents[1] / "data"
QUESTION = (Image("a.png"), Text("\nand "), Image("b.png"), Text("?"))
PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()
INLINE = [
    {"type": "image", "path": "a.png"},
    {"type": "text", "text": "\nand "},
    {"type": "image_url", "image_url": {"url": "b.png"}},
    {"type": "text", "text": "?"},
]
PLACED = [{"type": "image"}, {"type": "text", "text": "\nand "}, {"type": "image"}, {"type": "text", "text": "?"}]
SAMPLES: list[tuple[str, dict[str, Any]]] = [
    ("llava", {"image": ["a.png", "b.png"], "conversations": [{"from": "human", "value": "<image>\nand <image>?"}, {"from": "gpt", "value": "yes"}]}),
    ("llava", {"images": ["a.png", "b.png"], "conversations": [{"from": "user", "value": "<image>\nand <image>?"}, {"from": "assistant", "value": "yes"}]}),
    ("chatml", {"image": ["a.png", "b.png"], "conversations": [["<image>\nand <image>?", "yes"]]}),
    ("messages", {"images": ["a.png", "b.png"], "messages": [{"role": "user", "content": "<image>\nand <image>?"}, {"role": "assistant", "content": "yes"}]}),
    ("messages", {"images": ["a.png", "b.png"], "messages": [{"role": "user", "content": PLACED}, {"role": "assistant", "content": "yes"}]}),
    ("messages", {"messages": [{"role": "user", "content": INLINE}, {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}]}),
    (
        "messages",
        {"images": [{"path": "a.png"}, {"url": "b.png"}], "conversations": [{"role": "user", "content": PLACED}, {"role": "assistant", "content": "yes"}]},
    ),
    ("swift", {"images": ["a.png", "b.png"], "query": "<image>\nand <image>?", "response": "yes"}),
    ("swift", {"images": ["a.png", "b.png"], "conversation": [{"human": "<image>\nand <image>?", "assistant": "yes"}]}),
    ("alpaca", {"images": ["a.png", "b.png"], "instruction": "<image>\nand <image>?", "output": "yes"}),
    ("prompt_completion", {"images": ["a.png", "b.png"], "prompt": "<image>\nand <image>?", "completion": "yes"}),
    (
        "prompt_completion",
        {"images": ["a.png", "b.png"], "prompt": [{"role": "user", "content": PLACED}], "completion": [{"role": "assistant", "content": "yes"}]},
    ),
]
PAIRS: list[dict[str, Any]] = [
    {"image": "a.png", "prompt": "<image>\nWhat?", "chosen": "a cat", "rejected": "a dog"},
    {"images": ["a.png"], "prompt": "What?", "chosen": "a cat", "rejected": "a dog"},
    {
        "images": ["a.png"],
        "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nWhat?"}]}],
        "chosen": [{"role": "assistant", "content": "a cat"}],
        "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "a dog"}]}],
    },
    {
        "images": ["a.png"],
        "chosen": [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "a cat"}],
        "rejected": [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "a dog"}],
    },
    {
        "images": ["a.png"],
        "prompt": "<image>\nWhat?",
        "chosen": [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "a cat"}],
        "rejected": [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "a dog"}],
    },
    {"image": "a.png", "question": "What?", "chosen": "a cat", "rejected": "a dog"},
    {"image": "a.png", "text": json.dumps({"question": "What?", "chosen": "a cat", "rejected": "a dog"})},
    {
        "images": ["a.png"],
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}],
        "chosen": {"from": "gpt", "value": "a cat"},
        "rejected": {"from": "gpt", "value": "a dog"},
    },
    {"images": ["a.png"], "instruction": "What?", "input": "", "chosen": "a cat", "rejected": "a dog"},
    {
        "images": ["a.png"],
        "messages": [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "a cat"}],
        "rejected_response": "a dog",
    },
    {"images": ["a.png"], "query": "What?", "response": "a cat", "rejected_response": "a dog"},
    {
        "images": ["a.png"],
        "messages": [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "a cat"}],
        "rejected_messages": [{"role": "assistant", "content": "a dog"}],
    },
]
TURNS = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
BAD: list[tuple[Any, str]] = [
    ({"image": ["a", "b"], "conversations": [["<image>q", "a"]]}, "placeholder_mismatch"),
    ({"image": ["a"], "conversations": [["<image><image>q", "a"]]}, "placeholder_mismatch"),
    ({"image": ["a"], "conversations": [["q", "a"]]}, "placeholder_mismatch"),  # an image listed but never used
    ({"images": ["a", "b"], "messages": [{"role": "user", "content": PLACED[:2]}, {"role": "assistant", "content": "x"}]}, "placeholder_mismatch"),
    ({"video": "v.mp4", "conversations": [["<video><video>q", "a"]]}, "placeholder_mismatch"),
    ({"image": "a", "images": ["b"], "conversations": [["<image>q", "a"]]}, "ambiguous"),
    ({"messages": [{"role": "user", "content": "q"}], "conversations": TURNS}, "ambiguous"),
    ({"query": "q", "response": "a", "conversations": TURNS}, "ambiguous"),
    ({"image": ["a", 5], "conversations": [["<image><image>q", "a"]]}, "bad_image"),  # mixed types
    ({"image": {"height": 3}, "conversations": [["<image>q", "a"]]}, "bad_image"),
    ({"image": "data:image/png,xx", "conversations": [["<image>q", "a"]]}, "bad_image"),
    ({"image": "data:image/png;base64,@@", "conversations": [["<image>q", "a"]]}, "bad_image"),
    ({"image": "a", "conversations": [{"from": "system", "value": "see <image>"}, *TURNS]}, "image_outside_user_turn"),
    ({"image": "a", "system": "see <image>", "conversations": TURNS}, "image_outside_user_turn"),
    ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": INLINE}]}, "image_outside_user_turn"),
    ({"audios": ["x.wav"], "conversations": TURNS}, "audio"),
    ({"conversations": []}, "empty"),
    ({"conversations": [["q", "  "]]}, "empty_answer"),
    ({"conversations": [{"from": "human", "value": "q"}]}, "no_answer"),
    ({"conversations": [{"from": "robot", "value": "q"}]}, "unknown_role"),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "bad_order"),
    ({"conversations": [*TURNS, {"from": "system", "value": "s"}]}, "bad_order"),
    ({"conversations": [{"from": "human", "value": 5}, {"from": "gpt", "value": "a"}]}, "bad_turn"),
    ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "loss": float("nan")}]}, "bad_weight"),
    ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "loss": -1}]}, "bad_weight"),
    ({"messages": [{"role": "user", "content": [{"type": "sound"}]}]}, "bad_turn"),
    ({"messages": [{"role": "tool", "content": "q"}]}, "unknown_role"),
    ({"query": "q", "response": "a", "history": [["only one"]]}, "bad_turn"),
    ({"prompt": "q", "chosen": "a", "rejected": "  "}, "empty_answer"),
    ({"prompt": "q", "chosen": "a", "rejected": 5}, "bad_turn"),
    ({"chosen": "a", "rejected": "b"}, "unknown_format"),
    ({"prompt": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x"}], "chosen": "a", "rejected": "b"}, "bad_order"),
    ({"prompt": "q", "completion": "a", "label": False}, "unwanted_answer"),
    ({"kto_tag": False, "conversations": TURNS}, "unwanted_answer"),
    ({"system": "one", "conversations": [{"from": "system", "value": "other"}, *TURNS]}, "ambiguous"),
    ({"system": ["no", "text"], "conversations": TURNS}, "bad_turn"),
    ({"image": "a", "video": "v.mp4", "conversations": [["<image><image>q", "a"]]}, "placeholder_mismatch"),
    ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "loss": 10**400}]}, "bad_weight"),
    (
        {"images": ["a", "b"], "messages": [{"role": "user", "content": [{"type": "image", "index": 1}, {"type": "image", "index": 0}]}]},
        "placeholder_mismatch",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "<image>?"}]}, {"role": "assistant", "content": "a"}]}, "placeholder_mismatch"),
    ({"text": "x"}, "unknown_format"),
    ({"conversations": "q"}, "unknown_format"),
    ([], "not_an_object"),
    ("text", "not_an_object"),
]


def read(record: Any) -> Sample | PreferencePair:
    return FORMATS[recognise(record)[0]](record)


def sample(record: Any) -> Sample:
    found = read(record)
    assert isinstance(found, Sample)
    return found


@pytest.mark.parametrize(("name", "record"), SAMPLES)
def test_every_format_gives_the_same_sample(name: str, record: dict[str, Any]) -> None:
    assert recognise(record)[0] == name
    found = sample(record)
    assert [turn.role for turn in found.turns] == ["user", "assistant"]
    assert found.turns[0].parts == QUESTION
    assert found.turns[1].text == "yes"


@pytest.mark.parametrize("record", PAIRS)
def test_every_preference_form_gives_the_same_pair(record: dict[str, Any]) -> None:
    pair = read(record)
    assert isinstance(pair, PreferencePair)
    assert [turn.role for turn in pair.prompt] == ["user"]
    assert media_of(pair.prompt) == [Image("a.png")]
    assert pair.prompt[0].text == "\nWhat?"
    assert (pair.chosen.text, pair.rejected.text, pair.rejected_prompt) == ("a cat", "a dog", None)


def test_a_rejected_answer_may_bring_its_own_images() -> None:
    pair = read({"images": ["a.png"], "rejected_images": ["blank.png"], "query": "<image>What?", "response": "x", "rejected_response": "y"})
    assert isinstance(pair, PreferencePair) and pair.rejected_prompt is not None
    assert media_of(pair.prompt) == [Image("a.png")]
    assert media_of(pair.rejected_prompt) == [Image("blank.png")]


@pytest.mark.parametrize(("record", "reason"), BAD)
def test_bad_records_are_named(record: Any, reason: str) -> None:
    with pytest.raises(BadRow) as caught:
        read(record)
    assert caught.value.reason == reason
    assert caught.value.detail


def test_image_as_string_or_list_and_text_only_rows() -> None:
    turns = [{"from": "human", "value": "<image>x"}, {"from": "gpt", "value": "y"}]
    assert sample({"image": "a.png", "conversations": turns}).turns == sample({"image": ["a.png"], "conversations": turns}).turns
    for nothing in ({}, {"image": None}, {"image": ""}, {"images": []}):
        assert media_of(sample({**nothing, "conversations": TURNS}).turns) == []


def test_videos_in_every_spelling() -> None:
    def videos(record: dict[str, Any], text: str) -> list[Any]:
        return media_of(sample({**record, "conversations": [[text, "a"]]}).turns)

    assert videos({"video": "v.mp4"}, "<video>\nq") == [Video("v.mp4")]
    assert videos({"video": "v.mp4"}, "<image>\nq") == [Video("v.mp4")]  # as LLaVA-NeXT writes it
    assert videos({"videos": ["v.mp4", "w.mp4"]}, "<video><video>q") == [Video("v.mp4"), Video("w.mp4")]
    frames = (Image("1.jpg"), Image("2.jpg"))
    assert videos({"video": ["1.jpg", "2.jpg"]}, "<video>q") == videos({"videos": [["1.jpg", "2.jpg"]]}, "<video>q") == [Video("1.jpg", frames=frames)]
    assert videos({"video": ["1.jpg"]}, "<video>q") == [Video("1.jpg", frames=frames[:1])]
    assert videos({"image": "a.png", "video": "v.mp4"}, "<video> after <image>") == [Video("v.mp4"), Image("a.png")]
    inline = {
        "messages": [{"role": "user", "content": [{"type": "video", "video": "v.mp4"}, {"type": "text", "text": "q"}]}, {"role": "assistant", "content": "a"}]
    }
    assert media_of(sample(inline).turns) == [Video("v.mp4")]


def test_embedded_images_in_every_spelling() -> None:
    data = base64.b64decode(PNG)
    long = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(2000)).decode()
    for value, expected in (
        ({"bytes": data, "path": None}, data),
        ({"bytes": PNG}, data),
        ({"base64": PNG}, data),
        (f"data:image/png;base64,{PNG}", data),
        (long, base64.b64decode(long)),
        (data, data),
    ):
        (image,) = media_of(sample({"image": value, "conversations": [["<image>q", "a"]]}).turns)
        assert image.data == expected


def test_media_without_any_placeholder_come_first_only_where_the_format_leaves_it_open() -> None:
    for record in ({"query": "q", "response": "a"}, {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}):
        found = sample({"images": ["1", "2"], **record})
        assert found.turns[0].parts == (Image("1"), Text("\n"), Image("2"), Text("\n"), Text("q"))


def test_a_placeholder_in_an_answer_stays_text() -> None:
    assert sample({"conversations": [["q", "write <image> here"]]}).turns[1].parts == (Text("write <image> here"),)


def test_history_system_and_input_are_kept_in_order() -> None:
    found = sample({"system": "s", "query": "q2", "response": "a2", "history": [["q1", "a1"]]})
    assert [(turn.role, turn.text) for turn in found.turns] == [("system", "s"), ("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")]
    assert sample({"instruction": "do", "input": "this", "output": "done"}).turns[0].text == "do\nthis"


def test_nothing_that_a_preference_or_completion_row_says_is_lost() -> None:
    pair = read({"query": "q2", "response": "x", "rejected_response": "y", "history": [["q1", "a1"]], "system": "s"})
    assert isinstance(pair, PreferencePair)
    assert [turn.text for turn in pair.prompt] == ["s", "q1", "a1", "q2"]
    assert [turn.text for turn in sample({"system": "s", "prompt": "q", "completion": "a"}).turns] == ["s", "q", "a"]
    found = sample(
        {"images": ["1"], "messages": [{"role": "user", "content": [{"type": "text", "text": "Look: <image>!"}]}, {"role": "assistant", "content": "a"}]}
    )
    assert found.turns[0].parts == (Text("Look: "), Image("1"), Text("!"))
    weighed = sample({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0.5}]})
    assert weighed.turns[1].weight == 0.5


def test_a_completion_is_learned_and_earlier_answers_in_its_prompt_are_not() -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "r"}]
    found = sample({"prompt": turns, "completion": [{"role": "assistant", "content": "b"}]})
    assert [turn.weight for turn in found.turns if turn.role == "assistant"] == [0.0, 1.0]


def test_parts_keep_their_order_over_turns() -> None:
    found = sample({"image": ["1", "2"], "conversations": [["a<image>b", "c"], ["<image>d", "e"]]})
    assert found.turns[0].parts == (Text("a"), Image("1"), Text("b"))
    assert media_of(found.turns) == [Image("1"), Image("2")]


# --- schemas ---


def validator(name: str) -> jsonschema.Draft202012Validator:
    schemas = {path.name: json.loads(path.read_text()) for path in DATA.glob("*.schema.json")}
    registry = Registry().with_resources([(file, Resource.from_contents(schema)) for file, schema in schemas.items()])
    return jsonschema.Draft202012Validator(schemas[f"{name}.schema.json"], registry=registry)


def test_every_format_has_a_valid_schema() -> None:
    for name in (*FORMATS, "mixture", "media"):
        jsonschema.Draft202012Validator.check_schema(validator(name).schema)


@pytest.mark.parametrize(("name", "record"), [*SAMPLES, *(("preference", record) for record in PAIRS)])
def test_rows_that_are_read_fit_their_schema(name: str, record: dict[str, Any]) -> None:
    assert not list(validator(name).iter_errors([record]))


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("llava", {"conversations": []}),
        ("llava", {"conversations": [{"from": "robot", "value": "q"}, {"from": "gpt", "value": "a"}]}),
        ("llava", {"image": 5, "conversations": TURNS}),
        ("chatml", {"conversations": [["only one"]]}),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "sound"}]}, {"role": "assistant", "content": "a"}]}),
        ("swift", {"query": "q", "response": " "}),
        ("alpaca", {"instruction": "q"}),
        ("preference", {"prompt": "q", "chosen": "a"}),
    ],
)
def test_schemas_refuse_what_cannot_be_read(name: str, record: dict[str, Any]) -> None:
    assert not validator(name).is_valid([record])
    with pytest.raises(BadRow):
        FORMATS[name](record)


def test_the_schema_of_mixtures() -> None:
    good = "datasets:\n  - json_path: data/{a,b}.json\n    sampling_strategy: first:10%\n  - json_path: c.jsonl\n"
    validator("mixture").validate(yaml.safe_load(good))
    assert not validator("mixture").is_valid({"datasets": [{"json_path": "a.json", "sampling_strategy": "some:3"}]})
