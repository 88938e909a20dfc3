"""Families beside LLaVA's, against transformers' own processors and models: tiny models of the real geometry, float32 on the CPU."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText

from interlace.data.reading import Row
from interlace.data.sample import BadRow, Image, Text, Turn
from interlace.data.splitting import split
from interlace.errors import InputError
from interlace.inference.generation import load_generator
from interlace.model.families import family_of
from interlace.model.features import FeatureCache, FeatureStore
from interlace.model.loading import load_model, load_processing, weights_fingerprint
from interlace.model.merging import merge
from interlace.model.saving import save_processing
from interlace.model.tuning import Lora, TunedModel, lora_targets, tune
from interlace.training.supervised import finetune
from interlace.training.weights import copy_of_weights, load_weights, save_weights
from tests.small_families import (
    ROWS,
    SMALL,
    collate,
    library_arguments,
    library_ids,
    library_inputs,
    library_log_probs,
    make_model,
    make_pictures,
    make_row,
    opened,
)
from tests.test_equivalence import assert_packing_and_checkpointing_change_nothing, backward, score

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
EVERYTHING = ("vision_tower", "projector", "language_model")
SETUPS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora": Lora(4, 8, 0.0, None)},
    "with tower": {"parts": EVERYTHING},
    "lora with tower": {"parts": EVERYTHING, "lora": Lora(4, 8, 0.0, None)},
}


@pytest.fixture(scope="module", params=SMALL)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def rows(folder: Path, pictures: Path) -> list[Row]:
    processing = load_processing(str(folder))
    return [make_row(processing, pictures, number, names) for number, names in enumerate(ROWS)]


def tuned_model(folder: Path, parts: Sequence[str] = ("projector", "language_model"), lora: Lora | None = None) -> TunedModel:
    torch.manual_seed(0)
    tuned = tune(load_model(str(folder), torch.float32), parts, lora, None)
    for name, parameter in tuned.packed.named_parameters():
        if "lora_B" in name:  # starts at zero: an adapter that does nothing proves nothing
            parameter.data.normal_(std=0.1)
    return tuned


def assert_same_gradients(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first and set(first) == set(second)
    whole = torch.stack([gradient.norm() for gradient in first.values()]).norm()
    for name, gradient in first.items():  # some are zero but for rounding: a bias of keys moves no attention
        assert (second[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6 * whole, name


# --- tokens, pixels, positions ---


@pytest.mark.parametrize("names", ROWS[:-1], ids="-".join)
def test_ids_are_those_of_the_saved_template_and_the_models_own_processor(folder: Path, pictures: Path, names: Sequence[str]) -> None:
    row = make_row(load_processing(str(folder)), pictures, 3, names)
    batch = collate(folder, [row])
    assert batch.input_ids[0].tolist() == library_ids(folder, pictures, 3, names)
    assert batch.num_tokens == row.length


@pytest.mark.parametrize("names", [names for names in ROWS if names], ids="-".join)
def test_pixel_values_are_those_of_the_library(folder: Path, pictures: Path, names: Sequence[str]) -> None:
    row = make_row(load_processing(str(folder)), pictures, 3, names)
    processing, ids = load_processing(str(folder)), collate(folder, [row]).input_ids
    inputs, expected = processing.generation_inputs([opened(row)], ids), library_inputs(folder, opened(row))
    for name in set(inputs) & set(expected):
        torch.testing.assert_close(inputs[name], torch.as_tensor(expected[name]), rtol=0, atol=1e-6)
    assert "pixel_values" in set(inputs) & set(expected)


def test_an_image_of_another_size_than_was_counted_is_refused(folder: Path) -> None:
    processing = load_processing(str(folder))
    counted, other = (processing.row_image_tokens([size]) for size in ((30, 30), (500, 95)))
    assert (counted == other) == (processing.config.model_type == "gemma3")  # all sizes are one to it
    if counted != other:
        with pytest.raises(BadRow, match="500 x 95"):
            processing.process_images([PIL.Image.new("RGB", (500, 95))], counted)


def test_the_page_shows_the_whole_picture(folder: Path, pictures: Path) -> None:
    processing = load_processing(str(folder))
    image = PIL.Image.new("RGB", (420, 330), (255, 0, 0))
    image.paste((0, 0, 255), (0, 0, 210, 330))
    pixels = processing.process_images([image], processing.row_image_tokens([image.size]))
    shown = processing.images.picture(pixels, image.size)
    assert shown.shape[0] == 3
    left, right = shown[:, :, : shown.shape[2] // 2 - 8].mean((1, 2)), shown[:, :, shown.shape[2] // 2 + 8 :].mean((1, 2))
    assert left[0] < right[0] and left[2] > right[2]


# --- log-probs and gradients ---


@pytest.mark.parametrize("setup", ["full", "with tower"])
def test_packed_log_probs_and_gradients_equal_the_library_on_separate_rows(folder: Path, rows: list[Row], setup: str) -> None:
    model = load_model(str(folder), torch.float32)
    tuned, batch = tuned_model(folder, **SETUPS[setup]), collate(folder, rows)
    alone = [library_log_probs(model, folder, row) for row in rows]
    found = score(tuned, batch).log_probs
    for number, expected in enumerate(alone):
        torch.testing.assert_close(found[batch.sequence_index == number], expected, **TOLERANCE)
    loss = sum(-log_probs.sum() for log_probs in alone) / len(found)
    loss.backward()
    reference = {f"model.{name}": parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    learning = {name for name, parameter in tuned.packed.named_parameters() if parameter.requires_grad}
    assert_same_gradients({name: gradient for name, gradient in reference.items() if name in learning}, backward(tuned, [batch])[1])
    if setup == "with tower":  # what the library gives no gradient does not learn here
        assert learning == set(reference)


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_packed_equals_separate_and_checkpointing_changes_nothing(folder: Path, rows: list[Row], setup: str) -> None:
    tuned = tuned_model(folder, **SETUPS[setup])
    together, alone = collate(folder, rows), [collate(folder, [row]) for row in rows]
    assert_packing_and_checkpointing_change_nothing(tuned, together, alone, assert_same_gradients)


@pytest.mark.parametrize("setup", ["full", "with tower"])
def test_shared_rows_score_and_learn_as_they_do_alone(folder: Path, pictures: Path, setup: str) -> None:
    processing = load_processing(str(folder))
    shared = [("wide", "tall"), ("square",), ("wide", "tall"), ("wide", "tall"), (), ("square",)]
    rows = [make_row(processing, pictures, number, names, question=f"{'same' if number else 'other'}") for number, names in enumerate(shared)]
    tuned = tuned_model(folder, **SETUPS[setup])
    together, alone = collate(folder, rows, share_prefix=True), [collate(folder, [row]) for row in rows]
    assert len([segment for segment in together.segments if segment.parent >= 0]) == 5
    with torch.no_grad():
        found = score(tuned, together).log_probs
        for i, number in enumerate(together.row_numbers):
            torch.testing.assert_close(found[together.sequence_index == i], score(tuned, alone[number]).log_probs, **TOLERANCE)
    loss, gradients = backward(tuned, [together])
    expected, separate = backward(tuned, alone)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert_same_gradients(separate, gradients)


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_text_only_batches_give_every_parameter_a_gradient_and_change_no_value(folder: Path, rows: list[Row], setup: str) -> None:
    tuned = tuned_model(folder, **SETUPS[setup])
    text = [row for row in rows if not row.images]
    loss, found = backward(tuned, [collate(folder, text)])
    assert set(found) == {name for name, parameter in tuned.packed.named_parameters() if parameter.requires_grad}
    family = family_of(tuned.base.config)
    assert not any(gradient.any() for name, gradient in found.items() if f".{family.language_model}." not in name and "lm_head" not in name)
    with torch.no_grad():
        model = load_model(str(folder), torch.float32).eval()
        expected = torch.cat([library_log_probs(model, folder, row) for row in text])
    if "lora" not in setup:
        assert loss == pytest.approx(-expected.mean().item(), rel=1e-5)


@pytest.mark.parametrize("setup", ["full", "with tower"])
def test_halves_of_a_batch_add_up_to_it(folder: Path, rows: list[Row], setup: str) -> None:
    tuned, batch = tuned_model(folder, **SETUPS[setup]), collate(folder, rows)
    halves = split(batch)
    assert halves is not None
    loss, gradients = backward(tuned, [batch])
    found = backward(tuned, halves)
    assert found[0] == pytest.approx(loss, rel=1e-5)
    assert_same_gradients(gradients, found[1])


def test_features_from_the_cache_are_those_that_were_made(folder: Path, rows: list[Row], tmp_path: Path) -> None:
    tuned, store = tuned_model(folder), FeatureStore(tmp_path)
    assert tuned.tower is not None
    collator = load_processing(str(folder)).collator(features=store)
    numbered = list(enumerate(rows))
    plain = score(tuned, collate(folder, rows)).log_probs
    tuned.tower.cache = FeatureCache(store, 1 << 30, print)
    first = collator.pack(numbered[:3])
    score(tuned, first)
    tuned.tower.cache.flush()
    mixed = collator.pack(numbered)
    assert 0 < sum(mixed.is_cached) < len(mixed.is_cached)
    torch.testing.assert_close(score(tuned, mixed).log_probs, plain, **TOLERANCE)
    tuned.tower.cache.flush()
    cached = collator.pack(numbered)
    assert all(cached.is_cached) and cached.pixel_values is None
    torch.testing.assert_close(score(tuned, cached).log_probs, plain, **TOLERANCE)


def test_parts_are_told_apart_and_adapters_stay_on_the_language_model(folder: Path) -> None:
    model = load_model(str(folder), torch.float32)
    table = {name: (total, trainable) for name, total, trainable in tuned_model(folder, parts=("projector",)).part_table()}
    projector = family_of(model.config).projector
    expected = sum(parameter.numel() for name in projector for parameter in model.model.get_submodule(name).parameters())
    assert table["projector"] == (expected, expected)
    assert table["language_model"][1] == table["vision_tower"][1] == 0
    assert sum(total for total, _ in table.values()) == sum(parameter.numel() for parameter in model.parameters())
    assert all(f".{family_of(model.config).language_model}." in name for name in lora_targets(model, None))


# --- saving ---


HUB = {"qwen2_vl": {"visual", "model"}, "qwen2_5_vl": {"visual", "model"}, "qwen3_vl": {"model"}, "smolvlm": {"model"}, "idefics3": {"model"}}
HUB["internvl"] = HUB["gemma3"] = {"vision_tower", "multi_modal_projector", "language_model"}


@pytest.mark.parametrize("setup", ["full", "with tower"])
def test_a_saved_model_gives_the_same_logits_in_the_library(folder: Path, rows: list[Row], tmp_path: Path, setup: str) -> None:
    tuned, processing = tuned_model(folder, **SETUPS[setup]), load_processing(str(folder))
    for parameter in tuned.packed.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    save_weights(tuned, copy_of_weights(tuned, tuned.packed.named_parameters(), True), processing, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert {name.split(".")[0] for name in names} - {"lm_head"} == HUB[tuned.base.config.model_type]
    batch = collate(folder, rows)
    with torch.no_grad():
        before = score(tuned, batch).log_probs
        model = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32).eval()
        for number, row in enumerate(rows):
            torch.testing.assert_close(library_log_probs(model, tmp_path, row), before[batch.sequence_index == number], **TOLERANCE)
        again = tuned_model(folder, **SETUPS[setup])
        load_weights(again, tmp_path)
        assert torch.equal(score(again, batch).log_probs, before)


def test_config_json_is_flat_where_the_hub_s_is_and_read_as_what_was_saved(folder: Path, tmp_path: Path) -> None:
    config, settings = AutoConfig.from_pretrained(folder), json.loads((folder / "config.json").read_text())
    assert ("text_config" not in settings) is (config.model_type in ("qwen2_vl", "qwen2_5_vl"))
    if "text_config" not in settings:
        assert settings["hidden_size"] == 64 and settings["rope_scaling"] == {"rope_type": "default", "mrope_section": [2, 3, 3]}
        assert settings["model_type"] == config.model_type and settings["tie_word_embeddings"] is (config.model_type == "qwen2_5_vl")
    SMALL[config.model_type]()[0].config.save_pretrained(tmp_path)  # as the library writes it itself
    found, expected = config.to_dict(), AutoConfig.from_pretrained(tmp_path).to_dict()
    for own, library in ((found, expected), *((found[part], expected[part]) for part in ("text_config", "vision_config"))):
        differing = {name for name in {*own, *library} if not name.endswith("_config") and own.get(name) != library.get(name)}
        assert differing <= {"_name_or_path", "architectures", "rope_theta", "rope_scaling", "tie_word_embeddings", "sliding_window_pattern"}, differing


def test_the_fingerprint_is_of_the_weights_and_not_of_their_layout(folder: Path, tmp_path: Path) -> None:
    load_model(str(folder), torch.float32).save_pretrained(tmp_path / "as_transformers_does")
    load_model(str(folder), torch.float32).save_pretrained(tmp_path / "as_in_memory", save_original_format=False)
    fingerprint = weights_fingerprint(str(folder))
    assert fingerprint
    assert weights_fingerprint(str(tmp_path / "as_transformers_does")) == weights_fingerprint(str(tmp_path / "as_in_memory")) == fingerprint


def test_image_aspect_ratio_is_refused_with_what_to_do(folder: Path) -> None:
    with pytest.raises(InputError, match="image_aspect_ratio: 'pad' does not go with model_type"):
        load_processing(str(folder), image_aspect_ratio="pad")


def test_images_are_kept_within_the_bounds_that_were_asked_for(folder: Path, pictures: Path, tmp_path: Path) -> None:
    if "qwen" not in folder.name:
        with pytest.raises(InputError, match="min_pixels and max_pixels do not go with model_type"):
            load_processing(str(folder), max_pixels=10_000)
        return
    images = [PIL.Image.open(path).convert("RGB") for path in sorted(pictures.glob("*.png"))]
    sizes = [image.size for image in images]
    own = load_processing(str(folder))
    settings: Any = own.image_processor
    side = settings.patch_size * settings.merge_size
    bounds = {"min_pixels": 12 * side**2, "max_pixels": 20 * side**2}
    bounded = load_processing(str(folder), **bounds)
    assert bounded.image_settings != own.image_settings
    counts = bounded.row_image_tokens(sizes)
    shapes = [max(size) / min(size) for size in sizes]
    assert all(12 <= count - 2 <= 20 for count, shape in zip(counts, shapes, strict=True) if shape < 20)  # longer ones keep their shape, as the processor does
    assert counts != own.row_image_tokens(sizes)
    bounded.config.save_pretrained(tmp_path)
    save_processing(bounded, tmp_path)
    assert load_processing(str(tmp_path)).row_image_tokens(sizes) == counts
    grids = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")(images=images, return_tensors="pt")["image_grid_thw"]
    assert [int(grid.prod()) // 4 + 2 for grid in grids] == counts
    with pytest.raises(InputError, match="expected the second to be no less than the first"):
        load_processing(str(folder), min_pixels=10_000, max_pixels=9_000)


# --- the whole way ---


def run_arguments(folder: Path, pictures: Path, tmp_path: Path, make_arguments: Callable[..., dict[str, Any]], **changes: Any) -> dict[str, Any]:
    records = []
    for names in ROWS[:6]:
        turns = [{"from": "human", "value": "<image>" * len(names) + "Which?"}, {"from": "gpt", "value": "This one."}]
        records.append({"image": [f"{name}.png" for name in names], "conversations": turns} if names else {"conversations": turns})
    (tmp_path / "rows.json").write_text(json.dumps(records))
    arguments = make_arguments(tmp_path / "rows.json", model_name_or_path=str(folder), max_steps=6, learning_rate=3e-3, **changes)
    arguments["dataset"]["train"][0]["image_folder"] = str(pictures)
    return arguments


@pytest.mark.parametrize(
    "changes",
    [{}, {"lora": True, "lora_rank": 4, "feature_cache": "memory", "share_prefix": True}, {"lora": True, "tunable_parts": ",".join(EVERYTHING)}],
    ids=["full", "lora", "lora with tower"],
)
def test_a_run_trains_and_its_result_answers_as_the_library_does(
    folder: Path, pictures: Path, tmp_path: Path, make_arguments: Callable[..., dict[str, Any]], changes: dict[str, Any]
) -> None:
    finetune(run_arguments(folder, pictures, tmp_path, make_arguments, **changes))
    run, names = tmp_path / "run", [ROWS[1], ROWS[2], ROWS[0]]
    losses = [entry["loss"] for entry in json.loads((run / "trainer_state.json").read_text())["log_history"] if "loss" in entry]
    assert losses[-1] < losses[0]
    turns = [[Turn("user", (*(Image(str(pictures / f"{name}.png")) for name in chosen), Text("Which?")))] for chosen in names]
    generator = load_generator(str(run))
    prompts = [generator.prompt(turn) for turn in turns]
    found = generator.answer(prompts, 8)
    if changes:
        merge(str(run), tmp_path / "merged")
        assert load_generator(str(tmp_path / "merged")).answer(prompts, 8) == found
    model: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged" if changes else run, dtype=torch.float32).eval()
    for chosen, prompt, answer in zip(names, prompts, found, strict=True):
        ids = torch.tensor([prompt.input_ids])
        inputs = library_arguments(model, folder, [PIL.Image.open(pictures / f"{name}.png") for name in chosen], ids)
        end = generator.processing.template.end
        output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8, eos_token_id=end, **inputs)
        assert generator.processing.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip() == answer
