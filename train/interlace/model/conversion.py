"""A model's folder from its authors' layout, or PaddleMIX's, to Hugging Face's, and back; weights go through file by file."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from interlace.errors import InputError
from interlace.files import whole_or_not_at_all
from interlace.model.layouts import EMBEDDINGS, HEAD, NAMES, ROWS_ADDED, TEXT_MODELS, hub_name, original_name
from interlace.model.loading import load_config, load_processing, local_folder, original_of
from interlace.model.original import KEPT_SETTINGS, KEPT_WEIGHTS, keep_aside
from interlace.model.saving import LICENCE_FILES, copy_files, save_config, save_processing
from interlace.model.weight_files import StoredTensor, safetensors_of, stored_tensors, write_sharded

Progress = Callable[[Iterable[Any]], Iterable[Any]]
_VOCABULARIES = (151936, 152064, 32000)  # of Qwen1.5 and Qwen2, LLaMA and Mistral
_TOWERS = {  # geometry (kind, width, layers, pixels, pixels of a patch) -> the name that the authors' code makes it from
    ("siglip_vision_model", 1152, 26, 384, 14): "google/siglip-so400m-patch14-384",
    ("clip_vision_model", 1024, 24, 336, 14): "openai/clip-vit-large-patch14-336",
}
_TOKENIZER_FILES = ("tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json", "generation_config.json")


def to_hub(source: str, output_dir: Path, vision_tower: str | None = None, progress: Progress = iter) -> None:
    """Writes a model of the authors' layout as the hub ports are written, with processor and chat template.

    Args:
        source: a folder or a hub id. vision_tower: see `open_original`. progress: wraps the files on their way.

    Raises:
        InputError: it is in another layout, or `open_original` refuses it.
    """
    folder = local_folder(source)
    original = original_of(source, vision_tower)
    if original is None:
        wanted = f"its authors' (config.json with {', '.join(TEXT_MODELS)}), or a language model and --vision-tower"
        raise InputError(f"{source} is in Hugging Face's layout already; expected {wanted}")
    with whole_or_not_at_all(output_dir) as scratch:
        write_sharded(original.tensors, scratch, progress)
        save_config(original.config, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[original.config.model_type], scratch)
        original.tokenizer.save_pretrained(scratch)
        original.image_processor().save_pretrained(scratch)
        save_processing(load_processing(str(scratch)), scratch)
        keep_aside(original, scratch)
        copy_files(folder, scratch, LICENCE_FILES)


def to_original(source: str, output_dir: Path, progress: Progress = iter) -> None:
    """Writes a model of Hugging Face's layout as its authors' code reads it.

    Raises:
        InputError: see `original_form`.
    """
    folder = local_folder(source)
    if original_of(source) is not None:
        raise InputError(f"{source} is in its authors' layout already; expected Hugging Face's")
    config, image_processor = load_config(source), load_processing(source).image_processor
    tensors, settings = original_form(folder, config, bool(getattr(image_processor, "do_pad", False)))
    with whole_or_not_at_all(output_dir) as scratch:
        write_sharded(tensors, scratch, progress)
        (scratch / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        copy_files(folder, scratch, (*_TOKENIZER_FILES, *LICENCE_FILES))


def original_form(folder: Path, config: PretrainedConfig, pads_images: bool) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    """Weights and config.json of a folder in Hugging Face's layout, as its authors' code reads them.

    Args:
        config: of the folder. pads_images: whether its image processor pads images to squares.

    Raises:
        InputError: weights are missing, or the model has no form in that layout.
    """
    tensors = {original_name(hub_name(name)): tensor for name, tensor in stored_tensors(folder).items()}
    kept = folder / KEPT_SETTINGS
    settings = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else _settings(config, folder, pads_images)
    if (folder / KEPT_WEIGHTS).is_file():
        tensors |= safetensors_of(folder / KEPT_WEIGHTS)
    rows = settings["vocab_size"]
    for name in (original_name(name) for name in (EMBEDDINGS, HEAD)):
        if name in tensors and tensors[name].shape[0] < rows:
            raise InputError(f"{folder}: {name} has {tensors[name].shape[0]} rows; expected {rows} at least")
        if name in tensors:
            tensors[name] = tensors[name].changed((rows, tensors[name].shape[1]), lambda values: values[:rows])
    unknown = [name for name in tensors if not name.startswith(tuple(start for start, _ in NAMES))]
    if unknown:
        raise InputError(f"{folder}: {len(unknown)} weights have no place in that layout, {unknown[0]!r} among them; merge an adapter first")
    return tensors, settings


def _settings(config: PretrainedConfig, folder: Path, pads_images: bool) -> dict[str, Any]:
    """A config.json for a model that never had one: the ports' vocabulary without the rows they added."""
    text, vision = config.text_config, config.vision_config
    architectures = {kind: name for name, kind in TEXT_MODELS.items()}
    if text.model_type not in architectures or config.model_type not in ("llava", "llava_next", "llava_onevision"):
        raise InputError(f"{folder}: model_type {config.model_type!r} on {text.model_type!r} has no form in the authors' layout")
    geometry = (vision.model_type, vision.hidden_size, vision.num_hidden_layers, vision.image_size, vision.patch_size)
    if geometry not in _TOWERS:
        raise InputError(f"{folder}: the authors' code makes its vision tower from a name, and knows none of {geometry}; expected {list(_TOWERS)}")
    kept = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps"]
    kept += ["hidden_act", "initializer_range", "attention_dropout", "bos_token_id", "eos_token_id", "use_cache", "vocab_size"]
    settings = {name: getattr(text, name) for name in kept if getattr(text, name, None) is not None}
    settings["rope_theta"] = text.rope_parameters["rope_theta"]
    if settings["vocab_size"] - ROWS_ADDED in _VOCABULARIES:
        settings["vocab_size"] -= ROWS_ADDED
    tiles = {"llava": "pad" if pads_images else "square", "llava_next": "anyres", "llava_onevision": getattr(config, "vision_aspect_ratio", "")}
    return settings | {
        "architectures": [architectures[text.model_type]],
        "model_type": {"qwen2": "llava_qwen", "llama": "llava_llama", "mistral": "llava_mistral"}[text.model_type],
        "tie_word_embeddings": bool(config.get_text_config().tie_word_embeddings),
        "torch_dtype": str(config.dtype or torch.float16).removeprefix("torch."),
        "mm_vision_tower": _TOWERS[geometry],
        "mm_hidden_size": vision.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": config.vision_feature_layer if vision.model_type == "clip_vision_model" else -2,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "flat" if config.model_type == "llava" else "spatial_unpad",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "image_aspect_ratio": tiles[config.model_type],
        "image_grid_pinpoints": getattr(config, "image_grid_pinpoints", None),
    }
