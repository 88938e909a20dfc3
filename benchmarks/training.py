"""Whole training runs against other tools: `make bench`, or `python benchmarks/training.py` with `train/` on PYTHONPATH.

Every variant trains the same model from the same weights on the same rows in the same order, through its own trainer (ours as `supervised_finetune.py` runs
it), in a process of its own, on one thread. Parity comes first: the first step's loss within 1e-5 and its gradient's norm within 1e-4 of ours in float32, or
the variant is not reported. Seconds are process CPU time from the end of one step to the end of the next: reading, decoding, forward, backward, optimizer.
"""

import argparse
import functools
import json
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
import transformers
from forecast import config_05b
from peft import LoraConfig, PeftModel, get_peft_model
from scaling import config_7b
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    TrainerCallback,
)

from interlace.arguments import SCHEMA_PATH, resolve
from interlace.data.demo import MODEL
from interlace.data.template import ChatTemplate
from interlace.model.forward import FrozenTower
from interlace.model.loading import Processing
from interlace.model.saving import save_model, save_processing

PATCH, VOCABULARY, PROMPT, ANSWER = 14, 9408, 60, 50
MIXTURE = {1: 25, 2: 30, 3: 10, 4: 10, 5: 8, 6: 5, 8: 7, 10: 3, 16: 2}  # images per row -> percent of rows
MINI_VISION = {"hidden_size": 256, "intermediate_size": 956, "num_hidden_layers": 9, "num_attention_heads": 4}
SMALL_VISION = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
MINI_TEXT = {"vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 4}
MINI_TEXT |= {"num_key_value_heads": 4, "tie_word_embeddings": False}
TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
LEARNING_RATE = 1e-3
PEERS = {"trl_default": "", "trl_tuned": "", "hugging_face": "", "llama_factory": "llamafactory", "ms_swift": "ms-swift"}  # variant -> interpreter
NAMES = {
    "trl_default": "TRL, default",
    "trl_tuned": "TRL, tuned",
    "hugging_face": "Hugging Face Trainer",
    "llama_factory": "LLaMA-Factory",
    "ms_swift": "ms-swift",
    "interlace": "Interlace, first epoch",
    "interlace_cached": "Interlace, cached features",
}


@dataclass(frozen=True)
class Case:
    """What is trained, and how.

    images: of the rows of a step; None draws them from the mixture, and our micro-batches are packed to as many tokens on average.
    lora: an adapter, else projector and language model. steps: of an epoch. side: of the images. rows: of the mixture in a step.
    model: `mini`, `small_tower`, `0.5b` or `7b`. prompt, answer: their tokens. scene: whether all rows ask about the same images.
    device: `cpu`, or `cuda` in bfloat16. workers: processes that read. cache: `feature_cache`. epochs: of ours; the others have one.
    """

    images: tuple[int, ...] | None
    lora: bool
    steps: int
    side: int = 384
    rows: int = 4
    model: str = "mini"
    prompt: int = PROMPT
    answer: int = ANSWER
    scene: bool = False
    device: str = "cpu"
    workers: int = 0
    cache: str = "memory"
    epochs: int = 2

    @property
    def rows_per_step(self) -> int:
        return self.rows if self.images is None else len(self.images)


CASES = {
    "lora_1_2": Case((1, 2), True, 4),
    "lora_1_1_2_4": Case((1, 1, 2, 4), True, 3),
    "full_1_2": Case((1, 2), False, 4),
    "lora_mixture": Case(None, True, 16, 112),
    "lora_scene": Case((16,) * 8, True, 2, 140, prompt=12, answer=4, scene=True),  # as in ScanQA: many questions about 16 frames
}


# --- the same for all ---


def make_folder(case: Case, folder: Path) -> None:
    """Model, adapter, images and rows."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    config = make_config(case, tokenizer)
    image_token_id = config.image_token_id
    torch.manual_seed(0)
    with torch.device(case.device):
        torch.set_default_dtype(torch.float32 if case.device == "cpu" else torch.bfloat16)
        model = LlavaForConditionalGeneration(config)
        torch.set_default_dtype(torch.float32)
    (folder / "model").mkdir()
    save_model(model, folder / "model")
    images = SiglipImageProcessorPil(size={"height": case.side, "width": case.side})
    save_processing(Processing(tokenizer, images, ChatTemplate(tokenizer, image_token_id), config), folder / "model")
    torch.manual_seed(7)
    settings = LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(model, settings).save_pretrained(folder / "adapter")
    write_rows(case, folder, tokenizer)


def make_config(case: Case, tokenizer: Any) -> LlavaConfig:
    """Of the mini model, whose FLOP ratios are like the 0.5B's, or of LLaVA-NeXT-Interleave 0.5B and 7B."""
    if case.model in ("mini", "small_tower"):
        vision = SiglipVisionConfig(**(MINI_VISION if case.model == "mini" else SMALL_VISION), image_size=case.side, patch_size=PATCH, vision_use_head=False)
        config = LlavaConfig(vision_config=vision, text_config=Qwen2Config(**MINI_TEXT), vision_feature_layer=-1, vision_feature_select_strategy="full")
    else:
        config = {"0.5b": config_05b, "7b": config_7b}[case.model]()
    config.image_token_id, config.text_config.pad_token_id = tokenizer.convert_tokens_to_ids("<image>"), tokenizer.pad_token_id
    return config


def write_rows(case: Case, folder: Path, tokenizer: Any) -> None:
    """`rows.json`, in LLaVA's format."""
    randomness, pixels = random.Random(0), np.random.default_rng(0)
    words = [f" {word}" for word in ("cat", "dog", "tree", "left", "right", "red", "house", "three", "seven", "digit", "image")]
    (folder / "images").mkdir()
    counts = (
        [case.images] * case.steps
        if case.images
        else [tuple(randomness.choices(list(MIXTURE), list(MIXTURE.values()), k=case.rows)) for _ in range(case.steps)]
    )
    rows: list[dict[str, Any]] = []
    for count in (count for step in counts for count in step):
        names = rows[0]["image"] if rows and case.scene else []
        for _ in range(count - len(names)):
            names.append(f"images/{len(rows)}_{len(names)}.png")
            PIL.Image.fromarray(pixels.integers(0, 255, (case.side, case.side, 3), dtype=np.uint8)).save(folder / names[-1])

        def write(length: int) -> str:
            text = ""
            while len(tokenizer(text)["input_ids"]) < length:
                text += randomness.choice(words)
            return text.strip()

        question = "<image>" * count + write(case.prompt)
        rows.append({"image": names, "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": write(case.answer)}]})
    (folder / "rows.json").write_text(json.dumps(rows))


