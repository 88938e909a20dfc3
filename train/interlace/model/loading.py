"""Models, tokenizers and image processors: loading what users have, in whichever layout."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HfHubHTTPError, StrictDataclassError
from peft import PeftModel
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from interlace.data import demo
from interlace.data.template import ChatTemplate, LabelPolicy
from interlace.errors import InputError
from interlace.model.adapters import ADAPTER_CONFIG, PROCESSING_FILES, PROCESSOR_FILE, load_adapter, own_processing, read_adapter_config
from interlace.model.families import FAMILIES, Family, family_of
from interlace.model.hub import file_of, local_folder
from interlace.model.layouts import hub_name, is_language_model, is_original, memory_name, read_settings
from interlace.model.original import Original, open_original
from interlace.model.processing import Processing, contradictions
from interlace.model.prompts import difference, prompt_settings, published_template, style_of
from interlace.model.weight_files import StoredTensor, fingerprint, stored_tensors

IMAGE_BACKEND = "pil"  # one backend for training and inference: torchvision's resizing gives other pixels
BASE_FILE = "base_model.json"  # what an adapter was trained on
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


def resolve_model_path(name: str) -> str:
    """A local directory's absolute path, the embedded model for "demo", or a hub id as it is.

    Raises:
        InputError: looks like a path and is no directory with a model in it.
    """
    if name == "demo":
        return str(demo.MODEL)
    path = Path(name)
    if path.is_dir():
        if not any((path / file).is_file() for file in ("config.json", ADAPTER_CONFIG)):
            raise InputError(f"{name}: neither config.json nor {ADAPTER_CONFIG} in this folder; expected a model that transformers or PEFT saved")
        return str(path.resolve())
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise InputError(f'{name}: no such model folder; expected a local folder, a hub id (owner/name) or "demo"')
    return name


def base_of(path: str) -> str:
    """The base model of an adapter directory, or `path` itself where there is no adapter."""
    if not (Path(path) / ADAPTER_CONFIG).is_file():
        return path
    base = read_adapter_config(path).base_model_name_or_path
    if not base:
        raise InputError(f"{path}: {ADAPTER_CONFIG} names no base model")
    return resolve_model_path(base)


def original_of(path: str, vision_tower: str | None = None) -> Original | None:
    """A model in its authors' layout, from a folder or the hub; None for Hugging Face's layout, and where nothing can be found.

    Args:
        vision_tower: see `open_original`; with it, a language model alone will do, too.

    Raises:
        InputError: see `open_original`.
    """
    config_file = file_of(path, "config.json")
    settings = {} if config_file is None else read_settings(config_file)
    is_wanted = is_original(settings) or (vision_tower is not None and is_language_model(settings))
    return open_original(local_folder(path), vision_tower) if is_wanted else None


def load_config(path: str, trust_remote_code: bool = False, image_aspect_ratio: str | None = None) -> PretrainedConfig:
    """The configuration of a model, or of an adapter's base.

    Args:
        image_aspect_ratio: how images are cut into tiles by a model that does so; None takes what the adapter was trained with, else the model's own.

    Raises:
        InputError: it cannot be had, the model is of an unknown family, or cannot take images in this way.
    """
    base = base_of(path)
    original = original_of(base)
    try:
        config = copy.deepcopy(original.config) if original else AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise InputError(f"{path}: the model's configuration cannot be loaded: {' '.join(str(error).split())}") from error
    family, trained = family_of(config), Path(path) / PROCESSOR_FILE
    if image_aspect_ratio is None and base != path and trained.is_file():
        image_aspect_ratio = json.loads(trained.read_text(encoding="utf-8")).get("vision_aspect_ratio")
    try:
        family.check(config, image_aspect_ratio)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return config


def load_processing(
    path: str,
    system_prompt: str | None = None,
    label_policy: LabelPolicy = "assistant",
    trust_remote_code: bool = False,
    image_aspect_ratio: str | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    **prompt: Any,
) -> Processing:
    """Tokenizer, image processor and template of a model or adapter directory; of its base where the adapter's has none of its own.

    Args:
        system_prompt: None takes the one the model was trained with by Interlace, else the style's own.
        image_aspect_ratio: how images become the model's size or its tiles; None leaves it to what comes with the model.
        min_pixels, max_pixels: of an image of any shape; None as for the aspect ratio.
        prompt: prompt_style, image_placement, image_placement_ratio, newline_after_image, form; None as for the system prompt.

    Raises:
        InputError: files are missing, the tokenizer does not fit, or the model cannot take images in this way.
    """
    config, base = load_config(path, trust_remote_code, image_aspect_ratio), base_of(path)
    own, remote = own_processing(path), {"trust_remote_code": trust_remote_code}
    words, pictures = (path if base == path or part in own else base for part in ("tokenizer", "image processor"))
    original = original_of(base) if base in (words, pictures) else None
    try:
        tokenizer = original.tokenizer if original and words == base else AutoTokenizer.from_pretrained(words, **remote)
        if original and pictures == base:
            image_processor = original.image_processor()
        else:
            image_processor = AutoImageProcessor.from_pretrained(pictures, backend=IMAGE_BACKEND, **remote)
        published = published_template(words, tokenizer)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: tokenizer or image processor cannot be loaded: {error}") from error
    family = family_of(config)
    prompt, is_guessed = prompt_settings(words, prompt | {"system_prompt": system_prompt}, family, style_of(tokenizer, config, published))
    try:
        image_processor = family.image_processor(image_processor, config, image_aspect_ratio)
        images = family.images(config, image_processor, tokenizer)
        images.bound(min_pixels, max_pixels)
        prompt |= {"image_text": images.text, "video_token_id": images.video_token_id}
        template = ChatTemplate(tokenizer, config.image_token_id, label_policy=label_policy, **prompt)
        _check_style(template, family, config)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    borrowed = [part for part in PROCESSING_FILES if base != path and part not in own]
    notes = [f"{path} has no {' and no '.join(borrowed)} of its own; taken from its base, {base}"] if borrowed else []
    file = file_of(path, PROCESSOR_FILE)
    notes += [] if file is None else [f"{path}: {PROCESSOR_FILE} {found}" for found in contradictions(json.loads(file.read_text(encoding="utf-8")), config)]
    notes += list(filter(None, [difference(template, published) if is_guessed else ""]))
    return Processing(tokenizer, image_processor, template, config, tuple(notes))


def _check_style(template: ChatTemplate, family: Family, config: PretrainedConfig) -> None:
    """Gemma's style writes the line breaks around an image that Gemma's processor writes, and no other processor does.

    Raises:
        InputError: one goes without the other.
    """
    style = template.style.name
    if "gemma" in (style, family.prompt_style) and style != family.prompt_style:
        reason = "it writes line breaks around an image, as Gemma's own processor does and no other; what is saved would be asked in another form"
        wanted = "expected gemma" if family.prompt_style == "gemma" else "leave prompt_style out"
        raise InputError(f"prompt_style {style} does not go with model_type {config.model_type!r}: of prompt_style gemma alone, {reason}; {wanted}")


def quantization(load_in_4bit: bool, load_in_8bit: bool, compute_dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """The bitsandbytes settings of QLoRA (NF4, double quantization; arXiv 2305.14314), of 8 bits, or None."""
    if not (load_in_4bit or load_in_8bit):
        return None
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise InputError('load_in_4bit and load_in_8bit need bitsandbytes: pip install -e ".[quantization]"') from None
    if load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute_dtype)


def load_model(
    path: str,
    dtype: torch.dtype | str,
    quantization_config: BitsAndBytesConfig | None = None,
    trust_remote_code: bool = False,
    image_aspect_ratio: str | None = None,
) -> PreTrainedModel:
    """A model, or an adapter's base, with its weights in `dtype` ("auto": as they are stored).

    Args:
        quantization_config: of the language model; vision tower, projector and `lm_head` stay whole.
        image_aspect_ratio: see `load_config`.

    Raises:
        InputError: the weights cannot be had or do not fit the configuration.
    """
    config, base = load_config(path, trust_remote_code, image_aspect_ratio), base_of(path)
    if quantization_config is not None:
        family = family_of(config)
        quantization_config = copy.deepcopy(quantization_config)
        quantization_config.llm_int8_skip_modules = [*(f"model.{name}" for name in (family.vision_tower, *family.projector)), "lm_head"]
    settings = {"config": config, "dtype": dtype, "quantization_config": quantization_config, "output_loading_info": True, "ignore_mismatched_sizes": True}
    original = original_of(base)
    if original is None and Path(base).is_dir():
        stored_tensors(Path(base))  # names the file that is missing or broken; of safetensors it reads headers
    try:
        if original is None:
            loaded: Any = AutoModelForImageTextToText.from_pretrained(base, trust_remote_code=trust_remote_code, **settings)
        else:
            weights = {memory_name(name): tensor.load() for name, tensor in original.tensors.items()}
            kind: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
            loaded = kind.from_pretrained(None, state_dict=weights, **settings)
            loaded[0].name_or_path = base
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{path}: the weights cannot be loaded: {error}") from error
    model, report = loaded
    generation = model.generation_config if original is None else generation_settings(original.folder)
    model.generation_config = sound_generation(generation or model.generation_config)
    _check_complete(path, model, report)
    return model


def generation_settings(folder: Path) -> GenerationConfig | None:
    """How a model generates, if its folder says so.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        return GenerationConfig.from_pretrained(folder) if (folder / "generation_config.json").is_file() else None
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / 'generation_config.json'} cannot be read: {error}; fetch it once more") from None


