"""Where the time of a step goes, and how much of the device's arithmetic is put to use."""

import re
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

# The phases of a step, in the order in which they come; `other` is what is left: logging, callbacks, the Trainer's own work
PHASES = ("data", "communication", "vision", "forward", "backward", "optimizer", "other")
PREFERENCE_PHASES = ("data", "communication", "vision", "reference", "forward", "backward", "optimizer", "other")

# TFLOP/s of dense 16-bit matrix products with float32 sums, from the makers' data sheets; the first name that a device's name contains counts
PEAK_TFLOPS = {
    "B200": 2250,
    "GB200": 2250,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "GH200": 989,
    "H800": 989,
    "H20": 148,
    "A100": 312,
    "A800": 312,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "A40": 150,
    "A30": 165,
    "A10G": 70,
    "A10": 125,
    "RTX 6000 Ada": 364,
    "A6000": 155,
    "RTX 5090": 209,
    "RTX 4090": 165,
    "RTX 4080": 97,
    "RTX 3090": 71,
    "T4": 65,
    "V100": 125,
    "MI300X": 1307,
    "MI250X": 383,
}


_MOST_MARKS = 10_000  # before they are added up: a run that never logs keeps no more


def peak_flops(device_name: str) -> float | None:
    """FLOP/s of a device's dense 16-bit matrix products, None if it is not in the table."""
    found = [name for name in PEAK_TFLOPS if re.search(rf"\b{re.escape(name)}\b", device_name)]
    return PEAK_TFLOPS[max(found, key=len)] * 1e12 if found and "Laptop" not in device_name else None


class StepClock:
    """Gives all time that passes to one phase or another: each mark ends a phase that began at the mark before it.

    On a GPU the marks are events in its queue, which cost no synchronisation: a phase lasts from the moment when the GPU has done all that was asked before it.
    What the GPU waits for (data, the host) counts where it waits.
    """

    def __init__(self, device: torch.device, phases: Sequence[str] = PHASES):
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []
        self._phases = phases
        self._seconds = dict.fromkeys(phases, 0.0)
        self.start()

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self) -> None:
        """Forgets what was measured: time runs from here."""
        self._marks = [("", self._now())]
        self._seconds = dict.fromkeys(self._phases, 0.0)

    def mark(self, phase: str) -> None:
        """The phase that ends here; "" for time that is to count nowhere."""
        self._marks.append((phase, self._now()))
        if len(self._marks) > _MOST_MARKS:
            self._add_up()

    def take(self) -> dict[str, float]:
        """Seconds of each phase since the last time, and forgets them."""
        self._add_up()
        seconds, self._seconds = self._seconds, dict.fromkeys(self._phases, 0.0)
        return seconds

    def _add_up(self) -> None:
        last = self._marks[-1][1]
        if self._on_gpu:
            last.synchronize()
        for (_, before), (phase, now) in pairwise(self._marks):
            if phase:
                self._seconds[phase] += before.elapsed_time(now) / 1000 if self._on_gpu else now - before
        self._marks = [("", last)]