class Meter(TrainerCallback):  # type: ignore[misc]
    """CPU seconds of each step, losses and gradient norms; images that towers have seen, tokens (padding too) that language models have seen."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.seconds: list[float] = []
        self.logs: list[dict[str, float]] = []
        self.images = self.tokens = 0
        self.per_step: list[tuple[int, int]] = []
        self._last = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Counts what goes through a model; recomputation in a backward pass counts again."""
        seen = {"SiglipVisionEmbeddings": ("pixel_values", self._see), "Qwen2DecoderLayer": ("hidden_states", self._read)}
        for module in model.modules():
            name, note = seen.get(type(module).__name__, ("", None))
            if note is not None and getattr(getattr(module, "self_attn", None), "layer_idx", 0) == 0:
                module.register_forward_pre_hook(
                    lambda _, inputs, named, name=name, note=note: note(named.get(name, next(iter(inputs), None))), with_kwargs=True
                )

    def _see(self, pixel_values: torch.Tensor) -> None:
        self.images += len(pixel_values)

    def _read(self, hidden: torch.Tensor) -> None:
        self.tokens += hidden.shape[0] * hidden.shape[1]

    def _now(self) -> float:
        """Of the process on CPUs, where others may run beside it; of the wall on a GPU, once it has done all it was asked."""
        if self.case.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self._last = self._now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        now = self._now()
        self.seconds.append(now - self._last)
        self.per_step.append((self.images, self.tokens))
        self.images = self.tokens = 0
        self._last = now

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.logs.append({name: float(logs[name]) for name in ("loss", "grad_norm")})

    def result(self, steps: slice, rows: int) -> dict[str, Any]:
        images, tokens = (sum(values[i] for values in self.per_step[steps]) for i in (0, 1))
        memory = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()} if self.case.device == "cuda" else {}
        return memory | {
            "seconds": self.seconds[steps],
            "losses": [log["loss"] for log in self.logs[steps]],
            "grad_norm": self.logs[0]["grad_norm"],
            "images": images,
            "tokens": tokens,
            "rows": rows,
            "mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }


def rows_of(case: Case, folder: Path) -> list[dict[str, Any]]:
    """As many of the rows as the case's epoch takes."""
    rows: list[dict[str, Any]] = json.loads((folder / "rows.json").read_text())
    return rows[: case.rows_per_step * case.steps]


def settings(case: Case, output_dir: Path) -> dict[str, Any]:
    """What every trainer is told."""
    return {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": case.rows_per_step,
        "gradient_accumulation_steps": 1,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "adam_beta2": 0.999,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": case.device == "cpu",
        "bf16": case.device == "cuda",
        "disable_tqdm": True,
        "dataloader_num_workers": case.workers,
        "dataloader_pin_memory": case.device == "cuda",
        "seed": 0,
    }


# --- ours ---


def interlace(case: Case, folder: Path) -> dict[str, Any]:
    """Epochs through `finetune`: the first fills the cache of features, the second finds them."""
    from interlace.data.packing import Plan
    from interlace.training import planning, run, supervised

    meter, rows = Meter(case), rows_of(case, folder)
    planning.Plan = functools.partial(Plan, shuffle=False)  # type: ignore[misc, assignment]
    own = (
        {"lora": True, "lora_path": str(folder / "adapter"), "tunable_parts": "language_model"} if case.lora else {"tunable_parts": "projector,language_model"}
    )
    config = (
        settings(case, folder / "interlace")
        | own
        | {
            "model_name_or_path": str(folder / "model"),
            "dataset": {"train": [{"data_files": str(folder / "rows.json"), "image_folder": str(folder), "sampling_strategy": f"first:{len(rows)}"}]},
            "packing": case.images is None,
            "gradient_checkpointing": False,
            "feature_cache": case.cache,
            "share_prefix": case.scene,
            "num_train_epochs": case.epochs,
            "max_length": 100_000,
            "cache_dir": str(folder / "cache"),
            "preprocessing_num_workers": 0,
            "overwrite_output_dir": True,
        }
    )
    arguments, problems = resolve(config, json.loads(SCHEMA_PATH.read_text())["properties"], dict.fromkeys(config, "benchmark"))
    assert not problems, problems
    original, features = run.guarded_trackers, FrozenTower.features

    def trackers(*values: Any) -> list[Any]:
        return [*original(*values), meter]

    def counted(tower: FrozenTower, pixel_values: torch.Tensor, grids: Sequence[tuple[int, int]] = ()) -> torch.Tensor:
        meter.images += len(pixel_values)
        return features(tower, pixel_values, grids)

    run.guarded_trackers, FrozenTower.features = trackers, counted  # type: ignore[method-assign, assignment]
    supervised.finetune(arguments)
    steps = len(meter.seconds) // case.epochs
    epochs = [meter.result(slice(epoch * steps, (epoch + 1) * steps), len(rows)) for epoch in range(case.epochs)]
    return dict(zip(("first", "cached"), epochs, strict=False))


# --- the others ---


def load_model(case: Case, folder: Path) -> Any:
    """The model with what learns set."""
    model = AutoModelForImageTextToText.from_pretrained(folder / "model", dtype=torch.float32)
    if case.lora:
        return PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True)
    model.model.vision_tower.requires_grad_(False)
    return model


