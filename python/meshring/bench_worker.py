"""What each rank of `meshring bench` runs: craft inputs, check results exactly, time the calls.

`python -m meshring.bench_worker CONFIG_JSON` is started once per rank. Rank 0 writes one JSON
object a line to the file descriptor that the configuration names: `hello`, then a `row` for each
operation and size, then `done`.
"""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from meshring.bench_data import (
    PERIOD,
    Array,
    count_wrong,
    craft,
    dtype_of,
    fill,
    reduced,
    spoil,
)
from meshring.bench_report import OPERATIONS, PLACEMENTS, Operation, Record, statistics

if TYPE_CHECKING:
    from meshring.communicator import Communicator

Row: TypeAlias = tuple[str, int, int]

# Below this a clock read is a visible part of a call, so one sample spans several calls.
SAMPLE_NS = 20_000
SAMPLES_MIN, SAMPLES_MAX = 5, 1000
CALIBRATION_NS = 1_000_000
HELLO_BYTES = 1024


# ---------------------------------------------------------------- where the arrays are


class Target(Protocol):
    """Where a rank's arrays are, and how its calls are timed."""

    sample_ns: int
    """Least length of a sample. Units: nanoseconds."""

    def empty(self, count: int, dtype: np.dtype[Any]) -> Array:
        """Return a new array, to pass to a collective."""

    def view(self, x: Array) -> Array:
        """Return the array of the same bytes that `fill`, `spoil` and `count_wrong` work on."""

    def sampler(self, call: Callable[[], object], calls: int) -> Callable[[], float]:
        """Return what makes that many calls and says how long they took. Units: nanoseconds."""

    def known(self, arrays: Sequence[Array], collective: bool) -> AbstractContextManager[None]:
        """Within it, the arrays are registered, if the run asks for that."""

    def facts(self) -> Record:
        """Return what the results' environment says of it."""


class Host:
    """Arrays in host memory, and its clock."""

    sample_ns = SAMPLE_NS

    def empty(self, count: int, dtype: np.dtype[Any]) -> Array:
        """Return a new NumPy array."""
        return np.empty(count, dtype)

    def view(self, x: Array) -> Array:
        """Return x."""
        return x

    def sampler(self, call: Callable[[], object], calls: int) -> Callable[[], float]:
        """Return what makes that many calls and says how long they took. Units: nanoseconds."""

        def sample() -> float:
            begin = perf_counter_ns()
            for _ in repeat(None, calls):
                call()
            return perf_counter_ns() - begin

        return sample

    @contextmanager
    def known(self, arrays: Sequence[Array], collective: bool) -> Iterator[None]:
        """Do nothing: memory of the host is not registered."""
        yield

    def facts(self) -> Record:
        """Return nothing: the environment describes the host."""
        return {}


HOST = Host()


# ---------------------------------------------------------------- one operation on one rank


@dataclass
class Case:
    """One operation on this rank's arrays: `call()` runs it; the rest is (array, pattern, start).

    `inputs` are written before the call, `results` must hold after it, `kept` too: with out= an
    operation leaves its input alone. `arrays` are all that was allocated.
    """

    call: Callable[[], object]
    inputs: list[tuple[Array, Array, int]] = field(default_factory=list)
    results: list[tuple[Array, Array, int]] = field(default_factory=list)
    kept: list[tuple[Array, Array, int]] = field(default_factory=list)
    arrays: list[Array] = field(default_factory=list)


