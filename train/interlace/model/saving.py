"""Models, tokenizers and image processors: saving what everybody can read."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from transformers import PretrainedConfig, PreTrainedModel

from interlace.data.vicuna import SentencePieceStyle
from interlace.files import set_default_mode, write_json
from interlace.model.adapters import PROCESSOR_FILE
from interlace.model.families import family_of
from interlace.model.hub import local_folder
from interlace.model.kept import KEPT, hand_on, keep_aside
from interlace.model.layouts import hub_name
from interlace.model.loading import original_of
from interlace.model.processing import Processing
from interlace.model.prompts import PROMPT_FILE

LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


def save_processing(processing: Processing, folder: Path) -> None:
    """Writes tokenizer, image processor, processor and the chat template that was trained."""
    tokenizer, processor = processing.tokenizer, processing.processor_settings()
    tokenizer.chat_template = processing.template.jinja()
    tokenizer.save_pretrained(folder)
    # The image processor stands in preprocessor_config.json, where every version reads it; transformers 4 stops at a copy in processor_config.json
    processing.image_processor.save_pretrained(folder)
    write_json(folder / PROCESSOR_FILE, dict(sorted(processor.items())))
    write_json(folder / PROMPT_FILE, processing.template.settings)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    extra = settings.pop("extra_special_tokens", None)  # transformers 4 wants a mapping here and stops at a list
    if isinstance(extra, dict) and extra:
        settings["extra_special_tokens"] = extra
    elif extra:
        settings["additional_special_tokens"] = extra
    named = settings.get("model_specific_special_tokens")  # such as `boi_token`, by which a processor asks; the mapping that transformers 4 reads
    if named:
        settings["extra_special_tokens"] = named
    for name in ("is_local", "local_files_only"):  # how it was loaded here is nobody's business
        settings.pop(name, None)
    if isinstance(processing.template.style, SentencePieceStyle) and processing.template.style.begins_every_text:
        settings["legacy"] = True  # transformers 5 leaves it out, and reads the folder as another tokenizer
    if settings.get("tokenizer_class") in (None, "TokenizersBackend"):
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        settings.setdefault("model_input_names", tokenizer.model_input_names)  # else transformers 4 gives the model token types as well
    settings["processor_class"] = processor["processor_class"]
    write_json(folder / "tokenizer_config.json", dict(sorted(settings.items())))


def save_model(model: PreTrainedModel, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
    """Writes a complete model in the layout of the hub ports, readable by older transformers and by serving tools.

    Args:
        weights: in place of the model's own, by the same names.
    """
    layout = family_of(model.config).layout
    state = {hub_name(name, layout): tensor.contiguous() for name, tensor in (weights or model.state_dict()).items()}
    if model.config.tie_word_embeddings:  # of the whole, not of its language model: what transformers goes by
        state.pop(hub_name("lm_head.weight", layout), None)
    save_torch_state_dict(state, folder, max_shard_size="5GB")
    for file in folder.glob("model*.safetensors"):
        set_default_mode(file)
    model.generation_config.save_pretrained(folder)
    save_config(model.config, type(model).__name__, folder)


def save_config(config: PretrainedConfig, architecture: str, folder: Path) -> None:
    """Writes config.json, readable by older transformers."""
    config.save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = settings["text_config"]
    if "rope_parameters" in text:
        rope = dict(text["rope_parameters"])
        if "sliding_attention" in rope:  # one of each kind of layer, of which older versions know the period
            text["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
            text["sliding_window_pattern"] = [*text["layer_types"], "full_attention"].index("full_attention") + 1
            rope = dict(rope["full_attention"])
        text["rope_theta"] = rope.pop("rope_theta")  # older versions read it here, and take 10000 without a word
        text |= {} if rope == {"rope_type": "default"} else {"rope_scaling": rope}
    if "tie_word_embeddings" in settings:
        text.setdefault("tie_word_embeddings", settings["tie_word_embeddings"])
    if family_of(config).has_flat_config:
        settings = {**{name: value for name, value in settings.pop("text_config").items() if name != "model_type"}, **settings}
    settings.setdefault("architectures", [architecture])
    write_json(folder / "config.json", settings)


def copy_beside(path: str, folder: Path) -> None:
    """Copies what belongs to a base model beside its weights: licence and notice files, and what its authors' layout has more than the hub's."""
    original = original_of(path)
    wanted = [*LICENCE_FILES, f"{KEPT}/*", "tokenizer.model", "video_preprocessor_config.json"]  # of a hub id, loading has fetched what it needs and no more
    source = local_folder(path, patterns=wanted) if original is None else original.folder
    copy_files(source, folder, LICENCE_FILES)
    if original is None:
        copy_files(source, folder, ("video_preprocessor_config.json",))
        hand_on(source, folder)
    else:
        keep_aside(original, folder)


def copy_files(source: Path, folder: Path, patterns: Sequence[str]) -> None:
    """Copies the files whose names match, if there are any."""
    for pattern in patterns:
        for file in source.glob(pattern):
            shutil.copyfile(file, folder / file.name)  # not its mode
