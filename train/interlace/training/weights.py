"""The trained weights between a model and a folder: gathered from all ranks, written so that everybody can read them, loaded back exactly."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from interlace.errors import InputError
from interlace.files import set_default_mode
from interlace.model.adapters import ADAPTER_FILE
from interlace.model.families import family_of
from interlace.model.layouts import hub_name
from interlace.model.loading import BASE_FILE, Processing
from interlace.model.pissa import beside_first, double_rank, separated
from interlace.model.saving import save_model, save_processing
from interlace.model.tuning import TunedModel

Weights = dict[str, torch.Tensor]


def copy_of_weights(tuned: TunedModel, parameters: Iterable[tuple[str, torch.Tensor | None]], is_main: bool) -> Weights:
    """A copy on the CPU of all that has to be saved, by names in `tuned.base`; empty except on the main process. What is frozen is not copied.

    Args:
        parameters: whole parameters by names in `tuned.packed`, one after the other, or None where this process does not get them.
    """
    weights: Weights = {}
    trained = {name for name, parameter in tuned.packed.named_parameters() if parameter.requires_grad}
    for name, tensor in parameters:
        if is_main and tensor is not None and (tuned.peft is None or is_adapter(name)):
            weights[name.removeprefix("model.")] = tensor.to("cpu", copy=name in trained)
    if is_main and tuned.peft is None:
        weights |= {name: buffer.to("cpu", copy=True) for name, buffer in _buffers(tuned).items()}
        if tuned.tower is not None:
            start = f"model.{tuned.packed.family.vision_tower}."
            weights |= {start + name: tensor.to("cpu") for name, tensor in tuned.tower.module.state_dict().items()}
    return weights


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter, by its name: what an adapter adds, or a module that it trains whole."""
    return "lora_" in name or ".modules_to_save." in name


def _buffers(tuned: TunedModel) -> Weights:
    """What a state dict holds beside parameters; asking for one would have a sharding engine rearrange this rank's weights alone."""
    return {
        f"{place}.{name}" if place else name: buffer
        for place, module in tuned.base.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }


def save_weights(tuned: TunedModel, weights: Weights, processing: Processing, folder: Path) -> None:
    """Writes the adapter, or the complete model in hub layout, with its processor and chat template.

    Args:
        weights: as `copy_of_weights` gives them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if tuned.peft is not None:
        state = {f"base_model.model.{name}": tensor for name, tensor in beside_first(weights, tuned.first).items()}
        tuned.peft.save_pretrained(str(folder), save_embedding_layers=False, state_dict=state)
        set_default_mode(folder / ADAPTER_FILE)
        if tuned.first:
            double_rank(folder)
        about = {"base_model_name_or_path": tuned.base.name_or_path, "weights_fingerprint": tuned.base_fingerprint}
        (folder / BASE_FILE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    else:
        save_model(tuned.base, folder, weights)
    save_processing(processing, folder)


def load_weights(tuned: TunedModel, folder: Path) -> None:
    """Loads what `save_weights` wrote back into a model that no engine has wrapped yet.

    Raises:
        InputError: a weight that trains is not in the checkpoint, or none of the model's is where it should be.
    """
    if tuned.peft is not None:
        state = load_file(folder / ADAPTER_FILE)
        state = separated(state, tuned, folder)[0] if tuned.first else state
        missing = set(get_peft_model_state_dict(tuned.peft, save_embedding_layers=False)) - set(state)
        if not missing:
            set_peft_model_state_dict(tuned.peft, state)
    else:
        state = _load_full(folder)
        layout = family_of(tuned.base.config).layout
        by_hub_name = {hub_name(name, layout): tensor for name, tensor in tuned.base.state_dict().items()}
        tied = tuned.base.config.tie_word_embeddings
        missing = set(by_hub_name) - set(state) - ({hub_name("lm_head.weight", layout)} if tied else set())
        if not missing:
            with torch.no_grad():
                for name, tensor in by_hub_name.items():
                    if name in state:
                        tensor.copy_(state[name])
    if missing:
        raise InputError(f"{folder}: {len(missing)} weights of this model are not in the checkpoint, {sorted(missing)[0]} among them")


def _load_full(folder: Path) -> Weights:
    state: Weights = {}
    for path in sorted(folder.glob("model*.safetensors")):
        state |= load_file(path)
    return state
