"""Two processes equal one, under every engine: DDP, ZeRO 1 to 3, FSDP2; for every mix of ranks with and without images.

The other side of each comparison is a plain loop in this process, without trainer or engine.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from interlace.data.batch import Collator, NumberedRows
from interlace.model.forward import model_inputs
from interlace.model.losses import supervised_loss
from interlace.training import supervised
from tests.conftest import ROOT, write_rows

Make = Callable[..., dict[str, Any]]
Steps = list[list[list[list[int]]]]  # step -> rank -> micro-batch -> rows
ENGINES = ["ddp", "zero1", "zero2", "zero3", "fsdp2"]
WRAPPED = {"ddp": "DistributedDataParallel", "fsdp2": "FSDPPackedModel"}
ALL_PARTS = "vision_tower,projector,language_model"
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "tower": {"tunable_parts": ALL_PARTS},
    "lora": {"lora": True, "lora_rank": 4, "lora_alpha": 8},
}
# rows 0, 4, 8, .. have no image, row n has n % 4
MIXES: Steps = [
    [[[1, 2]], [[3]]],  # image, image
    [[[5, 4]], [[8]]],  # image, text
    [[[0]], [[6, 7]]],  # text, image
    [[[12]], [[16, 20]]],  # text, text
    [[[4]], [[0]]],  # text, text: a stale gradient would show
    [[[9]], [[10]]],
]
ACCUMULATED: Steps = [
    [[[0], [1]], [[4], [8]]],  # the only image last
    [[[2, 3], [4]], [[8], [12]]],  # the only image first
    [[[0], [5]], [[6], [4]]],
    [[[16], [20]], [[0], [8]]],
]


def engine_arguments(engine: str, folder: Path) -> dict[str, Any]:
    if engine == "ddp":
        return {}
    if engine == "fsdp2":
        return {"fsdp": True}
    zero: dict[str, Any] = {"stage": int(engine[4]), "reduce_bucket_size": 5000, "allgather_bucket_size": 5000}
    if zero["stage"] == 3:  # some weights stay whole, most do not
        zero |= {"stage3_param_persistence_threshold": 40, "stage3_prefetch_bucket_size": 5000, "stage3_max_live_parameters": 5000, "sub_group_size": 9000}
    if engine.endswith("offload"):
        zero["offload_optimizer"] = {"device": "cpu"}
        zero |= {"offload_param": {"device": "cpu"}} if zero["stage"] == 3 else {}
    if engine.endswith("nvme"):
        del zero["sub_group_size"]
        zero["offload_optimizer"] = {"device": "nvme", "nvme_path": str(folder / "nvme")}
    path = folder / f"{engine}.json"
    path.write_text(json.dumps({"zero_optimization": zero}))
    return {"deepspeed": str(path)}


def launch(cases: list[dict[str, Any]], folder: Path, processes: int = 2, timeout_seconds: int = 400) -> Path:
    """Runs the cases one after the other in one start of the processes; returns where the results are."""
    results = folder / f"results{processes}"
    results.mkdir(exist_ok=True)
    (folder / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--rdzv_backend", "c10d"]
    command += ["--rdzv_endpoint", "127.0.0.1:0", "-m", "tests.distributed_worker", str(folder / "cases.json"), str(results)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'train'}", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=timeout_seconds, check=False)
    assert all((results / f"done{rank}").exists() for rank in range(processes)), done.stdout[-2000:] + done.stderr[-6000:]
    return results


def plain_sgd(arguments: dict[str, Any], steps: Steps) -> Iterator[tuple[float, dict[str, torch.Tensor]]]:
    """(loss, weights) after each step of plain gradient descent over the whole step's rows, in one process, without an engine."""
    plain = {**arguments, "deepspeed": None, "fsdp": None}
    args = supervised.training_arguments(plain)
    path = supervised.resolve_model_path(plain["model_name_or_path"])
    processing = supervised.processing_of(path, plain)
    reader = supervised.row_reader(plain, processing)
    rows, _ = supervised.load_rows(supervised.read_entries(plain["dataset"]["train"], args.seed), reader, plain, False)
    tuned = supervised.load_tuned_model(path, plain, args)
    for name, parameter in tuned.packed.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.linspace(-0.2, 0.2, parameter.numel()).view_as(parameter))
    collate = Collator(processing.process_images, processing.config.image_token_id)
    numbered = NumberedRows(rows)
    for step in steps:
        batches = [collate([numbered[row] for row in micro]) for rank in step for micro in rank]
        total = sum(float(batch.weights.sum()) for batch in batches)
        loss = torch.zeros(())
        for batch in batches:
            loss = loss + supervised_loss(tuned.packed(**model_inputs(batch, tuned.tower)).log_probs, batch.weights, total)
        tuned.packed.zero_grad()
        loss.backward()
        for parameter in tuned.packed.parameters():
            if parameter.requires_grad and parameter.grad is not None:
                parameter.data -= arguments["learning_rate"] * parameter.grad
        yield float(loss.detach()), {name: parameter.detach().clone() for name, parameter in tuned.packed.named_parameters()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("distributed")


def sgd_arguments(make: Make, folder: Path, **changes: Any) -> dict[str, Any]:
    data = folder / "data" / "rows.json"
    if not data.exists():
        write_rows(folder / "data", 24)
    return make(data, optim="sgd", learning_rate=0.01, max_grad_norm=0.0, weight_decay=0.0, lr_scheduler_type="constant", ddp_timeout=60, **changes)
