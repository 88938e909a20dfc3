"""Checkpoints against plain Hugging Face, full tuning of the same model: how long training stands still for a save, until it is safe, and what a load takes.

    PYTHONPATH=train python benchmarks/checkpoints.py

Hugging Face writes in the foreground, without bringing anything to the disk and without checksums. Interlace copies in the foreground, writes behind the
training, brings every file to the disk and notes its SHA-256; a load checks them. Each figure is the median of some saves in one process after the other.
"""

import json
import os
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from transformers import AutoTokenizer, LlavaConfig, LlavaForConditionalGeneration, Qwen2Config, SiglipImageProcessorPil, SiglipVisionConfig, Trainer
from transformers import TrainingArguments as HuggingFaceArguments

from interlace.arguments import SCHEMA_PATH, resolve
from interlace.data.demo import MODEL
from interlace.data.template import ChatTemplate
from interlace.model.loading import Processing
from interlace.model.saving import save_model, save_processing
from interlace.training import checkpoint, durable, resume, run, supervised

RESULTS = Path(__file__).parent / "results"
STEPS = 5
Seconds = defaultdict[str, list[float]]


def make_model(folder: Path) -> int:
    """Writes a random model with the demo's tokenizer; its number of parameters."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>", "<image>")}
    text = Qwen2Config(
        **{"vocab_size": len(tokenizer), "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 10, "num_attention_heads": 16},
        **{"num_key_value_heads": 16, "tie_word_embeddings": True, "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"]},
    )
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16, vision_use_head=False
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=ids["<image>"], vision_feature_layer=-1, vision_feature_select_strategy="full")
    config.tie_word_embeddings = True
    model = LlavaForConditionalGeneration(config)
    folder.mkdir()
    save_model(model, folder)
    images = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    save_processing(Processing(tokenizer, images, ChatTemplate(tokenizer, ids["<image>"]), config), folder)
    return sum(parameter.numel() for parameter in model.parameters())


def timed(seconds: Seconds, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with the time of each call noted."""

    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[name].append(time.perf_counter() - start)

    return call


def ours(model: Path, folder: Path) -> Seconds:
    """Seconds of each part of our saves and of a load."""
    seconds: Seconds = defaultdict(list)
    trainer = durable.DurableTrainer
    trainer._save_checkpoint = timed(seconds, "stands still", trainer._save_checkpoint)  # type: ignore[method-assign]
    trainer.finish_saving = timed(seconds, "waits for the one before", trainer.finish_saving)  # type: ignore[method-assign]
    trainer._restore_optimizer = timed(seconds, "load optimizer", trainer._restore_optimizer)  # type: ignore[method-assign]
    checkpoint.Saver._write = timed(seconds, "until safe", checkpoint.Saver._write)  # type: ignore[method-assign]
    run.find_checkpoint = timed(seconds, "check", resume.find_checkpoint)
    run.load_weights = timed(seconds, "load weights", run.load_weights)
    config = {
        **{"model_name_or_path": str(model), "output_dir": str(folder), "dataset": {"train": [{"data_files": "demo", "split": "validation"}]}},
        **{"max_steps": STEPS, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "resume_from_checkpoint": True, "use_cpu": True},
        **{"per_device_train_batch_size": 32, "gradient_checkpointing": False, "dataloader_num_workers": 0, "report_to": "none", "disable_tqdm": True},
    }
    schema = json.loads(SCHEMA_PATH.read_text(encoding="utf-8"))["properties"]
    arguments, problems = resolve(config, schema, dict.fromkeys(config, "benchmark"))
    assert not problems
    supervised.finetune(arguments)
    for name in ("trainer_state.json",):
        (folder / name).unlink()
    supervised.finetune({**arguments, "max_steps": STEPS + 1})
    return seconds


def theirs(model: Path, folder: Path) -> Seconds:
    """The same of plain Hugging Face: `Trainer` on the same model, random rows."""
    seconds: Seconds = defaultdict(list)
    rows = [{"input_ids": torch.randint(0, 200, (256,)), "labels": torch.randint(0, 200, (256,))} for _ in range(16)]

    def trainer(steps: int) -> Trainer:
        args = HuggingFaceArguments(
            str(folder), max_steps=steps, save_steps=1, save_total_limit=1, use_cpu=True, report_to=[], disable_tqdm=True, per_device_train_batch_size=4
        )
        made = Trainer(LlavaForConditionalGeneration.from_pretrained(model), args, train_dataset=rows)
        made._save_checkpoint = timed(seconds, "stands still", made._save_checkpoint)  # type: ignore[method-assign]
        made._load_from_checkpoint = timed(seconds, "load weights", made._load_from_checkpoint)  # type: ignore[method-assign]
        made._load_optimizer_and_scheduler = timed(seconds, "load optimizer", made._load_optimizer_and_scheduler)  # type: ignore[method-assign]
        return made

    trainer(STEPS).train()
    trainer(STEPS + 1).train(resume_from_checkpoint=True)
    return seconds


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="checkpoints-"))
    parameters = make_model(folder / "model")
    measured = {"plain Hugging Face": theirs(folder / "model", folder / "theirs"), "Interlace": ours(folder / "model", folder / "ours")}
    size = sum(path.stat().st_size for path in (folder / "ours" / "checkpoint-latest").iterdir()) / 1e9
    rows = {
        "stands still": "training stands still for a save",
        "waits for the one before": "of that, waiting for the save before",
        "until safe": "from then until it is safe on the disk",
        "check": "checksums before a load",
        "load weights": "load weights",
        "load optimizer": "load optimizer",
    }
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    lines = [
        "# Checkpoints",
        "",
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {versions}; {date.today()}.",
        f"`PYTHONPATH=train python benchmarks/checkpoints.py`: full tuning in float32, {parameters / 1e6:.0f}M parameters, {size:.2f} GB each, a save",
        "after every step, so that saves queue up behind each other: the worst case. Median seconds. Hugging Face's files are not brought to the disk, and",
        "have no checksums.",
        "",
        "| seconds | " + " | ".join(measured) + " |",
        "|---|" + "---|" * len(measured),
    ]
    for row, name in rows.items():
        values = [statistics.median(seconds[row]) if seconds[row] else None for seconds in measured.values()]
        lines.append(f"| {name} | " + " | ".join("-" if value is None else f"{value:.2f}" for value in values) + " |")
    (RESULTS / f"checkpoints_cpu_{date.today()}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
