"""The training benchmark on a GPU, with models of real size and random weights: `python benchmarks/gpu.py` with `train/` on PYTHONPATH.

    python benchmarks/gpu.py [--models 0.5b 7b] [--images 1 2 5 8 mixture] [--answers 50 200] [--tuning lora full] [--minutes 60]

Attention first: every backend is held against the dense mask, then timed. Then training, as in `training.py`: each tool takes larger and larger batches until
one does not fit or is no faster; its best one is measured three times, the tools taking turns. 5 steps warm up, 20 count. FLOPs are those the mathematics
requires, the same for every tool, so MFU compares them.
"""

import argparse
import dataclasses
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from training import MIXTURE, NAMES, PEERS, PROMPT, Case, make_config, make_folder
from transformers import AutoTokenizer

from interlace.data.batch import Segment
from interlace.data.demo import MODEL
from interlace.model.attention import Forest, dense_mask
from interlace.model.attention_kernels import BACKENDS, problem
from interlace.model.costs import StepCosts, step_costs
from interlace.model.tuning import Lora, tune
from interlace.training.clock import peak_flops
from interlace.training.planning import Columns

WARM_UP, STEPS, REPEATS, WORKERS = 5, 20, 3, 8
BATCHES = (1, 2, 4, 8, 16, 32)
TOKENS_PER_IMAGE, TEMPLATE = 729, 25
RESULTS = Path(__file__).parent / "results"


# --- attention ---


def attention_lines(device: torch.device) -> list[str]:
    """Milliseconds of forward and backward, of 16 heads of 64, for rows of their own and for a trunk with eight leaves."""
    forests = {
        "8 rows of 2,048": tuple(Segment(2048 * i, 2048 * (i + 1)) for i in range(8)),
        "a trunk of 11,700, 8 leaves of 60": (Segment(0, 11_700), *(Segment(11_700 + 60 * i, 11_760 + 60 * i, 0) for i in range(8))),
    }
    lines = ["| backend | agrees with the dense mask | " + " | ".join(f"{name}, ms" for name in forests) + " |", "|---|---|" + "---|" * len(forests)]
    for name in (*BACKENDS, "dense mask"):
        why = None if name == "dense mask" else problem(name, device, torch.bfloat16, 16, 16, 64)
        cells = ["" if why else f"{attention_milliseconds(name, segments, device):.2f}" for segments in forests.values()]
        lines.append(f"| {name} | {why or 'yes'} | {' | '.join(cells)} |")
    return lines


