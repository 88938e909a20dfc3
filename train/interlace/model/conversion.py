"""A model's folder from its authors' layout, or PaddleMIX's, to Hugging Face's, and back; weights go through file by file."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from interlace.errors import InputError
from interlace.files import whole_or_not_at_all
from interlace.model.hub import local_folder
from interlace.model.kept import keep_aside, kept_settings, kept_weights
from interlace.model.layouts import EMBEDDINGS, HEAD, NAMES, TEXT_MODELS, architecture, hub_name, is_language_model, original_name, read_settings
from interlace.model.loading import ADAPTER_CONFIG, generation_settings, load_config, load_processing, original_of, sound_generation
from interlace.model.original_settings import port_settings
from interlace.model.original_tokenizer import write_tokenizer
from interlace.model.saving import LICENCE_FILES, copy_files, save_config, save_processing
from interlace.model.weight_files import StoredTensor, stored_tensors, write_sharded

Progress = Callable[[Iterable[Any]], Iterable[Any]]


def to_hub(source: str, output_dir: Path, vision_tower: str | None = None, progress: Progress = iter) -> None:
    """Writes a model of the authors' layout as the hub ports are written, with processor and chat template.

    Args:
        source: a folder or a hub id. vision_tower: see `open_original`. progress: wraps the files on their way.

    Raises:
        InputError: it is in another layout, or `open_original` refuses it.
    """
    folder = whole_model(source)
    original = original_of(source, vision_tower)
    if original is None:
        raise InputError(f"{source} {_what_it_is(folder)}; expected its authors' layout: a config.json with {', '.join(TEXT_MODELS)}")
    with whole_or_not_at_all(output_dir) as scratch:
        write_sharded(original.tensors, scratch, progress)
        save_config(original.config, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[original.config.model_type], scratch)
        original.tokenizer.save_pretrained(scratch)
        original.image_processor().save_pretrained(scratch)
        save_processing(load_processing(str(scratch)), scratch)
        keep_aside(original, scratch)
        copy_files(folder, scratch, LICENCE_FILES)
        if generation := generation_settings(folder):
            sound_generation(generation).save_pretrained(scratch)


def to_original(source: str, output_dir: Path, progress: Progress = iter) -> list[str]:
    """Writes a model of Hugging Face's layout as its authors' code reads it; returns what is to be known about it.

    Raises:
        InputError: see `original_form`.
    """
    folder = whole_model(source)
    if original_of(source) is not None:
        raise InputError(f"{source} is in its authors' layout already; expected Hugging Face's")
    config, image_processor = load_config(source), load_processing(source).image_processor
    tensors, settings = original_form(folder, config, bool(getattr(image_processor, "do_pad", False)))
    with whole_or_not_at_all(output_dir) as scratch:
        write_sharded(tensors, scratch, progress)
        (scratch / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        copy_files(folder, scratch, LICENCE_FILES)
        return write_tokenizer(folder, scratch)


def whole_model(source: str) -> Path:
    """The folder of a model that is no adapter.

    Raises:
        InputError: it is one, or cannot be had.
    """
    folder = local_folder(source)
    if (folder / ADAPTER_CONFIG).is_file():
        raise InputError(f"{source} is an adapter; merge it first: python train/merge_adapter.py --adapter-path {source} --output-dir MERGED")
    return folder


def _what_it_is(folder: Path) -> str:
    """Of a model that is not in its authors' layout."""
    settings = read_settings(folder / "config.json")
    if is_language_model(settings):
        return "is a language model alone, which becomes a LLaVA with --vision-tower"
    if architecture(settings) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values():
        return "is in Hugging Face's layout already"
    return f"is a {architecture(settings) or settings.get('model_type')}, which Interlace does not know"


def original_form(folder: Path, config: PretrainedConfig, pads_images: bool) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    """Weights and config.json of a folder in Hugging Face's layout, as its authors' code reads them.

    Args:
        config: of the folder. pads_images: whether its image processor pads images to squares.

    Raises:
        InputError: weights are missing, or the model has no form in that layout.
    """
    stored = {hub_name(name): tensor for name, tensor in stored_tensors(folder).items()}
    settings = kept_settings(folder, stored) or port_settings(config, folder, pads_images)
    tensors = {original_name(name): tensor for name, tensor in stored.items()} | kept_weights(folder)
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
