"""The pre-flight over the nodes: what differs is named, with who holds it; processes that cannot find each other say what to look at."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from interlace.training.nodes import Node, _spans, _warnings
from tests.conftest import ROOT, fast_first, write_rows

Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path) -> list[Results]:
    """What each of two ranks was told, by case."""
    folder = tmp_path_factory.mktemp("nodes")
    (folder / "run").mkdir()
    shutil.copytree(tiny_dir, folder / "smaller")
    weights = folder / "smaller" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    command += ["-m", "tests.nodes_worker", str(folder), str(tiny_dir)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "train"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=150, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not list((folder / "run").iterdir()), "the trial files have to be gone"
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_all_ranks_are_told_the_same(results: list[Results]) -> None:
    assert results[0] == results[1]


def test_equal_nodes_pass_in_silence(results: list[Results]) -> None:
    assert results[0]["equal"] == {"error": None, "said": []}


@pytest.mark.parametrize(
    ("case", "told"),
    [
        ("argument", ["argument learning_rate: 0.0001 on {host} (rank 0); 0.0002 on {host} (rank 1)"]),
        ("data", ["rows and plan: rows on {host} (rank 0); other rows on {host} (rank 1)"]),
        ("unwritable", ["output_dir: cannot write in /proc: No such file or directory (on {host} (ranks 0-1))"]),
        (
            "two at once",
            [
                "argument learning_rate: 0.0001 on {host} (rank 0); 0.0002 on {host} (rank 1)",
                "rows and plan: rows on {host} (rank 0); other rows on {host} (rank 1)",
            ],
        ),
    ],
)
def test_what_differs_is_named_with_hosts_and_ranks(results: list[Results], case: str, told: list[str]) -> None:
    first, *lines = results[0][case]["error"].splitlines()
    assert first.startswith(f"2 processes on {socket.gethostname()} cannot train together")
    assert [line.strip() for line in lines] == [line.format(host=socket.gethostname()) for line in told]


def test_weights_of_another_size_are_another_model(results: list[Results]) -> None:
    _, line = results[0]["model"]["error"].splitlines()
    assert line.strip().startswith("model: ") and "(rank 0); " in line and line.endswith("(rank 1)")


def test_clocks_and_gpus_that_differ_are_warned_of() -> None:
    nodes = [Node(rank, f"node-{'ab'[rank // 2]}", {}, ("H100", "A100")[rank // 2], None, ()) for rank in range(4)]
    clocks = [1000.0, 1000.5, 1009.0, 1008.9]
    assert _warnings(nodes[:2], clocks[:2]) == []
    clock, gpus = _warnings(nodes, clocks)
    assert "the clock of node-b (rank 2) is 9 seconds ahead of that of node-a (rank 0)" in clock
    assert gpus.endswith("H100 on node-a (ranks 0-1); A100 on node-b (ranks 2-3)")


def test_ranks_are_written_as_spans() -> None:
    assert _spans([0, 1, 2, 3, 6, 8, 9]) == "0-3, 6, 8-9"


@pytest.mark.parametrize("rank", fast_first([0, 1], 1))
def test_a_rank_that_finds_nobody_says_what_to_look_at(rank: int, tmp_path: Path, tiny_dir: Path) -> None:
    write_rows(tmp_path, 4)
    config = {"model_name_or_path": str(tiny_dir), "output_dir": str(tmp_path / "run"), "dataset": {"train": [{"data_files": str(tmp_path / "rows.json")}]}}
    (tmp_path / "config.json").write_text(json.dumps({**config, "use_cpu": True, "ddp_timeout": 3}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launched = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "train/supervised_finetune.py", str(tmp_path / "config.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **launched}, timeout=100, check=False)
    assert done.returncode == 1
    assert f"rank {rank} of 2 on {socket.gethostname()} did not find the others (ddp_timeout: 3 seconds)" in done.stderr
    assert f"MASTER_PORT ({port})" in done.stderr and "GLOO_SOCKET_IFNAME (not set)" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