def load_processor(folder: Path) -> Any:
    """The model's processor, with a template that ends behind the last answer: its line break would be one more supervised token than ours has."""
    processor: Any = AutoProcessor.from_pretrained(folder / "model")
    before = "{{- '\\n' -}}{%- endfor -%}{%- if add"
    assert before in processor.chat_template
    inside = "{%- if not loop.last or message['role'] != 'assistant' -%}{{- '\\n' -}}{%- endif -%}{%- endfor -%}{%- if add"
    processor.chat_template = processor.chat_template.replace(before, inside)
    return processor


def images_of(row: dict[str, Any], folder: Path) -> list[str]:
    return [str(folder / name) for name in row["image"]]


def trl(case: Case, folder: Path, is_default: bool) -> dict[str, Any]:
    """`SFTTrainer` on prompt and completion; by default it recomputes activations. Its fused head is told that it may leave rows out on CPUs, too."""
    import datasets
    import trl.trainer.utils
    from trl import SFTConfig, SFTTrainer

    trl.trainer.utils._use_triton = lambda device: True  # type: ignore[attr-defined]
    rows = rows_of(case, folder)
    data: list[dict[str, Any]] = []
    for row in rows:
        question, answer = (turn["value"] for turn in row["conversations"])
        parts = [*({"type": "image"} for _ in row["image"]), {"type": "text", "text": question.replace("<image>", "")}]
        prompt = [{"role": "user", "content": parts}]
        completion = [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        data.append({"prompt": prompt, "completion": completion, "images": images_of(row, folder)})
    dataset = datasets.Dataset.from_list(data).cast_column("images", datasets.List(datasets.Image()))

    class Ordered(SFTTrainer):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    meter, processor = Meter(case), load_processor(folder)
    config = SFTConfig(**settings(case, folder / "trl"), gradient_checkpointing=is_default, max_length=None, num_train_epochs=1)
    trainer = Ordered(model=load_model(case, folder), args=config, train_dataset=dataset, processing_class=processor, callbacks=[meter])
    trainer.train()
    return {"first": meter.result(slice(0, None), len(rows))}


def hugging_face(case: Case, folder: Path) -> dict[str, Any]:
    """`Trainer` with a collator as its documentation suggests: the processor pads, prompts are masked. Frozen tower, no checkpointing."""
    from transformers import Trainer, TrainingArguments

    rows, processor = rows_of(case, folder), load_processor(folder)

    def conversation(row: dict[str, Any]) -> list[dict[str, Any]]:
        question, answer = (turn["value"] for turn in row["conversations"])
        parts = [*({"type": "image"} for _ in row["image"]), {"type": "text", "text": question.replace("<image>", "")}]
        return [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]

    def collate(batch: list[dict[str, Any]]) -> Any:
        turns = [conversation(row) for row in batch]
        texts = [processor.apply_chat_template(turn) for turn in turns]
        images = [[PIL.Image.open(path) for path in images_of(row, folder)] for row in batch]
        inputs = processor(text=texts, images=images, return_tensors="pt", padding=True, padding_side="right")
        inputs["labels"] = inputs["input_ids"].clone()
        for number, (turn, opened) in enumerate(zip(turns, images, strict=True)):
            prompt = processor.apply_chat_template(turn[:1], add_generation_prompt=True)
            inputs["labels"][number, : processor(text=prompt, images=opened, return_tensors="pt")["input_ids"].shape[1]] = -100
        inputs["labels"][inputs["attention_mask"] == 0] = -100
        return inputs

    class Ordered(Trainer):
        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    meter, model = Meter(case), load_model(case, folder)
    args = TrainingArguments(**settings(case, folder / "hugging_face"), remove_unused_columns=False, num_train_epochs=1)
    trainer = Ordered(model=model, args=args, train_dataset=rows, data_collator=collate, callbacks=[meter])  # type: ignore[arg-type]
    trainer.train()
    return {"first": meter.result(slice(0, None), len(rows))}


def llama_factory(case: Case, folder: Path) -> dict[str, Any]:
    """`run_exp` without checkpointing: its LLaVA plugin under ChatML (its own template speaks Vicuna) that ends behind the answer, as ours does."""
    from llamafactory.data.formatter import StringFormatter
    from llamafactory.data.mm_plugin import get_mm_plugin
    from llamafactory.data.template import register_template
    from llamafactory.train.tuner import run_exp

    register_template(
        name="llava_chatml",
        format_user=StringFormatter(slots=["<|im_start|>user\n{{content}}<|im_end|>\n<|im_start|>assistant\n"]),
        format_assistant=StringFormatter(slots=["{{content}}<|im_end|>"]),
        format_system=StringFormatter(slots=["<|im_start|>system\n{{content}}<|im_end|>\n"]),
        default_system="You are a helpful assistant.",
        mm_plugin=get_mm_plugin(name="llava", image_token="<image>"),
    )
    columns = {"messages": "conversations", "images": "image"}
    (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "taken.json", "formatting": "sharegpt", "columns": columns}}))
    rows, meter = rows_of(case, folder), Meter(case)
    (folder / "taken.json").write_text(json.dumps([row | {"image": images_of(row, folder)} for row in rows]))
    places = {"model_name_or_path": str(folder / "model"), "dataset_dir": str(folder), "dataset": "rows", "template": "llava_chatml", "stage": "sft"}
    tuning = {"finetuning_type": "lora", "adapter_name_or_path": str(folder / "adapter")} if case.lora else {"finetuning_type": "full"}
    tuning |= {"freeze_vision_tower": True, "freeze_multi_modal_projector": case.lora, "disable_gradient_checkpointing": True}
    how = {"do_train": True, "cutoff_len": 100_000, "disable_shuffling": True, "num_train_epochs": 1, "overwrite_cache": True}
    run_exp({**settings(case, folder / "llama_factory"), **places, **tuning, **how}, callbacks=[meter])
    return {"first": meter.result(slice(0, None), len(rows))}


