"""profiling: what networks cost, counted and measured: FLOPs, seconds side by side, memory in a process of its own.

What is timed is a plain callable, run in turn with those it is compared with, so that whatever else slows the machine
down slows all of them alike; what is compared are ratios within a round. What is weighed is made by a generator
function, every `next` of which is a call, in a process of its own.
"""

import gc
import math
import multiprocessing
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diffusers import ModelMixin
from torch.utils.flop_counter import FlopCounterMode

from wddm.devices import resolve_precision
from wddm.metrics.intervals import median

Maker = Callable[..., Iterator]  # a generator function: each `next` of what it returns is a call

ATTENTION = ("bmm", "attention")  # operators of its two products, of queries with keys and of weights with values


def forward_flops(backbone: ModelMixin, *, attention: bool = True) -> int:
    """Floating-point operations of one forward pass at batch 1, without memory for weights or activations.

    A multiply-add counts as two; what is not a matrix product or a convolution (norms, activations, spline bases)
    counts as none. The numbers published for these networks leave out the two products inside attention, as counters
    do that do not see into its fused kernel; `attention=False` agrees with them to the digits given.
    """
    config = backbone.config
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        copy = type(backbone).from_config(config).eval()
        copy(torch.empty(1, config.in_channels, config.sample_size, config.sample_size), torch.zeros(1).long())
    counted = counter.get_flop_counts()["Global"].items()
    return sum(flops for name, flops in counted if attention or not any(part in str(name) for part in ATTENTION))


def race(
    contenders: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 5,
    seconds: float = 0.0,
    least_seconds: float = 0.2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, np.ndarray]:
    """Seconds that a call of each contender takes, (rounds,), the contenders run in turn.

    There are `rounds` of them, or more, until the race has lasted so many `seconds`. Each contender is warmed up by one
    call and its length found by another. A round is, for each, as many calls as last `least_seconds`; every other round
    goes through them backwards, so that none always follows the same one.
    """

    def timed(contender: Callable[[], object], calls: int) -> float:
        synchronise()
        began = clock()
        for _ in range(calls):
            contender()
        synchronise()
        return (clock() - began) / calls

    if rounds < 5:
        raise ValueError(f"got {rounds} rounds, wanted 5 or more, for medians and their intervals: take more")
    calls = {}
    for name, contender in contenders.items():
        contender()
        calls[name] = max(1, math.ceil(least_seconds / max(timed(contender, 1), 1e-9))) if least_seconds else 1
    order, taken, began = list(contenders), {name: [] for name in contenders}, clock()
    while order and (len(taken[order[0]]) < rounds or clock() - began < seconds):
        for name in order:
            taken[name].append(timed(contenders[name], calls[name]))
        order.reverse()
    return {name: np.array(values) for name, values in taken.items()}


def speed(seconds: np.ndarray, units: float = 1.0) -> tuple[float, float, float]:
    """Units a second, of the seconds (R,) that so many took in each round: the median and its quartiles."""
    low, middle, high = np.quantile(units / seconds, [0.25, 0.5, 0.75]).tolist()
    return middle, low, high


def times_as_fast(seconds: np.ndarray, reference: np.ndarray) -> tuple[float, float, float]:
    """How many times as fast as the reference: the median ratio of paired rounds (R,), with its 90 % interval."""
    return median(reference / seconds)


def spread(value: float | None, low: float | None = None, high: float | None = None) -> str:
    """A number with its ends, for a table: 12.3 (11.9 to 12.8)."""
    return "–" if value is None else f"{value:.3g} ({low:.3g} to {high:.3g})"


class Measured(NamedTuple):
    """What a contender took: seconds a step in each round (R,), and peak memory in GiB beyond that of Python with all
    imports; or the reason why not."""

    seconds: np.ndarray | None = None
    memory_gib: float | None = None
    reason: str | None = None


def fitting_batch(flops: float, rate: float, batch_size: int, max_seconds: float) -> int:
    """The first of `batch_size`, half of it, half of that, ... whose step should take at most `max_seconds`; or 1.

    `flops` are those of a step of one image, `rate` the FLOP/s of a large matrix product, of which half is expected.
    """
    while batch_size > 1 and flops * batch_size > rate / 2 * max_seconds:
        batch_size //= 2
    return batch_size


def alone(make: Maker, calls: int = 2) -> Measured:
    """Make a contender in a fresh process, there call it a few times, and weigh it; the time is of the last call.

    `make` is a generator function of a module, or a `partial` of one. The memory is that which CUDA's allocator
    counts, or where there is no GPU the anonymous resident memory at its peak, less that before `make`.
    """
    context = multiprocessing.get_context("forkserver")  # which imports once: a process then starts at once
    context.set_forkserver_preload([getattr(make, "func", make).__module__])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(_weigh, make, calls).result()
        except BrokenProcessPool:
            return Measured(reason="its process died: out of memory?")


def _weigh(make: Maker, calls: int) -> Measured:
    before = 0 if torch.cuda.is_available() else _anonymous_bytes()
    try:
        contender = make()
        for _ in range(calls):
            began = time.perf_counter()
            next(contender)
            synchronise()
            seconds = time.perf_counter() - began
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
            return Measured(reason="out of memory")
        raise
    if torch.cuda.is_available():
        return Measured(np.array([seconds]), torch.cuda.max_memory_allocated() / 2**30)
    return Measured(np.array([seconds]), (_anonymous_bytes(peak=True) - before) / 2**30)


