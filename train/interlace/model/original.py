"""Models in their authors' layout (`LlavaQwenForCausalLM` and its relatives, also as PaddleMIX stores them), seen as the hub ports have them."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import save_file
from transformers import (
    CONFIG_MAPPING,
    AddedToken,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BaseImageProcessor,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextImageProcessorPil,
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessorPil,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

from interlace.errors import InputError
from interlace.files import set_default_mode
from interlace.model.layouts import EMBEDDINGS, HEAD, LANGUAGE_MODELS, ROWS_ADDED, TEXT_MODELS, VISION, hub_name, is_original, named_by_hub, original_name
from interlace.model.llava import with_aspect_ratio
from interlace.model.weight_files import PADDLE_FILE, StoredTensor, stored_tensors

KEPT_SETTINGS, KEPT_WEIGHTS = "llava_config.json", "llava_kept.safetensors"  # what the hub layout has no place for, kept for the way back
_BUFFERS = ("rotary_emb.inv_freq", "embeddings.position_ids")  # older versions stored them
_HEAD_SIZES = {"siglip_vision_model": 72, "clip_vision_model": 64}  # SigLIP so400m; every CLIP


@dataclass(frozen=True)
class Original:
    """A model in its authors' layout, seen as the hub ports have it.

    settings: its config.json. config: the same as transformers says it. tensors: in hub layout, the vocabulary padded as the ports pad it.
    kept: weights that the hub layout has no place for, by their original names. tokenizer: with the tokens that stand for images.
    """

    folder: Path
    settings: dict[str, Any]
    config: PretrainedConfig
    tensors: dict[str, StoredTensor]
    kept: dict[str, StoredTensor]
    tokenizer: PreTrainedTokenizerBase

    def image_processor(self) -> BaseImageProcessor:
        """What makes images the tower's size, or tiles; padded to squares first where the original does so."""
        vision, config = self.config.vision_config, self.config
        size = {"height": vision.image_size, "width": vision.image_size}
        if isinstance(config, LlavaNextConfig):
            crop = {"size": {"shortest_edge": vision.image_size}, "crop_size": size}
            return LlavaNextImageProcessorPil(image_grid_pinpoints=config.image_grid_pinpoints, **crop)  # type: ignore[arg-type]
        if isinstance(config, LlavaOnevisionConfig):
            return LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=config.image_grid_pinpoints)  # type: ignore[arg-type]
        if vision.model_type == "clip_vision_model":
            plain: BaseImageProcessor = CLIPImageProcessorPil(size={"shortest_edge": vision.image_size}, crop_size=size)
        else:
            plain = SiglipImageProcessorPil(size=size)
        return with_aspect_ratio(plain, "pad", config) if self.settings.get("image_aspect_ratio") == "pad" else plain


@lru_cache(maxsize=4)
def open_original(folder: Path, vision_tower: str | None = None) -> Original:
    """Reads a folder in the authors' layout, or of a language model alone, which gets a new projector; weights only by their headers.

    Args:
        vision_tower: where the tower is if it is not among the weights; None: where the configuration says (a folder or a hub id).

    Raises:
        InputError: weights are missing or too many, have other shapes than the configuration says, or are of a kind that has no place in transformers.
    """
    settings, stored = json.loads((folder / "config.json").read_text(encoding="utf-8")), stored_tensors(folder)
    is_bare = not is_original(settings)
    if is_bare:
        settings = _bare_settings(settings, vision_tower)
    tensors, kept = _renamed(stored, folder), {}
    if not any(name.startswith(VISION) for name in tensors):
        tensors |= _tower_from(vision_tower or settings.get("mm_vision_tower") or "", folder)
    if is_bare:
        tensors |= _new_projector(tensors[f"{VISION}embeddings.patch_embedding.weight"].shape[0], tensors[EMBEDDINGS])
    _check_projector(settings, tensors, folder)
    is_tied = _check_head(settings, tensors, folder)
    text = _text_config(settings, is_tied)
    tokenizer = _tokenizer(folder, text)
    vision = _vision_config(tensors, folder)
    config = _config(settings, text, vision, tokenizer)
    if config.model_type == "llava" and "image_newline" in tensors:
        kept["model.image_newline"] = tensors.pop("image_newline")
    _pad_vocabulary(config, tensors, folder)
    _check_shapes(config, tensors, folder)
    return Original(folder, settings, config, tensors, kept, tokenizer)