def ms_swift(case: Case, folder: Path) -> dict[str, Any]:
    """`SwiftSft` without checkpointing: its LLaVA template under ChatML, without its line break behind every image and behind the answer."""
    from swift.arguments import SftArguments
    from swift.pipelines.train.sft import SwiftSft
    from swift.template import register_template
    from swift.template.templates.llava import LlavaHfTemplate
    from swift.template.templates.utils import ChatmlTemplateMeta

    class Template(LlavaHfTemplate):  # type: ignore[misc]
        def replace_tag(self, *_: Any, **__: Any) -> list[str]:
            return ["<image>"]

    class Measured(SwiftSft):  # type: ignore[misc]
        def train(self, trainer: Any) -> None:
            trainer.add_callback(meter)
            trainer.train()

    system, end = "You are a helpful assistant.", ["<|im_end|>"]
    register_template(ChatmlTemplateMeta("llava_chatml", template_cls=Template, default_system=system, suffix=end))
    rows, meter = rows_of(case, folder), Meter(case)
    lines = []
    for row in rows:
        question, answer = (turn["value"] for turn in row["conversations"])
        lines.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], "images": images_of(row, folder)})
    (folder / "taken.jsonl").write_text("\n".join(map(json.dumps, lines)))
    places = {"model": str(folder / "model"), "model_type": "llava1_5_hf", "template": "llava_chatml", "dataset": [str(folder / "taken.jsonl")]}
    tuning = {"tuner_type": "lora", "adapters": [str(folder / "adapter")]} if case.lora else {"tuner_type": "full"}
    tuning |= {"freeze_vit": True, "freeze_aligner": case.lora, "gradient_checkpointing": False, "torch_dtype": "float32", "load_args": False}
    how = {"max_length": 100_000, "dataset_shuffle": False, "train_dataloader_shuffle": False, "num_train_epochs": 1, "strict": True}
    Measured(SftArguments(**{**settings(case, folder / "ms_swift"), **places, **tuning, **how})).main()
    return {"first": meter.result(slice(0, None), len(rows))}