def contest(
    makers: Mapping[str, Maker],
    *,
    rounds: int = 5,
    seconds: float = 0.0,
    max_seconds: float = math.inf,
    least: Mapping[str, float] = {},
) -> dict[str, Measured]:
    """Weigh every contender alone, then race those that fit.

    Args:
        makers: generator functions that take `steps`, how many of them a call is; as many as last
            half a second, 20 at most.
        rounds, seconds: how many, or how long, as for `race`.
        max_seconds: the longest step that is raced.
        least: seconds below which a step cannot be; where that is over `max_seconds` it is not run at all.
    """
    return _raced(makers, _weighed(makers, max_seconds, least), rounds, seconds)


def batch_contest(
    makers: Mapping[str, Maker],
    *,
    batch_size: int,
    least: Mapping[str, float],
    rounds: int = 5,
    seconds: float = 0.0,
    max_seconds: float = math.inf,
) -> tuple[int, dict[str, Measured]]:
    """`contest` of makers that take `batch_size`, too; and that is halved as long as one of them runs out of memory.

    `least` is of an image; all else is of a step.
    """
    while True:
        sized = {name: partial(make, batch_size=batch_size) for name, make in makers.items()}
        found = _weighed(sized, max_seconds, {name: batch_size * least[name] for name in makers})
        if batch_size == 1 or not any("memory" in str(one.reason) for one in found.values()):
            return batch_size, _raced(sized, found, rounds, seconds)
        batch_size //= 2


def _weighed(makers: Mapping[str, Maker], max_seconds: float, least: Mapping[str, float]) -> dict[str, Measured]:
    """What each takes alone, in seconds of one step; or the reason why it is not to be raced."""
    found = {}
    for name, make in makers.items():
        if least.get(name, 0) > max_seconds:
            found[name] = Measured(reason=f"over {least[name]:.3g} s a step")
            continue
        found[name] = alone(make)
        if found[name].reason is None and found[name].seconds[-1] > max_seconds:
            found[name] = found[name]._replace(reason=f"{found[name].seconds[-1]:.3g} s a step", seconds=None)
    return found


def _raced(
    makers: Mapping[str, Maker], weighed: Mapping[str, Measured], rounds: int, seconds: float
) -> dict[str, Measured]:
    """What was weighed, with seconds of all rounds of those that have no reason not to be raced."""
    found = dict(weighed)
    steps = {name: int(np.clip(0.5 / one.seconds[-1], 1, 20)) for name, one in found.items() if one.reason is None}
    with ready({name: partial(makers[name], steps=count) for name, count in steps.items()}) as calls:
        for name, taken in race(calls, rounds=rounds, seconds=seconds).items():
            found[name] = found[name]._replace(seconds=taken / steps[name])
    return found


@contextmanager
def ready(makers: Mapping[str, Maker]) -> Iterator[dict[str, Callable[[], object]]]:
    """A plain callable for every generator, for the length of a `with` block; the last is closed first: they nest.

    Networks may each be compiled, where PyTorch gives up after 8 of a class; and what they held is free afterwards,
    for processes beside this one.
    """
    with ExitStack() as stack, torch._dynamo.config.patch(recompile_limit=64):
        yield {name: partial(next, stack.enter_context(closing(make()))) for name, make in makers.items()}
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


def _anonymous_bytes(peak: bool = False) -> int:
    """Resident memory of this process that is no file's (libraries are read as they are used); now or at its peak.

    Where there is no /proc, the peak resident memory so far stands for both.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    kib = {line.split(":")[0]: line.split()[1] for line in status.read_text().splitlines() if line.endswith("kB")}
    return 1024 * (int(kib["VmHWM"]) - int(kib["RssFile"]) if peak else int(kib["RssAnon"]))


def synchronise() -> None:
    """Wait for what was launched on the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def matmul_rate(precision: str = "no", rounds: int = 5) -> float:
    """FLOP/s of a large square matrix product on this machine in that precision, at best of the rounds."""
    device, side = ("cuda", 8192) if torch.cuda.is_available() else ("cpu", 1024)
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}
    if device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as in training
    a, b = torch.randn(2, side, side, device=device, dtype=kinds[resolve_precision(precision)])
    return float(2 * side**3 / race({"matmul": lambda: a @ b}, rounds=rounds)["matmul"].min())


def machine(rate: float) -> list[dict[str, object]]:
    """What measured, in rows of property and value; `rate` is its `matmul_rate`."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    rows = {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores, threads": f"{os.cpu_count()}, {torch.get_num_threads()}",
        "memory": f"{pages / 2**30:.0f} GiB",
        "GPU": f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB" if gpu else "none",
        "large matrix product": f"{rate / 1e9:,.0f} GFLOP/s",
        "other load": f"{os.getloadavg()[0]:.1f} processes, mean of the last minute",
        "PyTorch": torch.__version__,
        "system": platform.platform(),
    }
    return [{"property": name, "value": value} for name, value in rows.items()]
