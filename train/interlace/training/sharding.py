"""Several processes that share a model's weights, gradients and optimizer state: DeepSpeed's ZeRO (arXiv 1910.02054) and FSDP2."""

import datetime
import importlib.util
import os
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import DistributedType
from torch import nn
from torch.utils.cpp_extension import get_default_build_root
from transformers import TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from interlace.arguments import read_json
from interlace.errors import InputError
from interlace.sharding_arguments import deepspeed_path

# Always taken from the arguments: DeepSpeed's own defaults are other ones (no clipping), and what a configuration says has been compared with the arguments.
# A run resumed with another number of processes shares the same step among them, so its accumulation is another one.
FROM_ARGUMENTS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
_LONGEST_COMPILATION = 900  # seconds without a new file in its folder


def num_processes() -> int:
    """How many processes the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def deepspeed_settings(value: str, optim: str) -> dict[str, Any]:
    """The DeepSpeed configuration that the `deepspeed` key means, for `TrainingArguments`: what the arguments say is "auto".

    Raises:
        InputError: the package or the file is missing.
    """
    check_deepspeed()
    config: dict[str, Any] = read_json(deepspeed_path(value), []) | dict.fromkeys(FROM_ARGUMENTS, "auto")
    for name in ("bf16", "fp16"):
        config[name] = {**config.get(name, {}), "enabled": "auto"}
    if not optim.startswith("adamw_torch"):
        # accelerate would put DeepSpeed's Adam in the place of any optimizer whose state is offloaded, without a word
        config.setdefault("zero_force_ds_cpu_optimizer", False)
    return config


def start_processes(values: Mapping[str, Any]) -> None:
    """Joins the processes into a group, before Hugging Face would: with `ddp_timeout` on CPUs too, in DeepSpeed's own way for DeepSpeed.

    Args:
        values: the arguments.

    Raises:
        InputError: FSDP with a single process, or DeepSpeed without what it needs.
    """
    on_cpu = values["use_cpu"] or not torch.accelerator.is_available()
    if on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"  # also where there is a GPU; and DeepSpeed, which peft and accelerate import, has nothing to guess
    timeout = datetime.timedelta(seconds=values["ddp_timeout"])
    if values["fsdp"] and num_processes() == 1:
        raise InputError("fsdp needs several processes: torchrun --nproc_per_node 8 train/...")
    if values["deepspeed"] and "RANK" not in os.environ:  # no launcher: a group of one
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    elif num_processes() == 1:
        return
    if not on_cpu:
        torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", "0")))
    if values["deepspeed"]:
        check_deepspeed()
        os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])  # where pip puts ninja
        check_compilable(read_json(deepspeed_path(values["deepspeed"]), []), on_cpu)
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo" if on_cpu else None, auto_mpi_discovery=False, timeout=timeout, verbose=False)
    elif not torch.distributed.is_initialized():
        torch.distributed.init_process_group(values["ddp_backend"] or ("gloo" if on_cpu else None), timeout=timeout)


def check_deepspeed() -> None:
    """Raises:
    InputError: the package is missing.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise InputError('deepspeed: the package is not installed: pip install -e ".[deepspeed]"')


def check_compilable(config: Mapping[str, Any], on_cpu: bool) -> None:
    """DeepSpeed compiles its code for the host at the first start: what exchanges between processes on CPUs, and what steps offloaded state.

    Raises:
        InputError: the compiler is missing, or the library for asynchronous files; or a compilation that was ended has left its lock.
    """
    from deepspeed.ops.op_builder import AsyncIOBuilder, CPUAdamBuilder
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    zero = config["zero_optimization"]
    devices = {(zero.get(name) or {}).get("device") for name in ("offload_optimizer", "offload_param")}
    if "nvme" in devices and not AsyncIOBuilder().is_compatible(verbose=False):
        raise InputError("deepspeed: offloading to nvme needs libaio with its headers: apt-get install libaio-dev")
    parts = [ShareMemCommBuilder] * on_cpu + [CPUAdamBuilder] * bool(devices & {"cpu", "nvme"}) + [AsyncIOBuilder] * ("nvme" in devices)
    for lock in (lock for part in parts for lock in _abandoned_locks(part().name)):
        raise InputError(f"deepspeed: {lock} was left by a compilation that has ended, and every start would wait for it; remove it: rm {lock}")
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(shlex.split(compiler)[0]) is None:
        for part in parts:
            try:
                part().load(verbose=False)  # installed with DeepSpeed, or compiled earlier
            except RuntimeError as error:
                told = f"deepspeed compiles its code for the host at the first start, and finds no C++ compiler {compiler}: apt-get install g++, or set CXX"
                raise InputError(told) from error


