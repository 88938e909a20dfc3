"""LLaVA-1.5 as published: a CLIP tower's last layer but one without its class token, LLaMA, vicuna prompts. Tiny models, float32 on the CPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import (
    AddedToken,
    AutoTokenizer,
    BaseImageProcessor,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

from interlace.data.dataset import load_rows
from interlace.data.reading import Row
from interlace.data.sources import read_entries
from interlace.data.template import ChatTemplate
from interlace.model.llava import with_aspect_ratio
from interlace.model.loading import load_model, load_processing
from interlace.model.processing import Processing
from interlace.model.saving import save_model, save_processing
from interlace.training.parts import row_reader
from tests.conftest import write_rows
from tests.test_equivalence import (
    SETUPS,
    TOLERANCE,
    assert_packing_and_checkpointing_change_nothing,
    backward,
    collate,
    hugging_face_log_probs,
    score,
    tuned_model,
)
from tests.test_more_families import assert_same_gradients
from tests.test_template import write_llama_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 features per 56 x 56 image."""
    place = tmp_path_factory.mktemp("clip")
    tokenizer = AutoTokenizer.from_pretrained(write_llama_tokenizer(place, is_legacy=True))
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    tokenizer.pad_token = tokenizer.unk_token
    widths = {"num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    vision = CLIPVisionConfig(hidden_size=32, image_size=56, patch_size=14, **widths)
    text = LlamaConfig(hidden_size=64, vocab_size=len(tokenizer), num_key_value_heads=4, max_position_embeddings=1024, **widths)
    image = tokenizer.convert_tokens_to_ids("<image>")
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=image))
    assert (model.config.vision_feature_layer, model.config.vision_feature_select_strategy) == (-2, "default")
    for parameter in model.parameters():  # larger weights than the initialisation: differences must show
        parameter.data.mul_(3)
    (place / "model").mkdir()
    save_model(model, place / "model")
    images = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    save_processing(Processing(tokenizer, images, ChatTemplate(tokenizer, image, prompt_style="vicuna_v1"), model.config), place / "model")
    return place / "model"


@pytest.fixture
def rows(folder: Path, tmp_path: Path, make_arguments: Callable[..., dict[str, Any]]) -> list[Row]:
    """Rows with 0, 1, 2 and 3 images, twice."""
    arguments = make_arguments(write_rows(tmp_path / "data", 8), model_name_or_path=str(folder), max_length=1024, too_long="error")
    sources = read_entries(arguments["dataset"]["train"], 0)
    return list(load_rows(sources, row_reader(arguments, load_processing(str(folder))), arguments, False)[0])


def test_packed_log_probs_and_gradients_equal_the_library_on_separate_rows(folder: Path, rows: list[Row]) -> None:
    assert {row.image_tokens for row in rows} == {(16,) * count for count in range(4)}
    model = load_model(str(folder), torch.float32)
    model.model.vision_tower.requires_grad_(False)
    batch, tuned = collate(folder, rows), tuned_model(folder)
    alone = [hugging_face_log_probs(model, collate(folder, [row])) for row in rows]
    found = score(tuned, batch).log_probs
    for number, expected in enumerate(alone):
        torch.testing.assert_close(found[batch.sequence_index == number], expected, **TOLERANCE)
    loss = sum(-log_probs.sum() for log_probs in alone) / len(found)
    loss.backward()
    reference = {f"model.{name}": parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    packed, gradients = backward(tuned, [batch])
    assert packed == pytest.approx(loss.item(), rel=1e-5)
    assert_same_gradients(reference, gradients)


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_packed_equals_separate_and_checkpointing_changes_nothing(folder: Path, rows: list[Row], setup: str) -> None:
    tuned = tuned_model(folder, **SETUPS[setup])
    assert_packing_and_checkpointing_change_nothing(tuned, collate(folder, rows), [collate(folder, [row]) for row in rows], assert_same_gradients)


# --- pad and squash, at the published sizes ---

TOWERS: dict[str, tuple[Any, BaseImageProcessor, tuple[int, int, int]]] = {
    "CLIP-336": (
        CLIPVisionConfig(image_size=336, patch_size=14),
        CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
        (122, 116, 104),
    ),
    "SigLIP-384": (SiglipVisionConfig(image_size=384, patch_size=14), SiglipImageProcessorPil(size={"height": 384, "width": 384}), (127, 127, 127)),
}


def by_hand(image: PIL.Image.Image, side: int, processor: Any) -> torch.Tensor:
    resized = np.asarray(image.resize((side, side), processor.resample), np.float64) / 255
    return torch.from_numpy(((resized - np.array(processor.image_mean)) / np.array(processor.image_std)).transpose(2, 0, 1))[None].float()


@pytest.mark.parametrize("size", [(500, 300), (301, 480), (400, 400), (1000, 7)], ids=str)
@pytest.mark.parametrize("tower", TOWERS)
def test_pad_puts_the_image_into_a_square_of_the_mean_colour_and_squash_stretches_it(tower: str, size: tuple[int, int]) -> None:
    vision, processor, colour = TOWERS[tower]
    config, side = LlavaConfig(vision_config=vision), vision.image_size
    image = PIL.Image.fromarray(np.random.RandomState(0).randint(0, 255, (size[1], size[0], 3), np.uint8))
    longest = max(size)
    square = PIL.Image.new("RGB", (longest, longest), colour)
    square.paste(image, ((longest - size[0]) // 2, (longest - size[1]) // 2))
    pixels = {ratio: with_aspect_ratio(processor, ratio, config)(images=[image], return_tensors="pt")["pixel_values"].float() for ratio in ("pad", "squash")}
    torch.testing.assert_close(pixels["pad"], by_hand(square, side, processor), rtol=0, atol=1e-5)
    torch.testing.assert_close(pixels["squash"], by_hand(image, side, processor), rtol=0, atol=1e-5)
    assert torch.equal(pixels["pad"], pixels["squash"]) is (size[0] == size[1])
