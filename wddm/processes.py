"""This process and those that `accelerate launch` started beside it. Imports torch only when asked to join."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import PartialState


def yield_cores() -> None:
    """Processes that share the cores must not spin while they wait for each other; before torch is imported."""
    if "LOCAL_RANK" in os.environ:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def join(device: str | None = None) -> "PartialState":
    """The processes, one or as many as were launched, on GPUs unless `device` is "cpu" or there are none."""
    yield_cores()

    import torch
    from accelerate import PartialState

    on_cpu = device == "cpu" or not torch.accelerator.is_available()
    processes = PartialState(cpu=on_cpu)
    if processes.num_processes > 1 and on_cpu:
        allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
        torch.set_num_threads(len(allowed))  # as alone, where launchers say 1: on it depends how sums round
    return processes
