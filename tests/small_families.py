"""Random models of further families in small, with their real geometry, and transformers' own way from a row to log-probs."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from transformers import (
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    GotOcr2ImageProcessorPil,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessorPil,
    SmolVLMProcessor,
)

from interlace.data.batch import PackedBatch
from interlace.data.lengths import expanded_length, prefix_of
from interlace.data.reading import Row
from interlace.data.sample import Image, Place, Sample, Text, Turn
from interlace.data.template import ChatTemplate
from interlace.model.families import family_of
from interlace.model.loading import load_processing
from interlace.model.processing import Processing
from interlace.model.saving import save_model, save_processing
from tests.conftest import DEMO_MODEL

SIZES = {"wide": (300, 70), "tall": (60, 250), "square": (120, 120), "large": (420, 330), "line": (300, 4), "dot": (1, 1), "odd": (197, 143)}
ROWS = ((), ("wide",), ("wide", "tall"), ("large",), ("square", "line", "square"), ("dot",), ("odd", "odd"), ())
TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}


def tokenizer_with(*tokens: str, **names: Any) -> tuple[PreTrainedTokenizerBase, dict[str, int]]:
    """The demo's tokenizer with more control tokens, and their ids."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL, **names)
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    return tokenizer, {token: tokenizer.convert_tokens_to_ids(token) for token in tokens}


def _qwen_parts(tokenizer: PreTrainedTokenizerBase, ids: dict[str, int]) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    text = {**TEXT, "vocab_size": len(tokenizer), "rope_parameters": rope, "bos_token_id": None, "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>")}
    return {"text_config": text, **dict(zip(names, ids.values(), strict=True))}


QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def qwen2_vl() -> tuple[PreTrainedModel, Any, PreTrainedTokenizerBase]:
    tokenizer, ids = tokenizer_with(*QWEN_TOKENS)
    vision = {"depth": 3, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2}
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(vision_config=vision, **_qwen_parts(tokenizer, ids)))
    return model, Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=28 * 28 * 60), tokenizer


def qwen2_5_vl() -> tuple[PreTrainedModel, Any, PreTrainedTokenizerBase]:
    tokenizer, ids = tokenizer_with(*QWEN_TOKENS)
    vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64, "fullatt_block_indexes": [1], "window_size": 112}
    config = Qwen2_5_VLConfig(vision_config=vision, tie_word_embeddings=True, **_qwen_parts(tokenizer, ids))
    return Qwen2_5_VLForConditionalGeneration(config), Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=28 * 28 * 60), tokenizer


def qwen3_vl() -> tuple[PreTrainedModel, Any, PreTrainedTokenizerBase]:
    tokenizer, ids = tokenizer_with(*QWEN_TOKENS)
    vision = {"depth": 4, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
    vision |= {"deepstack_visual_indexes": [0, 2], "num_position_embeddings": 25, "patch_size": 16}
    parts = _qwen_parts(tokenizer, ids)
    parts["text_config"] |= {"head_dim": 16}
    parts["text_config"]["rope_parameters"]["mrope_section"] = [4, 2, 2]
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(vision_config=vision, **parts))
    return model, Qwen2VLImageProcessorPil(patch_size=16, size={"shortest_edge": 64 * 64, "longest_edge": 32 * 32 * 60}), tokenizer


def internvl() -> tuple[PreTrainedModel, Any, PreTrainedTokenizerBase]:
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    tokenizer, ids = tokenizer_with(*names.values(), extra_special_tokens=names)
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": [112, 112], "patch_size": [14, 14]}
    text = {**TEXT, "model_type": "qwen2", "vocab_size": len(tokenizer)}
    config = InternVLConfig(vision_config=vision, text_config=text, image_token_id=ids["<IMG_CONTEXT>"], image_seq_length=16, tie_word_embeddings=False)
    return InternVLForConditionalGeneration(config), GotOcr2ImageProcessorPil(size={"height": 112, "width": 112}, max_patches=6), tokenizer


