"""profiling: what code costs: alternatives timed in turn, memory measured in a process of its own.

A `Maker` is what is measured, a generator function: every `next` of its generator is a call of so many steps. All
alternatives are timed in turn, so that whatever else slows the machine down slows all of them alike; only ratios within
a round are compared.
"""

import gc
import math
import multiprocessing
import os
import platform
import re
import resource
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch.autograd import DeviceType
from torch.profiler import profile

from wddm.metrics.intervals import median
from wddm.steps import resolve_precision

Maker = Callable[..., Generator]


def time_in_turn(
    alternatives: Mapping[Any, Callable[[], object]],
    *,
    rounds: int = 5,
    seconds: float = 0.0,
    min_seconds: float = 0.2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Any, np.ndarray]:
    """Seconds that a call of each alternative takes, (rounds,), the alternatives run in turn.

    There are `rounds` rounds, or more, until all have lasted `seconds`. One call warms an alternative up, another finds
    how many calls last `min_seconds`: so many are its part of a round. Every other round goes through the alternatives
    backwards, so that none always follows the same one.
    """
    if rounds < 5:
        raise ValueError(f"got {rounds} rounds, wanted 5 or more, for medians and their intervals: take more")

    calls = {}
    for name, call in alternatives.items():
        call()
        calls[name] = max(1, math.ceil(min_seconds / max(seconds_of(call, clock), 1e-9))) if min_seconds else 1
    taken: dict[Any, list[float]] = {name: [] for name in alternatives}
    order, began, done = list(alternatives), clock(), 0
    while order and (done < rounds or clock() - began < seconds):
        for name in order:
            taken[name].append(seconds_of(alternatives[name], clock, calls[name]))
        order, done = order[::-1], done + 1
    return {name: np.array(values) for name, values in taken.items()}


class Measurement(NamedTuple):
    """What steps of `batch_size` images took, or the `reason` why it is not known."""

    seconds: np.ndarray | None = None  # of a step, in each round (R,)
    memory_gib: float | None = None  # at its peak, beyond that of Python with all imports
    reason: str | None = None
    batch_size: int = 1


def speed(one: Measurement) -> list[float | None]:
    """Images a second: the median over rounds, and its quartiles."""
    return [None] * 3 if one.seconds is None else np.quantile(one.batch_size / one.seconds, [0.5, 0.25, 0.75]).tolist()


def times_as_fast(ours: Measurement, theirs: Measurement) -> list[float | None]:
    """How many times as fast ours is: the median ratio of paired rounds, with its 90 % interval."""
    return [None] * 3 if ours.seconds is None or theirs.seconds is None else [*median(theirs.seconds / ours.seconds)]


def spread(value: float | None, low: float | None = None, high: float | None = None) -> str:
    """A number with its ends, for a table: 12.3 (11.9 to 12.8)."""
    return "–" if value is None else f"{value:.3g} ({low:.3g} to {high:.3g})"


def compare(
    makers: Mapping[Any, Maker],
    *,
    batch_size: int,
    bounds: Mapping[Any, float] = {},
    rounds: int = 5,
    seconds: float = 0.0,
    max_seconds: float = math.inf,
) -> dict[Any, Measurement]:
    """Measure the memory of each alternative alone, then time those that fit in turn.

    Args:
        makers: generator functions that take `batch_size`, and `steps`, the number of steps in a call: as many as last
            half a second, 20 at most.
        batch_size: images a step; halved for all as long as one of them runs out of memory.
        bounds: seconds that an image takes at least; an alternative whose step is then over `max_seconds` is not run.
        rounds, seconds: how many, or how long, as for `time_in_turn`.
        max_seconds: the longest step that is timed.
    """
    while True:
        sized = {name: partial(make, batch_size=batch_size) for name, make in makers.items()}
        found = {name: _fits(make, bounds.get(name, 0) * batch_size, max_seconds) for name, make in sized.items()}
        if batch_size == 1 or not any("memory" in str(one.reason) for one in found.values()):
            break
        batch_size //= 2
    found = {name: one._replace(batch_size=batch_size) for name, one in found.items()}
    steps = {name: int(np.clip(0.5 / one.seconds[-1], 1, 20)) for name, one in found.items() if one.seconds is not None}
    with ready({name: partial(sized[name], steps=count) for name, count in steps.items()}) as calls:
        for name, taken in time_in_turn(calls, rounds=rounds, seconds=seconds).items():
            found[name] = found[name]._replace(seconds=taken / steps[name])
    return found


def _fits(make: Maker, minimum: float, max_seconds: float) -> Measurement:
    """What a step takes alone; or why not to time it: its seconds, `minimum` or more, exceed `max_seconds`."""
    if minimum > max_seconds:
        return Measurement(reason=f"over {minimum:.3g} s a step")
    one = measure_alone(make)
    if one.seconds is not None and one.seconds[-1] > max_seconds:
        return one._replace(reason=f"{one.seconds[-1]:.3g} s a step", seconds=None)
    return one


def fitting_batch(flops: float, rate: float, batch_size: int, max_seconds: float) -> int:
    """The first of `batch_size`, half of it, half of that, ... whose step should take at most `max_seconds`; or 1.

    `flops`: operations of a step on one image; `rate`: FLOP/s of a large matrix product, of which half is expected.
    """
    while batch_size > 1 and flops * batch_size > rate / 2 * max_seconds:
        batch_size //= 2
    return batch_size