def _bare_settings(settings: Mapping[str, Any], vision_tower: str | None) -> dict[str, Any]:
    """Of a language model alone, as LLaVA-1.5 begins: with a tower and a projector that has learned nothing."""
    tower = {"mm_vision_tower": vision_tower, "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "mm_projector_type": "mlp2x_gelu"}
    name = LANGUAGE_MODELS[settings["architectures"][0]]
    model_type = {"qwen2": "llava_qwen", "llama": "llava_llama", "mistral": "llava_mistral"}[TEXT_MODELS[name]]
    return {**settings, **tower, "architectures": [name], "model_type": model_type, "image_aspect_ratio": "pad", "mm_patch_merge_type": "flat"}


def _new_projector(vision_width: int, embeddings: StoredTensor) -> dict[str, StoredTensor]:
    """Drawn as torch draws linear layers, always the same."""
    width = embeddings.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = {"linear_1": torch.nn.Linear(vision_width, width), "linear_2": torch.nn.Linear(width, width)}
    drawn = {f"multi_modal_projector.{layer}.{name}": values.detach() for layer, made in layers.items() for name, values in made.named_parameters()}
    return {name: StoredTensor(tuple(values.shape), embeddings.dtype, partial(values.to, embeddings.dtype)) for name, values in drawn.items()}


def _renamed(stored: dict[str, StoredTensor], folder: Path) -> dict[str, StoredTensor]:
    """Tensors by hub names."""
    if (folder / PADDLE_FILE).is_file():
        stored = {re.sub(r"^(qwen2|llama|mistral)\.", "model.", name): _from_paddle(name, tensor) for name, tensor in stored.items()}
    tensors: dict[str, StoredTensor] = {}
    unknown = []
    for name, tensor in stored.items():
        found = named_by_hub(name)
        if name.endswith(_BUFFERS) or (found or "").startswith(f"{VISION}head."):  # SigLIP's own pooling, which nothing here uses
            continue
        if found is None:
            unknown.append(name)
        else:
            tensors[found] = tensor
    if unknown:
        raise InputError(f"{folder}: {len(unknown)} weights that this layout does not know, {unknown[0]!r} among them")
    return tensors


def _from_paddle(name: str, tensor: StoredTensor) -> StoredTensor:
    """Paddle's linear layers hold their weights as (in, out)."""
    is_linear = len(tensor.shape) == 2 and name.endswith(".weight") and not re.search(r"(embed_tokens|position_embedding)\.weight$", name)
    return tensor.changed(tensor.shape[::-1], lambda values: values.T.contiguous()) if is_linear else tensor


def _tower_from(place: str, folder: Path) -> dict[str, StoredTensor]:
    """The weights of a tower that lies elsewhere, without SigLIP's pooling and the last of its layers, which the originals leave out."""
    try:
        source = Path(place) if Path(place).is_dir() else Path(snapshot_download(place, allow_patterns=["*.json", "model*.safetensors", "pytorch_model*.bin"]))
    except (LocalEntryNotFoundError, RepositoryNotFoundError, HFValidationError, OSError) as error:
        wanted = f"the vision tower {place!r}" if place else "a vision tower"
        reason = str(error).split("\n", maxsplit=1)[0]
        raise InputError(f"{folder}: the weights hold no vision tower, and {wanted} cannot be had ({reason}); name its folder with --vision-tower") from None
    found = {}
    for name, tensor in stored_tensors(source).items():
        inside = name.removeprefix("vision_tower.")
        if inside.startswith("vision_model.") and not inside.startswith("vision_model.head.") and not name.endswith(_BUFFERS):
            found[f"vision_tower.{inside}"] = tensor
    if not found:
        raise InputError(f"{source}: no vision tower in this folder; expected weights named vision_model.*")
    if f"{VISION}embeddings.class_embedding" not in found:
        last = f"{VISION}encoder.layers.{_num_layers(found) - 1}."
        found = {name: tensor for name, tensor in found.items() if not name.startswith(last)}
    return found


def _num_layers(tensors: Mapping[str, StoredTensor]) -> int:
    numbers = [int(name.removeprefix(f"{VISION}encoder.layers.").split(".")[0]) for name in tensors if name.startswith(f"{VISION}encoder.layers.")]
    return 1 + max(numbers, default=-1)


def _check_projector(settings: Mapping[str, Any], tensors: Mapping[str, StoredTensor], folder: Path) -> None:
    kind = settings.get("mm_projector_type", "mlp2x_gelu")
    if kind != "mlp2x_gelu" or "multi_modal_projector.linear_2.weight" not in tensors:
        raise InputError(f"{folder}: mm_projector_type {kind!r}; expected mlp2x_gelu with its weights: transformers has no model with another projector")


def _check_head(settings: Mapping[str, Any], tensors: dict[str, StoredTensor], folder: Path) -> bool:
    """Whether the head is the embeddings; then it is left out."""
    embeddings, head = (tensors.get(name) for name in (EMBEDDINGS, HEAD))
    if embeddings is None:
        raise InputError(f"{folder}: model.embed_tokens.weight is missing")
    if head is None:
        if settings.get("tie_word_embeddings", True):
            return True
        raise InputError(f"{folder}: lm_head.weight is missing, and config.json says that it is no copy of the embeddings (tie_word_embeddings)")
    if not settings.get("tie_word_embeddings", False):
        return False
    if head.shape != embeddings.shape or not torch.equal(head.load(), embeddings.load()):
        raise InputError(f"{folder}: config.json says tie_word_embeddings, but lm_head.weight differs from model.embed_tokens.weight")
    del tensors[HEAD]
    return True


def _text_config(settings: Mapping[str, Any], is_tied: bool) -> PretrainedConfig:
    """Of the language model alone."""
    kind: Any = CONFIG_MAPPING[TEXT_MODELS[settings["architectures"][0]]]
    own = {"model_type", "architectures", "transformers_version", "dtype", "tie_word_embeddings", "rope_parameters"}
    names = {*kind().to_dict(), "rope_theta", "rope_scaling"} - own
    return kind(tie_word_embeddings=is_tied, **{name: settings[name] for name in names & set(settings) if settings[name] is not None})  # type: ignore[no-any-return]


def _tokenizer(folder: Path, text: PretrainedConfig) -> PreTrainedTokenizerBase:
    """With `<image>`, and something to pad with."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, config=text, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"{folder}: the tokenizer cannot be loaded: {error}") from error
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    return tokenizer  # type: ignore[no-any-return]


def _vision_config(tensors: Mapping[str, StoredTensor], folder: Path) -> PretrainedConfig:
    """The tower's geometry, from the shapes of its weights."""
    is_clip = f"{VISION}embeddings.class_embedding" in tensors
    kind: Any = CLIPVisionConfig if is_clip else SiglipVisionConfig
    try:
        width, _, _, patch = tensors[f"{VISION}embeddings.patch_embedding.weight"].shape
        places = tensors[f"{VISION}embeddings.position_embedding.weight"].shape[0] - int(is_clip)
        inner = tensors[f"{VISION}encoder.layers.0.mlp.fc1.weight"].shape[0]
    except KeyError as error:
        raise InputError(f"{folder}: {error.args[0]} is missing in the vision tower") from None
    size = _HEAD_SIZES[kind.model_type]
    if width % size or math.isqrt(places) ** 2 != places:
        raise InputError(f"{folder}: a vision tower of width {width} and {places} patches; expected heads of {size} and a square of patches")
    own = {} if is_clip else {"vision_use_head": False}
    shape = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": _num_layers(tensors), "num_attention_heads": width // size}
    return kind(**shape, image_size=math.isqrt(places) * patch, patch_size=patch, **own)  # type: ignore[no-any-return]


def _config(settings: Mapping[str, Any], text: PretrainedConfig, vision: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """The family is what the hub ports made of these settings: tiles of at most N: LLaVA-OneVision; tiles of a LLaMA or Mistral: LLaVA-NeXT; else LLaVA.

    LLaVA-NeXT-Interleave's settings speak of tiles, but its rows hold several images, which are never cut: its ports are plain LLaVA.
    """
    is_clip, aspect = vision.model_type == "clip_vision_model", settings.get("image_aspect_ratio") or "square"
    common = {
        "text_config": text,
        "vision_config": vision,
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        "projector_hidden_act": "gelu",
        "vision_feature_layer": settings.get("mm_vision_select_layer", -2) if is_clip else -1,
        "vision_feature_select_strategy": "default" if is_clip and settings.get("mm_vision_select_feature", "patch") == "patch" else "full",
        "tie_word_embeddings": text.tie_word_embeddings,
        "dtype": getattr(torch, settings.get("torch_dtype") or settings.get("dtype") or "float16"),
    }
    pinpoints = _pinpoints(settings.get("image_grid_pinpoints"), vision.image_size)
    if aspect.startswith("anyres_max"):
        tokenizer.add_tokens([AddedToken("<video>", special=True, normalized=False)], special_tokens=True)
        video = tokenizer.convert_tokens_to_ids("<video>")
        return LlavaOnevisionConfig(**common, video_token_index=video, image_grid_pinpoints=pinpoints, vision_aspect_ratio=aspect)  # type: ignore[arg-type]
    if aspect == "anyres" and text.model_type != "qwen2":
        return LlavaNextConfig(**common, image_grid_pinpoints=pinpoints)  # type: ignore[arg-type]
    return LlavaConfig(**common)  # type: ignore[arg-type]


def _pinpoints(written: Any, side: int) -> Any:
    """The resolutions, [height, width] each; also from the form "(1x1),...,(6x6)"."""
    if not isinstance(written, str):
        return written
    numbers = [(int(height), int(width)) for height, width in re.findall(r"\((\d+)x(\d+)\)", written)]
    if "..." in written and len(numbers) == 2:
        (low, left), (high, right) = numbers
        numbers = [(height, width) for height in range(low, high + 1) for width in range(left, right + 1)]
    return [[height * side, width * side] for height, width in numbers]


def _pad_vocabulary(config: PretrainedConfig, tensors: dict[str, StoredTensor], folder: Path) -> None:
    """Adds as many rows as the hub ports have, each the mean of the others: they stand for tokens that no text holds."""
    text, rows = config.text_config, tensors[EMBEDDINGS].shape[0]
    if rows != text.vocab_size or rows % ROWS_ADDED:
        raise InputError(
            f"{folder}: model.embed_tokens.weight has {rows} rows and config.json a vocabulary of {text.vocab_size}; expected the same, and a multiple of "
            f"{ROWS_ADDED}: a tool has shrunk this vocabulary; convert the model it was made from"
        )
    text.vocab_size = rows + ROWS_ADDED

    def pad(values: torch.Tensor) -> torch.Tensor:
        return torch.cat([values, values.mean(0, keepdim=True, dtype=torch.float32).to(values.dtype).expand(ROWS_ADDED, -1)])

    for name in (EMBEDDINGS, HEAD):
        if name in tensors:
            padded = tensors[name].changed((rows + ROWS_ADDED, tensors[name].shape[1]), pad)
            tensors[name] = replace(padded, load_first=tensors[name].load_first)


def _check_shapes(config: PretrainedConfig, tensors: Mapping[str, StoredTensor], folder: Path) -> None:
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    expected = {hub_name(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.text_config.tie_word_embeddings:
        del expected[HEAD]
    problems = [f"{original_name(name)} is missing" for name in expected if name not in tensors]
    problems += [f"{original_name(name)} is too many" for name in tensors if name not in expected]
    problems += [
        f"{original_name(name)} is {list(tensors[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if problems:
        raise InputError(f"{folder}: {len(problems)} weights do not fit config.json: {'; '.join(problems[:4])}{'; ..' * (len(problems) > 4)}")


def keep_aside(original: Original, folder: Path) -> None:
    """Writes what the way back needs and the hub layout has no place for."""
    (folder / KEPT_SETTINGS).write_text(json.dumps(original.settings, indent=2) + "\n", encoding="utf-8")
    if original.kept:
        save_file({name: tensor.load().contiguous() for name, tensor in original.kept.items()}, folder / KEPT_WEIGHTS, {"format": "pt"})
        set_default_mode(folder / KEPT_WEIGHTS)
