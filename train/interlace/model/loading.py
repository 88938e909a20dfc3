"""Models, tokenizers and image processors: loading what users have, saving what everybody can read."""

import copy
import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, save_torch_state_dict, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from interlace.data import demo
from interlace.data.template import ChatTemplate, LabelPolicy
from interlace.data.vicuna import SentencePieceStyle
from interlace.errors import InputError
from interlace.model.families import FAMILIES, Family, family_of
from interlace.model.layouts import hub_name, is_language_model, is_original, memory_name
from interlace.model.original import KEPT_SETTINGS, KEPT_WEIGHTS, Original, keep_aside, open_original
from interlace.model.processing import Processing
from interlace.model.weight_files import StoredTensor, stored_tensors

IMAGE_BACKEND = "pil"  # one backend for training and inference: torchvision's resizing gives other pixels
PROMPT_FILE = "prompt.json"  # what the saved model was trained with: system prompt
PROCESSOR_FILE = "processor_config.json"
ADAPTER_CONFIG = "adapter_config.json"
BASE_FILE = "base_model.json"  # what an adapter was trained on
OTHER_WEIGHTS = ["*.onnx", "*.gguf", "*.msgpack", "*.h5", "*.pth", "original/*"]  # of no use here, though the hub may have them
LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


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
    base = PeftConfig.from_pretrained(path).base_model_name_or_path
    if not base:
        raise InputError(f"{path}: {ADAPTER_CONFIG} names no base model")
    return resolve_model_path(base)


def local_folder(path: str, may_fetch: bool = True) -> Path:
    """The folder of a model: itself, or where the hub's files are kept, fetched first if need be.

    Raises:
        OSError: nothing is kept, and nothing may or can be fetched.
    """
    return Path(path) if Path(path).is_dir() else Path(snapshot_download(path, local_files_only=not may_fetch, ignore_patterns=OTHER_WEIGHTS))


