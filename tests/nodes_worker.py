"""A rank that holds its node against the other's, case by case; `test_nodes.py` starts two. Leaves in FOLDER/RANK.json what each case raised and said."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from interlace.errors import InputError
from interlace.training.nodes import check_nodes, meet

folder, model = Path(sys.argv[1]), sys.argv[2]
ranks = meet({"ddp_timeout": 60})
second = ranks.rank == 1
os.environ["LOCAL_RANK"] = "0"
ranks.local_rank = 0  # each is the first of a node of its own
base: dict[str, Any] = {"output_dir": str(folder / "run" / "one"), "lora": True, "learning_rate": 1e-4}
smaller = folder / "smaller"
cases: dict[str, tuple[dict[str, Any], str, str]] = {
    "equal": ({}, model, "rows"),
    "argument": ({"learning_rate": 2e-4} if second else {}, model, "rows"),
    "data": ({}, model, "other rows" if second else "rows"),
    "model": ({}, str(smaller) if second else model, "rows"),
    "unwritable": ({"output_dir": "/proc/run"}, model, "rows"),
    "two at once": ({"learning_rate": 2e-4} if second else {}, model, "other rows" if second else "rows"),
}
results = {}
for name, (change, path, data) in cases.items():
    said: list[str] = []
    try:
        check_nodes(ranks, {**base, **change}, path, data, said.append)
        error = None
    except InputError as raised:
        error = str(raised)
    results[name] = {"error": error, "said": said}
start = time.perf_counter()
check_nodes(ranks, base, model, "rows", said.append)
results["seconds"] = {"error": str(time.perf_counter() - start), "said": []}
(folder / f"{ranks.rank}.json").write_text(json.dumps(results))