def _abandoned_locks(name: str) -> list[Path]:
    """The locks on a compiled part in whose folder nothing has happened for long."""
    root, now = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()), time.time()
    locks = [*root.glob(f"{name}/lock"), *root.glob(f"*/{name}/lock")]
    return [lock for lock in locks if all(now - path.stat().st_mtime > _LONGEST_COMPILATION for path in lock.parent.iterdir())]


def settle(args: TrainingArguments) -> None:
    """What Hugging Face's arguments leave behind, put right.

    FSDP works on CPUs, but accelerate shares weights only between what it takes for GPUs, and trains with DDP otherwise, without a word.

    Models are loaded whole, on the CPU, where the processes of a machine share the files' pages; the engine takes its slices from there.

    Hugging Face would build them in slices as soon as it has seen a configuration of stage 3, tower and all.
    """
    if args.fsdp and args.use_cpu:
        args.distributed_state.distributed_type = DistributedType.MULTI_GPU  # type: ignore[union-attr]
    unset_hf_deepspeed_config()


def float32_weights(packed: nn.Module) -> dict[str, torch.Tensor]:
    """Name -> values of what learns and is float32 now, before an engine rounds it to 16 bits."""
    return {name: parameter.data for name, parameter in packed.named_parameters() if parameter.requires_grad and parameter.dtype == torch.float32}


def slice_weights(packed: nn.Module, args: TrainingArguments, max_steps: int) -> None:
    """ZeRO-3: each weight goes to the device and is sliced there before the next one comes.

    `deepspeed.initialize` would first put the whole model on every device, which the stage is there to avoid.
    """
    settings: Any = args.hf_deepspeed_config  # type: ignore[attr-defined]
    settings.trainer_config_finalize(args, packed, max_steps)
    _slice(packed, settings.config, settings.dtype(), args.device)


def _slice(module: nn.Module, config: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
    """Weights in `dtype` and in slices, buffers whole on the device."""
    import deepspeed

    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    deepspeed.zero.Init(module=module, config_dict_or_path=config, dtype=dtype)
    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            owner._buffers[name] = buffer.to(device)


def engine_of(model: nn.Module) -> str:
    """What trains a model that the Trainer has wrapped: "DeepSpeedEngine, ZeRO stage 2", "FSDPPackedModel", "DistributedDataParallel", "PackedModel"."""
    name, engine = type(model).__name__, cast(Any, model)
    return f"{name}, ZeRO stage {engine.zero_optimization_stage()}" if name == "DeepSpeedEngine" else name


def inference_engine(module: nn.Module, args: TrainingArguments) -> nn.Module:
    """A second model that never learns, on the device: whole, or under ZeRO-3 in slices as the first one is."""
    if not args.deepspeed or not args.hf_deepspeed_config.is_zero3():  # type: ignore[attr-defined]
        return module.to(args.device)
    import deepspeed

    settings: Any = args.hf_deepspeed_config  # type: ignore[attr-defined]
    config = {name: value for name, value in settings.config.items() if name not in ("optimizer", "scheduler", "zero_optimization")}
    kept = ("stage", "offload_param", "stage3_param_persistence_threshold", "stage3_prefetch_bucket_size", "stage3_max_live_parameters")
    config["zero_optimization"] = {name: settings.config["zero_optimization"][name] for name in kept if name in settings.config["zero_optimization"]}
    _slice(module, config, settings.dtype(), args.device)
    engine: nn.Module = deepspeed.initialize(model=module, config=config)[0]
    engine.eval()  # returns nothing
    return engine
