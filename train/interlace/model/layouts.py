"""One model, several spellings of its weights' names: the hub's, transformers' in memory, and of LLaVA its authors' (lmms-lab)."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from interlace.errors import InputError

TEXT_MODELS = {"LlavaQwenForCausalLM": "qwen2", "LlavaLlamaForCausalLM": "llama", "LlavaMistralForCausalLM": "mistral"}  # the authors' classes
LANGUAGE_MODELS = {"Qwen2ForCausalLM": "LlavaQwenForCausalLM", "LlamaForCausalLM": "LlavaLlamaForCausalLM", "MistralForCausalLM": "LlavaMistralForCausalLM"}
VISION = "vision_tower.vision_model."
EMBEDDINGS, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
NAMES = (  # original, hub
    ("model.embed_tokens.", "language_model.model.embed_tokens."),
    ("model.layers.", "language_model.model.layers."),
    ("model.norm.", "language_model.model.norm."),
    ("lm_head.", "language_model.lm_head."),
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("model.vision_tower.vision_tower.vision_model.", VISION),
    ("model.image_newline", "image_newline"),
)
PADDLE_CLIP = (  # PaddleMIX's CLIP tower (its paddlemix/models/llava/clip_model.py), transformers'; behind what every name begins with
    ("class_embedding", "embeddings.class_embedding"),
    ("conv1.", "embeddings.patch_embedding."),
    ("positional_embedding.", "embeddings.position_embedding."),
    ("ln_pre.", "pre_layrnorm."),
    ("ln_post.", "post_layernorm."),
    ("transformer.layers.", "encoder.layers."),
)
PADDLE_CLIP_LAYER = {"linear1": "mlp.fc1", "linear2": "mlp.fc2", "norm1": "layer_norm1", "norm2": "layer_norm2"}
_PADDLE_START = re.compile(r"^(qwen2|llama|mistral)\.")
Layout = tuple[tuple[str, str], ...]  # how names begin in memory, and on the hub
LLAVA_LAYOUT: Layout = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.vision_tower.", VISION),
    ("model.image_newline", "image_newline"),
    ("vision_tower.", VISION),  # as a model made from a configuration is saved
)
QWEN_VL_LAYOUT: Layout = (("model.visual.", "visual."), ("model.language_model.", "model."))
INTERNVL_LAYOUT: Layout = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.vision_tower.", "vision_tower."),
)
ROWS_ADDED = 64  # what the hub ports' vocabularies have more than the originals': room for `<image>`, in steps of 64


def read_settings(path: Path) -> dict[str, Any]:
    """A model's config.json.

    Raises:
        InputError: it is none, or a part of one.
    """
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} cannot be read: {error}; it may be half-downloaded: fetch it once more") from None
    if not isinstance(settings, dict):
        raise InputError(f"{path} is no model's configuration: expected an object of names and values, got a JSON {type(settings).__name__}")
    return settings


def architecture(settings: Mapping[str, Any]) -> str:
    """The class that a config.json is of; "" where it names none."""
    named = settings.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else ""


def is_original(settings: Mapping[str, Any]) -> bool:
    """Whether a config.json is in the authors' layout."""
    return architecture(settings) in TEXT_MODELS


def is_language_model(settings: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a language model alone that LLaVA is made of."""
    return architecture(settings) in LANGUAGE_MODELS


def hub_name(name: str, layout: Layout = LLAVA_LAYOUT) -> str:
    """A parameter's name in memory, or as a model made from a configuration is saved, -> its name on the hub."""
    for memory, hub in layout:
        if name.startswith(memory) and not (hub.startswith(memory) and name.startswith(hub)):
            return hub + name.removeprefix(memory)
    return name


def memory_name(name: str) -> str:
    """A LLaVA's parameter's name on the hub -> its name in memory."""
    return next((memory + name.removeprefix(hub) for memory, hub in LLAVA_LAYOUT if name.startswith(hub)), name)


def original_name(name: str) -> str:
    """A name in the hub ports -> the authors'."""
    return next((original + name.removeprefix(hub) for original, hub in NAMES if name.startswith(hub)), name)


def spellings(name: str, text_model: str, layout: Layout = LLAVA_LAYOUT) -> tuple[str, ...]:
    """A name in memory, of a parameter or a module, in every layout: transformers', the hub's, the authors', PaddleMIX's.

    Args:
        text_model: `model_type` of the language model. layout: of the hub.
    """
    hub = hub_name(f"{name}.", layout).removesuffix(".")
    original = original_name(f"{hub}.").removesuffix(".")
    return name, hub, original, original.replace("model.", f"{text_model}.", 1) if original.startswith("model.") else original


def is_paddle(names: Iterable[str]) -> bool:
    """Whether weights are named as PaddleMIX names them."""
    return any(_PADDLE_START.match(name) for name in names)


def original_of_paddle(name: str) -> str:
    """PaddleMIX's name -> the authors'."""
    name = _PADDLE_START.sub("model.", name)
    start, tower, inside = name.partition("vision_tower.vision_tower.vision_model.")
    found = next((theirs + inside.removeprefix(paddle) for paddle, theirs in PADDLE_CLIP if inside.startswith(paddle)), None)
    return name if found is None else start + tower + ".".join(PADDLE_CLIP_LAYER.get(word, word) for word in found.split("."))


def named_by_hub(name: str) -> str | None:
    """The authors' name -> the hub ports'; None for a name that the authors do not have."""
    return next((hub + name.removeprefix(original) for original, hub in NAMES if name.startswith(original)), None)
