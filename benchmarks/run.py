"""One optimizer step of LoRA SFT, packed against plain Hugging Face: `make bench`, or `python benchmarks/run.py` with `train/` on PYTHONPATH.

Each variant runs in a process of its own. Parity comes first: losses within 1e-5 on the same rows in float32, or nothing is reported. CPU seconds are
process time of forward and backward; images are already in memory for both sides.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from transformers import LlavaConfig, LlavaForConditionalGeneration, Qwen2Config, SiglipVisionConfig

from interlace.data.batch import PackedBatch, Segment
from interlace.model.forward import model_inputs
from interlace.model.losses import supervised_loss
from interlace.model.tuning import Lora, tune

IMAGE, VOCABULARY, IMAGE_TOKENS = 7, 32_000, 196
CASES = {"images_1_2": (1, 2), "images_1_1_2_4": (1, 1, 2, 4)}
VARIANTS = ("hugging_face_padded", "interlace_packed")
STEPS = 4


def make_model() -> LlavaForConditionalGeneration:
    """A mini model whose vision : language cost per image resembles the 0.5B's."""
    vision = SiglipVisionConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=4, image_size=224, patch_size=16, vision_use_head=False
    )
    text = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, vision_feature_layer=-1, vision_feature_select_strategy="full", tie_word_embeddings=True
    )
    return LlavaForConditionalGeneration(config)


def make_rows(counts: tuple[int, ...]) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(ids, labels, pixel_values) per row: images first, 60 tokens of question, 50 of answer."""
    generator, rows = torch.Generator().manual_seed(1), []
    for count in counts:
        text = torch.randint(10, VOCABULARY, (110,), generator=generator)
        ids = torch.cat([torch.full((count * IMAGE_TOKENS,), IMAGE), text])
        labels = torch.cat([torch.full((len(ids) - 50,), -100), text[-50:]])
        rows.append((ids, labels, torch.randn(count, 3, 224, 224, generator=generator)))
    return rows


def pack(rows: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> PackedBatch:
    """The rows as one packed batch."""
    segments, start = [], 0
    for ids, _, _ in rows:
        segments.append(Segment(start, start + len(ids)))
        start += len(ids)
    ids, labels, pixels = (torch.cat(column) for column in zip(*rows, strict=True))
    targets = (labels >= 0).nonzero()[:, 0]
    return PackedBatch(
        input_ids=ids[None],
        position_ids=torch.cat([torch.arange(len(row[0])) for row in rows])[None],
        segments=tuple(segments),
        rows=targets - 1,
        targets=labels[targets],
        weights=torch.ones(len(targets)),
        sequence_index=torch.zeros_like(targets),
        row_numbers=tuple(range(len(rows))),
        pixel_values=pixels,
        image_index=torch.arange(len(pixels)),
        image_positions=(ids == IMAGE).nonzero()[:, 0],
    )


def measure(variant: str, counts: tuple[int, ...]) -> dict[str, Any]:
    """Loss and CPU seconds of some steps of one variant."""
    torch.set_num_threads(1)
    rows, lora = make_rows(counts), Lora(8, 16, 0.0, None)
    tuned = tune(make_model(), ["language_model"], lora, None)
    model = tuned.base
    if variant == "hugging_face_padded":
        assert tuned.tower is not None
        tuned.tower.attach_to(model)
        model.set_attn_implementation("sdpa")
        longest = max(len(ids) for ids, _, _ in rows)
        ids = torch.stack([F.pad(ids, (0, longest - len(ids))) for ids, _, _ in rows])
        labels = torch.stack([F.pad(labels, (0, longest - len(labels)), value=-100) for _, labels, _ in rows])
        mask, pixels = (torch.arange(longest) < torch.tensor([[len(row[0])] for row in rows])).long(), torch.cat([row[2] for row in rows])

    batch = pack(rows)
    losses, seconds = [], []
    for _ in range(STEPS):
        start = time.process_time()
        if variant == "hugging_face_padded":
            loss = model(input_ids=ids, attention_mask=mask, labels=labels, pixel_values=pixels).loss
        else:
            scores = tuned.packed(**model_inputs(batch, tuned.tower))
            loss = supervised_loss(scores.log_probs, batch.weights, batch.weights.sum())
        loss.backward()
        seconds.append(time.process_time() - start)
        losses.append(loss.item())
        model.zero_grad()
    return {"loss": losses[0], "min": min(seconds), "median": statistics.median(seconds), "mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", nargs=2, metavar=("VARIANT", "CASE"))
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure[0], CASES[options.measure[1]])))
        return
    lines = ["| images per row | variant | CPU s per step, min | median | peak MiB | loss |", "|---|---|---|---|---|---|"]
    for case, counts in CASES.items():
        results = {}
        for variant in VARIANTS:
            done = subprocess.run([sys.executable, __file__, "--measure", variant, case], capture_output=True, text=True, check=True)
            results[variant] = json.loads(done.stdout.splitlines()[-1])
        losses = [result["loss"] for result in results.values()]
        assert abs(losses[0] - losses[1]) <= 1e-5, f"{case}: the losses differ ({losses}); nothing is reported"
        for variant, r in results.items():
            lines.append(f"| {list(counts)} | {variant} | {r['min']:.2f} | {r['median']:.2f} | {r['mib']:.0f} | {r['loss']:.6f} |")
        ratio = results[VARIANTS[0]]["min"] / results[VARIANTS[1]]["min"]
        lines.append(f"| {list(counts)} | ratio of minima | {ratio:.2f}x | | | |")
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()}"
    title = f"LoRA SFT, one step, mini model, float32, 1 thread, {STEPS} steps; {versions}"
    note = "Plain Hugging Face at its best here: frozen tower without gradient, LoRA on the language model only, no checkpointing."
    text = "\n".join([f"# {title}", "", note, "", *lines, ""])
    path = Path(__file__).parent / "results" / f"sft_step_cpu_{date.today()}.md"
    path.write_text(text)
    print(f"{text}\n{path}")


if __name__ == "__main__":
    main()
