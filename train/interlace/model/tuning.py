"""Which parameters learn, and how fast: parts, freezing, LoRA, learning rates."""

import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel

from interlace.errors import InputError
from interlace.model.adapters import load_adapter, read_adapter_config
from interlace.model.families import Family, family_of, part_of
from interlace.model.forward import FrozenTower, PackedModel
from interlace.model.layouts import spellings

PARTS = ("vision_tower", "projector", "language_model")


@dataclass(frozen=True)
class Lora:
    """Settings of a new adapter; see the argument keys of the same names."""

    rank: int
    alpha: float
    dropout: float
    targets: Sequence[str] | None
    use_dora: bool = False
    use_rslora: bool = False


@dataclass(frozen=True)
class TunedModel:
    """A model ready to train: `packed` is what gets wrapped; `tower` the frozen tower outside of it, or None if it trains; `peft` the adapter, or None;
    `base_fingerprint` says which weights an adapter is trained on; `first` holds what PiSSA began with, by names in `base`, as the base lacks it."""

    packed: PackedModel
    tower: FrozenTower | None
    peft: PeftModel | None
    base_fingerprint: str = ""
    first: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def base(self) -> PreTrainedModel:
        """The Hugging Face model inside."""
        return self.packed.model

    def part_table(self) -> list[tuple[str, int, int]]:
        """(part, parameters, trainable parameters) for each part and the adapter."""
        part = part_of(self.base)
        counts = {name: [0, 0] for name in (*PARTS, "adapter")}
        named = list(self.base.named_parameters())
        if self.tower is not None:
            named += [(f"model.{self.packed.family.vision_tower}.{name}", parameter) for name, parameter in self.tower.module.named_parameters()]
        for name, parameter in named:
            if ".original_module." in name:
                continue
            key = "adapter" if "lora_" in name else part(name)
            size = parameter.numel() * (2 if parameter.__class__.__name__ == "Params4bit" else 1)
            counts[key][0] += size
            counts[key][1] += size if parameter.requires_grad else 0
        return [(name, total, trainable) for name, (total, trainable) in counts.items() if total]


def tune(
    model: PreTrainedModel,
    tunable_parts: Sequence[str],
    lora: Lora | None,
    lora_path: str | None,
    freeze_include: Sequence[str] = (),
    freeze_exclude: Sequence[str] = (),
    frozen_dtype: torch.dtype | None = torch.float32,
    trained_dtype: torch.dtype | None = torch.float32,
    adapter_dtype: torch.dtype | None = None,
) -> TunedModel:
    """Sets what learns; what learns is kept in `trained_dtype` (an adapter in `adapter_dtype`, if given), the rest in `frozen_dtype`, or as loaded (None).

    Args:
        lora: a new adapter on the language model; None for full tuning, or when `lora_path` continues one.
        freeze_include, freeze_exclude: globs on names in `model`; what matches the first and not the second stays frozen.

    Raises:
        InputError: an unknown part, a pattern that matches nothing, or nothing left to train.
    """
    unknown = [part for part in tunable_parts if part not in PARTS]
    if unknown:
        raise InputError(f"tunable_parts: {', '.join(unknown)}: unknown; expected some of {', '.join(PARTS)}")
    family, part = family_of(model.config), part_of(model)
    frozen = _frozen_names(model, freeze_include, freeze_exclude)
    whole = _whole_modules(model, tunable_parts)
    if lora_path is not None:
        _check_adapter(lora_path, whole, family)
    tower = FrozenTower(model) if "vision_tower" not in tunable_parts else None
    model.requires_grad_(False)
    peft = None
    if lora is not None or lora_path is not None:
        peft = _continue_adapter(model, lora_path) if lora_path else _new_adapter(model, lora, whole)
    for name, parameter in model.named_parameters():
        plain = name.replace(".base_layer", "").replace(".modules_to_save.default", "")
        if ".lora_" in plain:  # an adapter is frozen with the weight it changes
            plain = plain.split(".lora_")[0] + ".weight"
        if peft is not None and part(name) == "language_model":
            learns = "lora_" in name and "language_model" in tunable_parts
        elif peft is not None and family.tiling is not None and name == f"model.{family.tiling.newline}":
            learns = False  # an adapter's file holds modules, and this is a parameter of the model itself: what it learned would be lost
        else:
            learns = part(name) in tunable_parts and ".original_module." not in name
        parameter.requires_grad_(learns and plain not in frozen and parameter.dtype.is_floating_point)
    if tower is None:
        module = getattr(model.model, family.vision_tower)
        unused = set(family.unused(model.config, module))
        for name, parameter in module.named_parameters():
            if name in unused:
                parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError("nothing is left to train: check tunable_parts and freeze_include")
    for name, parameter in [*model.named_parameters(), *([] if tower is None else tower.module.named_parameters())]:
        if parameter.dtype in (torch.float32, torch.float16, torch.bfloat16):
            learned = (adapter_dtype if ".lora_" in name else None) or trained_dtype
            parameter.data = parameter.data.to((learned if parameter.requires_grad else frozen_dtype) or parameter.dtype)
    if peft is not None and lora_path is not None:  # once more, in float32: loading into a 16-bit model has rounded the whole parts
        set_peft_model_state_dict(peft, load_peft_weights(lora_path, device="cpu"))
    return TunedModel(PackedModel(model), tower, peft)


def _whole_modules(model: PreTrainedModel, tunable_parts: Sequence[str]) -> list[str]:
    """Names of the modules, inside `PreTrainedModel.model`, that learn beside an adapter; what stands inside another of them comes with it."""
    family = family_of(model.config)
    whole = [family.vision_tower] if "vision_tower" in tunable_parts else []
    if "projector" in tunable_parts and not (whole and family.projector_in_tower):
        for name in family.projector:
            module = model.model.get_submodule(name)
            whole = [*(f"{name}.{i}" for i in range(len(module))), *whole] if isinstance(module, nn.ModuleList) else [name, *whole]
    return whole