def build(
    comm: Communicator,
    operation: Operation,
    count: int,
    values: Array,
    op: str,
    root: int,
    in_place: bool,
    target: Target = HOST,
) -> Case:
    """Allocate this rank's arrays of `count` elements a block and bind the call to them."""
    n, rank, name = comm.size, comm.rank, operation.name
    if name == "barrier":
        return Case(comm.barrier)
    mine, at_root = values[rank], rank == root
    total = reduced(values, op) if operation.reduces else mine
    block = slice(rank * count, (rank + 1) * count)

    arrays: list[Array] = []

    def new(blocks: int = 1) -> Array:
        arrays.append(target.empty(blocks * count, values.dtype))
        return arrays[-1]

    def case(call: Callable[[], object], x: Array | None) -> Case:
        made = Case(call, arrays=arrays)
        if x is not None:
            made.inputs.append((x, mine, 0))
            if not in_place:
                made.kept.append((x, mine, 0))
        return made

    # Arguments are positional: bound that way, partial() costs some 30 ns a call.
    if name in ("all_reduce", "broadcast"):
        x = new()
        out = None if in_place else new()
        if name == "all_reduce":
            made = case(partial(comm.all_reduce, x, op, out), x)
            result = total
        else:
            made = case(partial(comm.broadcast, x, root, out), x)
            result = values[root]
        made.results.append((x if out is None else out, result, 0))
    elif name == "reduce":
        x = new()
        out = (x if in_place else new()) if at_root else None
        made = case(partial(comm.reduce, x, op, root, out), x)
        if out is not None:
            made.results.append((out, total, 0))
    elif name in ("all_gather", "gather"):
        collects = name == "all_gather" or at_root
        out = new(n) if collects else None
        x = out[block] if in_place and out is not None else new()
        if name == "all_gather":
            made = case(partial(comm.all_gather, x, 0, None, out), x)
        else:
            made = case(partial(comm.gather, x, root, 0, None, out), x)
        if out is not None:
            made.results += [(out[r * count : (r + 1) * count], values[r], 0) for r in range(n)]
    elif name == "reduce_scatter":
        x = new(n)
        out = x[block] if in_place else new()
        made = case(partial(comm.reduce_scatter, x, op, 0, None, out), x)
        made.results.append((out, total, rank * count))
    elif name == "scatter":
        source = new(n) if at_root else None
        out = source[block] if in_place and source is not None else new()
        made = case(partial(comm.scatter, source, root, 0, None, out), source)
        made.results.append((out, values[root], rank * count))
    elif name == "all_to_all":
        x, out = new(n), new(n)
        made = case(partial(comm.all_to_all, x, 0, None, out), x)
        made.results += [
            (out[r * count : (r + 1) * count], values[r], rank * count) for r in range(n)
        ]
    else:
        x, out = new(), new()
        to, source_rank = (rank + 1) % n, (rank - 1) % n
        made = case(partial(comm.sendrecv, x, to, source_rank, out), x)
        made.results.append((out, values[source_rank], 0))
    return made


def check(case: Case, target: Target = HOST) -> int:
    """Run `case` once on fresh data and return the number of wrong elements on this rank."""
    for x, pattern, start in case.results:
        spoil(target.view(x), pattern, start)
    for x, pattern, start in case.inputs:  # second: in place, an input is a part of the result's
        fill(target.view(x), pattern, start)
    case.call()
    pieces = case.results + case.kept
    return sum(count_wrong(target.view(x), pattern, start) for x, pattern, start in pieces)


# ---------------------------------------------------------------- timing


@dataclass(frozen=True)
class Settings:
    """What one run measures and how. Units: budget_s seconds for each row and placement.

    `need` is what a rank's arrays take at most, in bytes. `graph` and `registered` are for NCCL.
    """

    rows: Sequence[Row]
    dtype: str
    op: str
    root: int
    warmup: int
    iters: int | None
    budget_s: float
    check: bool
    backend: str = "host"
    graph: bool = False
    registered: bool = False
    need: int = 0


def slowest(comm: Communicator, values: Array) -> Array:
    """Return on rank 0 the element-wise maximum over ranks (meaningless on the others)."""
    gathered = comm.gather(values, root=0)
    return values if gathered is None else gathered.reshape(comm.size, -1).max(axis=0)


def agree(comm: Communicator, *numbers: int) -> list[int]:
    """Return rank 0's numbers on every rank."""
    return [int(n) for n in comm.broadcast(np.array(numbers, dtype=np.int64), root=0)]


def measure(
    comm: Communicator, call: Callable[[], object], settings: Settings, target: Target = HOST
) -> tuple[Array, int]:
    """Time `call` and return (samples, calls per sample). Units: microseconds per call.

    Samples are the slowest rank's, on rank 0; every rank makes the same number of calls.
    """
    for _ in repeat(None, settings.warmup):
        call()
    calls = 1
    while True:
        sample = target.sampler(call, calls)
        comm.barrier()
        took = float(slowest(comm, np.array([sample()], dtype=np.float64))[0])
        enough = took >= CALIBRATION_NS or calls >= 256
        (more,) = agree(comm, 0 if enough else calls * 4)
        if not more:
            break
        calls = more
    each = max(took / calls, 1.0)
    batch = max(1, math.ceil(target.sample_ns / each))
    fitting = int(settings.budget_s * 1e9 / (each * batch))
    samples = settings.iters or min(max(fitting, SAMPLES_MIN), SAMPLES_MAX)
    batch, samples = agree(comm, batch, samples)

    times = np.zeros(samples, dtype=np.float64)
    sample = target.sampler(call, batch)
    for i in range(samples):
        comm.barrier()
        times[i] = sample()
    return slowest(comm, times) / (1e3 * batch), batch


