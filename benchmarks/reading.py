"""Reading and checking a large data set: time, and memory of every process. `python benchmarks/reading.py --rows 1000000 --images 0` (train/ on PYTHONPATH).

The rows are LLaVA json: a question of 25 words, an answer of 30 words, and one to three images of 640 x 480 (68 kB JPEG files) out of `--images`; without
images, text alone. Memory is the highest resident set a process ever had, the library code it maps included.
"""

import argparse
import io
import json
import multiprocessing
import os
import platform
import random
import resource
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from interlace.arguments import SCHEMA_PATH, resolve
from interlace.data.dataset import open_rows
from interlace.data.packing import Plan, PlanSampler
from interlace.data.sources import read_entries
from interlace.model.loading import resolve_model_path
from interlace.training.parts import processing_of, row_reader

WORDS = [
    *[
        "what",
        "is",
        "the",
        "colour",
        "of",
        "this",
        "digit",
        "image",
        "shows",
        "one",
        "two",
        "three",
        "four",
        "five",
        "six",
        "seven",
        "largest",
        "even",
        "odd",
        "place",
        "first",
        "last",
        "read",
    ],
    "all",
    "in",
    "order",
]


def write_images(folder: Path, count: int) -> None:
    """The same noise under `count` names, each a file of its own."""
    picture = io.BytesIO()
    noise = np.random.RandomState(0).randint(0, 255, (48, 64, 3), np.uint8)
    PIL.Image.fromarray(noise).resize((640, 480)).save(picture, "JPEG", quality=85)
    folder.mkdir()
    for i in range(count):
        (folder / f"{i:07d}.jpg").write_bytes(picture.getvalue())


def write_rows(path: Path, count: int, images: int) -> None:
    """A json list of `count` rows."""
    randomness = random.Random(0)
    with path.open("w") as file:
        for i in range(count):
            used = randomness.choice([1, 1, 2, 3]) if images else 0
            names = [f"images/{(2 * i + k) % images:07d}.jpg" for k in range(used)]
            question = "<image>\n" * used + " ".join(randomness.choices(WORDS, k=25))
            turns = [{"from": "human", "value": question}, {"from": "gpt", "value": " ".join(randomness.choices(WORDS, k=30))}]
            row = {"id": i, **({"image": names} if names else {}), "conversations": turns}
            file.write(("[" if i == 0 else ",\n") + json.dumps(row))
        file.write("]")


def measure(folder: Path, workers: int, connection: Any) -> None:
    """Reads the rows, plans an epoch and looks at 20,000 rows of it in the plan's order."""
    config = {
        "model_name_or_path": "demo",
        "output_dir": str(folder / "unused"),
        "dataset": {"train": [{"data_files": str(folder / "rows.json")}]},
        "cache_dir": str(folder / "cache"),
        "preprocessing_num_workers": workers,
    }
    arguments, problems = resolve(config, json.loads(SCHEMA_PATH.read_text())["properties"], dict.fromkeys(config, "benchmark"))
    assert not problems
    processing = processing_of(resolve_model_path("demo"), arguments)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    rows, ledger = open_rows(read_entries(arguments["dataset"]["train"], 0), row_reader(arguments, processing), arguments, True)
    checked = time.perf_counter() - start
    assert ledger.trained == ledger.rows
    lengths = rows.lengths.tolist()
    sampler = PlanSampler(Plan(lengths, lengths, 8192, None, 1, 0), 0)
    start, seen = time.perf_counter(), 0
    for batch in sampler:
        seen += sum(len(rows[row].encoded.input_ids) > 0 for row in batch)
        if seen >= 20_000:
            break
    peak = {who: resource.getrusage(kind).ru_maxrss / 1024 for who, kind in (("main", resource.RUSAGE_SELF), ("worker", resource.RUSAGE_CHILDREN))}
    connection.send({"seconds": checked, "before": before / 1024, "first": time.perf_counter() - start, **peak, "tokens": int(rows.lengths.sum())})


def in_new_process(folder: Path, workers: int) -> dict[str, float]:
    """The figures of one run, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=measure, args=(folder, workers, theirs))
    process.start()
    figures: dict[str, float] = ours.recv()
    process.join()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--images", type=int, default=100_000, help="distinct image files; 0 for text alone")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_rows(folder / "rows.json", options.rows, options.images)
        write_images(folder / "images", options.images)
        megabytes = (folder / "rows.json").stat().st_size / 1e6
        first, again = in_new_process(folder, options.workers), in_new_process(folder, options.workers)
        kept = sum(file.stat().st_size for file in (folder / "cache").rglob("*") if file.is_file()) / 1e6
    lines = [
        f"# Reading and checking {options.rows:,} rows, {options.images:,} image files",
        "",
        f"{options.workers} workers on {os.cpu_count()} {platform.machine()} cores, {date.today()}; json of {megabytes:,.0f} MB, {first['tokens']:,} tokens; "
        f"kept on disk: {kept:,.0f} MB. Memory in MiB: highest resident set, {first['before']:,.0f} of it before the first row (libraries).",
        "",
        "| run | seconds to check | rows/s | plan and 20,000 rows, s | main process | largest worker |",
        "|---|---|---|---|---|---|",
    ]
    for name, figures in (("first", first), ("again, rows kept", again)):
        values = (
            f"{figures['seconds']:.1f} | {options.rows / figures['seconds']:,.0f} | {figures['first']:.1f} | {figures['main']:,.0f} | {figures['worker']:,.0f}"
        )
        lines.append(f"| {name} | {values} |")
    text = "\n".join([*lines, ""])
    path = Path(__file__).parent / "results" / f"reading_{options.rows}_rows_{options.images}_images_cpu_{date.today()}.md"
    path.write_text(text)
    print(f"{text}\n{path}")


if __name__ == "__main__":
    main()