def _frozen_names(model: PreTrainedModel, include: Sequence[str], exclude: Sequence[str]) -> set[str]:
    text_model, layout = model.config.get_text_config().model_type, family_of(model.config).layout
    names = {name: spellings(name, text_model, layout) for name, _ in model.named_parameters()}
    matched: dict[str, set[str]] = {"freeze_include": set(), "freeze_exclude": set()}
    for key, patterns in (("freeze_include", include), ("freeze_exclude", exclude)):
        for pattern in patterns:
            found = {name for name, spelled in names.items() if fnmatch.filter(spelled, pattern)}
            if not found:
                raise InputError(f"{key}: {pattern!r} matches no parameter; names look like {next(iter(names))!r} and {list(names)[-1]!r}")
            matched[key] |= found
    return matched["freeze_include"] - matched["freeze_exclude"]


def lora_targets(model: PreTrainedModel, targets: Sequence[str] | None) -> list[str]:
    """Full names of the linear layers an adapter goes on.

    Args:
        targets: names of layers (`q_proj`) or regular expressions that match whole module names, in any layout's spelling; None for all linear layers of
            the language model. Only the language model is searched, unless the vision tower or the projector is written out in a pattern.

    Raises:
        InputError: a target that matches no linear layer, or no regular expression.
    """
    family, part, text_model = family_of(model.config), part_of(model), model.config.get_text_config().model_type
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    inside = [name for name in linear if part(name) == "language_model"]
    if targets is None:
        return inside
    found: dict[str, None] = {}
    for target in targets:
        try:
            pattern = re.compile(target)
        except re.error as error:
            raise InputError(f"lora_target_modules: {target!r} is no regular expression: {error}") from None
        searched = linear if any(part in target for part in (family.vision_tower, *family.projector, "mm_projector")) else inside
        matches = [name for name in searched if any(map(pattern.fullmatch, spellings(name, text_model, family.layout))) or name.endswith(f".{target}")]
        if not matches and family.vision_tower in target:
            raise InputError(f"lora_target_modules: {target!r}: the vision tower is frozen; add vision_tower to tunable_parts to train it")
        if not matches:
            raise InputError(f"lora_target_modules: {target!r} matches no linear layer; names look like {inside[0]!r}")
        found.update(dict.fromkeys(matches))
    return list(found)


def target_pattern(names: Iterable[str]) -> str:
    """One regular expression that matches exactly these module names, layer numbers folded together."""
    by_form: dict[str, set[str]] = {}
    for name in names:
        number = re.search(r"\.(\d+)\.", name)
        form = name if number is None else f"{name[: number.start(1)]}#{name[number.end(1) :]}"
        by_form.setdefault(form, set()).add(number.group(1) if number else "")
    pieces = []
    for form, numbers in by_form.items():
        choice = "|".join(sorted(numbers, key=int)) if "#" in form else ""
        pieces.append(re.escape(form).replace(r"\#", f"(?:{choice})"))
    return "|".join(pieces)


def _new_adapter(model: PreTrainedModel, lora: Lora | None, whole: list[str]) -> PeftModel:
    assert lora is not None
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=target_pattern(lora_targets(model, lora.targets)),
        modules_to_save=whole or None,
        use_dora=lora.use_dora,
        use_rslora=lora.use_rslora,
    )
    return get_peft_model(model, config)  # type: ignore[return-value]


def _continue_adapter(model: PreTrainedModel, path: str) -> PeftModel:
    try:
        peft = load_adapter(model, path, is_trainable=True)
    except InputError as error:
        raise InputError(f"lora_path: {error}") from error
    peft.peft_config["default"].base_model_name_or_path = model.name_or_path
    return peft


def _check_adapter(path: str, whole: list[str], family: Family) -> None:
    """An adapter can only go on training the parts that it holds."""
    if not (Path(path) / "adapter_config.json").is_file():
        raise InputError(f"lora_path: {path}: no adapter_config.json in this folder")
    held = set(read_adapter_config(path).modules_to_save or [])  # type: ignore[attr-defined]
    missing = [name for name in whole if name not in held]
    if missing:
        raise InputError(f"lora_path: {path} holds no {', '.join(missing)}; set tunable_parts to what it trained ({', '.join(held) or 'language_model'})")
    if family.vision_tower in held and family.vision_tower not in whole:
        raise InputError(f"lora_path: {path} holds a trained vision tower; add vision_tower to tunable_parts")


def parameter_groups(
    tuned: TunedModel, decays: Callable[[str], bool], weight_decay: float, learning_rate: float, rates: dict[str, float | None]
) -> list[dict[str, object]]:
    """Optimizer groups: one per part and weight decay, with the part's learning rate.

    Args:
        decays: whether a parameter of `tuned.packed` decays, by name (biases and norms do not).
        rates: part -> its own learning rate, or None for `learning_rate`; `lora_B` -> that of an adapter's second matrices (LoRA+, arXiv 2402.12354).
    """
    part = part_of(tuned.base)
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in tuned.packed.named_parameters():
        if parameter.requires_grad:
            is_second = ".lora_B." in name and rates.get("lora_B") is not None
            groups.setdefault(("lora_B" if is_second else part(name), decays(name)), []).append(parameter)
    result: list[dict[str, object]] = []
    for (name, decay), parameters in groups.items():
        rate = rates.get(name)
        result.append({"params": parameters, "weight_decay": weight_decay if decay else 0.0, "lr": learning_rate if rate is None else rate, "part": name})
    return result