RUN: dict[str, Callable[[Case, Path], dict[str, Any]]] = {
    "trl_default": lambda case, folder: trl(case, folder, True),
    "trl_tuned": lambda case, folder: trl(case, folder, False),
    "hugging_face": hugging_face,
    "llama_factory": llama_factory,
    "ms_swift": ms_swift,
    "interlace": interlace,
}


# --- the table ---


def case_of(text: str) -> Case:
    """A case as JSON."""
    values = json.loads(text)
    return Case(**values | {"images": None if values["images"] is None else tuple(values["images"])})


def run_case(name: str, folder: Path, log: Path, pythons: dict[str, str]) -> list[str]:
    """Lines of the table; pythons: of each variant."""
    make_folder(CASES[name], folder)
    results: dict[str, dict[str, Any]] = {}
    for variant, python in pythons.items():
        done = subprocess.run([python, __file__, "--measure", variant, name, str(folder)], capture_output=True, text=True, check=False)
        with log.open("a") as file:
            file.write(f"### {name} {variant}\n{done.stdout}\n{done.stderr if done.returncode else ''}\n".replace(str(folder), "FOLDER"))
        if done.returncode:
            print(f"{name}: {variant} failed, see {log}: {done.stderr.strip().splitlines()[-1]}")
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        results[variant] = found["first"]
        if "cached" in found:
            results[f"{variant}_cached"] = found["cached"]
    return lines_of(CASES[name], results, pythons)