def sound_generation(settings: GenerationConfig) -> GenerationConfig:
    """How a model generates, without how it would sample if it did, as LLaVA-1.5's file has it: transformers reads that, and then refuses to save the model."""
    if not settings.do_sample:
        for name in _SAMPLING:
            setattr(settings, name, None)
    return settings


def _check_complete(path: str, model: PreTrainedModel, report: Mapping[str, Any]) -> None:
    """Holds what was loaded against the configuration; a tower may have more than is used of it (a head, layers behind the selected one).

    Raises:
        InputError: weights are missing, have another shape, or would be left out of the language model.
    """
    language_model = f"model.{family_of(model.config).language_model}.layers."
    left_out = sorted(name for name in report["unexpected_keys"] if name.startswith(language_model) and not name.endswith("rotary_emb.inv_freq"))
    contradiction = "config.json is of another model than the weights; fetch both once more"
    if report["mismatched_keys"]:
        name, stored, expected = sorted(report["mismatched_keys"])[0]
        count = len(report["mismatched_keys"])
        raise InputError(f"{path}: {name} is {list(stored)} in the file and {list(expected)} by config.json ({count} weights differ); {contradiction}")
    if report["missing_keys"]:
        name = sorted(report["missing_keys"])[0]
        raise InputError(f"{path}: {len(report['missing_keys'])} weights that config.json asks for are missing, {name} among them; {contradiction}")
    if left_out:
        raise InputError(f"{path}: {len(left_out)} weights have no place in the model of config.json, {left_out[0]} among them; {contradiction}")


