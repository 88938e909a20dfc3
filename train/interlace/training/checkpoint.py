"""Where a run may write, what it resumes from, and weights that load back exactly."""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from interlace.errors import InputError
from interlace.model.loading import Processing, hub_name, save_model, save_processing
from interlace.model.tuning import TunedModel

RECORDS = ("arguments.json", "environment.json", "ledger.json", "trainer_state.json", "train_results.json", "all_results.json", "training_curves.png")
MODEL_FILES = ("config.json", "generation_config.json", "adapter_config.json", "*.safetensors", "*.safetensors.index.json", "*.bin")
STATE_FILE = "trainer_state.json"
# A resumed run goes on with the same weights, rows and order
FIXED_KEYS = (
    *("model_name_or_path", "lora", "lora_path", "lora_rank", "lora_target_modules", "use_dora", "load_in_4bit", "load_in_8bit"),
    *("tunable_parts", "freeze_include", "freeze_exclude", "optim"),
    *("dataset", "image_aspect_ratio", "num_frames", "video_fps", "max_length", "too_long", "bad_rows", "system_prompt", "label_policy", "seed", "data_seed"),
    *("packing", "per_device_train_batch_size", "max_tokens_per_batch"),
)


def checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints in a run's folder, oldest first; the Trainer writes the state file last."""
    found = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name) and (path / STATE_FILE).is_file()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def check_output_dir(output_dir: Path, resumes: bool, overwrite: bool, sources: Sequence[str]) -> None:
    """Refuses a folder that holds another run or a model, and always one that the run starts from (`sources`).

    Raises:
        InputError: it is a file, or holds a run and neither resuming nor overwriting was asked for.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise InputError(f"output_dir: {output_dir} is a file; expected a folder, new or empty")
    for source in sources:
        if output_dir.resolve() == Path(source).resolve():
            raise InputError(f"output_dir: {output_dir} is what this run starts from; choose another folder")
    held = [path.name for pattern in (*RECORDS, *MODEL_FILES, "checkpoint-*") for path in output_dir.glob(pattern)]
    if held and not resumes and not overwrite:
        raise InputError(
            f"output_dir: {output_dir} already holds a run or a model ({', '.join(held[:3])}); choose another folder, "
            "or set resume_from_checkpoint: true to go on, or overwrite_output_dir: true to start over"
        )


def find_resume(output_dir: Path, wanted: bool | str | None) -> Path | None:
    """The checkpoint to resume from: the one named, the newest complete one for `true`, or None.

    Raises:
        InputError: the one named is no complete checkpoint.
    """
    if not wanted:
        return None
    if isinstance(wanted, str):
        if not (Path(wanted) / STATE_FILE).is_file():
            raise InputError(f"resume_from_checkpoint: {wanted}: no complete checkpoint; expected a folder with {STATE_FILE}")
        return Path(wanted)
    found = checkpoints(output_dir)
    return found[-1] if found else None


def finished_steps(output_dir: Path) -> int:
    """Steps of a run that has come to its end in this folder; 0 if none has."""
    path = output_dir / STATE_FILE
    return int(json.loads(path.read_text(encoding="utf-8"))["global_step"]) if path.is_file() else 0


def check_resume(checkpoint: Path, arguments: Mapping[str, Any]) -> None:
    """Refuses to resume with other data, order or trained weights than the run began with.

    Raises:
        InputError: the keys that changed, with what they were and are.
    """
    path = checkpoint.parent / "arguments.json"
    if not path.is_file():
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    changed = [f"{name}: was {before.get(name)!r}, is {arguments[name]!r}" for name in FIXED_KEYS if before.get(name) != arguments[name]]
    if changed:
        raise InputError(f"{checkpoint} belongs to a run with other settings; change them back, or start over in another output_dir\n  " + "\n  ".join(changed))


def clear_run(output_dir: Path) -> None:
    """Removes an earlier run's records, model and checkpoints, so that nothing of it can be taken for the new run's."""
    for path in output_dir.glob("checkpoint-*"):
        shutil.rmtree(path)
    for pattern in (*RECORDS, *MODEL_FILES):
        for path in output_dir.glob(pattern):
            path.unlink()


def save_tuned(tuned: TunedModel, processing: Processing, folder: Path) -> None:
    """Writes the adapter, or the complete model in hub layout, with its processor and chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    if tuned.peft is not None:
        tuned.peft.save_pretrained(str(folder), save_embedding_layers=False)
    else:
        if tuned.tower is not None:
            tuned.tower.attach_to(tuned.base)
        save_model(tuned.base, folder)
        if tuned.tower is not None:
            tuned.tower.detach_from(tuned.base)
    save_processing(processing, folder)


def load_tuned(tuned: TunedModel, folder: Path) -> None:
    """Loads what `save_tuned` wrote back into the model.

    Raises:
        InputError: a weight that trains is not in the checkpoint, or none of the model's is where it should be.
    """
    if tuned.peft is not None:
        state = load_file(folder / "adapter_model.safetensors")
        missing = set(get_peft_model_state_dict(tuned.peft, save_embedding_layers=False)) - set(state)
        if not missing:
            set_peft_model_state_dict(tuned.peft, state)
    else:
        state = _load_full(folder)
        by_hub_name = {hub_name(name): tensor for name, tensor in tuned.base.state_dict().items()}
        tied = tuned.base.config.get_text_config().tie_word_embeddings
        missing = set(by_hub_name) - set(state) - ({"language_model.lm_head.weight"} if tied else set())
        if not missing:
            with torch.no_grad():
                for name, tensor in by_hub_name.items():
                    if name in state:
                        tensor.copy_(state[name])
    if missing:
        raise InputError(f"{folder}: {len(missing)} weights of this model are not in the checkpoint, {sorted(missing)[0]} among them")


def _load_full(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        state |= load_file(path)
    return state
