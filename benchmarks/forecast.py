"""The forecast against what a step really takes: `python benchmarks/forecast.py` with `train/` on PYTHONPATH.

Each case is measured in a process of its own, one thread, on random pixels and ids. Memory is the peak of resident memory above what Python and its libraries
hold after a first small product; blocks of the allocator above 64 KiB go back to the system at once (glibc's MALLOC_ environment variables), so that freed
memory is not counted. Time is process time of forward, backward and optimizer, the fastest of some steps; the probe sees smaller batches than the step that
it forecasts. Nothing is asserted.
"""

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import LlavaConfig, LlavaForConditionalGeneration, PreTrainedModel, Qwen2Config, SiglipVisionConfig
from transformers.initialization import no_init_weights

from interlace.arguments import SCHEMA_PATH
from interlace.data.batch import PackedBatch, Segment
from interlace.data.demo import MODEL
from interlace.model.costs import shape_of, step_costs
from interlace.model.forward import model_inputs
from interlace.model.loading import load_model
from interlace.model.losses import supervised_loss
from interlace.model.tuning import Lora, TunedModel, tune
from interlace.training.forecast import Sharding, memory_of, micro_shapes, rehearse_all, sizes_of
from interlace.training.outline import compute_dtype, empty_model
from interlace.training.planning import Columns
from interlace.training.probe import probe

STEPS = 3
ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}


@dataclass(frozen=True)
class Case:
    """A model, the images of each row of its micro-batch, how many of these rows the probe's batches have, text tokens per row, and the keys that matter."""

    model: str
    images: tuple[int, ...]
    probed: tuple[int, ...] = (1, 2)
    text: int = 110
    answer: int = 50
    keys: dict[str, Any] = field(default_factory=dict)


LORA = {"lora": True, "lora_rank": 16, "lora_dropout": 0.05}
CASES = {
    "demo, LoRA": Case("demo", (1, 2, 3, 0) * 16, (4, 8, 16, 32), 40, 8, LORA),
    "demo, full": Case("demo", (1, 2, 3, 0) * 16, (4, 8, 16, 32), 40, 8),
    "mini, LoRA": Case("mini", (1, 1, 2, 4), keys=LORA),
    "mini, LoRA, checkpointing": Case("mini", (1, 1, 2, 4), keys={**LORA, "gradient_checkpointing": True}),
    "mini, full": Case("mini", (1, 1, 2, 4)),
    "mini, full with tower": Case("mini", (1, 1, 2, 4), keys={"tunable_parts": "vision_tower,projector,language_model"}),
    "mini, full with tower, checkpointing": Case(
        "mini", (1, 1, 2, 4), keys={"tunable_parts": "vision_tower,projector,language_model", "gradient_checkpointing": True}
    ),
    "0.5B, LoRA, bf16": Case("0.5B", (0, 1, 1), keys={**LORA, "bf16": True}),
    "0.5B, LoRA, bf16, checkpointing": Case("0.5B", (0, 1, 1), keys={**LORA, "bf16": True, "gradient_checkpointing": True}),
    "0.5B, full, bf16": Case("0.5B", (0, 1, 1), keys={"bf16": True}),
}


def config_05b() -> LlavaConfig:
    """LLaVA-NeXT-Interleave 0.5B: 864,031,264 parameters."""
    vision = SiglipVisionConfig(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=26, num_attention_heads=16, image_size=384, patch_size=14, vision_use_head=False
    )
    text = Qwen2Config(
        vocab_size=152_000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=16,
        tie_word_embeddings=True,
    )
    return LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=151_646, vision_feature_layer=-1, vision_feature_select_strategy="full", tie_word_embeddings=True
    )


def make_model() -> LlavaForConditionalGeneration:
    """A mini model whose vision : language cost per image resembles the 0.5B's; float32, random weights."""
    vision = SiglipVisionConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=4, image_size=224, patch_size=16, vision_use_head=False
    )
    text = Qwen2Config(
        vocab_size=32_000,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=7, vision_feature_layer=-1, vision_feature_select_strategy="full", tie_word_embeddings=True
    )
    return LlavaForConditionalGeneration(config)


def make(case: Case) -> PreTrainedModel:
    """The case's model with weights."""
    if case.model == "demo":
        return load_model(str(MODEL), torch.float32)
    if case.model == "mini":
        return make_model()
    torch.set_default_dtype(torch.bfloat16)
    with no_init_weights():
        model = LlavaForConditionalGeneration(config_05b())
    torch.set_default_dtype(torch.float32)
    model.tie_weights()
    model.config.dtype = torch.bfloat16  # as in the config.json of the published model
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    return model


def arguments_of(case: Case) -> dict[str, Any]:
    """Every key of the case."""
    schema = json.loads(SCHEMA_PATH.read_text())["properties"]
    return {**{name: spec.get("default") for name, spec in schema.items()}, "gradient_checkpointing": False, **case.keys}


def tuned_model(case: Case) -> TunedModel:
    """The case's model as the trainer has it."""
    arguments, model = arguments_of(case), make(case)
    lora = Lora(arguments["lora_rank"], arguments["lora_alpha"], arguments["lora_dropout"], None) if arguments["lora"] else None
    keeps_types = lora is None and arguments["bf16"]
    tuned = tune(model, arguments["tunable_parts"].split(","), lora, None, frozen_dtype=None if keeps_types else compute_dtype(arguments))
    if arguments["gradient_checkpointing"]:
        tuned.packed.activation_checkpointing_enable()
        tuned.packed.checkpoint_tower()
    return tuned