def run_row(
    comm: Communicator, row: Row, settings: Settings, salt: int, target: Target = HOST
) -> Record:
    """Check and time one operation at one size; the record is complete on rank 0."""
    name, size, count = row
    operation = OPERATIONS[name]
    dtype = dtype_of(settings.dtype)
    op = settings.op if operation.reduces else None
    record: Record = {
        "operation": name,
        "size_bytes": size,
        "count": count,
        "dtype": None if name == "barrier" else settings.dtype,
        "op": op,
        "root": settings.root if operation.rooted else None,
        "ranks": comm.size,
        "out_of_place": None,
        "in_place": None,
    }
    for placement in PLACEMENTS:
        in_place = placement == "in_place"
        if in_place and not operation.in_place:
            continue
        # A new salt each time: what an earlier call left behind cannot pass for a result.
        values = craft(dtype, op, comm.size, 2 * salt + in_place)
        case = build(comm, operation, count, values, settings.op, settings.root, in_place, target)
        with target.known(case.arrays, not operation.rooted):
            record[placement] = run_case(comm, case, row, settings, in_place, target)
        del case  # before the next one's arrays are made
    return record


def run_case(
    comm: Communicator,
    case: Case,
    row: Row,
    settings: Settings,
    in_place: bool,
    target: Target,
) -> Record:
    """Check and time one placement of a row; the record is complete on rank 0."""
    name, size, _ = row
    operation = OPERATIONS[name]
    wrong = None
    if settings.check and name != "barrier":
        mine = np.array([check(case, target)], dtype=np.int64)
        gathered = comm.gather(mine, root=0)
        wrong = int(mine[0] if gathered is None else gathered.sum())
    # The timed data. In place, each call reduces the result of the one before: with the
    # neutral element it stays as it is, whereas sums would run into inf, and products or
    # means into denormals, which some processors are slow on. All pages are touched here.
    for array, pattern, _ in case.results:
        fill(target.view(array), np.zeros(PERIOD, pattern.dtype))
    for array, pattern, start in case.inputs:
        if in_place and operation.reduces:
            neutral = np.ones if settings.op == "prod" else np.zeros
            fill(target.view(array), neutral(PERIOD, pattern.dtype))
        else:
            fill(target.view(array), pattern, start)
    samples, batch = measure(comm, case.call, settings, target)
    return statistics(samples, batch, size, operation.factor(comm.size), wrong)


# ---------------------------------------------------------------- the rank


def cores_text(cores: set[int]) -> str:
    """Write a set of core numbers as ranges: {0, 1, 2, 5} -> '0-2,5'."""
    runs: list[list[int]] = []
    for core in sorted(cores):
        if runs and core == runs[-1][1] + 1:
            runs[-1][1] = core
        else:
            runs.append([core, core])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def introduce(comm: Communicator) -> list[Record]:
    """Return on rank 0 who the ranks are: rank, pid, host, cores."""
    cores = cores_text(os.sched_getaffinity(0))
    me = {"rank": comm.rank, "pid": os.getpid(), "host": socket.gethostname()[:64]}
    if comm.device is not None:
        me["gpu"] = comm.device
    text = json.dumps(me | {"cores": cores[: HELLO_BYTES - 300]}).encode().ljust(HELLO_BYTES)
    gathered = comm.gather(np.frombuffer(text, dtype=np.uint8), root=0)
    if gathered is None:
        return []
    return [json.loads(bytes(line)) for line in gathered.reshape(comm.size, HELLO_BYTES)]


def run(
    comm: Communicator, settings: Settings, emit: Callable[[Record], None], target: Target = HOST
) -> None:
    """Measure every row; `emit` is called on rank 0 only."""
    ranks = introduce(comm)
    if comm.rank == 0:
        hello = {"kind": "hello", "ranks": ranks, "numpy": np.__version__}
        hello |= {"python": platform.python_version(), "backend": settings.backend}
        emit(hello | {"transport": comm.transport} | target.facts())
    gc.collect()
    gc.disable()  # a collection inside a sample is the benchmark's own noise
    try:
        for salt, row in enumerate(settings.rows):
            record = run_row(comm, row, settings, salt, target)
            if comm.rank == 0:
                emit({"kind": "row", "result": record})
    finally:
        gc.enable()
    comm.barrier()
    if comm.rank == 0:
        emit({"kind": "done"})


def main(argv: Sequence[str]) -> int:
    """Run one rank with the configuration in argv[1]."""
    import meshring as mr

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a benchmark without tracebacks
    config = json.loads(argv[1])
    fd: int = config.pop("fd")
    config["rows"] = [tuple(row) for row in config["rows"]]

    def emit(record: Record) -> None:
        data = memoryview(json.dumps(record).encode() + b"\n")
        while data:
            data = data[os.write(fd, data) :]

    settings = Settings(**config)
    if settings.backend == "host":
        with mr.init("host") as comm:
            run(comm, settings, emit)
        return 0
    from meshring import bench_device

    try:
        bench_device.share_a_gpu()
        with mr.init("nccl") as comm, bench_device.target(comm, settings) as target:
            run(comm, settings, emit, target)
    except mr.UsageError as error:
        print(f"meshring bench: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