def original_of(path: str, vision_tower: str | None = None) -> Original | None:
    """A model in its authors' layout, from a folder or the hub; None for Hugging Face's layout, and where nothing can be found.

    Args:
        vision_tower: see `open_original`; with it, a language model alone will do, too.

    Raises:
        InputError: see `open_original`.
    """
    try:
        config_file = Path(path) / "config.json" if Path(path).is_dir() else Path(hf_hub_download(path, "config.json"))
        settings = json.loads(config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError, HfHubHTTPError):
        return None
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
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: the model's configuration cannot be loaded: {error}") from error
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
    **prompt: Any,
) -> Processing:
    """Tokenizer, image processor and template of a model or adapter directory.

    Args:
        system_prompt: None takes the one the model was trained with by Interlace, else the style's own.
        image_aspect_ratio: how images become the model's size or its tiles; None leaves it to what comes with the model.
        prompt: prompt_style, image_placement, image_placement_ratio, newline_after_image, form; None as for the system prompt.

    Raises:
        InputError: files are missing, the tokenizer does not fit, or the model cannot take images in this way.
    """
    config = load_config(path, trust_remote_code, image_aspect_ratio)
    original = None if (Path(path) / ADAPTER_CONFIG).is_file() else original_of(path)
    try:
        if original is not None:
            tokenizer, image_processor = original.tokenizer, original.image_processor()
        else:
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
            image_processor = AutoImageProcessor.from_pretrained(path, backend=IMAGE_BACKEND, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: tokenizer or image processor cannot be loaded: {error}") from error
    family = family_of(config)
    prompt = _prompt_settings(Path(path), prompt | {"system_prompt": system_prompt}, tokenizer, family)
    try:
        image_processor = family.image_processor(image_processor, config, image_aspect_ratio)
        image_text = family.images(config, image_processor, tokenizer).text
        template = ChatTemplate(tokenizer, config.image_token_id, label_policy=label_policy, image_text=image_text, **prompt)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    return Processing(tokenizer, image_processor, template, config)


def _prompt_settings(folder: Path, chosen: dict[str, Any], tokenizer: PreTrainedTokenizerBase, family: Family) -> dict[str, Any]:
    """What was chosen, else what the model in this folder was trained with, else what its tokenizer and family were made for."""
    chosen = {name: value for name, value in chosen.items() if value is not None}
    kept = json.loads((folder / PROMPT_FILE).read_text(encoding="utf-8")) if (folder / PROMPT_FILE).is_file() else {}
    if "form" in chosen or ("prompt_style" in chosen and chosen["prompt_style"] != kept.get("prompt_style")):
        kept = {name: value for name, value in kept.items() if name not in ("prompt_style", "system_prompt", "form")}  # each style has its own
    style = family.prompt_style or ("chatml" if "<|im_start|>" in tokenizer.get_vocab() else "vicuna_v1")
    own = {} if family.system_prompt is None or "form" in chosen else {"system_prompt": family.system_prompt}
    return {"prompt_style": style, **own, **kept, **chosen}


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
    original, settings = original_of(base), {"config": config, "dtype": dtype, "quantization_config": quantization_config, "output_loading_info": True}
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
    if report["missing_keys"]:
        raise InputError(f"{path}: {len(report['missing_keys'])} weights are missing, {sorted(report['missing_keys'])[0]} among them")
    return model


def weights_fingerprint(path: str) -> str:
    """A hash of the beginnings of all weights of a model, the same in whichever layout it lies; "" where they cannot be read."""
    original = original_of(path)
    try:
        tensors = original.tensors if original else _named_as_on_hub(path)
        content = hashlib.sha256()
        for name in sorted(tensors):
            content.update(name.encode() + tensors[name].first.float().numpy().tobytes())
    except (InputError, OSError, HfHubHTTPError):
        return ""
    return content.hexdigest()[:32]


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
        return PeftModel.from_pretrained(model, path).eval()
    return model.eval()


def save_processing(processing: Processing, folder: Path) -> None:
    """Writes tokenizer, image processor, processor and the chat template that was trained."""
    tokenizer, processor = processing.tokenizer, processing.processor_settings()
    tokenizer.chat_template = processing.template.jinja()
    tokenizer.save_pretrained(folder)
    # The image processor stands in preprocessor_config.json, where every version reads it; transformers 4 stops at a copy in processor_config.json
    processing.image_processor.save_pretrained(folder)
    _write_json(folder / PROCESSOR_FILE, dict(sorted(processor.items())))
    _write_json(folder / PROMPT_FILE, processing.template.settings)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    extra = settings.pop("extra_special_tokens", None)  # transformers 4 wants a mapping here and stops at a list
    if isinstance(extra, dict) and extra:
        settings["extra_special_tokens"] = extra
    elif extra:
        settings["additional_special_tokens"] = extra
    for name in ("is_local", "local_files_only"):  # how it was loaded here is nobody's business
        settings.pop(name, None)
    if isinstance(processing.template.style, SentencePieceStyle) and processing.template.style.begins_every_text:
        settings["legacy"] = True  # transformers 5 leaves it out, and reads the folder as another tokenizer
    if settings.get("tokenizer_class") in (None, "TokenizersBackend"):
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["processor_class"] = processor["processor_class"]
    _write_json(folder / "tokenizer_config.json", settings)


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
    model.generation_config.save_pretrained(folder)
    save_config(model.config, type(model).__name__, folder)


def save_config(config: PretrainedConfig, architecture: str, folder: Path) -> None:
    """Writes config.json, readable by older transformers."""
    config.save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = settings["text_config"]
    if "rope_parameters" in text:
        rope = dict(text["rope_parameters"])
        text["rope_theta"] = rope.pop("rope_theta")  # older versions read it here, and take 10000 without a word
        text |= {} if rope == {"rope_type": "default"} else {"rope_scaling": rope}
    if "tie_word_embeddings" in settings:
        text.setdefault("tie_word_embeddings", settings["tie_word_embeddings"])
    settings.setdefault("architectures", [architecture])
    _write_json(folder / "config.json", settings)


def copy_beside(path: str, folder: Path) -> None:
    """Copies what belongs to a base model beside its weights: licence and notice files, and what its authors' layout has more than the hub's."""
    original = original_of(path)
    source = Path(path) if original is None else original.folder
    copy_files(source, folder, LICENCE_FILES)
    if original is None:
        copy_files(source, folder, (KEPT_SETTINGS, KEPT_WEIGHTS, "video_preprocessor_config.json"))
    else:
        keep_aside(original, folder)


def copy_files(source: Path, folder: Path, patterns: Sequence[str]) -> None:
    """Copies the files whose names match, if there are any."""
    for pattern in patterns:
        for file in source.glob(pattern):
            shutil.copy(file, folder / file.name)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