def smolvlm() -> tuple[PreTrainedModel, Any, PreTrainedTokenizerBase]:
    places = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    tokenizer, _ = tokenizer_with("<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *places)
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 128, "patch_size": 16}
    text = {**TEXT, "model_type": "llama", "vocab_size": len(tokenizer)}
    image_token, pad = (tokenizer.convert_tokens_to_ids(token) for token in ("<image>", "<|endoftext|>"))
    config = SmolVLMConfig(vision_config=vision, text_config=text, image_token_id=image_token, scale_factor=2, pad_token_id=pad)
    sampling = {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": 128}}  # stands in the published files; transformers 4 asks for it
    images = SmolVLMImageProcessorPil(size={"longest_edge": 512}, max_image_size={"longest_edge": 128}, video_sampling=sampling)
    return SmolVLMForConditionalGeneration(config), images, tokenizer


def idefics3() -> tuple[PreTrainedModel, Any, PreTrainedTokenizerBase]:
    """As SmolVLM-Instruct: its tokenizer has no tokens for a tile's place, which are plain text to it."""
    tokenizer, _ = tokenizer_with("<fake_token_around_image>", "<end_of_utterance>")
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 126, "patch_size": 14}
    text = {**TEXT, "model_type": "llama", "vocab_size": len(tokenizer)}
    image_token, pad = (tokenizer.convert_tokens_to_ids(token) for token in ("<image>", "<|endoftext|>"))
    config = Idefics3Config(vision_config=vision, text_config=text, image_token_id=image_token, scale_factor=3, pad_token_id=pad)
    images = Idefics3ImageProcessorPil(size={"longest_edge": 504}, max_image_size={"longest_edge": 126})
    return Idefics3ForConditionalGeneration(config), images, tokenizer


GEMMA_NAMES = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}


