"""Families whose images are cut into tiles, against transformers' own processors and models: tiny models, float32 on the CPU."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageFile
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    CLIPVisionConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextModel,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionModel,
    LlavaOnevisionProcessor,
    PreTrainedModel,
    Qwen2Config,
    SiglipVisionConfig,
)

from interlace.data.batch import Collator, PackedBatch
from interlace.data.dataset import load_rows
from interlace.data.lengths import expanded_length
from interlace.data.reading import Row
from interlace.data.sample import BadRow, Image, Place, Sample, Text, Turn
from interlace.data.sources import read_entries
from interlace.data.template import ChatTemplate
from interlace.errors import InputError
from interlace.inference.generation import load_generator
from interlace.model.families import family_of
from interlace.model.llava import TiledImages
from interlace.model.loading import load_config, load_model, load_processing
from interlace.model.processing import Processing
from interlace.model.saving import save_model, save_processing
from interlace.model.tiles import Tiles
from interlace.model.tuning import Lora, tune
from interlace.training.parts import row_reader
from interlace.training.supervised import finetune
from interlace.training.weights import copy_of_weights, load_weights, save_weights
from tests.conftest import DEMO_MODEL
from tests.test_equivalence import assert_packing_and_checkpointing_change_nothing, backward, score, tuned_model

FAMILIES = ("llava_next", "llava_onevision")
NEXT_GRID = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
ONEVISION_GRID = [[32 * rows, 32 * columns] for rows in range(1, 4) for columns in range(1, 4)]
SIZES = {"wide": (90, 30), "tall": (20, 75), "square": (40, 40), "large": (100, 95), "line": (200, 1), "dot": (1, 1)}
ROWS = ((), ("wide",), ("wide", "tall"), ("large",), ("square", "line", "square"), ("dot",), ("line",), ())
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}
SETUPS = {
    "full": {},
    "lora": {"lora": Lora(4, 8, 0.0, None)},
    "with tower": {"parts": ("vision_tower", "projector", "language_model")},
}


def make_model(family: str, folder: Path) -> Path:
    """A random tiny model with 16 features per 32 x 32 tile, saved as Interlace saves models."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    tokenizer.add_tokens(["<video>"], special_tokens=True)
    widths = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    text = Qwen2Config(vocab_size=len(tokenizer), tie_word_embeddings=family == "llava_onevision", **widths)
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    torch.manual_seed(0)
    model: PreTrainedModel
    images: Any
    if family == "llava_next":
        vision = CLIPVisionConfig(**tower)
        model = LlavaNextForConditionalGeneration(
            LlavaNextConfig(vision_config=vision, text_config=text, image_token_index=image_token, image_grid_pinpoints=NEXT_GRID)
        )
        images = LlavaNextImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=NEXT_GRID)
    else:
        siglip = SiglipVisionConfig(vision_use_head=False, **tower)
        video_token = tokenizer.convert_tokens_to_ids("<video>")
        config = LlavaOnevisionConfig(
            vision_config=siglip,
            text_config=text,
            image_token_index=image_token,
            video_token_index=video_token,
            image_grid_pinpoints=ONEVISION_GRID,
            vision_aspect_ratio="anyres_max_2",
            tie_word_embeddings=True,
        )
        model = LlavaOnevisionForConditionalGeneration(config)
        images = LlavaOnevisionImageProcessorPil(size={"height": 32, "width": 32}, image_grid_pinpoints=ONEVISION_GRID)
    for parameter in model.parameters():  # larger weights than the initialisation: differences must show
        parameter.data.mul_(3)
    save_model(model, folder)
    save_processing(Processing(tokenizer, images, ChatTemplate(tokenizer, image_token), model.config), folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: make_model(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    return folders[request.param]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PNG files of the sizes in SIZES."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, (name, (width, height)) in enumerate(SIZES.items()):
        PIL.Image.fromarray(np.random.RandomState(number).randint(0, 255, (height, width, 3), np.uint8)).save(folder / f"{name}.png")
    return folder


def make_row(processing: Processing, pictures: Path, number: int, names: Sequence[str]) -> Row:
    parts = [part for name in names for part in (Text("look "), Image(name))]
    turns = (Turn("user", (*parts, Text(f"question {number}"))), Turn("assistant", (Text(f"answer {number}, no more"),)))
    encoded = processing.template.encode(Sample(turns))
    places = tuple(Place(str(pictures / f"{name}.png")) for name in names)
    tokens = processing.row_image_tokens([SIZES[name] for name in names])
    return Row("rows.json", number, encoded, places, tuple(tokens), expanded_length(encoded, tokens))


@pytest.fixture(scope="module")
def rows(folder: Path, pictures: Path) -> list[Row]:
    processing = load_processing(str(folder))
    return [make_row(processing, pictures, number, names) for number, names in enumerate(ROWS)]


def collate(folder: Path, rows: Sequence[Row]) -> PackedBatch:
    processing = load_processing(str(folder))
    return Collator(processing.process_images, processing.config.image_token_id).pack(list(enumerate(rows)))


def assert_same_gradients(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first and set(first) == set(second)
    for name, gradient in first.items():
        tolerance = {"rtol": 1e-4, "atol": 1e-6 + 1e-5 * gradient.abs().max().item()}
        torch.testing.assert_close(second[name], gradient, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


# --- transformers' side ---


def library_inputs(folder: Path, images: Sequence[PIL.Image.Image]) -> dict[str, torch.Tensor]:
    """One row's images by the model's own image processor."""
    if not images:
        return {}
    processor = load_processing(str(folder)).image_processor
    nested = isinstance(processor, LlavaOnevisionImageProcessorPil)
    return dict(processor(images=[list(images)] if nested else list(images), return_tensors="pt"))


def library_log_probs(model: PreTrainedModel, folder: Path, row: Row) -> torch.Tensor:
    """Full logits of one row by the model's own forward, with the image tokens that its own features need."""
    inputs = library_inputs(folder, [PIL.Image.open(place.path) for place in row.images])
    batch = collate(folder, [row])
    logits = model(input_ids=batch.input_ids, attention_mask=torch.ones_like(batch.input_ids), **inputs).logits[0]
    return F.log_softmax(logits.float(), -1)[batch.rows[batch.row_index], batch.targets]


def library_processor(folder: Path) -> Any:
    """The processor of the saved settings, made without its video part: that needs torchvision."""
    settings = json.loads((folder / "processor_config.json").read_text())
    kind = {"LlavaNextProcessor": LlavaNextProcessor, "LlavaOnevisionProcessor": LlavaOnevisionProcessor}[settings.pop("processor_class")]
    processor = kind.__new__(kind)
    processing = load_processing(str(folder))
    vars(processor).update(settings, image_processor=processing.image_processor, tokenizer=processing.tokenizer, video_processor=None)
    return processor


# --- token counts ---


@pytest.mark.parametrize("names", [names for names in ROWS if names], ids="-".join)
def test_tokens_counted_from_sizes_are_those_of_the_library(folder: Path, pictures: Path, names: Sequence[str]) -> None:
    processing, processor = load_processing(str(folder)), library_processor(folder)
    counted = processing.row_image_tokens([SIZES[name] for name in names])
    inputs = library_inputs(folder, [PIL.Image.open(pictures / f"{name}.png") for name in names])
    assert [processor.replace_image_token(inputs, i).count("<image>") for i in range(len(names))] == counted
    with torch.no_grad():
        features = load_model(str(folder), torch.float32).get_image_features(**inputs).pooler_output
    assert list(map(len, features)) == counted


PUBLISHED = [("llava_next", "anyres"), *(("llava_onevision", f"anyres_max_{n}") for n in (1, 4, 9, 36))]


@pytest.fixture(scope="module", params=PUBLISHED, ids="-".join)
def published(request: pytest.FixtureRequest, folders: dict[str, Path]) -> tuple[Tiles, Any, Any]:
    """The geometry of the published models: tiles, the library's model (weights on the meta device), and its processor."""
    family, ratio = request.param
    config: Any
    if family == "llava_next":
        config = LlavaNextConfig(vision_config=CLIPVisionConfig(image_size=336, patch_size=14), text_config=Qwen2Config(num_hidden_layers=1))
    else:
        vision = SiglipVisionConfig(image_size=384, patch_size=14, vision_use_head=False)
        config = LlavaOnevisionConfig(vision_config=vision, text_config=Qwen2Config(num_hidden_layers=1), vision_aspect_ratio=ratio)
    with torch.device("meta"):
        model: Any = (LlavaNextModel if family == "llava_next" else LlavaOnevisionModel)(config)
    tiny, processor = load_processing(str(folders[family])), library_processor(folders[family])
    processing = Processing(tiny.tokenizer, tiny.image_processor, tiny.template, config)
    vars(processor).update(family_of(config).processor_settings(config))
    processor.image_processor.image_grid_pinpoints = config.image_grid_pinpoints
    assert isinstance(processing.images, TiledImages)
    return processing.images.tiles, model, processor


def corners(test: Callable[..., None]) -> Callable[..., None]:
    for size in [(1, 1), (1, 3000), (3000, 1), (336, 336), (672, 336), (337, 673), (384, 384), (2304, 2304), (2304, 384), (385, 2303), (7, 1000), (1000, 7)]:
        test = example(size=size)(test)
    return test


@corners
@settings(max_examples=60, deadline=None)
@given(size=st.tuples(st.integers(1, 3000), st.integers(1, 3000)))
def test_tokens_of_any_size_are_those_of_the_published_geometry(published: tuple[Tiles, Any, Any], size: tuple[int, int]) -> None:
    tiles, model, processor = published
    width, height = size
    counted = tiles.image_tokens([size])[0]
    expected = processor._get_number_of_features(height, width, tiles.pixels, tiles.pixels)
    assert counted == expected - int(processor.vision_feature_select_strategy == "default")
    strategy = {} if tiles.single else {"vision_feature_select_strategy": "default"}
    ratio = {"vision_aspect_ratio": model.config.vision_aspect_ratio} if tiles.single else {}
    features = torch.zeros(tiles.count((height, width), counted), tiles.patches**2, 1)
    (image,), _ = model.pack_image_features([features], [(height, width)], image_newline=torch.zeros(1), **strategy, **ratio)
    assert len(image) == counted
    assert not tiles.single or counted != tiles.uncut_tokens


@pytest.mark.parametrize(("width", "height"), [(200, 1), (90, 30), (100, 95)])
def test_tokens_are_counted_without_decoding(
    folder: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_arguments: Callable[..., dict[str, Any]], width: int, height: int
) -> None:
    name = next(name for name, size in SIZES.items() if size == (width, height))
    file = tmp_path / "rows.json"
    turns = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "This."}]
    file.write_text(json.dumps([{"image": str(pictures / f"{name}.png"), "conversations": turns}]))
    arguments = make_arguments(file, model_name_or_path=str(folder), preprocessing_num_workers=0, cache_dir=str(tmp_path / "cache"))
    arguments["dataset"]["train"][0]["media_roots"] = [str(pictures)]
    decoded = []
    monkeypatch.setattr(PIL.ImageFile.ImageFile, "load", lambda self: decoded.append(self))
    processing = load_processing(str(folder))
    (row,), _ = load_rows(read_entries(arguments["dataset"]["train"], 0), row_reader(arguments, processing), arguments, False)
    monkeypatch.undo()
    assert not decoded
    with torch.no_grad():
        features = load_model(str(folder), torch.float32).get_image_features(**library_inputs(folder, [PIL.Image.open(pictures / f"{name}.png")]))
    assert row.image_tokens == (len(features.pooler_output[0]),)


def test_rows_are_read_with_the_tokens_of_all_their_images(folder: Path, pictures: Path, tmp_path: Path, make_arguments: Callable[..., dict[str, Any]]) -> None:
    records: list[dict[str, Any]] = []
    for names in ROWS:
        turns = [{"from": "human", "value": "<image>" * len(names) + "Which?"}, {"from": "gpt", "value": "This."}]
        records.append({"image": [f"{name}.png" for name in names], "conversations": turns} if names else {"conversations": turns})
    (tmp_path / "rows.json").write_text(json.dumps(records))
    arguments = make_arguments(tmp_path / "rows.json", model_name_or_path=str(folder), cache_dir=str(tmp_path / "cache"))
    arguments["dataset"]["train"][0]["image_folder"] = str(pictures)
    read, _ = load_rows(read_entries(arguments["dataset"]["train"], 0), row_reader(arguments, load_processing(str(folder))), arguments, False)
    processor = library_processor(folder)
    for row, names in zip(read, ROWS, strict=True):
        inputs = library_inputs(folder, [PIL.Image.open(pictures / f"{name}.png") for name in names])
        assert row.image_tokens == tuple(processor.replace_image_token(inputs, i).count("<image>") for i in range(len(names)))


def test_an_answer_with_an_image_of_its_own_is_counted_as_a_row_of_its_own(
    folder: Path, pictures: Path, tmp_path: Path, make_arguments: Callable[..., dict[str, Any]]
) -> None:
    record = {"images": ["wide.png"], "rejected_images": ["large.png"], "query": "<image>Which?", "response": "x", "rejected_response": "y"}
    (tmp_path / "rows.json").write_text(json.dumps([record]))
    arguments = make_arguments(tmp_path / "rows.json", model_name_or_path=str(folder), cache_dir=str(tmp_path / "cache"))
    arguments["dataset"]["train"][0]["image_folder"] = str(pictures)
    reader = row_reader(arguments, load_processing(str(folder)), "preference")
    (row,), _ = load_rows(read_entries(arguments["dataset"]["train"], 0), reader, arguments, False)
    inputs = [library_inputs(folder, [PIL.Image.open(pictures / name)]) for name in ("wide.png", "large.png")]
    assert row.image_tokens == tuple(library_processor(folder).replace_image_token(one, 0).count("<image>") for one in inputs)


# --- pixels ---


@pytest.mark.parametrize("names", [names for names in ROWS if names], ids="-".join)
def test_pixel_values_are_those_of_the_library(folder: Path, pictures: Path, names: Sequence[str]) -> None:
    images = [PIL.Image.open(pictures / f"{name}.png") for name in names]
    processing, expected = load_processing(str(folder)), library_inputs(folder, images)
    inputs = processing.generation_inputs([images], torch.zeros(1, 0))
    tiles = iter(inputs["pixel_values"])
    for padded, size, tokens in zip(expected["pixel_values"], expected["image_sizes"], processing.row_image_tokens([i.size for i in images]), strict=True):
        assert isinstance(processing.images, TiledImages)
        for pixels in padded[: processing.images.tiles.count(tuple(size.tolist()), tokens)]:  # type: ignore[arg-type]
            assert torch.equal(next(tiles), pixels)
    assert next(tiles, None) is None
    assert all(torch.equal(inputs[name], torch.as_tensor(expected[name])) for name in inputs if name != "pixel_values")


def test_an_image_of_another_size_than_was_counted_is_refused(folder: Path, rows: list[Row]) -> None:
    processing = load_processing(str(folder))
    with pytest.raises(BadRow, match="100 x 95"):
        processing.process_images([PIL.Image.new("RGB", (100, 95))], processing.row_image_tokens([(30, 30)]))


# --- log-probs and gradients ---


def test_packed_log_probs_equal_the_library_on_separate_rows(folder: Path, rows: list[Row]) -> None:
    model = load_model(str(folder), torch.float32).eval()
    batch = collate(folder, rows)
    with torch.no_grad():
        found = score(tuned_model(folder), batch).log_probs
        for number, row in enumerate(rows):
            torch.testing.assert_close(found[batch.sequence_index == number], library_log_probs(model, folder, row), **TOLERANCE)


@pytest.mark.parametrize("setup", ["full", "with tower"])
def test_loss_and_gradients_equal_the_library_on_separate_rows(folder: Path, rows: list[Row], setup: str) -> None:
    model = load_model(str(folder), torch.float32)
    total = sum(row.supervised_tokens for row in rows)
    expected = sum(-library_log_probs(model, folder, row).sum() / total for row in rows)
    expected.backward()
    tuned = tuned_model(folder, **SETUPS[setup])
    loss, found = backward(tuned, [collate(folder, rows)])
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert "model.model.image_newline" in found
    reference = {f"model.{name}": parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    if setup == "full":
        reference = {name: gradient for name, gradient in reference.items() if "vision_tower" not in name}
    assert_same_gradients(reference, found)


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_packed_equals_separate_and_checkpointing_changes_nothing(folder: Path, rows: list[Row], setup: str) -> None:
    tuned = tuned_model(folder, **SETUPS[setup])
    together, alone = collate(folder, rows), [collate(folder, [row]) for row in rows]
    assert_packing_and_checkpointing_change_nothing(tuned, together, alone, assert_same_gradients)


def test_a_frozen_tower_sees_the_tiles_of_each_distinct_image_once(folder: Path, rows: list[Row]) -> None:
    tuned, batch = tuned_model(folder), collate(folder, rows * 2)
    seen = []
    assert tuned.tower is not None
    tuned.tower.module.register_forward_hook(lambda module, inputs, output: seen.append((len(inputs[0]), output.last_hidden_state.requires_grad)))
    score(tuned, batch)
    counts = {}  # an image comes in two forms where a model cuts it only if it is alone
    for names in ROWS:
        inputs = library_inputs(folder, [PIL.Image.new("RGB", SIZES[name]) for name in names])
        for name, padded in zip(names, inputs.get("pixel_values", ()), strict=True):
            counts[name, len(names) > 1 and "onevision" in folder.name] = sum(bool(tile.any()) for tile in padded)
    assert seen == [(sum(counts.values()), False)]


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_text_only_batches_give_every_parameter_a_gradient_and_change_no_value(folder: Path, rows: list[Row], setup: str) -> None:
    tuned = tuned_model(folder, **SETUPS[setup])
    text = [row for row in rows if not row.images]
    loss, found = backward(tuned, [collate(folder, text)])
    assert set(found) == {name for name, parameter in tuned.packed.named_parameters() if parameter.requires_grad}
    assert not any(gradient.any() for name, gradient in found.items() if "language_model" not in name and "lm_head" not in name)
    with torch.no_grad():
        model = load_model(str(folder), torch.float32).eval()
        expected = torch.cat([library_log_probs(model, folder, row) for row in text])
    if setup != "lora":
        assert loss == pytest.approx(-expected.mean().item(), rel=1e-5)


def test_the_newline_is_a_part_of_the_projector(folder: Path) -> None:
    table = {name: (total, trainable) for name, total, trainable in tuned_model(folder, parts=("projector",)).part_table()}
    projector = sum(parameter.numel() for name, parameter in load_model(str(folder), torch.float32).named_parameters() if "projector" in name)
    assert table["projector"] == (projector + 32, projector + 32)
    assert table["language_model"][1] == 0


def test_an_adapter_leaves_the_newline_alone_which_its_file_cannot_hold(folder: Path, rows: list[Row]) -> None:
    tuned = tuned_model(folder, **SETUPS["lora"])
    learning = {name for name, parameter in tuned.packed.named_parameters() if parameter.requires_grad}
    assert any("multi_modal_projector" in name for name in learning)
    assert not any("image_newline" in name for name in learning)


# --- saving ---


def test_a_saved_model_gives_the_same_logits_in_the_library(folder: Path, rows: list[Row], tmp_path: Path) -> None:
    tuned, processing = tuned_model(folder), load_processing(str(folder))
    for parameter in tuned.packed.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    save_weights(tuned, copy_of_weights(tuned, tuned.packed.named_parameters(), True), processing, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "image_newline" in names
    assert {name.split(".")[0] for name in names} == {"image_newline", "language_model", "multi_modal_projector", "vision_tower"}
    assert {name.split(".")[1] for name in names if name.startswith("vision_tower")} == {"vision_model"}
    batch = collate(folder, rows)
    with torch.no_grad():
        before = score(tuned, batch).log_probs
        model = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32).eval()
        for number, row in enumerate(rows):
            torch.testing.assert_close(library_log_probs(model, tmp_path, row), before[batch.sequence_index == number], **TOLERANCE)
        again = tuned_model(folder)
        load_weights(again, tmp_path)
        assert torch.equal(score(again, batch).log_probs, before)


def test_the_saved_processor_writes_the_rows_that_were_trained(folders: dict[str, Path], pictures: Path) -> None:
    processing = load_processing(str(folders["llava_next"]))
    processor: Any = AutoProcessor.from_pretrained(folders["llava_next"], backend="pil")
    row = make_row(processing, pictures, 2, ROWS[2])
    content = [part for _ in ROWS[2] for part in ({"type": "text", "text": "look "}, {"type": "image"})] + [{"type": "text", "text": "question 2"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}, {"role": "assistant", "content": "answer 2, no more"}])
    ids = processor(text=text, images=[PIL.Image.open(place.path) for place in row.images])["input_ids"][0]
    assert list(ids) == collate(folders["llava_next"], [row]).input_ids[0].tolist()


# --- image_aspect_ratio ---


@pytest.mark.parametrize("ratio", ["squash", "pad", "anyres_max_4", "stretch"])
def test_llava_next_refuses_what_it_has_no_way_for(folders: dict[str, Path], ratio: str) -> None:
    with pytest.raises(InputError, match=f"{ratio}.*expected anyres$"):
        load_processing(str(folders["llava_next"]), image_aspect_ratio=ratio)


@pytest.mark.parametrize("ratio", ["squash", "pad", "anyres_max_0", "anyres_max_", "anyres_max_x"])
def test_onevision_refuses_what_it_has_no_way_for(folders: dict[str, Path], ratio: str) -> None:
    with pytest.raises(InputError, match=f"{ratio}.*expected anyres or anyres_max_N$"):
        load_processing(str(folders["llava_onevision"]), image_aspect_ratio=ratio)


@pytest.mark.parametrize("ratio", ["anyres", "anyres_max_4"])
def test_llava_has_no_tokens_for_tiles(tiny_dir: Path, ratio: str) -> None:
    with pytest.raises(InputError, match=f"{ratio}.*expected squash or pad$"):
        load_processing(str(tiny_dir), image_aspect_ratio=ratio)


@pytest.mark.parametrize(
    ("ratio", "meant"), [(None, "anyres_max_2"), ("anyres", "anyres_max_9"), ("anyres_max_1", "anyres_max_1"), ("anyres_max_4", "anyres_max_4")]
)
def test_the_chosen_maximum_is_what_the_library_reads(folders: dict[str, Path], pictures: Path, tmp_path: Path, ratio: str | None, meant: str) -> None:
    path = str(folders["llava_onevision"])
    processing, model = load_processing(path, image_aspect_ratio=ratio), load_model(path, torch.float32, image_aspect_ratio=ratio)
    assert processing.config.vision_aspect_ratio == model.config.vision_aspect_ratio == meant
    save_model(model, tmp_path)
    save_processing(processing, tmp_path)
    row = make_row(processing, pictures, 3, ROWS[3])
    saved = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32).eval()
    inputs = library_inputs(tmp_path, [PIL.Image.open(place.path) for place in row.images])
    assert row.image_tokens == (len(saved.get_image_features(**inputs).pooler_output[0]),)
    assert library_processor(tmp_path).replace_image_token(inputs, 0).count("<image>") == row.image_tokens[0]
    assert load_processing(str(tmp_path)).image_settings == processing.image_settings


def test_rows_on_disk_are_not_taken_for_another_maximum(folders: dict[str, Path]) -> None:
    ratios = (None, "anyres", "anyres_max_1", "anyres_max_4")
    assert len({load_processing(str(folders["llava_onevision"]), image_aspect_ratio=ratio).image_settings for ratio in ratios}) == len(ratios)


def test_an_adapter_is_used_with_the_maximum_it_was_trained_with(folders: dict[str, Path], tmp_path: Path) -> None:
    path = str(folders["llava_onevision"])
    tuned = tune(load_model(path, torch.float32, image_aspect_ratio="anyres_max_4"), ("language_model",), Lora(4, 8, 0.0, None), None)
    weights = copy_of_weights(tuned, tuned.packed.named_parameters(), True)
    save_weights(tuned, weights, load_processing(path, image_aspect_ratio="anyres_max_4"), tmp_path)
    assert load_config(str(tmp_path)).vision_aspect_ratio == "anyres_max_4"
    assert load_processing(str(tmp_path)).config.vision_aspect_ratio == load_generator(str(tmp_path)).model.config.vision_aspect_ratio == "anyres_max_4"


def test_geometry_that_leaves_no_square_is_refused(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    strategy = {"default": "full", "full": "default"}[config["vision_feature_select_strategy"]]
    for change, message in (({"vision_feature_select_strategy": strategy}, "no square"), ({"image_grid_pinpoints": [[32, 60]]}, "multiples")):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(InputError, match=message):
            load_config(str(tmp_path))


# --- the whole way ---


@pytest.mark.parametrize("changes", [{}, {"lora": True, "lora_rank": 4}], ids=["full", "lora"])
def test_a_run_trains_and_its_result_answers_as_the_library_does(
    folder: Path, pictures: Path, tmp_path: Path, make_arguments: Callable[..., dict[str, Any]], changes: dict[str, Any]
) -> None:
    records = []
    for names in ROWS[:6]:
        turns = [{"from": "human", "value": "<image>" * len(names) + "Which?"}, {"from": "gpt", "value": "This one."}]
        records.append({"image": [f"{name}.png" for name in names], "conversations": turns} if names else {"conversations": turns})
    (tmp_path / "rows.json").write_text(json.dumps(records))
    arguments = make_arguments(tmp_path / "rows.json", model_name_or_path=str(folder), max_steps=6, learning_rate=3e-3, **changes)
    arguments["dataset"]["train"][0]["image_folder"] = str(pictures)
    finetune(arguments)
    run = tmp_path / "run"
    losses = [entry["loss"] for entry in json.loads((run / "trainer_state.json").read_text())["log_history"] if "loss" in entry]
    assert losses[-1] < losses[0]
    generator = load_generator(str(run))
    turns = [[Turn("user", (*(Image(str(pictures / f"{name}.png")) for name in names), Text("Which?")))] for names in (ROWS[1], ROWS[2], ROWS[0])]
    prompts = [generator.prompt(turn) for turn in turns]
    found = generator.answer(prompts, 8)
    for names, prompt, answer in zip((ROWS[1], ROWS[2], ROWS[0]), prompts, found, strict=True):
        inputs = library_inputs(folder, [PIL.Image.open(pictures / f"{name}.png") for name in names])
        ids = torch.tensor([prompt.input_ids])
        generate: Any = generator.model.generate
        output = generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=8,
            eos_token_id=generator.processing.template.end,
            **inputs,
        )
        assert generator.processing.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip() == answer


# --- folders that are not whole ---


def _edit_config(folder: Path, part: str, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config[part] |= changes
    config[part].pop("layer_types", None)
    path.write_text(json.dumps(config))


def _keep_one_of_two_files(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    names = {name: f"model-{1 + (i % 2):05}-of-00002.safetensors" for i, name in enumerate(sorted(weights))}
    save_file({name: weights[name] for name, file in names.items() if "00001-of" in file}, folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    (folder / "model.safetensors").unlink()


def _halve(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "half a file": (_halve, r"model.safetensors cannot be read: .*half-downloaded: fetch it once more"),
    "one of two files": (_keep_one_of_two_files, r"1 of 2 files of weights are missing: model-00002-of-00002.safetensors"),
    "no file": (lambda folder: (folder / "model.safetensors").unlink(), r"no weights in this folder; expected model.safetensors"),
    "another width": (
        lambda folder: _edit_config(folder, "text_config", intermediate_size=56),
        r"layers.0.mlp.down_proj.weight is \[32, 48\] in the file and \[32, 56\] by config.json \(\d+ weights differ\)",
    ),
    "more layers": (lambda folder: _edit_config(folder, "text_config", num_hidden_layers=9), r"weights that config.json asks for are missing, .*layers\.\d"),
    "fewer layers": (lambda folder: _edit_config(folder, "text_config", num_hidden_layers=1), r"weights have no place in the model of config.json, .*layers.1"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_folder_that_is_not_whole_or_contradicts_itself_is_refused_by_name(tiny_dir: Path, tmp_path: Path, case: str) -> None:
    folder, (damage, message) = shutil.copytree(tiny_dir, tmp_path / "model"), BROKEN[case]
    damage(folder)
    with pytest.raises(InputError, match=message):
        load_model(str(folder), torch.float32)


def test_a_tower_may_have_more_than_is_used_of_it(tiny_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_dir, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "vision_tower" in name)
    save_file(weights | {f"{name.split('vision_tower')[0]}vision_tower.head.probe": torch.zeros(1)}, folder / "model.safetensors", {"format": "pt"})
    found, expected = (load_model(str(path), torch.float32).state_dict() for path in (folder, tiny_dir))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
