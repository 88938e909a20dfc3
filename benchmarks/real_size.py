"""Models of real size, really run: `python benchmarks/real_size.py [0.5b|7b]` with `train/` on PYTHONPATH.

0.5b: the exact configuration with random weights in bfloat16, written in its authors' layout, converted, trained with the shipped LoRA configuration, resumed,
merged, asked, converted back. 7b: written, converted and planned; needs 33 GB of disk, and trains where a GPU can be had (`gpu.py`).
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import psutil
import torch
from forecast import config_05b
from input_side import make_model_folder
from scaling import config_7b
from transformers import LlavaForConditionalGeneration

from interlace.model.layouts import hub_name, original_name
from interlace.model.weight_files import StoredTensor, stored_tensors, write_sharded

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY = 151_936
STEPS, RESUMED_STEPS = 3, 5


def write_original(folder: Path, name: str) -> None:
    """A model with random weights as lmms-lab publishes them."""
    make_model_folder(folder)
    for file in ("processor_config.json", "preprocessor_config.json", "prompt.json", "chat_template.jinja"):
        (folder / file).unlink(missing_ok=True)
    config = {"0.5b": config_05b, "7b": config_7b}[name]()
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    shapes = {original_name(hub_name(key)): tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    tensors: dict[str, StoredTensor] = {}
    for number, (key, shape) in enumerate(shapes.items()):
        shape = (VOCABULARY, *shape[1:]) if key in ("model.embed_tokens.weight", "lm_head.weight") else shape

        def load(shape: tuple[int, ...] = shape, number: int = number) -> torch.Tensor:
            generator = torch.Generator().manual_seed(number)
            return torch.empty(shape, dtype=torch.bfloat16).normal_(1.0 if len(shape) == 1 else 0.0, 0.02, generator=generator)

        tensors[key] = StoredTensor(shape, torch.bfloat16, load)
    tensors["model.image_newline"] = StoredTensor(
        (config.text_config.hidden_size,), torch.bfloat16, lambda: torch.ones(config.text_config.hidden_size).bfloat16()
    )
    write_sharded(tensors, folder)
    text = config.text_config
    kept = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "max_position_embeddings")
    settings = {key: getattr(text, key) for key in kept} | {"vocab_size": VOCABULARY, "rope_theta": 1_000_000.0, "rms_norm_eps": 1e-6}
    settings |= {"architectures": ["LlavaQwenForCausalLM"], "model_type": "llava_qwen", "tie_word_embeddings": config.tie_word_embeddings}
    settings |= {"mm_vision_tower": "google/siglip-so400m-patch14-384", "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_hidden_size": 1152}
    settings |= {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "flat", "torch_dtype": "bfloat16", "eos_token_id": 151_645, "bos_token_id": 151_643}
    (folder / "config.json").write_text(json.dumps(settings, indent=2))


def write_rows(folder: Path) -> Path:
    """Sixteen questions about one and two images of 384 x 384."""
    pixels, randomness = np.random.default_rng(0), random.Random(0)
    (folder / "images").mkdir(parents=True)
    rows = []
    for number in range(16):
        names = [f"images/{number}_{i}.png" for i in range(1 + number % 2)]
        for image in names:
            PIL.Image.fromarray(pixels.integers(0, 255, (384, 384, 3), dtype=np.uint8)).save(folder / image)
        answer = " ".join(randomness.choice(("red", "house", "left", "three", "cat")) for _ in range(40))
        turns = [{"from": "human", "value": "<image>\n" * len(names) + "What differs?"}, {"from": "gpt", "value": answer}]
        rows.append({"id": str(number), "image": names, "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


def run(log: list[str], what: str, *words: Any) -> subprocess.CompletedProcess[str]:
    """One command of a user; its seconds, and the most memory that it had to itself and in all (mapped files count in all)."""
    start, peaks = time.perf_counter(), {"own": 0, "all": 0}
    process = subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=dict(os.environ))

    def watch() -> None:
        while process.poll() is None:
            try:
                memory = psutil.Process(process.pid).memory_info()
            except psutil.NoSuchProcess:
                return
            peaks["own"], peaks["all"] = max(peaks["own"], memory.rss - memory.shared), max(peaks["all"], memory.rss)
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    output = process.communicate()[0]
    watcher.join()
    if process.returncode:
        raise RuntimeError(f"{what}: {output[-4000:]}")
    gib = 2**30
    log.append(f"| {what} | {time.perf_counter() - start:.0f} | {peaks['own'] / gib:.2f} | {peaks['all'] / gib:.2f} |")
    print(log[-1], flush=True)
    return subprocess.CompletedProcess(words, 0, output)


def differing(one: Path, other: Path) -> Iterator[str]:
    """Names of weights that are not the same to the bit."""
    ours, theirs = stored_tensors(one), stored_tensors(other)
    yield from set(ours) ^ set(theirs)
    for name in set(ours) & set(theirs):
        if not torch.equal(ours[name].load(), theirs[name].load()):
            yield name


def small(folder: Path, name: str, log: list[str]) -> list[str]:
    """The 0.5B, from its authors' layout to a chat."""
    original, hub, output, rows = folder / "original", folder / "hub", folder / "run", write_rows(folder / "data")
    run(log, "the libraries alone", "-c", "import interlace.training.supervised")
    run(log, "authors' layout -> hub layout", "train/convert_checkpoint.py", "--input", original, "--output", hub, "--to", "hf")
    count = sum(int(np.prod(tensor.shape)) for tensor in stored_tensors(hub).values())
    dataset = json.dumps({"train": [{"data_files": str(rows)}]})
    config = [f"configs/llava_next_interleave_{name}/lora_sft_argument.json", "--model_name_or_path", original, "--dataset", dataset, "--output_dir", output]
    config += ["--report_to", "none", "--use_cpu", "true", "--save_steps", "2", "--logging_steps", "1", "--gradient_accumulation_steps", "1"]
    config += ["--per_device_train_batch_size", "2", "--dataloader_num_workers", "0", "--cache_dir", folder / "cache"]
    run(log, "plan_run.py, with a probe", "train/plan_run.py", *config, "--max_steps", STEPS, "--json", folder / "plan.json")
    plan = json.loads((folder / "plan.json").read_text())
    run(log, f"LoRA, {STEPS} steps, bfloat16", "train/supervised_finetune.py", *config, "--max_steps", STEPS)
    again = [*config, "--max_steps", RESUMED_STEPS, "--resume_from_checkpoint", output / f"checkpoint-{STEPS - 1}"]
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    seconds = [sum(value for key, value in entry.items() if key.endswith("_seconds")) for entry in history if "loss" in entry]
    run(log, f"resumed at step {STEPS - 1}, to {RESUMED_STEPS}", "train/supervised_finetune.py", *again)
    run(log, "merged", "train/merge_adapter.py", "--adapter-path", output, "--output-dir", folder / "merged")
    image = rows.parent / "images" / "0_0.png"
    words = ["--model-path", folder / "merged", "--image-file", image, "--query", "<image>\nWhat is this?", "--max-new-tokens", "8"]
    run(log, "asked about an image, 8 tokens", "train/predict_multiround.py", *words)
    run(log, "hub layout -> authors' layout", "train/convert_checkpoint.py", "--input", hub, "--output", folder / "back", "--to", "llava")
    changed = list(differing(original, folder / "back"))
    lines = [f"- {count:,} parameters in the hub layout; weights that there and back changed: {len(changed)}"]
    lines += [f"- forecast: {plan['memory_bytes']['total'] / 2**30:.2f} GiB besides the libraries, which are the first line of the table"]
    lines += [f"- forecast: {plan['step_seconds']:.1f} s per step; measured: {', '.join(f'{value:.1f}' for value in seconds)}"]
    lines += [f"- losses {[round(entry['loss'], 4) for entry in history if 'loss' in entry]}"]
    return lines


