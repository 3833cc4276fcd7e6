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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from meshring.bench_report import OPERATIONS, PLACEMENTS, Operation, Record, statistics

if TYPE_CHECKING:
    from meshring.communicator import Communicator

Array: TypeAlias = NDArray[Any]
Row: TypeAlias = tuple[str, int, int]

# Inputs repeat after a prime number of elements: cheap to make and to check, while a block that
# lands at a wrong offset (offsets are powers of two and multiples of 16 bytes) still differs.
PERIOD = 8191
# Below this a clock read is a visible part of a call, so one sample spans several calls.
SAMPLE_NS = 20_000
SAMPLES_MIN, SAMPLES_MAX = 5, 1000
CALIBRATION_NS = 1_000_000
HELLO_BYTES = 1024


REDUCTIONS = ("sum", "prod", "min", "max", "mean")
ML_DTYPES = ("bfloat16", "float8_e4m3fn", "float8_e5m2")
DTYPES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128", *ML_DTYPES),
)
# Every integer up to here is exact in the type; larger types are cut off where it is plenty.
EXACT = {"bool": 1, "float16": 2048, "bfloat16": 256, "float8_e4m3fn": 16, "float8_e5m2": 8}
EXACT_PLENTY = 1 << 20


def dtype_of(name: str) -> np.dtype[Any]:
    """Return the NumPy dtype called `name`; ImportError where it needs ml_dtypes."""
    if name in ML_DTYPES:
        import ml_dtypes

        found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
        return found
    return np.dtype(name)


def supports(dtype: str, op: str) -> bool:
    """Tell whether the reduction `op` is defined for `dtype` (NumPy's meaning)."""
    if op in ("min", "max"):
        return not dtype.startswith("complex")
    if op == "mean":
        return not dtype.startswith(("bool", "int", "uint"))
    return True


# ---------------------------------------------------------------- exact inputs and results


def _magnitudes(rng: np.random.Generator, dtype: str, top: int, shape: tuple[int, ...]) -> Array:
    low = 0 if dtype.startswith(("bool", "uint")) else -top
    return np.asarray(rng.integers(low, top, size=shape, endpoint=True))


def _limit(dtype: str) -> int:
    if dtype in EXACT:
        return EXACT[dtype]
    if dtype.startswith(("int", "uint")):
        return min(int(np.iinfo(dtype).max) - 1, EXACT_PLENTY)  # the maximum is the poison
    return EXACT_PLENTY


def _bits(rng: np.random.Generator, op: str | None, ranks: int) -> Array:
    # The rare value is the one that decides, so that one lost rank changes some results.
    decisive = rng.integers(0, 2 if op is None else ranks + 1, size=(ranks, PERIOD)) == 0
    return np.asarray(~decisive if op in ("prod", "min") else decisive)


