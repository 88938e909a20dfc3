"""Models, tokenizers and image processors: loading what users have, saving what everybody can read."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from huggingface_hub import save_torch_state_dict
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BaseImageProcessor,
    BitsAndBytesConfig,
    LlavaImageProcessorPil,
    LlavaProcessor,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from interlace.data import demo
from interlace.data.template import DEFAULT_SYSTEM_PROMPT, ChatTemplate, LabelPolicy
from interlace.errors import InputError
from interlace.model.families import family_of

IMAGE_BACKEND = "pil"  # one backend for training and inference: torchvision's resizing gives other pixels
PROMPT_FILE = "prompt.json"  # what the saved model was trained with: system prompt
ADAPTER_CONFIG = "adapter_config.json"
LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


@dataclass(frozen=True)
class Processing:
    """What turns text and images into model inputs. `tokens_per_image` counts the tokens of one image."""

    tokenizer: PreTrainedTokenizerBase
    image_processor: BaseImageProcessor
    template: ChatTemplate
    config: PretrainedConfig
    tokens_per_image: int

    def image_tokens(self, width: int, height: int) -> int:
        """Number of tokens of an image of this size."""
        return self.tokens_per_image

    @property
    def image_settings(self) -> str:
        """Names what `image_tokens` depends on."""
        return f"{self.config.model_type} {self.tokens_per_image}"

    def process_images(self, images: list[PIL.Image.Image]) -> torch.Tensor:
        """RGB images -> (K, channels, height, width), float32."""
        return self.image_processor(images=images, return_tensors="pt")["pixel_values"]


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


def load_config(path: str, trust_remote_code: bool = False) -> PretrainedConfig:
    """A model's configuration.

    Raises:
        InputError: it cannot be had, or the model is of an unknown family.
    """
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: the model's configuration cannot be loaded: {error}") from error
    family_of(config)
    return config


def load_processing(
    path: str,
    system_prompt: str | None = None,
    label_policy: LabelPolicy = "assistant",
    trust_remote_code: bool = False,
    image_aspect_ratio: str | None = None,
) -> Processing:
    """Tokenizer, image processor and template of a model or adapter directory.

    Args:
        system_prompt: None takes the one the model was trained with by Interlace, else "You are a helpful assistant.".
        image_aspect_ratio: how images become the model's size; None leaves it to the image processor that comes with the model.

    Raises:
        InputError: files are missing, the tokenizer does not fit, or the model cannot take images in this way.
    """
    config = load_config(base_of(path), trust_remote_code)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        image_processor = AutoImageProcessor.from_pretrained(path, backend=IMAGE_BACKEND, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: tokenizer or image processor cannot be loaded: {error}") from error
    prompt_file = Path(path) / PROMPT_FILE
    if system_prompt is None:
        system_prompt = json.loads(prompt_file.read_text())["system_prompt"] if prompt_file.is_file() else DEFAULT_SYSTEM_PROMPT
    try:
        template = ChatTemplate(tokenizer, config.image_token_id, system_prompt, label_policy)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    if image_aspect_ratio is not None:
        image_processor = with_aspect_ratio(image_processor, image_aspect_ratio, config)
    return Processing(tokenizer, image_processor, template, config, family_of(config).tokens_per_image(config))


def with_aspect_ratio(image_processor: BaseImageProcessor, image_aspect_ratio: str, config: PretrainedConfig) -> BaseImageProcessor:
    """An image processor that makes every image the model's square size: `squash` stretches it, `pad` first adds borders of the mean colour.

    Both are saved as processors that other tools know: padding is Hugging Face's `LlavaImageProcessor`, the original code's `expand2square`.

    Raises:
        InputError: the model cannot take images in this way.
    """
    if image_aspect_ratio not in ("squash", "pad"):
        reason = "it cuts images into tiles, which this model has no tokens for" if image_aspect_ratio.startswith("anyres") else "no such way"
        raise InputError(f"image_aspect_ratio: {image_aspect_ratio!r} does not go with model_type {config.model_type!r}: {reason}; expected squash or pad")
    side = config.vision_config.image_size
    kept = ("resample", "image_mean", "image_std", "rescale_factor", "do_rescale", "do_normalize", "do_convert_rgb")
    values = {name: getattr(image_processor, name) for name in kept if getattr(image_processor, name, None) is not None}
    return LlavaImageProcessorPil(size={"height": side, "width": side}, do_center_crop=False, do_pad=image_aspect_ratio == "pad", **values)


def quantization(load_in_4bit: bool, load_in_8bit: bool, compute_dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """The bitsandbytes settings of QLoRA (NF4, double quantization; arXiv 2305.14314), of 8 bits, or None; vision tower and projector stay whole."""
    if not (load_in_4bit or load_in_8bit):
        return None
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise InputError('load_in_4bit and load_in_8bit need bitsandbytes: pip install -e ".[quantization]"') from None
    whole = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    if load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=whole)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=whole,
    )


def load_model(path: str, dtype: torch.dtype | str, quantization_config: BitsAndBytesConfig | None = None, trust_remote_code: bool = False) -> PreTrainedModel:
    """A base model with its weights in `dtype` ("auto": as they are stored).

    Raises:
        InputError: the weights cannot be had or do not fit the configuration.
    """
    load_config(path, trust_remote_code)
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            path, dtype=dtype, quantization_config=quantization_config, trust_remote_code=trust_remote_code, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{path}: the weights cannot be loaded: {error}") from error
    model, report = loaded
    if report["missing_keys"]:
        raise InputError(f"{path}: {len(report['missing_keys'])} weights are missing, {sorted(report['missing_keys'])[0]} among them")
    return model


def load_for_inference(path: str, dtype: torch.dtype, quantization_config: BitsAndBytesConfig | None = None) -> PreTrainedModel | PeftModel:
    """A model, or an adapter on its base, ready for `generate`."""
    path = resolve_model_path(path)
    model = load_model(base_of(path), dtype, quantization_config)
    if (Path(path) / ADAPTER_CONFIG).is_file():
        return PeftModel.from_pretrained(model, path).eval()
    return model.eval()


def save_processing(processing: Processing, folder: Path) -> None:
    """Writes tokenizer, image processor, processor and the chat template that was trained."""
    tokenizer, config = processing.tokenizer, processing.config
    tokenizer.chat_template = processing.template.jinja()
    processor = LlavaProcessor(
        image_processor=processing.image_processor,
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        image_token=tokenizer.convert_ids_to_tokens(config.image_token_id),
        num_additional_image_tokens=int(config.vision_config.model_type == "clip_vision_model"),
        chat_template=tokenizer.chat_template,
    )
    processor.save_pretrained(folder)
    processing.image_processor.save_pretrained(folder)
    _write_json(folder / PROMPT_FILE, {"prompt_style": "chatml", "system_prompt": processing.template.system_prompt})
    settings = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))
    settings.pop("image_processor", None)  # stands in preprocessor_config.json, where every version reads it; transformers 4 stops at this copy
    _write_json(folder / "processor_config.json", settings)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    extra = settings.pop("extra_special_tokens", None)  # transformers 4 wants a mapping here and stops at a list
    if isinstance(extra, dict) and extra:
        settings["extra_special_tokens"] = extra
    elif extra:
        settings["additional_special_tokens"] = extra
    for name in ("is_local", "local_files_only"):  # how it was loaded here is nobody's business
        settings.pop(name, None)
    if settings.get("tokenizer_class") in (None, "TokenizersBackend"):
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    _write_json(folder / "tokenizer_config.json", settings)


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """Writes a complete model in the layout of the hub ports, readable by older transformers and by serving tools."""
    state = {hub_name(name): tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.get_text_config().tie_word_embeddings:
        state.pop("language_model.lm_head.weight", None)
    save_torch_state_dict(state, folder, max_shard_size="5GB")
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = settings["text_config"]
    if "rope_parameters" in text:
        text["rope_theta"] = text["rope_parameters"]["rope_theta"]  # older versions read it here, and take 10000 without a word
    settings.setdefault("architectures", [type(model).__name__])
    _write_json(folder / "config.json", settings)


def hub_name(name: str) -> str:
    """A parameter's name in memory -> its name in the hub ports."""
    for start, hub in (
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("model.vision_tower.", "vision_tower.vision_model."),
    ):
        if name.startswith(start):
            return hub + name.removeprefix(start)
    return name


def copy_licence(path: str, folder: Path) -> None:
    """Copies the base model's licence and notice files, if it is a local directory that has any."""
    for pattern in LICENCE_FILES:
        for file in Path(path).glob(pattern):
            shutil.copy(file, folder / file.name)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
