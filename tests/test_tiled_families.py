"""What is InternVL's and SmolVLM's own: how many tiles an image of any size has, and what is written around them."""

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import (
    Gemma3Config,
    Gemma3ImageProcessorPil,
    GotOcr2ImageProcessorPil,
    Idefics3Config,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    InternVLConfig,
    PaliGemmaConfig,
    PreTrainedTokenizerBase,
    SmolVLMConfig,
    SmolVLMImageProcessorPil,
)
from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

from interlace.errors import InputError
from interlace.model.families import family_of
from interlace.model.gemma3 import GemmaImages
from interlace.model.internvl import InternImages
from interlace.model.loading import load_config, load_processing
from interlace.model.smolvlm import SmolImages
from tests.small_families import make_model, tokenizer_with

SMOL = {"SmolVLM-256M": (2048, 512, 16, 4), "SmolVLM2-2.2B": (1536, 384, 14, 3)}  # longest edge, tile, patch, scale factor


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    places = [f"<row_{row}_col_{column}>" for row in range(1, 9) for column in range(1, 9)]
    return tokenizer_with("<img>", "</img>", "<fake_token_around_image>", "<global-img>", *places)[0]


@pytest.mark.parametrize("most", [1, 6, 12])
@example(width=1, height=1)
@example(width=4000, height=10)
@example(width=448, height=448)
@example(width=896, height=448)
@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 4000), height=st.integers(1, 4000))
def test_tokens_of_any_size_are_those_of_internvls_processor(tokenizer: PreTrainedTokenizerBase, most: int, width: int, height: int) -> None:
    processor = GotOcr2ImageProcessorPil(size={"height": 448, "width": 448}, max_patches=most)
    images = InternImages(InternVLConfig(), processor, tokenizer)
    (tokens,) = images.row_tokens([(width, height)])
    assert tokens == 256 * processor.get_number_of_image_patches(height, width, {"crop_to_patches": True}) + 2
    assert len(images.ids(tokens)) == tokens
    if width * height < 40_000:
        made = processor(images=[PIL.Image.new("RGB", (width, height))], crop_to_patches=True, return_tensors="np")
        assert len(images.pixels([PIL.Image.new("RGB", (width, height))], [tokens])) == made["num_patches"][0] == tokens // 256


