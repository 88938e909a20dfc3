"""Hosts for the tests of this folder, the launches on them, the run they are held against."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.multinode.hosts import Hosts, Launched, why_not

STEPS = 12
DEMO = ("train/supervised_finetune.py", "configs/lora_sft_argument.json", "--eval_strategy", "no", "--logging_steps", "1", "--max_steps", str(STEPS))
DEMO += ("--save_strategy", "steps", "--save_steps", "4", "--save_total_limit", "2", "--dataloader_num_workers", "0", "--ddp_timeout", "120")
ENVIRONMENT = {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "INTERLACE_CACHE": os.environ["INTERLACE_CACHE"],
    "GLOO_SOCKET_IFNAME": "eth0",  # the hosts' own names resolve to 127.0.1.1
}
Launch = Callable[..., list[Launched]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mine = [item for item in items if Path(__file__).parent in item.path.parents]
    reason = why_not() if mine else None
    for item in mine:
        item.add_marker(pytest.mark.multinode)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with Hosts(tmp_path / "hosts") as both:
        yield both


def launch(kind: str, hosts: Hosts, words: tuple[str | Path, ...], log: Path, slots: int = 1) -> list[Launched]:
    """Starts a script with `slots` ranks on each host, through launch/; what has to be waited for, node-a's first."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has it ignored by what runs in the background, which tests may
    if kind == "deepspeed":
        if not Path(sys.executable).with_name("deepspeed").exists():
            pytest.skip("deepspeed is not installed")
        if "--deepspeed" in words and shutil.which("c++") is None:
            pytest.skip("needs g++: DeepSpeed compiles its code for CPUs")
        hostfile = log.with_suffix(".hostfile")
        hostfile.write_text(f"# the hosts of the test\n\nnode-a slots={slots}\n  node-b slots={slots}\n")
        command = [ROOT / "launch" / "deepspeed.sh", hostfile, "--master_addr", hosts.addresses["node-a"], *words]
        return [hosts.start("node-a", command, log, ENVIRONMENT, ROOT)]
    started = []
    for rank, name in enumerate(hosts.addresses):
        options = ["--nnodes", "2", "--node-rank", str(rank), "--nproc-per-node", str(slots), "--master-addr", hosts.addresses["node-a"]]
        command = [ROOT / "launch" / "torchrun.sh", *options, "--master-port", "29511", *words]
        started.append(hosts.start(name, command, log.with_suffix(f".{name}"), ENVIRONMENT, ROOT))
    return started


def losses(run: Path) -> dict[int, float]:
    """The loss of every step of a finished run."""
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


@pytest.fixture(scope="session")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of one process that sees the same micro-batches in each step."""
    folder = tmp_path_factory.mktemp("single")
    with Hosts(folder / "hosts") as hosts:
        alone = hosts.start(
            "node-a", ["python", *DEMO, "--gradient_accumulation_steps", "2", "--output_dir", folder / "run"], folder / "log", ENVIRONMENT, ROOT
        )
        assert alone.wait(200) == 0, alone.output()[-3000:]
    found = losses(folder / "run")
    assert len(found) == STEPS
    shutil.rmtree(folder / "run")
    return found
