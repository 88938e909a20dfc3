"""Before the first step: the nodes of a run held against each other, so that what differs between them is said, and not trained."""

import hashlib
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed import DistError

from interlace.errors import InputError, RunError
from interlace.ranks import Ranks
from interlace.training.sharding import start_processes
from interlace.training.tracking import environment

_CLOCK_SECONDS = 5.0
_SHOWN_CHARACTERS = 100
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt")


@dataclass(frozen=True)
class Node:
    """What a rank tells the others.

    Args:
        facts: what must be the same everywhere, by name.
        gpus: names of the machine's GPUs.
        token: a file that this rank has left in the run's folder; None if it could not.
        problems: what is wrong on this machine by itself.
    """

    rank: int
    host: str
    facts: Mapping[str, str]
    gpus: str
    token: Path | None
    problems: tuple[str, ...]


def meet(arguments: Mapping[str, Any]) -> Ranks:
    """The processes that the launcher started, when they have found each other.

    Raises:
        RunError: they did not; says who waited for whom, and what to look at.
    """
    timeout_seconds = arguments["ddp_timeout"]
    try:
        start_processes(arguments)
        return Ranks(timeout_seconds)
    except RuntimeError as error:
        if not (isinstance(error, DistError) or "gloo" in str(error).lower()):
            raise
        rank, size, address, port = (os.environ.get(name, "?") for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
        networks = " and ".join(f"{name} ({os.environ.get(name, 'not set')})" for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"))
        raise RunError(
            f"rank {rank} of {size} on {socket.gethostname()} did not find the others (ddp_timeout: {timeout_seconds} seconds): {_first_line(error)}\n"
            f"  MASTER_ADDR ({address}) has to be an address of rank 0's machine that every node reaches; MASTER_PORT ({port}) and the ports above 1024\n"
            "  have to be open between the nodes\n"
            f"  {networks} have to name the network that joins the nodes, where a machine's own name resolves to 127.0.1.1\n"
            "  and every node has to have been started; launch/README.md says more"
        ) from error


def check_nodes(ranks: Ranks, arguments: Mapping[str, Any], model_path: str, data: str, say: Callable[[str], None]) -> None:
    """Compares software, arguments, model and data of all ranks, and looks whether they share an `output_dir` that all can write.

    Args:
        arguments: resolved, without secrets.
        model_path: the model's folder, or its hub id.
        data: fingerprint of rows and plan.
        say: takes the warnings: clocks that differ, GPUs of several kinds.

    Raises:
        InputError: on every rank with the same message, which names hosts and ranks.
    """
    folder = _nearest(Path(arguments["output_dir"]))
    token, problems = _leave_token(folder, ranks.rank) if ranks.local_rank == 0 else (None, ())
    begins = folder != Path(arguments["output_dir"]).absolute()  # a run that goes on, or over another, has its room
    needed = 0 if arguments["lora"] or not begins else sum(size for _, size in _weight_files(model_path))
    free = shutil.disk_usage(folder).free
    if free < needed:
        problems += (f"output_dir: {free / 1e9:.2f} GB are free in {folder}, and the trained model alone takes {needed / 1e9:.2f} GB",)
    facts, gpus = _describe(arguments, model_path, data)
    try:
        nodes: list[Node] = ranks.gather(Node(ranks.rank, socket.gethostname(), facts, gpus, token, problems))
        clock = time.time()  # the gathering ends everywhere at once
        unseen = [node.rank for node in nodes if node.token is not None and not node.token.exists()]
        answers: list[tuple[float, list[int]]] = ranks.gather((clock, unseen))
    finally:
        if token is not None:
            token.unlink(missing_ok=True)
    found = [*_differences(nodes), *_apart(nodes, [seen for _, seen in answers]), *_alone(nodes)]
    if found:
        hosts = dict.fromkeys(node.host for node in nodes)
        if len(nodes) == 1:
            raise InputError("\n  ".join(found))
        raise InputError(f"{len(nodes)} processes on {', '.join(hosts)} cannot train together; mend this, then start again\n  " + "\n  ".join(found))
    for line in _warnings(nodes, [clock for clock, _ in answers]):
        say(line)


def _describe(arguments: Mapping[str, Any], model_path: str, data: str) -> tuple[dict[str, str], str]:
    """(what must be the same on all ranks, by name; the kinds of GPUs)."""
    known = environment()
    facts = {"python": known["python"], **known["packages"], "interlace": f"commit {known['commit']}, code {_code()}"}
    facts |= {f"argument {name}": json.dumps(value, ensure_ascii=False, default=str) for name, value in arguments.items()}
    facts |= {"model": _model(model_path), "rows and plan": data}
    return {name: str(fact) for name, fact in facts.items()}, ", ".join(sorted(set(known["machine"]["gpus"])))


def _nearest(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that is there: nothing is made before everything is right."""
    folder = folder.absolute()
    while not folder.is_dir():
        folder = folder.parent
    return folder


def _leave_token(folder: Path, rank: int) -> tuple[Path | None, tuple[str, ...]]:
    token = folder / f".interlace-{rank}-{uuid.uuid4().hex}"
    try:
        token.touch()
    except OSError as error:
        return None, (f"output_dir: cannot write in {folder}: {error.strerror}",)
    return token, ()


def _weight_files(model_path: str) -> list[tuple[str, int]]:
    return sorted((file.name, file.stat().st_size) for pattern in _WEIGHTS for file in Path(model_path).glob(pattern))


def _model(model_path: str) -> str:
    """Configuration, names and sizes of the weights: a frozen part that differed between nodes would be noticed nowhere else."""
    config = Path(model_path) / "config.json"
    if not config.is_file():
        return model_path
    return hashlib.sha256(repr(_weight_files(model_path)).encode() + config.read_bytes()).hexdigest()


def _code() -> str:
    """A hash of the package's source: a commit alone does not tell an edit."""
    package, content = Path(__file__).parents[1], hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        content.update(file.read_bytes())
    return content.hexdigest()[:12]


def _differences(nodes: Sequence[Node]) -> list[str]:
    """One line for each fact that is not the same everywhere, with who holds what."""
    lines = []
    for name in dict.fromkeys(name for node in nodes for name in node.facts):
        holders: dict[str, list[Node]] = {}
        for node in nodes:
            holders.setdefault(node.facts.get(name, "absent"), []).append(node)
        if len(holders) > 1:
            lines.append(f"{name}: " + "; ".join(f"{_short(fact)} on {_who(group)}" for fact, group in holders.items()))
    return lines


def _apart(nodes: Sequence[Node], unseen: Sequence[Sequence[int]]) -> list[str]:
    """A line if the run's folder is not one folder; `unseen` holds, by rank, the ranks whose files it did not find."""
    blind = {node.host: (node, nodes[ranks[0]]) for node, ranks in zip(nodes, unseen, strict=True) if ranks}
    if not blind:
        return []
    node, other = next(iter(blind.values()))
    return [
        f"output_dir: not one shared folder: {_who([node])} does not see what {_who([other])} wrote in {other.token.parent if other.token else ''}; "
        "choose a folder on a file system that all nodes share, by a path that is the same on all of them"
    ]


def _alone(nodes: Sequence[Node]) -> list[str]:
    """What is wrong on single machines, each thing once."""
    holders: dict[str, list[Node]] = {}
    for node in nodes:
        for problem in node.problems:
            holders.setdefault(problem, []).append(node)
    return [f"{problem} (on {_who(group)})" for problem, group in holders.items()]


def _warnings(nodes: Sequence[Node], clocks: Sequence[float]) -> list[str]:
    lines = []
    slow, fast = (choose(zip(clocks, nodes, strict=True), key=lambda pair: pair[0]) for choose in (min, max))
    if fast[0] - slow[0] > _CLOCK_SECONDS:
        ahead = f"{_who([fast[1]])} is {fast[0] - slow[0]:.0f} seconds ahead of that of {_who([slow[1]])}"
        lines.append(f"warning: the clock of {ahead}; times in logs and files will not agree")
    kinds: dict[str, list[Node]] = {}
    for node in nodes:
        kinds.setdefault(node.gpus or "none", []).append(node)
    if len(kinds) > 1:
        held = "; ".join(f"{gpus} on {_who(group)}" for gpus, group in kinds.items())
        lines.append(f"warning: not all nodes have the same GPUs, the slowest decides: {held}")
    return lines


def _who(nodes: Sequence[Node]) -> str:
    """`node-a (ranks 0-7), node-b (rank 8)`."""
    hosts: dict[str, list[int]] = {}
    for node in nodes:
        hosts.setdefault(node.host, []).append(node.rank)
    return ", ".join(f"{host} (rank{'s' if len(ranks) > 1 else ''} {_spans(ranks)})" for host, ranks in hosts.items())


def _spans(ranks: Sequence[int]) -> str:
    """Rising numbers as `0-3, 6`."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return ", ".join(str(start) if start == end else f"{start}-{end}" for start, end in spans)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]


def _short(fact: str) -> str:
    return fact if len(fact) <= _SHOWN_CHARACTERS else f"{fact[:_SHOWN_CHARACTERS]}... (hash {hashlib.sha256(fact.encode()).hexdigest()[:8]})"