def weights_fingerprint(path: str) -> str:
    """A hash of the beginnings of all weights of a model, the same in whichever layout it lies; "" where they cannot be read."""
    original = original_of(path)
    try:
        tensors = original.tensors if original else _named_as_on_hub(path)
        return fingerprint(tensors)
    except (InputError, OSError, HfHubHTTPError):
        return ""


def _named_as_on_hub(path: str) -> dict[str, StoredTensor]:
    folder = local_folder(path, may_fetch=False)
    model_type = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    layout = FAMILIES[model_type].layout if model_type in FAMILIES else ()
    return {hub_name(name, layout): tensor for name, tensor in stored_tensors(folder).items()}


def check_base(adapter_path: str, base: str | None = None) -> None:
    """Holds an adapter against the weights that it was trained on.

    Args:
        base: the model that it is to go on; None for the one that it names.

    Raises:
        InputError: the base model's weights are others.
    """
    kept = Path(adapter_path) / BASE_FILE
    if not kept.is_file():
        return
    base = base or base_of(adapter_path)
    trained, found = json.loads(kept.read_text(encoding="utf-8"))["weights_fingerprint"], weights_fingerprint(base)
    if trained and found and trained != found:
        raise InputError(f"{adapter_path} was trained on other weights than those of {base} (fingerprints {trained[:8]} and {found[:8]}); give it its own base")


def load_for_inference(path: str, dtype: torch.dtype, quantization_config: BitsAndBytesConfig | None = None) -> PreTrainedModel | PeftModel:
    """A model, or an adapter on its base, ready for `generate`."""
    path = resolve_model_path(path)
    model = load_model(path, dtype, quantization_config)
    if (Path(path) / ADAPTER_CONFIG).is_file():
        check_base(path)
        return load_adapter(model, path).eval()
    return model.eval()
