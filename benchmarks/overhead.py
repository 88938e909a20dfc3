"""What a whole run costs outside its steps: `python benchmarks/overhead.py` with `train/` on PYTHONPATH; about six minutes.

`supervised_finetune.py` as a user starts it, on rows of `training.py`, with logs and checkpoints; every second of the process is given to one thing.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch
from training import Case, make_folder, settings

from interlace.training.clock import PHASES

STEPS, SAVES = 200, 2
ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder, case = Path(scratch), Case((1, 2), True, STEPS)
        make_folder(case, folder)
        config = settings(case, folder / "run") | {
            "model_name_or_path": str(folder / "model"),
            "dataset": {"train": [{"data_files": str(folder / "rows.json"), "image_folder": str(folder)}]},
            "lora": True,
            "gradient_checkpointing": False,
            "max_length": 100_000,
            "num_train_epochs": 1,
            "save_strategy": "steps",
            "save_steps": STEPS // SAVES,
            "cache_dir": str(folder / "cache"),
            "dataloader_num_workers": 1,
        }
        (folder / "config.json").write_text(json.dumps(config))
        marks = folder / "marks"
        child = f"""
import runpy, sys, time
from pathlib import Path
sys.argv = ["supervised_finetune.py", {str(folder / "config.json")!r}]
from interlace.training import supervised
ready = time.time()
try:
    runpy.run_path({str(ROOT / "train" / "supervised_finetune.py")!r}, run_name="__main__")
finally:
    Path({str(marks)!r}).write_text(f"{{ready}} {{time.time()}}")
"""
        start = time.time()
        subprocess.run([sys.executable, "-c", child], check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        whole = time.time() - start
        ready, end = map(float, marks.read_text().split())
        history = json.loads((folder / "run" / "trainer_state.json").read_text())["log_history"]
        training = json.loads((folder / "run" / "train_results.json").read_text())["train_runtime"]
        steps = sum(entry.get(f"{phase}_seconds", 0) for entry in history for phase in PHASES if phase != "other")
    parts = {
        f"{STEPS} steps: data, vision, forward, backward, optimizer": steps,
        f"between the steps: a log after each, {SAVES} checkpoints": training - steps,
        "before and behind: rows read and checked, plan, model loaded; model and report written": end - ready - training,
        "Python's imports": ready - start,
        "the process's end": start + whole - end,
    }
    lines = [f"# A whole run, seconds on the clock; LoRA, rows of 1 and 2 images, one CPU thread; torch {torch.__version__}, {platform.machine()}", ""]
    lines += ["| part | seconds | of the steps |", "|---|---|---|", *(f"| {name} | {value:.1f} | {value / steps:.1%} |" for name, value in parts.items())]
    lines += [f"| the whole run | {whole:.1f} | {whole / steps:.1%} |", ""]
    path = Path(__file__).parent / "results" / f"overhead_cpu_{date.today()}.md"
    path.write_text("\n".join(lines))
    print("\n".join(lines), path, sep="\n")


if __name__ == "__main__":
    main()