def attention_milliseconds(name: str, segments: tuple[Segment, ...], device: torch.device) -> float:
    """Median of 20 runs, after 5."""
    length = segments[-1].end
    q, k, v = (torch.randn(1, 16, length, 64, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    forest = Forest(segments, device)
    mask = dense_mask(segments, length).to(device) if name == "dense mask" else None

    def run() -> None:
        if mask is not None:
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            out = BACKENDS[name]()(q, k, v, forest, 64**-0.5, 0.0)
        out.sum().backward()

    times = []
    for _ in range(25):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[5:])


# --- training ---


def costs_of(case: Case) -> StepCosts:
    """Of the case's model, on the meta device."""
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(make_config(case, AutoTokenizer.from_pretrained(MODEL)))
        parts = ["language_model"] if case.lora else ["projector", "language_model"]
        return step_costs(tune(model, parts, Lora(8, 16, 0.0, None) if case.lora else None, None))


def row_means(case: Case) -> tuple[float, float]:
    """FLOPs that a row requires in the mean, forward and backward, its images encoded; and its tokens, without padding."""
    counts = list(MIXTURE) if case.images is None else [case.images[0]]
    shares = np.array(list(MIXTURE.values()) if case.images is None else [1.0])
    images = np.array(counts)
    rows = Columns(images * TOKENS_PER_IMAGE + PROMPT + case.answer + TEMPLATE, images, np.full(len(images), case.answer))
    return tuple(float((values * shares).sum() / shares.sum()) for values in (rows.flops(costs_of(case)), rows.lengths))  # type: ignore[return-value]


def with_batch(case: Case, batch: int) -> Case:
    """The case with so many rows in a step."""
    return dataclasses.replace(case, images=None if case.images is None else case.images[:1] * batch, rows=batch)


def measure(variant: str, case: Case, folder: Path, log: Path) -> dict[str, Any] | None:
    """What a process of its own measured; None if it failed, which the log tells."""
    words = [sys.executable, str(Path(__file__).with_name("training.py")), "--measure", variant, json.dumps(dataclasses.asdict(case)), str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    with log.open("a") as file:
        file.write(f"### {variant} {case}\n{done.stdout}\n{done.stderr[-3000:] if done.returncode else ''}\n".replace(str(folder), "FOLDER"))
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def rows_per_second(result: dict[str, Any], case: Case) -> list[float]:
    """Of every step after the warm-up."""
    per_step = result["rows"] / len(result["seconds"])
    return [per_step / seconds for seconds in result["seconds"][min(WARM_UP, len(result["seconds"]) // 2) :]]


def best_batch(variant: str, case: Case, folder: Path, log: Path, deadline: float) -> tuple[int, int]:
    """The batch that trains most rows per second, and the largest that fits."""
    best, speed, largest = 0, 0.0, 0
    for batch in BATCHES:
        if time.monotonic() > deadline:
            break
        sized = with_batch(case, batch)
        found = measure(variant, dataclasses.replace(sized, steps=8), folder, log)
        if found is None:
            break
        largest, now = batch, statistics.median(rows_per_second(found["first"], sized))
        if now <= speed * 1.02:
            break
        best, speed = batch, now
    return best, largest


def run_case(name: str, case: Case, folder: Path, log: Path, deadline: float) -> list[str]:
    """Lines of the table."""
    make_folder(with_batch(case, BATCHES[-1]), folder)
    batches = {variant: best_batch(variant, case, folder, log, deadline) for variant in (*(peer for peer, python in PEERS.items() if not python), "interlace")}
    speeds: dict[str, list[float]] = {}
    results: dict[str, dict[str, Any]] = {}
    for _ in range(REPEATS):
        for variant, (batch, _largest) in batches.items():
            if not batch or time.monotonic() > deadline:
                continue
            sized = with_batch(case, batch)
            found = measure(variant, sized, folder, log) or {}
            for key, result in found.items():
                label = variant if key == "first" else f"{variant}_{key}"
                speeds.setdefault(label, []).extend(rows_per_second(result, sized))
                results[label] = result
    peak, (flops, tokens) = peak_flops(torch.cuda.get_device_name()) if case.device == "cuda" else None, row_means(case)
    lines = []
    for label, found_speeds in speeds.items():
        low, median, high = np.quantile(found_speeds, [0.25, 0.5, 0.75])
        batch, largest = batches[label.removesuffix("_cached")]
        result, gib = results[label], 2**30
        memory = f"{result.get('allocated', 0) / gib:.1f} | {result.get('reserved', 0) / gib:.1f}"
        mfu = f"{median * flops / peak:.1%}" if peak and not label.endswith("_cached") else ""
        lines.append(f"| {name} | {NAMES[label]} | {batch} ({largest}) | {median:.2f} ({low:.2f} to {high:.2f}) | {median * tokens:,.0f} | {mfu} | {memory} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=["0.5b", "7b"])
    parser.add_argument("--images", nargs="*", default=["mixture", "1", "2", "5", "8"])
    parser.add_argument("--answers", nargs="*", type=int, default=[50, 200])
    parser.add_argument("--tuning", nargs="*", default=["lora", "full"])
    parser.add_argument("--minutes", type=float, default=120.0)
    parser.add_argument("--device", default="cuda", help="cpu tries the script out")
    options = parser.parse_args()
    deadline, device = time.monotonic() + 60 * options.minutes, torch.device(options.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    stem = f"gpu_{name.replace(' ', '_')}_{date.today()}"
    log, path = RESULTS / f"{stem}.log", RESULTS / f"{stem}.md"
    log.write_text("")
    lines = [f"# Training on {name}; torch {torch.__version__}, transformers {transformers.__version__}", ""]
    if device.type == "cuda":
        lines += [*attention_lines(device), ""]
    lines.append("| case | tool | rows per step (most that fit) | rows per second, median (quartiles) | tokens/s | MFU | allocated GiB | reserved GiB |")
    lines.append("|---|---|---|---|---|---|---|---|")
    for model in options.models:
        for tuning in options.tuning:
            for images in options.images:
                for answer in options.answers:
                    if time.monotonic() > deadline:
                        continue
                    counts = None if images == "mixture" else (int(images),)
                    case = Case(counts, tuning == "lora", WARM_UP + STEPS, model=model, answer=answer, device=device.type, workers=WORKERS)
                    if model == "mini":
                        case = dataclasses.replace(case, side=112, steps=4, workers=0)
                    with tempfile.TemporaryDirectory() as folder:
                        lines += run_case(f"{model} {tuning}, {images} images, answers of {answer}", case, Path(folder), log, deadline)
                        shutil.rmtree(folder, ignore_errors=True)
                    path.write_text("\n".join([*lines, ""]))
                    print("\n".join(lines[-5:]), flush=True)
    print(path)


if __name__ == "__main__":
    main()