def measure_alone(make: Maker, clock: Callable[[], float] = time.perf_counter) -> Measurement:
    """Peak memory, and seconds of the second call, of a maker that is called twice in a fresh process.

    `make` is a `partial` of a module's generator function. The memory is what CUDA's allocator counts, or without a GPU
    the anonymous resident memory at its peak, less that before `make`.
    """
    context = multiprocessing.get_context("forkserver")  # imports once, so that processes start at once
    context.set_forkserver_preload([getattr(make, "func", make).__module__])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(_measure_here, make, clock).result()
        except BrokenProcessPool:
            return Measurement(reason="its process died: out of memory?")


def _measure_here(make: Maker, clock: Callable[[], float] = time.perf_counter) -> Measurement:
    before, on_gpu = anonymous_bytes(), torch.cuda.is_available()
    try:
        next(steps := make())
        seconds = seconds_of(partial(next, steps), clock)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
            return Measurement(reason="out of memory")
        raise
    taken = (torch.cuda.max_memory_allocated() if on_gpu else 0) or anonymous_bytes(peak=True) - before
    return Measurement(np.array([seconds]), taken / 2**30)


def anonymous_bytes(peak: bool = False) -> int:
    """Resident memory of this process, in bytes, without mapped files (libraries, for instance); now or at its peak.

    Where there is no /proc, it is all resident memory, at its peak so far.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    kib = {name: int(size) for name, size in re.findall(r"^(\w+):\s+(\d+) kB$", status.read_text(), re.M)}
    return 1024 * (kib["VmHWM"] - kib["RssFile"] if peak else kib["RssAnon"])


@contextmanager
def ready(makers: Mapping[Any, Maker]) -> Iterator[dict[Any, Callable[[], object]]]:
    """A plain callable for every maker's generator, for the length of a `with` block; they are closed in reverse order.

    Up to 64 networks of a class may be compiled, where PyTorch gives up after 8. Afterwards all that they held is free,
    also for other processes.
    """
    with ExitStack() as stack, torch._dynamo.config.patch(recompile_limit=64):
        yield {name: partial(next, stack.enter_context(closing(make()))) for name, make in makers.items()}
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


def synchronise() -> None:
    """Wait for what was launched on the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


OUTSIDE, REST = "outside of operators", "all other operators"


def by_operator(make: Maker, steps: int = 5) -> tuple[list[dict[str, Any]], float]:
    """A row for each of PyTorch's operators, the slowest first: its `calls` and its own `seconds` in a step, those of
    the GPU where there is one; and the seconds of a step without the profiler.

    `make` takes `steps`, the number of steps in a call: the first call warms up, the second is timed, the third is
    profiled. The part of the third that no operator takes, mostly Python's, has a row, too.
    """
    with closing(make(steps=steps)) as calls:
        next(calls)
        alone = seconds_of(partial(next, calls))
        with silenced(), profile() as seen:
            watched = seconds_of(partial(next, calls))
    own = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    operators = [one for one in seen.key_averages() if one.device_type == DeviceType.CPU]  # not their kernels, too
    found = [(one.key, one.count / steps, getattr(one, own) / 1e6 / steps) for one in operators]
    rest = max(0.0, watched / steps - sum(seconds for *_, seconds in found))
    found = [(OUTSIDE, 1.0, rest), *(row for row in found if row[2])]
    rows = [dict(zip(("operator", "calls", "seconds"), row, strict=True)) for row in found]
    return sorted(rows, key=lambda row: -row["seconds"]), alone / steps


@contextmanager
def silenced() -> Iterator[None]:
    """Discard what libraries write to the standard error themselves, past Python, as the profiler's does."""
    sys.stderr.flush()
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def seconds_of(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter, calls: int = 1) -> float:
    """Seconds of one call, a mean over so many `calls`."""
    synchronise()
    began = clock()
    for _ in range(calls):
        call()
    synchronise()
    return (clock() - began) / calls


def shares(table: pd.DataFrame, by: Sequence[str], most: int = 14) -> pd.DataFrame:
    """Per cent of a step: a row for each of the `most` costly operators and two for the rest, a column for each `by`.

    `table` has the rows of `by_operator`, and columns `by` that say what was profiled.
    """
    wide = table.pivot(index="operator", columns=list(by), values="seconds").fillna(0.0)
    wide = 100 * wide / wide.sum()
    order = wide.drop(index=OUTSIDE).max(axis=1).sort_values(ascending=False).index
    shown = wide.loc[order[:most]]
    shown.loc[REST] = wide.loc[order[most:]].sum()
    shown.loc[OUTSIDE] = wide.loc[OUTSIDE]
    return shown.round(1)


def matmul_rate(precision: str = "no") -> float:
    """FLOP/s of a large square matrix product on this machine in that precision, the best of five rounds."""
    device, side = ("cuda", 8192) if torch.cuda.is_available() else ("cpu", 1024)
    if device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as in training
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}[resolve_precision(precision)]
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    return float(2 * side**3 / time_in_turn({"product": lambda: a @ b})["product"].min())


def machine(rate: float) -> list[dict[str, str]]:
    """The machine that measures, in rows of property and value; `rate` is its `matmul_rate`."""
    info = Path("/proc/cpuinfo")
    names = re.findall("^model name.*: (.*)", info.read_text(), re.M) if info.exists() else []
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    rows = {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores, threads": f"{os.cpu_count()}, {torch.get_num_threads()}",
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB",
        "GPU": f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB" if gpu else "none",
        "large matrix product": f"{rate / 1e9:,.0f} GFLOP/s",
        "other load": f"{os.getloadavg()[0]:.1f} processes, mean of the last minute",
        "PyTorch": torch.__version__,
        "system": platform.platform(),
    }
    return [{"property": name, "value": value} for name, value in rows.items()]
