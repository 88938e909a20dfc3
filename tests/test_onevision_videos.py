"""Videos as LLaVA-OneVision sees them, against transformers' own processor and model: a tiny model, float32 on the CPU."""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPVisionConfig, LlavaOnevisionConfig, LlavaOnevisionModel, LlavaOnevisionProcessor, Qwen2Config, SiglipVisionConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from interlace.data.batch import Collator, PackedBatch
from interlace.data.dataset import Rows, load_rows
from interlace.data.lengths import expand
from interlace.data.media import open_images
from interlace.data.preview import preview_line
from interlace.data.reading import Row
from interlace.data.sample import Image, Sample, Text, Turn, Video, with_frames
from interlace.data.sources import read_entries
from interlace.data.splitting import split
from interlace.data.template import ChatTemplate
from interlace.inference.ablations import Ablations
from interlace.inference.attaching import Attachments
from interlace.inference.choices import rank_choices
from interlace.inference.dialogue import Dialogue
from interlace.inference.evaluation import predict, question_of, read_questions
from interlace.inference.generation import Generator, load_generator
from interlace.model.families import family_of
from interlace.model.features import FeatureCache, FeatureStore
from interlace.model.forward import model_inputs
from interlace.model.loading import load_model, load_processing
from interlace.model.processing import Processing
from interlace.model.saving import save_processing
from interlace.training.parts import row_reader
from interlace.training.supervised import finetune
from tests.test_equivalence import assert_packing_and_checkpointing_change_nothing, backward, score, tuned_model
from tests.test_families import SETUPS, SIZES, library_inputs, library_log_probs, library_processor, make_model
from tests.test_more_families import assert_same_gradients
from tests.test_video import write_video

TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}
FRAMES = {"clip3": 3, "clip5": 5, "one": 1}  # folders of frames
# media of each row, in order; "file" is a video of 5 frames, and "list" one that is given by them
ROWS = (
    ("clip3",),
    (),
    ("large", "clip5"),
    ("file",),
    ("clip3", "wide", "clip3", "tall"),
    ("one",),
    ("list", "file"),
    ("square", "square"),
    ("large",),
)
NUM_FRAMES = 5
FORM = {"system": "Look.", "user": "<|im_start|>{{user}}\n", "bot": "{{bot}}<|im_end|>"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_model("llava_onevision", tmp_path_factory.mktemp("llava_onevision"))
    save_processing(load_processing(str(folder)), folder)  # with the template of a model that is known, as runs save it
    return folder


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    for number, (name, (width, height)) in enumerate(SIZES.items()):
        PIL.Image.fromarray(np.random.RandomState(number).randint(0, 255, (height, width, 3), np.uint8)).save(folder / f"{name}.png")
    for name, count in FRAMES.items():
        (folder / name).mkdir()
        for number in range(count):
            PIL.Image.fromarray(np.random.RandomState(100 + number + count).randint(0, 255, (30, 50, 3), np.uint8)).save(folder / name / f"{number}.png")
    write_video(folder / "file.mp4", times=list(range(NUM_FRAMES)), size=(96, 64))
    return folder


def kind_of(name: str) -> str:
    return "image" if name in SIZES else "video"


def record_of(number: int, names: Sequence[str]) -> dict[str, Any]:
    """A LLaVA row; every placeholder behind a word of its own."""
    turns = [{"from": "human", "value": "".join(f"look <{kind_of(name)}>" for name in names) + f"question {number}"}]
    turns.append({"from": "gpt", "value": f"answer {number}, no more"})
    videos: list[Any] = [{"file": "file.mp4", "list": [f"clip5/{i}.png" for i in range(NUM_FRAMES)]}.get(name, name) for name in names if name not in SIZES]
    images = [f"{name}.png" for name in names if name in SIZES]
    return {"id": f"row {number}", "images": images, "videos": videos, "conversations": turns, "metadata": {"choices": [turns[1]["value"], "no"]}}


def read_rows(folder: Path, media: Path, work: Path, make_arguments: Callable[..., dict[str, Any]], rows: Sequence[Sequence[str]], **changes: Any) -> Rows:
    file = work / "rows.json"
    file.write_text(json.dumps([record_of(number, names) for number, names in enumerate(rows)]))
    named = {"model_name_or_path": str(folder), "cache_dir": str(work / "cache"), "num_frames": NUM_FRAMES, "preprocessing_num_workers": 0}
    arguments = make_arguments(file, **(named | changes))
    arguments["dataset"]["train"][0]["image_folder"] = str(media)
    return load_rows(read_entries(arguments["dataset"]["train"], 0), row_reader(arguments, load_processing(str(folder))), arguments, False)[0]


@pytest.fixture
def rows(folder: Path, media: Path, tmp_path: Path, make_arguments: Callable[..., dict[str, Any]]) -> list[Row]:
    return list(read_rows(folder, media, tmp_path, make_arguments, ROWS))


def collate(folder: Path, rows: Sequence[Row], **options: Any) -> PackedBatch:
    return load_processing(str(folder)).collator(**options).pack(list(enumerate(rows)))


# --- transformers' side ---


def pixels_of(frames: Sequence[PIL.Image.Image], folder: Path) -> torch.Tensor:
    """(frames, 3, 32, 32): what the library's video processor is configured to do, written down; the class itself needs torchvision."""
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    mean, std = (np.array(settings[name], np.float32) for name in ("image_mean", "image_std"))
    stretched = [frame.convert("RGB").resize((32, 32), PIL.Image.Resampling.BICUBIC) for frame in frames]
    return torch.from_numpy(np.stack([((np.asarray(frame, np.float32) / 255 - mean) / std).transpose(2, 0, 1) for frame in stretched]))


def media_inputs(model: Any, folder: Path, names: Sequence[str], row: Row) -> dict[str, Any]:
    """The arguments of the library's forward for the media of a row."""
    opened, images, videos = iter(open_images(row.images)), [], []
    for name in names:
        if kind_of(name) == "image":
            images.append(next(opened))
        else:
            videos.append(pixels_of([next(opened) for _ in range(FRAMES.get(name, NUM_FRAMES))], folder))
    assert next(opened, None) is None
    inputs = library_inputs(folder, images)
    if len({len(video) for video in videos}) == 1:
        return inputs | {"pixel_values_videos": torch.stack(videos)}
    if videos:  # of several lengths, which the library's own forward cannot stack
        found = torch.cat([model.get_video_features(video[None]).pooler_output[0] for video in videos])[None]
        of_images = {"image": model.get_image_features(**inputs)} if inputs else {}
        return {"mm_encoder_outputs": of_images | {"video": BaseModelOutputWithPooling(pooler_output=found)}}
    return inputs


def library_ids(folder: Path, names: Sequence[str], row: Row, number: int, answer: bool = True) -> list[int]:
    """A row by the saved chat template, each image and video as the model's own processor writes it."""
    processing, processor = load_processing(str(folder)), library_processor(folder)
    record = record_of(number, names)
    parts: list[dict[str, str]] = [part for name in names for part in ({"type": "text", "text": "look "}, {"type": kind_of(name)})]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": f"question {number}"}]}]
    messages += [{"role": "assistant", "content": [{"type": "text", "text": record["conversations"][1]["value"]}]}] * answer
    text = processing.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=not answer)
    opened, images, videos = iter(open_images(row.images)), [], []
    for name in names:
        if kind_of(name) == "image":
            images.append(next(opened))
        else:
            videos.append(pixels_of([next(opened) for _ in range(FRAMES.get(name, NUM_FRAMES))], folder))
    inputs = library_inputs(folder, images) | {"pixel_values_videos": videos}
    for token, count, written in (("<image>", len(images), processor.replace_image_token), ("<video>", len(videos), processor.replace_video_token)):
        before, *behind = text.split(token)
        assert len(behind) == count
        text = before + "".join(f"{{{token[1:-1]} {i}}}{rest}" for i, rest in enumerate(behind))
        for i in range(count):
            text = text.replace(f"{{{token[1:-1]} {i}}}", written(inputs, i).replace("<", "\0").replace(">", "\1"))
    ids: list[int] = processing.tokenizer(text.replace("\0", "<").replace("\1", ">"), add_special_tokens=False)["input_ids"]
    return ids


