"""Two hosts, the launchers of launch/: training equals one process, signals reach every rank, a lost host ends the run, and it goes on from there."""

import json
import signal
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.multinode.conftest import DEMO, ENVIRONMENT, STEPS, launch, losses
from tests.multinode.hosts import Hosts

STAND_IN = Path(__file__).with_name("stand_in.py")
# DeepSpeed's launcher ends ranks 30 seconds after a SIGTERM; a large checkpoint takes longer
SIGNALS = [("deepspeed", "SIGTERM", 33), ("deepspeed", "SIGUSR1", 1), ("deepspeed", "SIGINT", 1), ("torchrun", "SIGTERM", 33), ("torchrun", "SIGUSR1", 1)]


@pytest.mark.parametrize(("kind", "name", "saving_seconds"), SIGNALS)
def test_a_signal_to_the_launcher_lets_every_rank_save(hosts: Hosts, tmp_path: Path, kind: str, name: str, saving_seconds: int) -> None:
    (tmp_path / "ranks").mkdir()
    started = launch(kind, hosts, (STAND_IN, tmp_path / "ranks", "1000", str(saving_seconds)), tmp_path / "log", slots=2)
    started[0].wait_for("step 3\n", 60)
    started[0].send(signal.Signals[name])
    codes = [one.wait(saving_seconds + 40) for one in started]
    saved = {file.name: file.read_text().split() for file in (tmp_path / "ranks").iterdir()}
    assert saved.keys() == {f"rank-{rank}" for rank in range(4)}
    assert len({step for step, *_ in saved.values()}) == 1
    assert saved["rank-0"][1:] == [name]
    assert codes == [143] if kind == "deepspeed" else all(codes)


@pytest.mark.parametrize(("kind", "sharding"), [("deepspeed", None), ("torchrun", None), ("deepspeed", "zero2"), ("deepspeed", "zero3")])
def test_two_hosts_train_as_one_process_does(hosts: Hosts, tmp_path: Path, single: dict[int, float], kind: str, sharding: str | None) -> None:
    extra = ("--deepspeed", sharding) if sharding else ()
    started = launch(kind, hosts, (*DEMO, *extra, "--output_dir", tmp_path / "run"), tmp_path / "log")
    assert [one.wait(240) for one in started] == [0] * len(started), started[0].output()[-3000:]
    assert losses(tmp_path / "run") == pytest.approx(single, rel=1e-5)
    manifest = json.loads((tmp_path / "run" / "checkpoint-latest" / "manifest.json").read_text())
    # plain DDP gives the same losses: a configuration that was dropped would not show in them
    assert manifest["engine"] == (f"DeepSpeedEngine, ZeRO stage {sharding[-1]}" if sharding else "DistributedDataParallel")


@pytest.mark.parametrize("kind", ["deepspeed", "torchrun"])
def test_a_host_that_is_cut_off_ends_the_run_and_it_goes_on_later(tmp_path: Path, single: dict[int, float], kind: str) -> None:
    words = (*DEMO, "--output_dir", tmp_path / "run", "--resume_from_checkpoint", "true")
    with Hosts(tmp_path / "first") as hosts:
        started = launch(kind, hosts, words, tmp_path / "cut")
        started[0].wait_for(f"step 6/{STEPS}", 200)
        hosts.cut("node-b")
        cut = time.monotonic()
        code = started[0].wait(90)
        assert code not in (0, None)
        assert "rank 1 on node-b" in started[0].output(), started[0].output()[-3000:]
        assert time.monotonic() - cut < 75  # the promise is a minute; the machine may be busy
    checkpoints = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-[0-9]*"))
    assert checkpoints, "a checkpoint from before the cut"
    with Hosts(tmp_path / "second") as hosts:  # all that was left on the lost host is gone, the cable is back
        started = launch(kind, hosts, words, tmp_path / "resumed")
        assert [one.wait(240) for one in started] == [0] * len(started), started[0].output()[-3000:]
    assert losses(tmp_path / "run") == pytest.approx(single, rel=1e-5)


def test_sigterm_to_the_launcher_leaves_one_whole_checkpoint_and_the_run_goes_on(hosts: Hosts, tmp_path: Path, single: dict[int, float]) -> None:
    words = (*DEMO, "--output_dir", tmp_path / "run", "--resume_from_checkpoint", "true")
    (started,) = launch("deepspeed", hosts, words, tmp_path / "log")
    started.wait_for(f"step 2/{STEPS}", 200)
    started.send(signal.SIGTERM)
    assert started.wait(120) == 143
    stopped = int((tmp_path / "run" / "checkpoint-latest").resolve().name.split("-")[1])
    assert 2 <= stopped < STEPS and f"stopped at step {stopped} of {STEPS}" in started.output()
    (started,) = launch("deepspeed", hosts, words, tmp_path / "log")
    assert started.wait(240) == 0, started.output()[-3000:]
    assert losses(tmp_path / "run") == pytest.approx(single, rel=1e-5)


def test_a_folder_that_is_not_shared_and_a_command_that_differs_are_named(hosts: Hosts, tmp_path: Path) -> None:
    (tmp_path / "outputs").mkdir()
    mounted = hosts.start("node-b", ["mount", "-t", "tmpfs", "tmpfs", tmp_path / "outputs"], tmp_path / "mount")
    assert mounted.wait(20) == 0
    started = []
    for rank, (name, address) in enumerate(hosts.addresses.items()):
        options = ["--nnodes", "2", "--node-rank", str(rank), "--nproc-per-node", "1", "--master-addr", "node-a", "--master-port", "29511"]
        words = [*DEMO, "--output_dir", tmp_path / "outputs" / "run", "--seed", str(40 + rank)]
        started.append(hosts.start(name, [ROOT / "launch" / "torchrun.sh", *options, *words], tmp_path / f"log-{address}", ENVIRONMENT, ROOT))
    for one in started:
        assert one.wait(200) != 0
        assert "argument seed: 40 on node-a (rank 0); 41 on node-b (rank 1)" in one.output(), one.output()[-3000:]
        assert "output_dir: not one shared folder" in one.output()
    assert not list((tmp_path / "outputs").iterdir()), "nothing is written before all is right"
