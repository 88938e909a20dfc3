"""A rank that answers signals as a training process does, without the seconds that loading takes: at the next step all ranks agree to stop, save and exit 143.

usage: stand_in.py FOLDER STEPS SAVING_SECONDS; leaves `rank-N` with the step at which the rank saved and what it caught, from where it goes on if
started again, and `done-N` at the end
"""

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

caught: list[str] = []


def catch(number: int, _: FrameType | None) -> None:
    caught.append(signal.Signals(number).name)


def main() -> None:
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank=")]
    folder, steps, saving_seconds = Path(words[0]), int(words[1]), float(words[2])
    rank = int(os.environ["RANK"])
    saved = folder / f"rank-{rank}"
    first = int(saved.read_text().split()[0]) if saved.exists() else 0
    dist.init_process_group("gloo", timeout=timedelta(seconds=20))
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, catch)
    for step in range(first, steps):
        stops = torch.tensor([float(bool(caught))])
        dist.all_reduce(stops)
        if rank == 0:
            print(f"step {step}", flush=True)
        if stops.item():
            time.sleep(saving_seconds)
            print(f"rank {rank} has saved step {step}", flush=True)
            saved.write_text(f"{step} {' '.join(caught)}")
            dist.barrier()
            os._exit(143)
        time.sleep(0.1)
    (folder / f"done-{rank}").touch()
    dist.barrier()
    os._exit(0)


main()