def gemma3() -> tuple[PreTrainedModel, Any, PreTrainedTokenizerBase]:
    """Two kinds of layers; images of 16 tokens, which is more than a window. As in its own tokenizer, line breaks in a row are one token."""
    tokenizer, ids = tokenizer_with("<bos>", "<start_of_turn>", "<end_of_turn>", *GEMMA_NAMES.values(), bos_token="<bos>", extra_special_tokens=GEMMA_NAMES)
    tokenizer.add_tokens(["\n" * count for count in range(2, 8)])
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 128, "patch_size": 16}
    text = {**TEXT, "vocab_size": len(tokenizer), "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 11, "pad_token_id": 0}
    text |= {"layer_types": ["sliding_attention", "full_attention"] * 2, "bos_token_id": ids["<bos>"], "eos_token_id": ids["<end_of_turn>"]}
    names = ("boi_token_index", "eoi_token_index", "image_token_index")
    numbers = dict(zip(names, (ids[token] for token in GEMMA_NAMES.values()), strict=True))
    config = Gemma3Config(vision_config={**vision, "vision_use_head": False}, text_config=text, mm_tokens_per_image=16, **numbers)
    model = Gemma3ForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if "mm_input_projection_weight" in name or "norm.weight" in name:  # these start at zero
            torch.nn.init.normal_(parameter, std=0.1)
    return model, Gemma3ImageProcessorPil(size={"height": 128, "width": 128}), tokenizer


SMALL: dict[str, Callable[[], tuple[PreTrainedModel, Any, PreTrainedTokenizerBase]]] = {
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "internvl": internvl,
    "smolvlm": smolvlm,
    "idefics3": idefics3,
    "gemma3": gemma3,
}
PROCESSORS: dict[str, Any] = {
    "qwen2_vl": Qwen2VLProcessor,
    "qwen2_5_vl": Qwen2_5_VLProcessor,
    "qwen3_vl": Qwen3VLProcessor,
    "internvl": InternVLProcessor,
    "smolvlm": SmolVLMProcessor,
    "idefics3": Idefics3Processor,
    "gemma3": Gemma3Processor,
}
OPTIONS: dict[str, Any] = {
    "internvl": {"crop_to_patches": True},
    "smolvlm": {"return_row_col_info": True},
    "idefics3": {"return_row_col_info": True},
}  # as their processors ask for images


def make_model(family: str, folder: Path) -> Path:
    """A random tiny model, saved as Interlace saves models."""
    torch.manual_seed(0)
    model, images, tokenizer = SMALL[family]()
    for parameter in model.parameters():  # larger weights than the initialisation: differences must show
        parameter.data.mul_(3)
    save_model(model, folder)
    config: Any = model.config
    text = family_of(config).images(config, images, tokenizer).text
    style = {"prompt_style": family_of(config).prompt_style} if family_of(config).prompt_style else {}
    template = ChatTemplate(tokenizer, config.image_token_id, image_text=text, **style)
    save_processing(Processing(tokenizer, images, template, config), folder)
    return folder


def make_pictures(folder: Path) -> Path:
    """PNG files of the sizes in SIZES."""
    for number, (name, (width, height)) in enumerate(SIZES.items()):
        PIL.Image.fromarray(np.random.RandomState(number).randint(0, 255, (height, width, 3), np.uint8)).save(folder / f"{name}.png")
    return folder


def make_turns(pictures: Path, number: int, names: Sequence[str], question: str = "question") -> tuple[Turn, ...]:
    parts = [part for name in names for part in (Text("look "), Image(str(pictures / f"{name}.png")))]
    return (Turn("user", (*parts, Text(f"{question} {number}"))), Turn("assistant", (Text(f"answer {number}, no more"),)))


def make_row(processing: Processing, pictures: Path, number: int, names: Sequence[str], question: str = "question") -> Row:
    encoded = processing.template.encode(Sample(make_turns(pictures, number, names, question)))
    places = tuple(Place(str(pictures / f"{name}.png")) for name in names)
    tokens = processing.row_image_tokens([SIZES[name] for name in names])
    prefix = prefix_of(encoded, processing.config.image_token_id)
    return Row("rows.json", number, encoded, places, tuple(tokens), expanded_length(encoded, tokens), *prefix)


def collate(folder: Path, rows: Sequence[Row], share_prefix: bool = False) -> PackedBatch:
    return load_processing(str(folder)).collator(share_prefix).pack(list(enumerate(rows)))


# --- transformers' side ---


def opened(row: Row) -> list[PIL.Image.Image]:
    return [PIL.Image.open(place.path).convert("RGB") for place in row.images]


def library_processor(folder: Path) -> Any:
    """The processor of the saved settings, made without its video part: that needs torchvision."""
    settings = json.loads((folder / "processor_config.json").read_text())
    kind = PROCESSORS[json.loads((folder / "config.json").read_text())["model_type"]]
    assert settings.pop("processor_class") == kind.__name__
    processor, processing = kind.__new__(kind), load_processing(str(folder))
    vars(processor).update(settings, image_processor=processing.image_processor, tokenizer=processing.tokenizer, video_processor=None)
    if kind is InternVLProcessor:
        processor.start_image_token, processor.end_image_token = processing.tokenizer.start_image_token, processing.tokenizer.end_image_token
    if kind is SmolVLMProcessor:
        processor.fake_image_token, processor.global_image_token, processor.image_token = "<fake_token_around_image>", "<global-img>", "<image>"
    if kind is Idefics3Processor:
        processor = Idefics3Processor(processing.image_processor, processing.tokenizer, settings["image_seq_len"])
    if kind is Gemma3Processor:
        processor = Gemma3Processor(processing.image_processor, processing.tokenizer, image_seq_length=settings["image_seq_length"])
    return processor


def library_inputs(folder: Path, images: Sequence[PIL.Image.Image]) -> dict[str, torch.Tensor]:
    """One row's images by the model's own image processor."""
    options = OPTIONS.get(json.loads((folder / "config.json").read_text())["model_type"], {})
    return dict(load_processing(str(folder)).image_processor(images=list(images), return_tensors="pt", **options)) if images else {}


def library_ids(folder: Path, pictures: Path, number: int, names: Sequence[str]) -> list[int]:
    """A row by the saved chat template, each image as the model's own processor writes it."""
    processing, processor = load_processing(str(folder)), library_processor(folder)
    messages = []
    for turn in make_turns(pictures, number, names):
        parts = [{"type": "text", "text": part.text} if isinstance(part, Text) else {"type": "image"} for part in turn.parts]
        messages.append({"role": turn.role, "content": parts})
    text = processing.tokenizer.apply_chat_template(messages, tokenize=False)
    before, *behind = text.split(processor.image_token)
    inputs = library_inputs(folder, [PIL.Image.open(pictures / f"{name}.png").convert("RGB") for name in names])
    written = before + "".join(processor.replace_image_token(inputs, i) + text for i, text in enumerate(behind))
    ids: list[int] = processing.tokenizer(written, add_special_tokens=False)["input_ids"]
    return ids


def library_arguments(model: Any, folder: Path, images: Sequence[PIL.Image.Image], ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The arguments of the model's own forward for one row's images, beside its ids."""
    inputs = library_inputs(folder, images)
    if "image_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    if "num_crops" in inputs:
        inputs["token_type_ids"] = (ids == model.config.image_token_id).int()
    return {name: values for name, values in inputs.items() if name not in ("num_patches", "rows", "cols", "num_crops")}


def library_log_probs(model: Any, folder: Path, row: Row) -> torch.Tensor:
    """Full logits of one row by the model's own forward."""
    batch = collate(folder, [row])
    known = library_arguments(model, folder, opened(row), batch.input_ids)
    logits = model(input_ids=batch.input_ids, attention_mask=torch.ones_like(batch.input_ids), **known).logits[0]
    return F.log_softmax(logits.float(), -1)[batch.rows[batch.row_index], batch.targets]
