"""A real SLURM of two nodes: a job that is signalled or preempted saves, goes back into the queue and resumes by itself; a cancelled one stays away."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.multinode.conftest import DEMO, ENVIRONMENT, losses
from tests.multinode.hosts import Hosts

DAEMONS = ("slurmctld", "slurmd", "munged")
STAND_IN = Path(__file__).with_name("stand_in.py")
CONFIG = """
ClusterName=test
SlurmctldHost=node-a
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir=/run/slurmd
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=node-a,node-b CPUs={cpus} State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=60 OverSubscribe=FORCE:1
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""
pytestmark = pytest.mark.skipif(any(shutil.which(name) is None for name in DAEMONS), reason="slurm-wlm and munge are not installed")


class Cluster:
    """SLURM on both hosts, and one job."""

    def __init__(self, hosts: Hosts, folder: Path):
        self.hosts, self.folder, self.output = hosts, folder, folder / "job.log"
        self.output.touch()
        self._count = 0
        (folder / "state").mkdir()
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o600)
        (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, cpus=os.cpu_count()))
        for name in hosts.addresses:
            files = f"--key-file={folder}/munge.key --log-file={folder}/munge-{name}.log --seed-file={folder}/seed-{name}"
            self.run("sh", "-c", f"mkdir -p /run/munge && munged --force {files} --socket=/run/munge/munge.socket.2 --pid-file=/run/munge/pid", host=name)
        self.run("slurmctld")
        for name in hosts.addresses:
            self.run("slurmd", "-N", name, host=name)
        self.until("both nodes are idle", lambda: self.run("sinfo", "-h", "-p", "low", "-t", "idle", "-o", "%D") == "2", 40)

    def run(self, *words: str | Path, host: str = "node-a") -> str:
        """The output of a command, which has to succeed."""
        self._count += 1
        done = self.hosts.start(host, words, self.folder / f"command-{self._count}", {**ENVIRONMENT, "SLURM_CONF": f"{self.folder}/slurm.conf"}, ROOT)
        assert done.wait(60) == 0, f"{words}: {done.output()}"
        return done.output().strip()

    def submit(self, *words: str | Path) -> str:
        """The number of a new job of launch/slurm.sh, one task on each host."""
        return self.run("sbatch", "--parsable", "--ntasks-per-node=1", "--output", self.output, "launch/slurm.sh", *words)

    def state(self, job: str) -> str:
        """As squeue names it, empty once the job has left the queue."""
        return self.run("squeue", "-h", "-o", "%T", "--states=all", "-j", job)

    def until(self, what: str, holds: Callable[[], bool], seconds: float) -> None:
        """Waits for something to become true."""
        late = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < late, f"waited {seconds} s until {what}; the job has printed\n{self.output.read_text()[-3000:]}"
            time.sleep(0.3)

    def printed(self, text: str, seconds: float) -> None:
        """Waits for the job to print something."""
        self.until(f"it prints {text!r}", lambda: text in self.output.read_text(), seconds)

    def release(self, job: str) -> None:
        """Lets a requeued job start soon: SLURM holds it back for two minutes."""
        self.until("the job is back in the queue", lambda: self.state(job) == "PENDING", 60)
        time.sleep(5)  # a node that has not yet done with the job's last start kills the next one
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now")


@pytest.fixture
def cluster(hosts: Hosts, tmp_path: Path) -> Iterator[Cluster]:
    (tmp_path / "slurm").mkdir()
    yield Cluster(hosts, tmp_path / "slurm")


def test_a_preempted_job_saves_requeues_itself_and_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit(STAND_IN, tmp_path, "40", "1")
    cluster.printed("step 5\n", 60)
    cluster.run("sbatch", "--parsable", "-p", "high", "-N2", "--ntasks-per-node", str(os.cpu_count()), "--output", tmp_path / "high.log", "--wrap", "sleep 3")
    cluster.release(job)
    cluster.until("it is done", lambda: all((tmp_path / f"done-{rank}").exists() for rank in (0, 1)), 90)
    saved = [(tmp_path / f"rank-{rank}").read_text().split() for rank in (0, 1)]
    assert saved[0] == saved[1] == [saved[0][0], "SIGTERM"]


def test_a_cancelled_job_saves_and_does_not_come_back(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit(STAND_IN, tmp_path, "1000", "1")
    cluster.printed("step 5\n", 60)
    cluster.run("scancel", job)
    cluster.until("it is gone", lambda: cluster.state(job) == "CANCELLED", 60)
    time.sleep(3)
    assert cluster.state(job) == "CANCELLED"
    assert (tmp_path / "rank-0").exists() and (tmp_path / "rank-1").exists()


def test_training_that_is_signalled_resumes_by_itself_to_the_same_losses(cluster: Cluster, tmp_path: Path, single: dict[int, float]) -> None:
    job = cluster.submit(*DEMO, "--output_dir", tmp_path / "run")
    cluster.printed("step 2/", 200)
    cluster.run("scancel", "--signal=USR1", job)
    cluster.release(job)
    cluster.until("it is done", lambda: (tmp_path / "run" / "trainer_state.json").exists(), 200)
    assert "no complete checkpoint yet; starting afresh" in cluster.output.read_text()
    assert "is saved; the same command with" in cluster.output.read_text()
    assert losses(tmp_path / "run") == pytest.approx(single, rel=1e-5)