def large(folder: Path, name: str, log: list[str]) -> list[str]:
    """The 7B, as far as a CPU takes it."""
    original, hub, rows = folder / "original", folder / "hub", write_rows(folder / "data")
    run(log, "authors' layout -> hub layout", "train/convert_checkpoint.py", "--input", original, "--output", hub, "--to", "hf")
    count = sum(int(np.prod(tensor.shape)) for tensor in stored_tensors(hub).values())
    files = len(set(json.loads((hub / "model.safetensors.index.json").read_text())["weight_map"].values()))
    config = [f"configs/llava_next_interleave_{name}/lora_sft_argument.json", "--model_name_or_path", hub, "--output_dir", folder / "run"]
    config += ["--dataset", json.dumps({"train": [{"data_files": str(rows)}]}), "--report_to", "none", "--use_cpu", "true", "--cache_dir", folder / "cache"]
    run(log, "plan_run.py", "train/plan_run.py", *config, "--probe", "0", "--json", folder / "plan.json")
    memory = json.loads((folder / "plan.json").read_text())["memory_bytes"]["total"]
    return [f"- {count:,} parameters in the hub layout, in {files} files; forecast of LoRA in bfloat16: {memory / 2**30:.1f} GiB"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", choices=("0.5b", "7b"), default="0.5b")
    options = parser.parse_args()
    log: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_original(folder / "original", options.model)
        lines = (small if options.model == "0.5b" else large)(folder, options.model, log)
    head = [
        f"# LLaVA-NeXT-Interleave {options.model} at its real size, random weights; torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores",
        "",
    ]
    head += ["| step | seconds | GiB of its own | GiB with mapped files |", "|---|---|---|---|"]
    path = Path(__file__).parent / "results" / f"real_size_{options.model}_cpu_{date.today()}.md"
    path.write_text("\n".join([*head, *log, "", *lines, ""]))
    print("\n".join([*head, *log, "", *lines]), path, sep="\n")


if __name__ == "__main__":
    main()