def video_log_probs(model: Any, folder: Path, names: Sequence[str], row: Row) -> torch.Tensor:
    """Full logits of one row by the library's forward."""
    batch = collate(folder, [row])
    logits = model(input_ids=batch.input_ids, attention_mask=torch.ones_like(batch.input_ids), **media_inputs(model, folder, names, row)).logits[0]
    return F.log_softmax(logits.float(), -1)[batch.rows[batch.row_index], batch.targets]


# --- tokens ---


@pytest.mark.parametrize(("side", "patch", "is_clip"), [(384, 14, False), (336, 14, True), (224, 16, False), (32, 8, False)])
def test_tokens_of_a_video_are_those_of_the_library_s_processor(folder: Path, side: int, patch: int, is_clip: bool) -> None:
    kind: Any = CLIPVisionConfig if is_clip else SiglipVisionConfig
    strategy = "default" if is_clip else "full"
    config = LlavaOnevisionConfig(
        vision_config=kind(image_size=side, patch_size=patch),
        text_config=Qwen2Config(num_hidden_layers=1),
        vision_feature_select_strategy=strategy,
        image_grid_pinpoints=[[side, 2 * side]],
    )
    tiny = load_processing(str(folder))
    processing = Processing(tiny.tokenizer, tiny.image_processor, tiny.template, config)
    processor: Any = LlavaOnevisionProcessor.__new__(LlavaOnevisionProcessor)
    vars(processor).update(family_of(config).processor_settings(config))
    for num_frames, size in ((1, (384, 384)), (2, (1, 1000)), (16, (640, 360)), (64, (50, 70))):
        (expected,) = processor._get_num_multimodal_tokens(video_sizes=[(num_frames, *size)])["num_video_tokens"]
        assert processing.video_tokens is not None
        tokens = processing.video_tokens(num_frames)
        assert len(tokens) == num_frames and sum(tokens) == expected == num_frames * math.ceil(side // patch / 2) ** 2 + 1
        assert processing.images.videos([9_999, *tokens, *tokens, 9_999]) == [range(1, num_frames + 1), range(num_frames + 1, 2 * num_frames + 1)]


def test_a_frame_of_the_published_models_is_196_tokens(folder: Path) -> None:
    tiny = load_processing(str(folder))
    config = LlavaOnevisionConfig(text_config=Qwen2Config(num_hidden_layers=1))
    processing = Processing(tiny.tokenizer, tiny.image_processor, tiny.template, config)
    assert processing.video_tokens is not None
    assert sum(processing.video_tokens(16)) == 16 * 196 + 1
    with torch.device("meta"):
        model: Any = LlavaOnevisionModel(processing.config)
    assert model.apply_pooling(torch.zeros(2, 27 * 27, 1)).shape == (2, 196, 1)


def test_ids_are_those_of_the_saved_template_and_the_model_s_own_processor(folder: Path, rows: list[Row]) -> None:
    processing = load_processing(str(folder))
    for number, (names, row) in enumerate(zip(ROWS, rows, strict=True)):
        expected = library_ids(folder, names, row, number)
        assert collate(folder, [row]).input_ids[0].tolist() == expected, names
        line = preview_line(row.file, row, None, processing.config.image_token_id, processing.images.ids)
        assert line["input_ids"] == expected and line["length"] == len(expected)
        in_videos = [number for video in processing.images.videos(row.image_tokens) for number in video]
        assert len(in_videos) == sum(FRAMES.get(name, NUM_FRAMES) for name in names if kind_of(name) == "video")


@pytest.mark.parametrize(
    "changes", [{"newline_after_image": True}, {"image_placement": "in_front"}, {"prompt_style": "vicuna_v1"}, {"prompt_style": "plain"}, {"form": FORM}]
)
def test_nothing_stands_between_the_frames_of_a_video(folder: Path, changes: dict[str, Any]) -> None:
    """The ids are those of a row with a token in each video's place, and the saved template writes the same."""
    processing = load_processing(str(folder), **changes)
    template, tokenizer = processing.template, processing.tokenizer
    image, video = processing.config.image_token_id, processing.config.video_token_id
    turns = (Turn("user", (Text("see "), Video("v"), Text("or "), Image("x"), Text("which"))), Turn("assistant", (Text("this"),)))
    found = template.encode(Sample(with_frames(turns, [4, 1]))).input_ids.tolist()
    as_one = (
        ChatTemplate(tokenizer, image, **template.settings)
        .encode(Sample((dataclasses.replace(turns[0], parts=tuple(Image("v") if isinstance(part, Video) else part for part in turns[0].parts)), turns[1])))
        .input_ids.tolist()
    )
    at = as_one.index(image)
    assert video not in template.text_ids("<video>")
    assert found == [*as_one[:at], *[image] * 4, *as_one[at + 1 :]]
    if "image_placement" not in changes and "newline_after_image" not in changes:
        words = [{"type": "text", "text": "see "}, {"type": "video"}, {"type": "text", "text": "or "}, {"type": "image"}, {"type": "text", "text": "which"}]
        chat = {"chat_template": template.jinja(), "tokenize": False, "add_generation_prompt": True}
        written = tokenizer.apply_chat_template([{"role": "user", "content": words}], **chat)
        expected = template.encode_prompt(with_frames(turns[:1], [4, 1]))
        assert tokenizer(written, add_special_tokens=False)["input_ids"] == [*expected[:at], video, *expected[at + 4 :]]


def test_fewer_frames_are_as_many_as_fit(folder: Path, media: Path, tmp_path: Path, make_arguments: Callable[..., dict[str, Any]]) -> None:
    (whole,) = read_rows(folder, media, tmp_path, make_arguments, [("clip5", "file")])
    for less, frames in ((0, 5), (1, 4), (8, 4), (9, 3), (25, 1)):
        changes = {"max_length": whole.length - less, "too_long": "fewer_frames"}
        (row,) = read_rows(folder, media, tmp_path, make_arguments, [("clip5", "file")], **changes)
        assert row.image_tokens == (*[4] * (frames - 1), 5) * 2
        assert row.length == whole.length - 2 * 4 * (5 - frames)


# --- pixels, log-probs and gradients ---


def test_pixels_of_frames_are_stretched_and_those_of_images_are_as_ever(folder: Path, rows: list[Row]) -> None:
    processing, row = load_processing(str(folder)), rows[2]
    opened = open_images(row.images)
    found = processing.process_images(opened, row.image_tokens)
    torch.testing.assert_close(found[-5:], pixels_of(opened[1:], folder), rtol=0, atol=1e-6)
    (alone,) = processing.row_image_tokens([opened[0].size])  # a video beside it does not make it one of several
    assert row.image_tokens[0] == alone
    assert torch.equal(found[:-5], processing.process_images(opened[:1], [alone]))


def test_packed_log_probs_equal_the_library_on_separate_rows(folder: Path, rows: list[Row]) -> None:
    model = load_model(str(folder), torch.float32).eval()
    batch = collate(folder, rows)
    with torch.no_grad():
        found = score(tuned_model(folder), batch).log_probs
        for number, (names, row) in enumerate(zip(ROWS, rows, strict=True)):
            torch.testing.assert_close(found[batch.sequence_index == number], video_log_probs(model, folder, names, row), **TOLERANCE)
        images = [number for number, names in enumerate(ROWS) if not any(kind_of(name) == "video" for name in names)]
        for number in images:
            torch.testing.assert_close(found[batch.sequence_index == number], library_log_probs(model, folder, rows[number]), **TOLERANCE)


@pytest.mark.parametrize("setup", ["full", "with tower"])
def test_loss_and_gradients_equal_the_library_on_separate_rows(folder: Path, rows: list[Row], setup: str) -> None:
    model = load_model(str(folder), torch.float32)
    total = sum(row.supervised_tokens for row in rows)
    expected: Any = sum(-video_log_probs(model, folder, names, row).sum() / total for names, row in zip(ROWS, rows, strict=True))
    expected.backward()
    loss, found = backward(tuned_model(folder, **SETUPS[setup]), [collate(folder, rows)])
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    reference = {f"model.{name}": parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    if setup == "full":
        reference = {name: gradient for name, gradient in reference.items() if "vision_tower" not in name}
    assert_same_gradients(reference, found)


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_packed_equals_separate_and_checkpointing_changes_nothing(folder: Path, rows: list[Row], setup: str) -> None:
    tuned = tuned_model(folder, **SETUPS[setup])
    together, alone = collate(folder, rows), [collate(folder, [row]) for row in rows]
    assert_packing_and_checkpointing_change_nothing(tuned, together, alone, assert_same_gradients)


def test_questions_about_one_video_share_it(folder: Path, media: Path, tmp_path: Path, make_arguments: Callable[..., dict[str, Any]]) -> None:
    rows = list(read_rows(folder, media, tmp_path, make_arguments, [("large", "file"), ("clip3",), ("large", "file"), ("clip3",), ("large", "file")]))
    tuned = tuned_model(folder)
    together, alone = collate(folder, rows, share_prefix=True), [collate(folder, [row]) for row in rows]
    assert len(together.segments) == 5 + 2
    trunks = [segment for number, segment in enumerate(together.segments) if number in {other.parent for other in together.segments}]
    assert together.num_tokens == sum(row.length for row in rows) - sum(times * (trunk.end - trunk.start) for times, trunk in zip((2, 1), trunks, strict=True))
    (loss, found), (expected, separate) = backward(tuned, [together]), backward(tuned, alone)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert_same_gradients(separate, found)
    halves = split(together)
    assert halves is not None
    assert backward(tuned, halves)[0] == pytest.approx(expected, rel=1e-5)


def test_an_answer_pair_sees_the_video_of_its_prompt_once(folder: Path, media: Path, tmp_path: Path, make_arguments: Callable[..., dict[str, Any]]) -> None:
    (tmp_path / "pairs.json").write_text(json.dumps([{"video": "clip3", "prompt": "<video>Which?", "chosen": "this one", "rejected": "none"}]))
    arguments = make_arguments(tmp_path / "pairs.json", model_name_or_path=str(folder), cache_dir=str(tmp_path / "cache"))
    arguments["dataset"]["train"][0]["image_folder"] = str(media)
    processing, model = load_processing(str(folder)), load_model(str(folder), torch.float32).eval()
    (row,), _ = load_rows(read_entries(arguments["dataset"]["train"], 0), row_reader(arguments, processing, "preference"), arguments, False)
    batch, line = collate(folder, [row]), preview_line(row.file, row, None, processing.config.image_token_id, processing.images.ids)
    assert len(batch.segments) == 3 and line["prompt_ids"].count(processing.config.video_token_id) == 3 * 4 + 1
    with torch.no_grad():
        found = score(tuned_model(folder), batch).log_probs
        for number, name in enumerate(("chosen_ids", "rejected_ids")):
            ids, answer = torch.tensor([line["prompt_ids"] + line[name]]), torch.tensor(line[name])
            logits = model(input_ids=ids, **media_inputs(model, folder, ["clip3"], row)).logits[0, -len(answer) - 1 : -1]
            expected = F.log_softmax(logits, -1).gather(1, answer[:, None])[:, 0]
            torch.testing.assert_close(found[batch.sequence_index == number], expected, **TOLERANCE)


def test_features_of_frames_come_back_from_the_cache(folder: Path, rows: list[Row], tmp_path: Path) -> None:
    (tmp_path / "features").mkdir()
    tuned, store = tuned_model(folder), FeatureStore(tmp_path / "features")
    assert tuned.tower is not None
    tuned.tower.cache = FeatureCache(store, 1 << 30, print)
    with torch.no_grad():
        score(tuned, collate(folder, [rows[0], rows[3], rows[8]], features=store))
        tuned.tower.cache.flush()
        batch, plain = collate(folder, rows, features=store), collate(folder, rows)
        assert any(batch.is_cached) and not all(batch.is_cached)
        torch.testing.assert_close(score(tuned, batch).log_probs, score(tuned, plain).log_probs, rtol=1e-6, atol=1e-6)
        tuned.tower.cache.flush()
        known = collate(folder, rows, features=store)
        assert known.pixel_values is None
        torch.testing.assert_close(score(tuned, known).log_probs, score(tuned, plain).log_probs, rtol=1e-6, atol=1e-6)


def test_a_collator_that_is_told_no_ids_makes_the_same_batch_but_for_them(folder: Path, rows: list[Row]) -> None:
    processing = load_processing(str(folder))
    plain = Collator(processing.process_images, processing.config.image_token_id).pack(list(enumerate(rows)))
    assert torch.equal(plain.image_positions, collate(folder, rows).image_positions)


# --- answers ---


@torch.no_grad()
def library_answer(generator: Generator, folder: Path, names: Sequence[str], row: Row, ids: list[int]) -> str:
    model: Any = generator.model.get_base_model() if hasattr(generator.model, "get_base_model") else generator.model
    inputs, end = torch.tensor([ids]), generator.processing.template.end
    more = media_inputs(model, folder, names, row)
    output = model.generate(input_ids=inputs, attention_mask=torch.ones_like(inputs), do_sample=False, max_new_tokens=8, eos_token_id=end, **more)
    return str(generator.processing.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)).strip()


@pytest.mark.parametrize("changes", [{}, {"lora": True, "lora_rank": 4}], ids=["full", "lora"])
def test_a_run_trains_and_its_result_answers_as_the_library_does(
    folder: Path, media: Path, tmp_path: Path, make_arguments: Callable[..., dict[str, Any]], changes: dict[str, Any]
) -> None:
    (tmp_path / "rows.json").write_text(json.dumps([record_of(number, names) for number, names in enumerate(ROWS)]))
    settings = {"model_name_or_path": str(folder), "max_steps": 6, "learning_rate": 3e-3, "num_frames": NUM_FRAMES, **changes}
    arguments = make_arguments(tmp_path / "rows.json", **settings)
    arguments["dataset"]["train"][0]["image_folder"] = str(media)
    finetune(arguments)
    run = tmp_path / "run"
    losses = [entry["loss"] for entry in json.loads((run / "trainer_state.json").read_text())["log_history"] if "loss" in entry]
    assert losses[-1] < losses[0]
    if not changes:
        assert json.loads((run / "processor_config.json").read_text())["video_token"] == "<video>"
        assert "<video>" in (run / "chat_template.jinja").read_text()
    generator = load_generator(str(run))
    rows = read_rows(folder, media, tmp_path, make_arguments, ROWS)
    outcomes = questions(generator, media, tmp_path, ROWS)
    prompts = [question_of(outcome, generator) for outcome in outcomes]
    found = generator.answer(prompts, 8)
    assert len(set(found)) > 1
    for number, (names, row, prompt, answer) in enumerate(zip(ROWS, rows, prompts, found, strict=True)):
        ids = library_ids(folder, names, row, number, answer=False)
        assert prompt.input_ids == ids
        assert library_answer(generator, folder, names, row, ids) == answer, names


def questions(generator: Generator, media: Path, work: Path, rows: Sequence[Sequence[str]]) -> list[Any]:
    file = work / "questions.json"
    file.write_text(json.dumps([record_of(number, names) for number, names in enumerate(rows)]))
    return read_questions({"data_files": str(file), "image_folder": str(media)}, generator)


def test_questions_that_begin_alike_are_answered_as_they_are_alone(folder: Path, media: Path, tmp_path: Path) -> None:
    """Behind a video that is computed once for all; and behind one image, where a later turn shows another."""
    generator = load_generator(str(folder))
    outcomes = questions(generator, media, tmp_path, [("large", "file")] * 4)
    prompts = [question_of(outcome, generator) for outcome in outcomes]
    assert all(prompt.trunk_images == 6 for prompt in prompts)
    assert generator.answer(prompts, 8) == [generator.answer([prompt], 8)[0] for prompt in prompts]
    turns = [{"from": "human", "value": "<image>A"}, {"from": "gpt", "value": "B"}]
    records = [
        {"images": ["large.png", name], "conversations": [*turns, {"from": "human", "value": f"<image>{name}"}, {"from": "gpt", "value": "C"}]}
        for name in ("wide.png", "tall.png")
    ]
    (tmp_path / "later.json").write_text(json.dumps(records))
    later = read_questions({"data_files": str(tmp_path / "later.json"), "image_folder": str(media)}, generator)
    prompts = [question_of(outcome, generator) for outcome in later]
    assert all(prompt.trunk_images == 1 for prompt in prompts)
    assert generator.answer(prompts, 8) == [generator.answer([prompt], 8)[0] for prompt in prompts]


def test_choices_are_ranked_by_the_library_s_log_probs(folder: Path, media: Path, tmp_path: Path) -> None:
    generator = load_generator(str(folder))
    outcomes = questions(generator, media, tmp_path, ROWS)
    found = rank_choices(generator, outcomes, 8)
    with torch.no_grad():
        for names, outcome, prediction in zip(ROWS, outcomes, found, strict=True):
            expected = video_log_probs(generator.model, folder, names, outcome.row).sum().item()  # of the row's own answer, the first choice
            assert prediction["metadata"]["choice_log_probs"][0] == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_a_dialogue_sees_a_video_as_the_library_does(folder: Path, media: Path) -> None:
    """The logits of each answer's tokens, against the library's forward over the whole conversation."""
    generator = load_generator(str(folder))
    dialogue = Dialogue(generator, 4, Attachments(num_frames=NUM_FRAMES))
    asked: list[str] = []
    for images, videos in (([], ["clip3"]), (["large"], []), ([], ["clip5", "one"])):
        dialogue.attach([str(media / f"{name}.png") for name in images])
        dialogue.attach_videos([str(media / name) for name in videos])
        asked += [*images, *videos]
        logits: list[torch.Tensor] = []
        hook = generator.model.get_output_embeddings().register_forward_hook(lambda _, __, output, kept=logits: kept.append(output[0].clone()))
        dialogue.ask("What?")
        hook.remove()
        ids = [token for token, _ in dialogue.context.tokens]
        row: Any = dataclasses.make_dataclass("Shown", ["images"])([frame.place for frames in dialogue.frames for frame in frames])
        inputs = torch.tensor([ids])
        more = media_inputs(generator.model, folder, asked, row)
        expected = generator.model(input_ids=inputs, attention_mask=torch.ones_like(inputs), use_cache=False, **more).logits[0, -len(logits) :]
        torch.testing.assert_close(torch.stack(logits), expected, rtol=1e-4, atol=1e-5)
        assert (inputs == generator.processing.config.video_token_id).sum() == 4 * sum(FRAMES.get(name, 0) for name in asked) + sum(
            kind_of(name) == "video" for name in asked
        )


def test_changed_rows_keep_the_form_of_a_video(folder: Path, media: Path, tmp_path: Path) -> None:
    generator = load_generator(str(folder))
    outcomes = questions(generator, media, tmp_path, [("clip3", "wide", "clip3", "tall"), ("clip3", "tall", "clip3"), ("wide", "clip3"), ("clip3", "wide")])
    row = outcomes[0].row
    assert row is not None
    assert row.image_tokens == (4, 4, 5, 17, 4, 4, 5, 17)
    ablations = Ablations(generator.processing, tmp_path)
    (_, _, moved), *_ = ablations.of("shuffled", row)
    assert moved.image_tokens == row.image_tokens and set(moved.images) == set(row.images)
    blanked = [changed for _, image, changed in ablations.of("blanked", row) if image is not None]
    assert [[i for i in range(8) if changed.images[i] != row.images[i]] for changed in blanked] == [[0, 1, 2], [3], [4, 5, 6], [7]]
    dropped = [changed for _, _, changed in ablations.of("dropped", row)]
    (alone,) = generator.processing.row_image_tokens([SIZES["tall"]])
    assert [changed.image_tokens for changed in dropped] == [
        (17, 4, 4, 5, 17),
        (4, 4, 5, 4, 4, 5, alone),
        (4, 4, 5, 17, 17),
        (4, 4, 5, generator.processing.row_image_tokens([SIZES["wide"]])[0], 4, 4, 5),
    ]
    changed = [dataclasses.replace(outcomes[0], row=found) for found in (moved, *blanked, *dropped)]
    for outcome in changed:
        assert outcome.row is not None
        ids, _, _ = expand(outcome.row.encoded, outcome.row.image_tokens, generator.processing.config.image_token_id, generator.processing.images.ids)
        assert len(ids) == outcome.row.length
    assert len(predict(generator, changed, 4, 4)) == len(changed)
    for outcome in outcomes[2:]:  # one image: a frame in its place is counted as an image, and the image in a frame's place as a frame
        assert outcome.row is not None
        for name in ("shuffled", "references"):
            for _, _, found in ablations.of(name, outcome.row):
                images = [at for at, tokens in enumerate(found.image_tokens) if tokens not in (4, 5)]
                sizes = [image.size for image in open_images([found.images[at] for at in images])]
                assert [found.image_tokens[at] for at in images] == generator.processing.row_image_tokens(sizes)
                assert [at for at, tokens in enumerate(outcome.row.image_tokens) if tokens not in (4, 5)] == images
                assert len(predict(generator, [dataclasses.replace(outcome, row=found)], 4, 4)) == 1


# --- what stays as it was ---


def test_families_that_see_frames_as_images_write_them_so(tiny_dir: Path) -> None:
    template = load_processing(str(tiny_dir)).template
    videos = (Turn("user", (Text("see "), Video("v"), Text(" now"))), Turn("assistant", (Text("this"),)))
    images = (Turn("user", (Text("see "), Image("v"), Image("v"), Image("v"), Text(" now"))), Turn("assistant", (Text("this"),)))
    found, expected = template.encode(Sample(with_frames(videos, [3]))), template.encode(Sample(images))
    assert np.array_equal(found.input_ids, expected.input_ids) and np.array_equal(found.labels, expected.labels)
    assert "video" not in template.jinja()


def test_inputs_of_a_batch_are_complete(folder: Path, rows: list[Row]) -> None:
    """Every distinct image and frame once: a frame that ends a video and stands within another would be two."""
    batch = collate(folder, rows)
    assert len(model_inputs(batch, tuned_model(folder).tower)["image_features"]) == sum(
        load_processing(str(folder)).images.tiles.count(size, tokens)  # type: ignore[attr-defined]
        for size, tokens in zip(batch.image_sizes, batch.image_tokens, strict=True)
    )
