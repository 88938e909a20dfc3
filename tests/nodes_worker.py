"""A rank that holds its node against the other's, case by case; `test_nodes.py` starts two. Leaves in FOLDER/RANK.json what each case raised and said."""

import json
import sys
from pathlib import Path
from typing import Any

from interlace.errors import InputError, run_script
from interlace.training.nodes import check_nodes, meet


def main() -> None:
    folder, model = Path(sys.argv[1]), sys.argv[2]
    ranks = meet({"ddp_timeout": 60, "use_cpu": True, "deepspeed": None, "fsdp": None, "ddp_backend": None})
    ranks.local_rank = 0  # each is the first of a node of its own
    second = ranks.rank == 1
    base: dict[str, Any] = {"output_dir": str(folder / "run" / "one"), "lora": True, "learning_rate": 1e-4}
    other_rate, other_rows = {"learning_rate": 2e-4} if second else {}, "other rows" if second else "rows"
    cases: dict[str, tuple[dict[str, Any], str, str]] = {
        "equal": ({}, model, "rows"),
        "argument": (other_rate, model, "rows"),
        "data": ({}, model, other_rows),
        "model": ({}, str(folder / "smaller") if second else model, "rows"),
        "unwritable": ({"output_dir": "/proc/run"}, model, "rows"),
        "two at once": (other_rate, model, other_rows),
    }
    results = {}
    for name, (change, path, data) in cases.items():
        said: list[str] = []
        error = None
        try:
            check_nodes(ranks, {**base, **change}, path, data, said.append)
        except InputError as raised:
            error = str(raised)
        results[name] = {"error": error, "said": said}
    (folder / f"{ranks.rank}.json").write_text(json.dumps(results))
    ranks.gather(None)  # rank 0 holds the store, and leaves last


run_script(main)