def make_batch(config: LlavaConfig, images: tuple[int, ...], case: Case) -> PackedBatch:
    """Rows of images followed by text whose last tokens are supervised, as one micro-batch."""
    per_image = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    segments, positions, rows, start = [], [], [], 0
    for count in images:
        length = count * per_image + case.text
        segments.append(Segment(start, start + length))
        positions.append(torch.arange(start, start + count * per_image))
        rows.append(torch.arange(start + length - case.answer - 1, start + length - 1))
        start += length
    supervised, side = torch.cat(rows), config.vision_config.image_size
    return PackedBatch(
        input_ids=torch.randint(10, 100, (1, start)),
        position_ids=torch.cat([torch.arange(segment.end - segment.start) for segment in segments])[None],
        segments=tuple(segments),
        rows=supervised,
        row_index=torch.arange(len(supervised)),
        targets=torch.randint(10, 100, supervised.shape),
        weights=torch.ones(len(supervised)),
        sequence_index=torch.zeros_like(supervised),
        row_numbers=tuple(range(len(images))),
        pixel_values=torch.randn(sum(images), 3, side, side) if sum(images) else None,
        image_index=torch.arange(sum(images)),
        image_positions=torch.cat(positions),
    )


def status(name: str) -> int:
    """A figure of /proc/self/status in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) << 10


def measure(case: Case) -> dict[str, float]:
    """Peak bytes and seconds of real steps."""
    torch.set_num_threads(1)
    (torch.randn(64, 64).bfloat16() @ torch.randn(64, 64).bfloat16()).sum()
    baseline = status("VmRSS")
    tuned, dtype = tuned_model(case), compute_dtype(arguments_of(case))
    tuned.packed.train()
    parameters = [parameter for parameter in tuned.packed.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    batch, seconds = make_batch(tuned.base.config, case.images, case), []
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    for _ in range(STEPS):
        start = time.process_time()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not torch.float32):
            scores = tuned.packed(**model_inputs(batch, tuned.tower))
        supervised_loss(scores.log_probs, batch.weights, batch.weights.sum()).backward()
        del scores
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - start)
    return {"bytes": status("VmHWM") - baseline, "seconds": min(seconds)}


def forecast(case: Case) -> dict[str, float]:
    """What the forecast says of the same step: memory from the rehearsal, seconds from the probe on parts of the batch."""
    torch.set_num_threads(1)
    arguments, real = arguments_of(case), tuned_model(case)
    dtype, config = compute_dtype(arguments), real.base.config
    empty = empty_model(config, arguments)
    checkpointing = arguments["gradient_checkpointing"]
    costs, sizes = step_costs(empty, checkpointing, checkpointing), sizes_of(empty, arguments)
    batch = make_batch(config, case.images, case)
    lengths = np.array([segment.end - segment.start for segment in batch.segments])
    shapes = micro_shapes([list(range(len(lengths)))], Columns(lengths, np.array(case.images), np.full(len(lengths), case.answer)))
    memory = memory_of(sizes, rehearse_all(empty, shapes, dtype), Sharding())
    small = (make_batch(config, case.images[:count], case) for count in case.probed)
    speed = probe(real, small, costs, dtype, torch.device("cpu"), clock=time.process_time)
    seconds = speed.seconds(costs, shape_of(batch)) + speed.step_seconds
    return {"bytes": memory.total, "seconds": seconds, "flops": costs.total(shape_of(batch)).executed, "tokens": batch.num_tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", nargs=2, metavar=("measure|forecast", "CASE"))
    parser.add_argument("--only", default="", help="cases whose name contains this")
    options = parser.parse_args()
    if options.run:
        kind, name = options.run
        print(json.dumps((measure if kind == "measure" else forecast)(CASES[name])))
        return
    lines = ["| case | tokens | TFLOP | measured MiB | forecast | error | measured s | forecast | error |", "|---|---|---|---|---|---|---|---|---|"]
    for name in (name for name in CASES if options.only in name):
        result = {}
        for kind in ("measure", "forecast"):
            words = [sys.executable, __file__, "--run", kind, name]
            done = subprocess.run(words, capture_output=True, text=True, check=True, env={**os.environ, **ALLOCATOR})
            result[kind] = json.loads(done.stdout.splitlines()[-1])
        real, said = result["measure"], result["forecast"]
        errors = {key: said[key] / real[key] - 1 for key in ("bytes", "seconds")}
        memory = f"{real['bytes'] / 2**20:,.0f} | {said['bytes'] / 2**20:,.0f} | {errors['bytes']:+.1%}"
        seconds = f"{real['seconds']:.2f} | {said['seconds']:.2f} | {errors['seconds']:+.1%}"
        lines.append(f"| {name} | {said['tokens']:,} | {said['flops'] / 1e12:.3f} | {memory} | {seconds} |")
        print(lines[-1], flush=True)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()}"
    text = "\n".join(
        [f"# Forecast against measurement, one step, 1 thread, {STEPS} steps; {versions}", "", (__doc__ or "").split("\n", 2)[2].strip(), "", *lines, ""]
    )
    if not options.only:
        path = Path(__file__).parent / "results" / f"forecast_cpu_{date.today()}.md"
        path.write_text(text)
        print(path)


if __name__ == "__main__":
    main()
