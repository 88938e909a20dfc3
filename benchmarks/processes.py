"""Two processes against one, under every engine: tokens per second of the demo's model, LoRA and full, the same rows in each optimizer step.

    python benchmarks/processes.py

Writes benchmarks/results/processes_<hardware>_<date>.md. Parity comes first: without the losses of one process nothing is reported.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import deepspeed
import torch
import transformers

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
STEPS, WARM_UP, ROUNDS = 14, 4, 3
MICRO_BATCHES = 4  # per optimizer step, over all processes
TOLERANCE = 2e-5  # of losses
# name -> (processes, threads of each, arguments)
VARIANTS: dict[str, tuple[int, int, dict[str, str]]] = {
    "one process, one thread": (1, 1, {}),
    "one process, two threads": (1, 2, {}),
    "DDP": (2, 1, {}),
    "ZeRO-1": (2, 1, {"deepspeed": "zero1"}),
    "ZeRO-2": (2, 1, {"deepspeed": "zero2"}),
    "ZeRO-3": (2, 1, {"deepspeed": "zero3"}),
    "FSDP2": (2, 1, {"fsdp": "true"}),
}


def run(folder: Path, lora: bool, processes: int, threads: int, extra: dict[str, str]) -> tuple[list[float], list[float]]:
    """Losses, and tokens per second over all processes, of every step."""
    settings = {"output_dir": folder, "lora": str(lora).lower(), "max_steps": STEPS, "per_device_train_batch_size": 8, "learning_rate": 1e-3}
    settings |= {"gradient_accumulation_steps": MICRO_BATCHES // processes, "logging_steps": 1, "eval_strategy": "no", "save_strategy": "no"}
    settings |= {"report_to": "none", "disable_tqdm": "true", "dataloader_num_workers": 0, "use_cpu": "true", "warmup_steps": 0, **extra}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    command = [sys.executable, *launcher, str(ROOT / "train" / "supervised_finetune.py"), str(ROOT / "configs" / "lora_sft_argument.json")]
    command += [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    steps = [entry for entry in json.loads((folder / "trainer_state.json").read_text())["log_history"] if "loss" in entry]
    return [step["loss"] for step in steps], [step["tokens_per_second"] for step in steps]


def measure(lora: bool, folder: Path) -> dict[str, float]:
    """The median over the rounds, variants taking turns, of each run's median tokens per second after the warm-up."""
    speeds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    expected: list[float] = []
    for number in range(ROUNDS):
        for name, (processes, threads, extra) in VARIANTS.items():
            losses, found = run(folder / f"{lora} {number} {name}", lora, processes, threads, extra)
            expected = expected or losses
            assert max(abs(one - other) for one, other in zip(losses, expected, strict=True)) < TOLERANCE, (name, losses, expected)
            speeds[name].append(statistics.median(found[WARM_UP:]))
            print(f"{'LoRA' if lora else 'full'}, round {number + 1}: {name}: {speeds[name][-1]:,.0f} tokens/s", flush=True)
    return {name: statistics.median(found) for name, found in speeds.items()}


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="processes-") as scratch:
        measured = {lora: measure(lora, Path(scratch)) for lora in (True, False)}
    text = [
        "# Two processes against one",
        "",
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, DeepSpeed {deepspeed.__version__}; {time.strftime('%Y-%m-%d')}. `python benchmarks/processes.py`",
        "",
        f"The demo's model and rows, float32, gloo; {MICRO_BATCHES} micro-batches per optimizer step over all processes, one thread per process unless said. "
        f"Losses of all {STEPS} steps within {TOLERANCE:g} of one process's, or nothing is reported. Tokens per second over all processes: median of "
        f"{ROUNDS} runs, variants taking turns, of each run's median after {WARM_UP} steps. Efficiency: against twice one process on one thread.",
        "",
        "| | LoRA: tokens/s | efficiency | full: tokens/s | efficiency |",
        "|---|---|---|---|---|",
    ]
    base = {lora: found["one process, one thread"] for lora, found in measured.items()}
    for name, (processes, threads, _) in VARIANTS.items():
        cells = [f"{measured[lora][name]:,.0f} | {measured[lora][name] / base[lora] / (processes * threads):.0%}" for lora in (True, False)]
        text.append(f"| {name} | {' | '.join(cells)} |")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"processes_cpu_{time.strftime('%Y-%m-%d')}.md").write_text("\n".join(text) + "\n")
    print("\n".join(text))


if __name__ == "__main__":
    main()
