"""config.json as the authors' code reads it (llava/model/{builder,llava_arch}.py and its towers), for models that never had one of that kind."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from interlace.errors import InputError
from interlace.model.layouts import LANGUAGE_MODELS, ROWS_ADDED, TEXT_MODELS, architecture

VOCABULARIES = (151936, 152064, 32000, 64000, 128256)  # of Qwen1.5 and 2, the larger Qwen1.5 and 2, LLaMA and Mistral, Yi, Llama 3
_MODEL_TYPES = {"qwen2": "llava_qwen", "llama": "llava_llama", "mistral": "llava_mistral"}
_TOWERS = {  # geometry (kind, width, layers, pixels, pixels of a patch) -> the name that the authors' code makes it from
    ("siglip_vision_model", 1152, 26, 384, 14): "google/siglip-so400m-patch14-384",
    ("clip_vision_model", 1024, 24, 336, 14): "openai/clip-vit-large-patch14-336",
    ("clip_vision_model", 1024, 24, 224, 14): "openai/clip-vit-large-patch14",
}
_CONNECTION = {
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,  # read as true where it is missing
    "use_mm_proj": True,
    "tune_mm_mlp_adapter": False,
    "freeze_mm_mlp_adapter": False,
    "unfreeze_mm_vision_tower": True,  # without it the authors' towers load their published weights in place of the file's
}


def port_settings(config: PretrainedConfig, folder: Path, pads_images: bool) -> dict[str, Any]:
    """Of a model in Hugging Face's layout; its vocabulary without the rows that the hub ports added.

    Args:
        config: of the folder. pads_images: whether its image processor pads images to squares.

    Raises:
        InputError: the authors' code has no such model.
    """
    text, vision = config.text_config, config.vision_config
    architectures = {kind: name for name, kind in TEXT_MODELS.items()}
    if text.model_type not in architectures or config.model_type not in ("llava", "llava_next", "llava_onevision"):
        raise InputError(f"{folder}: model_type {config.model_type!r} on {text.model_type!r} has no form in the authors' layout")
    tower, is_clip = _TOWERS.get(_geometry(vision)), vision.model_type == "clip_vision_model"
    if tower is None:
        raise InputError(f"{folder}: the authors' code makes its vision tower from a name, and knows none of {_geometry(vision)}; expected {list(_TOWERS)}")
    takes_class = is_clip and config.vision_feature_select_strategy == "full"
    return _text_settings(text) | {
        "architectures": [architectures[text.model_type]],
        "model_type": _MODEL_TYPES[text.model_type],
        "tie_word_embeddings": bool(config.get_text_config().tie_word_embeddings),
        "torch_dtype": str(config.dtype or torch.float16).removeprefix("torch."),
        **_CONNECTION,
        "mm_vision_tower": tower,
        "mm_hidden_size": vision.hidden_size,
        "mm_vision_select_layer": config.vision_feature_layer if is_clip else -2,
        "mm_vision_select_feature": "cls_patch" if takes_class else "patch",
        **_image_settings(config, pads_images),
    }


def _geometry(vision: PretrainedConfig) -> tuple[Any, ...]:
    return vision.model_type, vision.hidden_size, vision.num_hidden_layers, vision.image_size, vision.patch_size


def _text_settings(text: PretrainedConfig) -> dict[str, Any]:
    names = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps"]
    names += ["hidden_act", "initializer_range", "attention_dropout", "bos_token_id", "eos_token_id", "use_cache", "vocab_size"]
    values = text.to_dict()
    settings = {name: values[name] for name in names if values.get(name) is not None}
    if settings["vocab_size"] - ROWS_ADDED in VOCABULARIES:
        settings["vocab_size"] -= ROWS_ADDED
    if text.model_type == "mistral":
        settings["sliding_window"] = values["sliding_window"]  # also where it has none: what is missing is read as 4096
    rope = {name: value for name, value in text.rope_parameters.items() if value is not None}
    settings["rope_theta"], kind = rope.pop("rope_theta"), rope.pop("rope_type", "default")
    if kind in ("linear", "dynamic"):
        settings["rope_scaling"] = {"type": kind, "factor": rope["factor"]}  # as versions from before "rope_type" read it, which take no other key
    elif kind != "default":
        settings["rope_scaling"] = {"rope_type": kind, **rope}
    return settings


def _image_settings(config: PretrainedConfig, pads_images: bool) -> dict[str, Any]:
    """How images are cut, and how their features are put together."""
    if config.model_type == "llava":
        return {"image_aspect_ratio": "pad" if pads_images else "square", "mm_patch_merge_type": "flat"}
    tiles = {"mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": config.image_grid_pinpoints}
    if config.model_type == "llava_next":
        return tiles | {"image_aspect_ratio": "anyres"}
    videos = {"mm_spatial_pool_mode": "bilinear", "mm_newline_position": "one_token"}  # of a video's frames, and one newline behind all of them
    return tiles | videos | {"image_aspect_ratio": config.vision_aspect_ratio}


def bare_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of a language model alone, as LLaVA-1.5 begins: with a tower and a projector that has learned nothing.

    Args:
        settings: the language model's config.json.
    """
    name = LANGUAGE_MODELS[architecture(settings)]
    layer = {"mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "image_aspect_ratio": "pad", "mm_patch_merge_type": "flat"}
    return {**settings, **_CONNECTION, **layer, "architectures": [name], "model_type": _MODEL_TYPES[TEXT_MODELS[name]]}


def tower_settings(vision: PretrainedConfig, place: str) -> dict[str, Any]:
    """Where the authors' code gets the tower's geometry from: its published name, else the last part of where it was found, which may be a folder here."""
    return {"mm_vision_tower": _TOWERS.get(_geometry(vision)) or (Path(place).name if Path(place).is_dir() else place), "mm_hidden_size": vision.hidden_size}
