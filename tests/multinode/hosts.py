"""Hosts on one machine, good enough for a real multi-node launch.

A host is a process tree in network, PID, mount, UTS and IPC namespaces of its own: address, name, process list, /run, /dev/shm, sshd. The hosts hang on a
switch in a further network namespace, so that a cable can be pulled while the carrier stays up, as with a real switch. The file system is shared, as over NFS.
Nothing is made in the machine's own namespaces. Every host dies with its first process, which dies with ours, however ours ends.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import psutil

TOOLS = ("unshare", "nsenter", "setpriv", "ip", "ssh", "ssh-keygen", "pdsh", "pgrep", "/usr/sbin/sshd")
NAMESPACES = ("--net", "--mount", "--uts", "--ipc", "--pid", "--mount-proc")
INIT = """
set -e
mount -t tmpfs -o mode=755 tmpfs /run
mkdir /run/sshd
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount --bind {folder}/hosts /etc/hosts
mount --bind {ssh_config} /etc/ssh/ssh_config
hostname {name}
ip link set lo up
until ip link show eth0 > /dev/null 2>&1; do sleep 0.05; done
ip addr add {address}/24 dev eth0
ip link set eth0 up
/usr/sbin/sshd -f {folder}/sshd_config -E {folder}/sshd.log
touch {folder}/ready
while :; do sleep 3600 & wait $! || true; done  # process 1 buries the orphans
"""
SSHD = """
ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile {key}.pub
PidFile {folder}/sshd.pid
UsePAM no
StrictModes no
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
PrintMotd no
"""
SSH = "Host *\n  IdentityFile {key}\n  IdentitiesOnly yes\n  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n  BatchMode yes\n"


def why_not() -> str | None:
    """Why hosts cannot be had on this machine; None if they can."""
    if os.geteuid() != 0:
        return "hosts of namespaces need root"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    trial = ["unshare", *NAMESPACES, "--fork", "sh", "-c", "mount -t tmpfs tmpfs /run && ip link add trial type bridge"]
    done = subprocess.run(trial, capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else f"namespaces are not permitted here: {done.stderr.strip()}"


class Hosts:
    """Two hosts, node-a and node-b, up within the `with` block and gone behind it.

    Args:
        folder: keys, configurations and logs go there.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.addresses = {"node-a": "10.77.0.1", "node-b": "10.77.0.2"}
        self.first: dict[str, int] = {}  # each host's first process
        self._holders: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Hosts":
        try:
            self._switch_on()
        except BaseException:
            self._off()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._off()

    def _off(self) -> None:
        for holder in self._holders:
            holder.kill()
            holder.wait()
        gone = time.monotonic() + 20
        while any(psutil.pid_exists(pid) for pid in self.first.values()):
            assert time.monotonic() < gone, "a host did not go away"
            time.sleep(0.05)

    def _switch_on(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        key = self.folder / "key"
        make_key(key)
        (self.folder / "ssh_config").write_text(SSH.format(key=key))
        self.first["switch"] = self._hold(("--net",), "sleep infinity", self.folder)
        self._on_switch("ip link add bridge type bridge && ip link set bridge up")
        for name, address in self.addresses.items():
            self._plug_in(name, address, key)

    def _plug_in(self, name: str, address: str, key: Path) -> None:
        folder = self.folder / name
        folder.mkdir()
        names = "".join(f"{other} {host}\n" for host, other in self.addresses.items())
        # Debian gives every machine the line 127.0.1.1: a library that looks up its own name finds an address that nobody else can reach
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n{names}")
        make_key(folder / "host_key")
        (folder / "sshd_config").write_text(SSHD.format(address=address, folder=folder, key=key))
        self.first[name] = self._hold(NAMESPACES, INIT.format(name=name, address=address, folder=folder, ssh_config=self.folder / "ssh_config"), folder)
        self._on_switch(f"ip link add {name} type veth peer name eth0 netns {self.first[name]} && ip link set {name} master bridge && ip link set {name} up")
        ready = time.monotonic() + 20
        while not (folder / "ready").exists():
            assert time.monotonic() < ready, f"{name} is not up: {(folder / 'holder.log').read_text()}"
            time.sleep(0.05)

    def _hold(self, namespaces: Sequence[str], script: str, folder: Path) -> int:
        """Starts a namespace's first process and returns its id; it is killed when this process ends, in whatever way."""
        words = ["setpriv", "--pdeathsig", "KILL", "unshare", *namespaces, "--fork", "--kill-child", "bash", "-c", script]
        with (folder / "holder.log").open("wb") as log:
            holder = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        self._holders.append(holder)
        return only_child(holder.pid)

    def _on_switch(self, script: str) -> None:
        subprocess.run(["nsenter", "-t", str(self.first["switch"]), "-n", "sh", "-ec", script], check=True)

    def start(self, name: str, words: Sequence[str | Path], log: Path, environment: Mapping[str, str] | None = None, folder: Path | None = None) -> "Launched":
        """Starts a command on a host, in `folder` (this one unless given), its output in `log`."""
        values = [f"{key}={value}" for key, value in (environment or {}).items()]
        enter = ["nsenter", "-t", str(self.first[name]), "-n", "-m", "-u", "-i", "-p", "--", "env", "-C", str(folder or Path.cwd()), *values]
        with log.open("wb") as out:
            entered = subprocess.Popen([*enter, *map(str, words)], stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
        return Launched(entered, log)

    def cut(self, name: str) -> None:
        """Pulls a host's cable at the switch: what it sends goes nowhere, and nobody is told."""
        self._on_switch(f"ip link set {name} nomaster")

    def heal(self, name: str) -> None:
        """Plugs the cable in again."""
        self._on_switch(f"ip link set {name} master bridge")


class Launched:
    """A command that runs on a host."""

    def __init__(self, entered: subprocess.Popen[bytes], log: Path):
        self.entered, self.log = entered, log

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to the command, which is a child of the one that entered the host."""
        os.kill(only_child(self.entered.pid), number)

    def wait(self, timeout_seconds: float) -> int:
        """Its exit code.

        Raises:
            AssertionError: it still runs then; the end of its output is shown.
        """
        try:
            return self.entered.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout_seconds} s; its output ends\n{self.output()[-3000:]}") from None

    def wait_for(self, text: str, timeout_seconds: float) -> None:
        """Returns when `text` stands in the output.

        Raises:
            AssertionError: the command ended, or the time is over, before that.
        """
        late = time.monotonic() + timeout_seconds
        while text not in self.output():
            assert self.entered.poll() is None, f"ended with {self.entered.returncode} before {text!r}:\n{self.output()[-3000:]}"
            assert time.monotonic() < late, f"no {text!r} after {timeout_seconds} s; the output ends\n{self.output()[-3000:]}"
            time.sleep(0.1)

    def output(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(errors="replace")


def only_child(pid: int) -> int:
    """The id of a process's child, as soon as it has one."""
    late = time.monotonic() + 20
    while True:
        children = psutil.Process(pid).children()
        if children:
            return children[0].pid
        assert time.monotonic() < late, f"process {pid} started nothing"
        time.sleep(0.02)


def make_key(path: Path) -> None:
    """An ssh key without a password."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
