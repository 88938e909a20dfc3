"""Where keeping features pays, and where it does not: `python benchmarks/feature_cache.py` with `train/` on PYTHONPATH; about three minutes.

LoRA runs of two epochs through `finetune`, one process and thread each, as in `training.py`: a tower that costs as much as its language model (as in the 0.5B
model at few tokens of text), and one that costs next to nothing.
"""

import json
import platform
import subprocess
import sys
import tempfile
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from training import Case, make_folder

CASES = {
    "large tower": Case((1, 2), True, 6),
    "small tower": Case((1, 2), True, 6, model="small_tower"),
    "large tower, one epoch": Case((1, 2), True, 6, epochs=1),
}
KINDS = ("off", "memory", "disk", "auto")


def measure(case: Case, folder: Path) -> dict[str, Any]:
    """What a run says and takes, without what an earlier one kept on disk."""
    command = [sys.executable, str(Path(__file__).with_name("training.py")), "--measure", "interlace", json.dumps(vars(case)), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    said = [line.removeprefix("feature cache: ") for line in (done.stdout + done.stderr).splitlines() if line.startswith("feature cache: ")]
    return json.loads(done.stdout.splitlines()[-1]) | {"said": said[0] if said else ""}


def main() -> None:
    head = ["model", "feature_cache", "CPU-s per step: epoch 1", "epoch 2", "images encoded: epoch 1", "epoch 2", "losses equal to `off`", "it says"]
    lines = [f"# Kept features: LoRA, rows of 1 and 2 images, one CPU thread, float32; torch {torch.__version__}, {platform.machine()}"]
    lines += ["", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as scratch:
            make_folder(case, Path(scratch))
            off: list[float] = []
            for kind in KINDS:
                found = measure(replace(case, cache=kind), Path(scratch))
                epochs = [found["first"], found["cached"]] if case.epochs == 2 else [found["first"]]
                losses = [loss for epoch in epochs for loss in epoch["losses"]]
                off = off or losses
                difference = max(abs(a - b) for a, b in zip(losses, off, strict=True))
                cells = [[f"{min(epoch['seconds']):.2f}", str(epoch["images"])] for epoch in epochs] + [["", ""]] * (2 - len(epochs))
                columns = [cell[0] for cell in cells] + [cell[1] for cell in cells]
                lines.append(f"| {name} | {kind} | {' | '.join(columns)} | {difference:.0e} | {found['said']} |")
                print(lines[-1], flush=True)
    path = Path(__file__).parent / "results" / f"feature_cache_cpu_{date.today()}.md"
    path.write_text("\n".join([*lines, ""]))
    print("\n".join(lines), path, sep="\n")


if __name__ == "__main__":
    main()
