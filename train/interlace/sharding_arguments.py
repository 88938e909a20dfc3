"""The keys `deepspeed` and `fsdp` against the other keys, without importing DeepSpeed or torch."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from interlace.errors import InputError

CONFIG_FOLDER = Path(__file__).parents[2] / "configs" / "deepspeed"
CONFIG_NAMES = ("zero1", "zero2", "zero2_offload", "zero3", "zero3_offload", "zero3_nvme")
# What PaddleMIX's `sharding` calls the same
STAGES = {"stage1": "zero1", "stage2": "zero2", "stage2 offload": "zero2_offload", "stage3": "zero3", "stage3 offload": "zero3_offload"}
# Every rank holds a slice of each weight: only optimizers that treat every number alike, and keep float32, can step it
ELEMENTWISE_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "rmsprop")
# DeepSpeed's key -> why its value cannot be honoured
REFUSED_BLOCKS = {
    "optimizer": "optim, learning_rate and weight_decay describe it, with groups per part; remove the block",
    "scheduler": "lr_scheduler_type and warmup_steps describe it; remove the block",
    "amp": "bf16 or fp16 say the precision; remove the block",
    "torch_autocast": "bf16 or fp16 say the precision; remove the block",
    "elasticity": "the plan of batches is made for the number of processes at the start; remove the block",
    "curriculum_learning": "the plan decides what is in a batch; remove the block",
    "data_efficiency": "the plan decides what is in a batch; remove the block",
    "tensor_parallel": "layers are not split between processes; remove the block",
    "compression_training": "weights are trained as they are; remove the block",
    "progressive_layer_drop": "every layer is called by every process; remove the block",
}
# Ways of slicing that state is not stored from: DeepSpeed's key in zero_optimization -> the value that means "off"
REFUSED_ZERO_KEYS = {
    "zenflow": None,
    "super_offload": False,
    "mics_shard_size": -1,
    "zero_hpz_partition_size": 1,
    "zero_quantized_weights": False,
    "zero_quantized_gradients": False,
    "compute_grad_norm": True,
}
FSDP_WORDS = ("full_shard", "shard_grad_op", "offload", "auto_wrap")
FSDP_KEYS = ("version", "reshard_after_forward", "cpu_offload", "auto_wrap_policy", "transformer_layer_cls_to_wrap", "min_num_params")

Read = Callable[[Path], Any]


def deepspeed_path(value: str) -> Path:
    """The file that the `deepspeed` key means: one of ours by its name, else a path.

    Raises:
        InputError: neither, or a name whose file did not come along.
    """
    name = STAGES.get(value, value)
    if name not in CONFIG_NAMES:
        if not value.endswith(".json") and not Path(value).is_file():
            raise InputError(f"deepspeed: expected {', '.join(CONFIG_NAMES)}, or the path of a DeepSpeed configuration (.json); got {value!r}")
        return Path(value)
    path = CONFIG_FOLDER / f"{name}.json"
    if not path.is_file():
        raise InputError(f"deepspeed: {value} stands for {path}, which is not there (the package was installed without the repository); give a path instead")
    return path


def sharding_problems(arguments: Mapping[str, Any], read_json: Read) -> list[str]:
    """What contradicts or cannot be honoured in `deepspeed`, `fsdp` and `fsdp_config`.

    Args:
        read_json: path -> the file's content.

    Raises:
        InputError: the file cannot be read.
    """
    if not arguments["deepspeed"] and not arguments["fsdp"]:
        return ["fsdp_config needs fsdp: true"] if arguments["fsdp_config"] else []
    if arguments["deepspeed"] and arguments["fsdp"]:
        return ["deepspeed and fsdp: choose one"]
    problems, stage = [], 3
    if arguments["deepspeed"]:
        path = deepspeed_path(arguments["deepspeed"])
        config = read_json(path)
        if not isinstance(config, dict) or not isinstance(config.get("zero_optimization"), dict):
            return [f"deepspeed: {path}: expected a DeepSpeed configuration, an object with zero_optimization"]
        stage = config["zero_optimization"].get("stage", 0)
        problems += [f"deepspeed: {path}: {problem}" for problem in (*_refused_settings(config), *_mismatches(config, arguments))]
    else:
        problems += _fsdp_problems(arguments, read_json)
    name = "deepspeed" if arguments["deepspeed"] else "fsdp"
    if arguments["optim"] not in ELEMENTWISE_OPTIMIZERS:
        problems.append(f"{name}: optim {arguments['optim']} cannot step slices of weights; expected one of {', '.join(ELEMENTWISE_OPTIMIZERS)}")
    if stage == 3 and (arguments["load_in_4bit"] or arguments["load_in_8bit"]):
        problems.append(f"{name}: quantised weights cannot be sliced; use deepspeed zero2, or neither load_in_4bit nor load_in_8bit")
    if stage == 3 and arguments["use_dora"]:
        problems.append(f"{name}: use_dora reads weights outside of their layers, where they are slices; use deepspeed zero2")
    return problems


def slices_weights(arguments: Mapping[str, Any]) -> bool:
    """Whether each process keeps slices of the weights (FSDP, ZeRO's stage 3), for keys that `sharding_problems` accepts."""
    if not arguments["deepspeed"]:
        return bool(arguments["fsdp"])
    config = json.loads(deepspeed_path(arguments["deepspeed"]).read_text(encoding="utf-8-sig"))
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    return isinstance(zero, dict) and zero.get("stage") == 3


def _refused_settings(config: Mapping[str, Any]) -> list[str]:
    zero = config["zero_optimization"]
    problems = [f"{name}: {reason}" for name, reason in REFUSED_BLOCKS.items() if config.get(name)]
    problems += [f"zero_optimization.{name}: not supported; remove it" for name, off in REFUSED_ZERO_KEYS.items() if zero.get(name, off) != off]
    stage = zero.get("stage", 0)
    if stage not in (1, 2, 3):
        problems.append(f"zero_optimization.stage: expected 1, 2 or 3, got {stage!r}; without the deepspeed key several processes train with DDP")
    if stage == 1 and (config.get("data_types") or {}).get("grad_accum_dtype"):
        problems.append("data_types.grad_accum_dtype: not with stage 1, where DeepSpeed would change to another kind of engine; use stage 2")
    if (config.get("bf16") or {}).get("check_grad_overflow") is False:
        problems.append("bf16.check_grad_overflow: false would make steps on gradients that are not finite; remove it")
    for name in ("offload_optimizer", "offload_param"):
        block = zero.get(name) or {}
        device = block.get("device", "none")
        if device not in ("none", "cpu", "nvme"):
            problems.append(f"zero_optimization.{name}.device: expected none, cpu or nvme, got {device!r}")
        if device != "none" and stage < 3 and (device == "nvme" or name == "offload_param"):
            problems.append(f"zero_optimization.{name}.device {device}: only with stage 3")
        if device == "nvme" and not block.get("nvme_path"):
            problems.append(f"zero_optimization.{name}.nvme_path: missing; it names a folder on a fast disk")
        if block.get("pipeline_read") or block.get("pipeline_write"):
            problems.append(f"zero_optimization.{name}: pipeline_read and pipeline_write: state cannot be stored from a pipeline; remove them")
        if block.get("ratio", 1.0) != 1.0:
            problems.append(f"zero_optimization.{name}.ratio: expected 1, all or nothing; got {block['ratio']}")
    return problems


def _mismatches(config: Mapping[str, Any], arguments: Mapping[str, Any]) -> list[str]:
    """Values that differ from the arguments'; `auto` takes those."""
    rows, steps = arguments["per_device_train_batch_size"], arguments["gradient_accumulation_steps"]
    whole = rows * steps * int(os.environ.get("WORLD_SIZE", "1"))
    ours = {
        "train_micro_batch_size_per_gpu": ("per_device_train_batch_size", rows),
        "gradient_accumulation_steps": ("gradient_accumulation_steps", steps),
        "train_batch_size": ("per_device_train_batch_size x gradient_accumulation_steps x processes", whole),
        "gradient_clipping": ("max_grad_norm", arguments["max_grad_norm"]),
    }
    given = {name: config.get(name, "auto") for name in ours}
    for name in ("bf16", "fp16"):
        ours[f"{name}.enabled"] = (name, arguments[name])
        block = config.get(name, {})
        given[f"{name}.enabled"] = block.get("enabled", "auto") if isinstance(block, dict) else block
    return [
        f"{name} is {given[name]!r}, but {key} is {value!r}; write `auto`" for name, (key, value) in ours.items() if given[name] not in ("auto", None, value)
    ]


def _fsdp_problems(arguments: Mapping[str, Any], read_json: Read) -> list[str]:
    value, config = arguments["fsdp"], arguments["fsdp_config"] or {}
    words = value.split() if isinstance(value, str) else []
    problems = [f"fsdp: {word!r} cannot be honoured; expected true, or some of {', '.join(FSDP_WORDS)}" for word in words if word not in FSDP_WORDS]
    if isinstance(config, str):
        config = read_json(Path(config))
    for name in config:
        plain = name.removeprefix("fsdp_")
        if plain not in FSDP_KEYS:
            hint = "gradient_checkpointing does it" if plain == "activation_checkpointing" else f"FSDP2 knows {', '.join(FSDP_KEYS)}"
            problems.append(f"fsdp_config.{name}: cannot be honoured: {hint}")
    if int(config.get("version", config.get("fsdp_version", 2))) != 2:
        problems.append("fsdp_config.version: expected 2; FSDP1 is on its way out of transformers")
    return problems
