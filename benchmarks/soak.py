"""Soak test: the demo's LoRA run for 2,000 steps, undisturbed and killed at random about every minute: same losses, same weights, memory flat.

    python benchmarks/soak.py [STEPS]

Writes benchmarks/results/soak_<hardware>_<date>.md.
"""

import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BETWEEN_KILLS = (20.0, 100.0)  # seconds
SAMPLE_SECONDS = 2.0


def command(output_dir: Path, steps: int) -> list[str]:
    config = [sys.executable, str(ROOT / "train" / "supervised_finetune.py"), str(ROOT / "configs" / "lora_sft_argument.json")]
    settings = {"output_dir": output_dir, "max_steps": steps, "save_strategy": "steps", "save_steps": 50, "save_total_limit": 2, "eval_strategy": "no"}
    settings |= {
        "resume_from_checkpoint": "true",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": "true",
        "dataloader_num_workers": 0,
    }
    return config + [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def start(output_dir: Path, steps: int) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (output_dir.parent / f"{output_dir.name}.log").open("ab") as log:
        return subprocess.Popen(command(output_dir, steps), cwd=ROOT, env=environment, stdout=log, stderr=log)


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in json.loads((folder / "trainer_state.json").read_text())["log_history"] if "loss" in entry]


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    folder, randomness = Path(tempfile.mkdtemp(prefix="soak-")), random.Random(0)
    straight, killed = folder / "straight", folder / "killed"
    running = {straight: start(straight, steps), killed: start(killed, steps)}
    kills, memory, began = 0, list[float](), time.monotonic()
    next_kill = began + randomness.uniform(*BETWEEN_KILLS)
    while running:
        time.sleep(SAMPLE_SECONDS)
        if straight in running:
            memory.append(psutil.Process(running[straight].pid).memory_info().rss / 2**20)
        if killed in running and time.monotonic() > next_kill:
            running[killed].send_signal(signal.SIGKILL)
            kills += running[killed].wait() == -signal.SIGKILL
            next_kill = time.monotonic() + randomness.uniform(*BETWEEN_KILLS)
            if running[killed].returncode:
                running[killed] = start(killed, steps)
        for name, process in list(running.items()):
            if process.poll() is not None:
                assert process.returncode == 0, (folder / f"{name.name}.log").read_text()[-3000:]
                del running[name]
    one, two = (load_file(path / "adapter_model.safetensors") for path in (straight, killed))
    same_weights = sum(torch.equal(one[name], two[name]) for name in one)
    same_losses = sum(first == second for first, second in zip(losses(straight), losses(killed), strict=True))
    middle = len(memory) // 2
    RESULTS.mkdir(exist_ok=True)
    text = [
        "# Soak: a run that is killed again and again",
        "",
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}; "
        f"{time.strftime('%Y-%m-%d')}; both runs at once, one thread each. `python benchmarks/soak.py {steps}`",
        "",
        f"The demo's LoRA run (configs/lora_sft_argument.json), {steps:,} steps, a checkpoint every 50; "
        f"SIGKILL after {BETWEEN_KILLS[0]:.0f} to {BETWEEN_KILLS[1]:.0f} seconds, then the same command again.",
        "",
        "| | |",
        "|---|---|",
        f"| kills | {kills} |",
        f"| losses equal to the undisturbed run's, bit for bit | {same_losses:,} of {len(losses(straight)):,} |",
        f"| tensors of the adapter equal, bit for bit | {same_weights} of {len(one)} |",
        f"| memory of the undisturbed run: highest in its second quarter, in its last | {max(memory[middle // 2 : middle]):,.0f} MiB, "
        f"{max(memory[-(middle // 2) :]):,.0f} MiB |",
        f"| minutes | {(time.monotonic() - began) / 60:.0f} |",
    ]
    (RESULTS / f"soak_cpu_{time.strftime('%Y-%m-%d')}.md").write_text("\n".join(text) + "\n")
    print("\n".join(text))


if __name__ == "__main__":
    main()