@pytest.mark.parametrize("name", SMOL)
@example(width=1, height=1)
@example(width=4000, height=10)
@example(width=512, height=512)
@example(width=2048, height=1537)
@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 5000), height=st.integers(1, 5000))
def test_ids_of_any_size_are_those_of_smolvlms_processor(tokenizer: PreTrainedTokenizerBase, name: str, width: int, height: int) -> None:
    longest, side, patch, factor = SMOL[name]
    processor: Any = SmolVLMImageProcessorPil(size={"longest_edge": longest}, max_image_size={"longest_edge": side})
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    config = SmolVLMConfig(vision_config={"image_size": side, "patch_size": patch}, scale_factor=factor, image_token_id=image_token)
    images = SmolImages(config, processor, tokenizer)
    (tokens,) = images.row_tokens([(width, height)])
    _, rows, columns = processor.get_number_of_image_patches(height, width)
    length = (side // patch // factor) ** 2
    text = get_image_prompt_string(rows, columns, length, "<fake_token_around_image>", "<image>", "<global-img>")
    assert list(images.ids(tokens)) == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert images.ids(tokens).count(image_token) == length * (rows * columns + 1)


@pytest.mark.parametrize("known", [True, False], ids=["SmolVLM-256M and -500M", "SmolVLM-Instruct"])
@pytest.mark.parametrize("size", [(1, 1), (512, 512), (1100, 500), (500, 2000), (2048, 1537)], ids=str)
def test_places_of_tiles_are_tokens_or_text_as_the_tokenizer_has_them(known: bool, size: tuple[int, int]) -> None:
    """The older models are Idefics 3 to the library, and the oldest one's tokenizer takes `<row_1_col_1>` and `<global-img>` for plain text."""
    places = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    tokenizer, _ = tokenizer_with("<fake_token_around_image>", "<end_of_utterance>", *(["<global-img>", *places] if known else []))
    longest, side, patch, factor = SMOL["SmolVLM-256M"]
    images = Idefics3ImageProcessorPil(size={"longest_edge": longest}, max_image_size={"longest_edge": side})
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    config = Idefics3Config(vision_config={"image_size": side, "patch_size": patch}, scale_factor=factor, image_token_id=image_token)
    processor = Idefics3Processor(images, tokenizer, image_seq_len=64)
    inputs = images(images=[PIL.Image.new("RGB", size)], return_row_col_info=True, return_tensors="np")
    expected = tokenizer(processor.replace_image_token(inputs, 0), add_special_tokens=False)["input_ids"]
    own = SmolImages(config, images, tokenizer)
    (tokens,) = own.row_tokens([size])
    assert list(own.ids(tokens)) == expected
    assert (len(tokenizer("<row_1_col_1>", add_special_tokens=False)["input_ids"]) == 1) is known


@pytest.mark.parametrize(("width", "height"), [(300, 70), (1, 1), (512, 511), (90, 400), (130, 128), (128, 129)])
def test_smolvlms_tiles_are_counted_as_they_are_cut(tokenizer: PreTrainedTokenizerBase, width: int, height: int) -> None:
    """Also where a tile's side does not divide the longest edge, where the processor's own count is another than its cutting."""
    for longest in (512, 500, 300):
        processor: Any = SmolVLMImageProcessorPil(size={"longest_edge": longest}, max_image_size={"longest_edge": 128})
        config = SmolVLMConfig(vision_config={"image_size": 128, "patch_size": 16}, scale_factor=2, image_token_id=tokenizer.convert_tokens_to_ids("<image>"))
        images = SmolImages(config, processor, tokenizer)
        image = PIL.Image.fromarray(np.random.RandomState(0).randint(0, 255, (height, width, 3), np.uint8))
        made = processor(images=[image], return_row_col_info=True, return_tensors="np")
        (tokens,) = images.row_tokens([image.size])
        assert images.ids(tokens).count(config.image_token_id) == 16 * len(made["pixel_values"][0]) == 16 * len(images.pixels([image], [tokens]))


TILES = [("internvl", "squash", 1), ("internvl", "anyres_max_2", 3), ("internvl", "anyres", 7), ("smolvlm", "squash", 1), ("smolvlm", "anyres", 13)]


@pytest.mark.parametrize(("family", "ratio", "tiles"), TILES)
def test_image_aspect_ratio_says_how_many_tiles_there_are(tmp_path: Path, family: str, ratio: str, tiles: int) -> None:
    processing = load_processing(str(make_model(family, tmp_path)), image_aspect_ratio=ratio)
    (tokens,) = processing.row_image_tokens([(600, 400)])
    assert processing.images.ids(tokens).count(processing.config.image_token_id) == 16 * tiles
    assert len(processing.process_images([PIL.Image.new("RGB", (600, 400))], [tokens])) == tiles


def test_an_internvl_of_another_layer_is_refused(tmp_path: Path) -> None:
    folder = make_model("internvl", tmp_path)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"vision_feature_layer": -1', '"vision_feature_layer": -2'))
    with pytest.raises(InputError, match=r"vision_feature_layer.*expected -1"):
        load_config(str(folder))


def test_paligemma_is_refused_with_the_reason() -> None:
    with pytest.raises(
        InputError, match=r"model_type 'paligemma' is not supported \(all of a prompt attends .*both directions.*supported: gemma3, idefics3, internvl"
    ):
        family_of(PaliGemmaConfig())


def test_a_tokenizer_without_the_tokens_around_images_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    plain = tokenizer_with()[0]
    with pytest.raises(InputError, match="no '<img>'"):
        InternImages(InternVLConfig(), GotOcr2ImageProcessorPil(), plain).ids(258)
    with pytest.raises(InputError, match="no '<start_of_image>'"):
        GemmaImages(Gemma3Config(), Gemma3ImageProcessorPil(), plain).ids(258)
