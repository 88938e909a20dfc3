"""Placeholder."""

import datetime
import os
from collections.abc import Mapping
from typing import Any

import torch


def start_processes(values: Mapping[str, Any]) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=values["ddp_timeout"]))