def lines_of(case: Case, results: dict[str, dict[str, Any]], pythons: dict[str, str]) -> list[str]:
    ours, lines = results["interlace"], []
    for variant, r in results.items():
        per_row = [seconds * len(r["seconds"]) / r["rows"] for seconds in r["seconds"]]
        r["best"] = sum(r["seconds"]) / r["rows"] if case.images is None else min(per_row)
        r["median"] = statistics.median(per_row)
        is_same = case.images is None or (abs(r["losses"][0] - ours["losses"][0]) <= 1e-5 and abs(r["grad_norm"] / ours["grad_norm"] - 1) <= 1e-4)
        r["reported"] = is_same or variant == "interlace_cached"
        if not r["reported"]:
            print(f"{variant}: loss {r['losses'][0]:.6f}, gradient {r['grad_norm']:.6f}; ours {ours['losses'][0]:.6f}, {ours['grad_norm']:.6f}: not reported")
    what = "mixture" if case.images is None else f"{len(case.images)} questions, {case.images[0]} frames" if case.scene else list(case.images)
    for variant, r in results.items():
        if not r["reported"]:
            continue
        ratios = [
            f"{results[peer]['best'] / r['best']:.2f}x" if peer in results and results[peer]["reported"] else "" for peer in pythons if peer != "interlace"
        ]
        lines.append(
            f"| SFT-{'LoRA' if case.lora else 'full'} {what} | {NAMES[variant]} | {1 / r['best']:.3f} | {r['best'] * case.rows_per_step:.2f} | "
            f"{r['median'] * case.rows_per_step:.2f} | {r['mib']:.0f} | {r['images']} | {r['tokens']:,} | {r['losses'][0]:.6f} | {' | '.join(ratios)} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", nargs=3, metavar=("VARIANT", "CASE", "FOLDER"))
    parser.add_argument("--only", nargs="*", default=list(CASES), metavar="CASE")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON", help="llamafactory or ms-swift: the interpreter it is installed for")
    options = parser.parse_args()
    if options.measure:
        variant, name, folder = options.measure
        torch.set_num_threads(1)
        transformers.logging.set_verbosity_error()
        case = CASES[name] if name in CASES else case_of(name)
        print(json.dumps(RUN[variant](case, Path(folder))))
        return
    import trl as trl_package

    peers = dict(peer.split("=", 1) for peer in options.peer)
    pythons = {variant: peers.get(name) if name else sys.executable for variant, name in PEERS.items()} | {"interlace": sys.executable}
    pythons = {variant: python for variant, python in pythons.items() if python}
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, trl {trl_package.__version__}, {platform.machine()}"
    head = ["model", "tool", "rows per CPU-s", "CPU-s per step, best", "median", "peak MiB", "images encoded", "tokens through the LM", "first loss"]
    head += [f"faster than {NAMES[peer]}" for peer in pythons if peer != "interlace"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    log = Path(__file__).parent / "results" / f"training_cpu_{date.today()}.log"
    log.write_text("")
    for name in options.only:
        with tempfile.TemporaryDirectory() as folder:
            lines += run_case(name, Path(folder), log, pythons)
        print(f"{name} done", flush=True)
    text = "\n".join([f"# Training on one CPU thread, float32; {versions}", "", *lines, ""])
    path = Path(__file__).parent / "results" / f"training_cpu_{date.today()}.md"
    path.write_text(text)
    print(f"{text}\n{path}")


if __name__ == "__main__":
    main()