def _real(rng: np.random.Generator, dtype: str, op: str | None, ranks: int) -> Array:
    shape = (ranks, PERIOD)
    if op == "sum":
        return _magnitudes(rng, dtype, max(1, _limit(dtype) // ranks), shape)
    if op == "mean":  # pairs of ranks hold (0, 2s) or (2s, 0), a rank left over s: the mean is s
        scale = rng.choice([-4, -2, -1, 1, 2, 4], size=PERIOD)
        values = np.tile(scale, (ranks, 1))
        flips = rng.integers(0, 2, size=(ranks // 2, PERIOD))
        values[0 : ranks // 2 * 2 : 2] *= 2 * flips
        values[1 : ranks // 2 * 2 : 2] *= 2 * (1 - flips)
        return values
    return _magnitudes(rng, dtype, _limit(dtype), shape)


def _factors(rng: np.random.Generator, dtype: str, ranks: int) -> Array:
    # All ranks hold 1 but two, drawn for each position: the product stays a small power of two.
    if dtype.startswith("complex"):
        choices = np.array([2, -1, 4, 1j, -2j])
    else:
        choices = np.array([2, 4] if dtype.startswith("uint") else [2, -1, 4, -2])
    values = np.ones((ranks, PERIOD), dtype=choices.dtype)
    for _ in range(2):
        values[rng.integers(0, ranks, size=PERIOD), np.arange(PERIOD)] *= rng.choice(
            choices, size=PERIOD
        )
    return values


def craft(dtype: np.dtype[Any], op: str | None, ranks: int, salt: int) -> Array:
    """Return every rank's input, one period of it: exact in `dtype` under `op` in any order.

    Shapes: (ranks, PERIOD). `op` None: data that is only moved.
    """
    rng = np.random.default_rng([salt, ranks])
    name = dtype.name
    if name == "bool":
        values = _bits(rng, op, ranks)
    elif op == "prod":
        values = _factors(rng, name, ranks)
    else:
        values = _real(rng, name, op, ranks)
        if dtype.kind == "c":
            values = values + 1j * _real(rng, name, op, ranks)
    if name in ML_DTYPES:
        values = values.astype(np.float32)
    return np.ascontiguousarray(values.astype(dtype))


def reduced(values: Array, op: str) -> Array:
    """Reduce `values` over ranks with NumPy: in rank order, half and smaller through float32."""
    dtype = values.dtype
    if dtype.name == "bool":
        return np.asarray(values.all(axis=0) if op in ("prod", "min") else values.any(axis=0))
    wide = np.dtype(np.float32) if dtype.name in EXACT else dtype
    combine = {"prod": np.multiply, "min": np.minimum, "max": np.maximum}.get(op, np.add)
    total = values[0].astype(wide)
    for row in values[1:]:
        total = combine(total, row.astype(wide))
    if op == "mean":
        total = total / wide.type(len(values))
    return np.asarray(total.astype(dtype))


def fill(target: Array, pattern: Array, start: int = 0) -> None:
    """Write the periodic `pattern` into `target`, beginning with its element `start`."""
    pattern = np.roll(pattern, -start)
    whole = target.size // PERIOD * PERIOD
    target[:whole].reshape(-1, PERIOD)[...] = pattern
    target[whole:] = pattern[: target.size - whole]


def count_wrong(actual: Array, pattern: Array, start: int = 0) -> int:
    """Return how many elements of `actual` differ from the periodic `pattern` from `start` on."""
    pattern = np.roll(pattern, -start)
    wrong = 0
    step = 128 * PERIOD  # keeps the temporary of the comparison in cache
    for begin in range(0, actual.size, step):
        piece = actual[begin : begin + step]
        whole = piece.size // PERIOD * PERIOD
        wrong += int(np.count_nonzero(piece[:whole].reshape(-1, PERIOD) != pattern))
        wrong += int(np.count_nonzero(piece[whole:] != pattern[: piece.size - whole]))
    return wrong


def spoil(target: Array, pattern: Array, start: int = 0) -> None:
    """Write values that are wrong everywhere, so that an element never written is noticed."""
    if target.dtype.name == "bool":
        fill(target, ~pattern, start)
    elif target.dtype.kind in "iu":
        target.fill(np.iinfo(target.dtype).max)
    else:
        target.fill(np.nan)


# ---------------------------------------------------------------- one operation on one rank


@dataclass
class Case:
    """One operation on this rank's arrays: `call()` runs it; the rest is (array, pattern, start).

    `inputs` are written before the call, `results` must hold after it, `kept` too: with out= an
    operation leaves its input alone.
    """

    call: Callable[[], object]
    inputs: list[tuple[Array, Array, int]] = field(default_factory=list)
    results: list[tuple[Array, Array, int]] = field(default_factory=list)
    kept: list[tuple[Array, Array, int]] = field(default_factory=list)


def build(
    comm: Communicator,
    operation: Operation,
    count: int,
    values: Array,
    op: str,
    root: int,
    in_place: bool,
) -> Case:
    """Allocate this rank's arrays of `count` elements a block and bind the call to them."""
    n, rank, name = comm.size, comm.rank, operation.name
    if name == "barrier":
        return Case(comm.barrier)
    mine, at_root = values[rank], rank == root
    total = reduced(values, op) if operation.reduces else mine
    block = slice(rank * count, (rank + 1) * count)

    def new(blocks: int = 1) -> Array:
        return np.empty(blocks * count, dtype=values.dtype)

    def case(call: Callable[[], object], x: Array | None) -> Case:
        made = Case(call)
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


def check(case: Case) -> int:
    """Run `case` once on fresh data and return the number of wrong elements on this rank."""
    for piece in case.results:
        spoil(*piece)
    for piece in case.inputs:  # second: in place, an input is a part of the result's array
        fill(*piece)
    case.call()
    return sum(count_wrong(*piece) for piece in case.results + case.kept)


# ---------------------------------------------------------------- timing


@dataclass(frozen=True)
class Settings:
    """What one run measures and how. Units: budget_s seconds for each row and placement."""

    rows: Sequence[Row]
    dtype: str
    op: str
    root: int
    warmup: int
    iters: int | None
    budget_s: float
    check: bool


def slowest(comm: Communicator, values: Array) -> Array:
    """Return on rank 0 the element-wise maximum over ranks (meaningless on the others)."""
    gathered = comm.gather(values, root=0)
    return values if gathered is None else gathered.reshape(comm.size, -1).max(axis=0)


def agree(comm: Communicator, *numbers: int) -> list[int]:
    """Return rank 0's numbers on every rank."""
    return [int(n) for n in comm.broadcast(np.array(numbers, dtype=np.int64), root=0)]


def measure(
    comm: Communicator, call: Callable[[], object], settings: Settings
) -> tuple[Array, int]:
    """Time `call` and return (samples, calls per sample). Units: microseconds per call.

    Samples are the slowest rank's, on rank 0; every rank makes the same number of calls.
    """
    for _ in repeat(None, settings.warmup):
        call()
    calls = 1
    while True:
        comm.barrier()
        begin = perf_counter_ns()
        for _ in repeat(None, calls):
            call()
        took = float(slowest(comm, np.array([perf_counter_ns() - begin], dtype=np.float64))[0])
        enough = took >= CALIBRATION_NS or calls >= 256
        (more,) = agree(comm, 0 if enough else calls * 4)
        if not more:
            break
        calls = more
    each = max(took / calls, 1.0)
    batch = max(1, math.ceil(SAMPLE_NS / each))
    fitting = int(settings.budget_s * 1e9 / (each * batch))
    samples = settings.iters or min(max(fitting, SAMPLES_MIN), SAMPLES_MAX)
    batch, samples = agree(comm, batch, samples)

    times = np.zeros(samples, dtype=np.float64)
    for i in range(samples):
        comm.barrier()
        begin = perf_counter_ns()
        for _ in repeat(None, batch):
            call()
        times[i] = perf_counter_ns() - begin
    return slowest(comm, times) / (1e3 * batch), batch


def run_row(comm: Communicator, row: Row, settings: Settings, salt: int) -> Record:
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
        case = build(comm, operation, count, values, settings.op, settings.root, in_place)
        wrong = None
        if settings.check and name != "barrier":
            mine = np.array([check(case)], dtype=np.int64)
            gathered = comm.gather(mine, root=0)
            wrong = int(mine[0] if gathered is None else gathered.sum())
        # The timed data. In place, each call reduces the result of the one before: with the
        # neutral element it stays as it is, whereas sums would run into inf, and products or
        # means into denormals, which some processors are slow on. All pages are touched here.
        for array, *_ in case.results:
            array.fill(0)
        for array, pattern, start in case.inputs:
            if in_place and operation.reduces:
                array.fill(1 if op == "prod" else 0)
            else:
                fill(array, pattern, start)
        samples, batch = measure(comm, case.call, settings)
        record[placement] = statistics(samples, batch, size, operation.factor(comm.size), wrong)
    return record


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
    text = json.dumps(me | {"cores": cores[: HELLO_BYTES - 300]}).encode().ljust(HELLO_BYTES)
    gathered = comm.gather(np.frombuffer(text, dtype=np.uint8), root=0)
    if gathered is None:
        return []
    return [json.loads(bytes(line)) for line in gathered.reshape(comm.size, HELLO_BYTES)]


def run(comm: Communicator, settings: Settings, emit: Callable[[Record], None]) -> None:
    """Measure every row; `emit` is called on rank 0 only."""
    ranks = introduce(comm)
    if comm.rank == 0:
        hello = {"ranks": ranks, "backend": comm.backend, "transport": comm.transport}
        emit(
            {"kind": "hello", "numpy": np.__version__, "python": platform.python_version()} | hello
        )
    gc.collect()
    gc.disable()  # a collection inside a sample is the benchmark's own noise
    try:
        for salt, row in enumerate(settings.rows):
            record = run_row(comm, row, settings, salt)
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

    with mr.init() as comm:
        run(comm, Settings(**config), emit)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
