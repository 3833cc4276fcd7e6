"""The one case table: what is called, on what arrays, and what must come back.

`table()` gives cases, `run_case(comm, case, where)` runs one on any communicator and device. Not the full product of
all properties: every (dtype, op) of every operation, and of the shape properties every pair (or
triple, with `strength=3`) that is legal.
"""

from __future__ import annotations

import itertools
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np

import oracle

RANKS = (1, 2, 3, 4, 5)
REDUCTIONS = ("all_reduce", "reduce", "reduce_scatter")
JOINS = ("all_gather", "gather")
CUTS = ("reduce_scatter", "scatter", "all_to_all")
WHOLE = ("all_reduce", "broadcast", "reduce", "sendrecv", "send")
OPERATIONS = (*WHOLE, *JOINS, *CUTS, "barrier")
IN_PLACE = ("all_reduce", "broadcast")  # without out= they write to x

# out: with out=; in place: x in its own place of out, or out in its own place of x.
LAYOUTS = ("c", "fortran", "strided", "unaligned", "0-d", "out", "in place")
AXES = ("0", "1", "-1", "middle")
UNEVEN = ("equal", "sizes", "zeros", "auto")
LINE, SLOT, ROUND, MIB = 48, 32 << 10, 256 << 10, 1 << 20
# Bytes of one rank's array (cuts: of all its pieces), and elements beyond: each side of every
# threshold of the host backend.
SIZES = {
    "empty": (0, 0),
    "one": (0, 1),
    "seven": (0, 7),
    "line": (LINE, 0),
    "line+": (LINE, 1),
    "slot": (SLOT, 0),
    "slot+": (SLOT, 1),
    "round": (ROUND, 0),
    "round+": (ROUND, 1),
    "large": (MIB, 3),
}
SMALL = ("empty", "one", "seven", "line", "line+")
SHAPES = {"0": (1, 1), "1": (3, 1), "-1": (4, 1), "middle": (2, 3)}  # outer and inner elements


@dataclass(frozen=True)
class Case:
    """One call on all ranks of a group."""

    operation: str
    ranks: int
    dtype: str = "float32"
    op: str = "sum"
    layout: str = "c"
    axis: str = "0"
    uneven: str = "equal"
    size: str = "seven"

    @property
    def seed(self) -> int:
        """A number that every process computes alike."""
        return zlib.crc32(repr(sorted(asdict(self).items())).encode())

    @property
    def root(self) -> int:
        """The root, where there is one."""
        return self.seed % self.ranks

    def __str__(self) -> str:
        fields = [self.operation, f"{self.ranks} ranks", self.dtype, self.op, self.layout]
        return ", ".join([*fields, f"axis {self.axis}", self.uneven, self.size])


def legal(case: Case) -> bool:
    """Whether there is such a call; what is not is some other case under a second name."""
    operation, layout = case.operation, case.layout
    if operation == "barrier":
        return asdict(case) == asdict(Case("barrier", case.ranks))
    if operation not in REDUCTIONS and case.op != "sum":
        return False
    if operation in REDUCTIONS and not oracle.supports(case.dtype, case.op):
        return False
    if case.uneven != "equal" and operation in ("all_reduce", "broadcast", "reduce"):
        return False
    if case.uneven == "auto" and operation in WHOLE:
        return False
    if layout == "fortran" and case.axis == "0":
        return False
    if layout == "0-d":
        cuts = operation in CUTS and case.ranks > 1 and case.uneven == "equal"
        fits = case.axis in ("0", "-1") if operation not in WHOLE else case.axis == "0"
        uneven = case.uneven != "equal" and operation not in CUTS
        return case.size == "one" and fits and not cuts and not uneven
    if layout == "in place":
        if operation in ("sendrecv", "send") or (operation == "all_to_all" and case.ranks > 1):
            return False
        return case.axis == "0" or operation in WHOLE
    return True


# ---- the table ------------------------------------------------------------------------------


def table(
    ranks: Sequence[int] = RANKS,
    *,
    operations: Sequence[str] = OPERATIONS,
    dtypes: Sequence[str] = oracle.DTYPES,
    layouts: Sequence[str] = LAYOUTS,
    sizes: Sequence[str] = tuple(SIZES),
    strength: int = 2,
) -> Iterator[Case]:
    """The cases of these properties, in an order that is the same everywhere."""
    small = [s for s in sizes if s in SMALL]
    for operation in operations:
        types = _types(operation, ranks, dtypes, small)
        shapes = _shapes(operation, ranks, dtypes, layouts, sizes, strength)
        yield from dict.fromkeys([*types, *shapes])


def _types(
    operation: str, ranks: Sequence[int], dtypes: Sequence[str], sizes: Sequence[str]
) -> Iterator[Case]:
    """Every dtype and op on every number of ranks."""
    turn = itertools.cycle(sizes)
    for n, dtype, op in itertools.product(ranks, dtypes, oracle.OPS):
        case = Case(operation, n, dtype, op, size="seven" if operation == "barrier" else next(turn))
        if legal(case):
            yield case


def _shapes(
    operation: str,
    ranks: Sequence[int],
    dtypes: Sequence[str],
    layouts: Sequence[str],
    sizes: Sequence[str],
    strength: int,
) -> Iterator[Case]:
    """Every pair (triple, ...) of the properties that say where the bytes lie."""
    if operation == "barrier":
        return
    product = list(itertools.product(layouts, AXES, UNEVEN, sizes, ranks))
    random.Random(f"{operation} {strength}").shuffle(product)
    ops = [(d, o) for d in dtypes for o in oracle.OPS if legal(Case(operation, 1, d, o))]
    random.Random(operation).shuffle(ops)
    turn = itertools.cycle(ops)
    seen: set[tuple[Any, ...]] = set()
    for row in product:
        if not legal(Case(operation, row[4], "float32", "sum", *row[:4])):
            continue
        new = set(itertools.combinations(enumerate(row), strength)) - seen
        if new:
            seen |= new
            dtype, op = next(turn)
            yield Case(operation, row[4], dtype, op, *row[:4])


# ---- where arrays live ----------------------------------------------------------------------


def _assign(x: Any, a: np.ndarray) -> None:
    x[...] = a


@dataclass(frozen=True)
class Where:
    """How arrays come to the device of a backend and back, and how results are compared there."""

    put: Callable[[np.ndarray], Any] = lambda a: a  # of a C-contiguous array
    get: Callable[[Any], Any] = lambda a: a
    assign: Callable[[Any, np.ndarray], None] = _assign
    difference: Callable[[Case, Any, Any], str | None] = lambda case, got, want: oracle.difference(
        got, want
    )
    sends_to_itself: bool = True  # without group()


HOST = Where()


# ---- arrays ---------------------------------------------------------------------------------


def values(rng: np.random.Generator, dtype: str, shape: Sequence[int]) -> np.ndarray:
    """Ordinary numbers, one in sixteen replaced by arbitrary bytes: NaN, inf, subnormals, huge."""
    count = int(np.prod(shape, dtype=int))
    t = oracle.dtype_of(dtype)
    wild = rng.integers(0, 256, count * t.itemsize, np.uint8)
    if t.kind == "b":
        return (wild & 1).view(bool).reshape(shape)
    if t.kind in "iu":
        return wild.view(t).reshape(shape)
    tame = rng.standard_normal(count) * 2.0 ** rng.integers(-4, 4, count)
    out = (tame + 1j * rng.standard_normal(count) if t.kind == "c" else tame).astype(t)
    out[::16] = wild.view(t)[::16]
    return out.reshape(shape)


def laid_out(a: np.ndarray, layout: str, put: Callable[[np.ndarray], Any]) -> Any:
    """A fresh array with the values of `a`, laid out in memory as the case says."""
    if layout == "unaligned":
        memory = np.empty(a.nbytes + 1, np.uint8)[1:]
        memory[:] = a.reshape(-1).view(np.uint8)
        return memory.view(a.dtype).reshape(a.shape)
    if layout == "fortran":
        return put(np.ascontiguousarray(a.T)).T
    if layout == "strided":
        wide = np.zeros((*a.shape[:-1], 2 * a.shape[-1]), a.dtype)
        wide[..., ::-2] = a
        return put(wide)[..., ::-2]
    return put(a.copy())


def poisoned(a: np.ndarray, layout: str, put: Callable[[np.ndarray], Any]) -> Any:
    """An output of the form of `a`, full of bytes that no result has by chance."""
    return laid_out(np.full(a.nbytes, 0xA5, np.uint8).view(a.dtype).reshape(a.shape), layout, put)


# ---- a case, worked out ---------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """Arguments and results of a case, one entry a rank."""

    inputs: list[np.ndarray]
    expected: list[np.ndarray | None]
    axis: int
    sizes: list[Any]  # the argument sizes=
    lengths: list[Any]  # along the axis: what each rank holds, or what it gets


def _uneven(case: Case, length: int) -> list[int]:
    """Lengths per rank that differ, for shards of about this length."""
    if case.uneven == "zeros":
        return [length if (r + case.seed) % 2 else 0 for r in range(case.ranks)]
    return [max(0, length - r) for r in range(case.ranks)]


def _cut(case: Case, length: int) -> list[int]:
    """The same for one axis that is cut."""
    if case.uneven == "auto":
        return oracle.balanced(length, case.ranks)
    weights = [w + 1 for w in _uneven(case, case.ranks)] if case.uneven == "sizes" else []
    weights = weights or [w + (case.ranks == 1) for w in _uneven(case, 1)]
    ends = [length * sum(weights[: i + 1]) // sum(weights) for i in range(case.ranks)]
    return [b - a for a, b in zip([0, *ends], ends, strict=False)]


@lru_cache(maxsize=8)
def plan(case: Case) -> Plan:
    """Work out a case; threads share the result, so nobody may write to it."""
    n, dtype = case.ranks, oracle.dtype_of(case.dtype)
    size, more = SIZES[case.size]
    outer, inner = SHAPES[case.axis]
    length = -(-(size // dtype.itemsize + more) // (outer * inner))
    axis = {"0": 0, "1": 1, "-1": -1, "middle": 1}[case.axis]
    cut: list[int] = []
    matrix: list[list[int]] = []
    held = [length] * n
    sizes: list[Any] = [None] * n
    if case.operation in CUTS:
        if case.uneven == "equal":
            length = -(-length // n) * n
            cut = [length // n] * n
        else:
            cut = _cut(case, length)
            sizes = ["auto" if case.uneven == "auto" else cut] * n
        matrix, held = [cut] * n, [length] * n
        if case.operation == "all_to_all" and case.uneven != "equal":
            held = [length + r * (case.layout != "0-d") for r in range(n)]
            matrix = [_cut(case, h) for h in held]
            sizes = ["auto" if case.uneven == "auto" else row for row in matrix]
    elif case.uneven != "equal":
        held = _uneven(case, length)
        sizes = ["auto" if case.uneven == "auto" else held] * n

    def shape(along: int) -> tuple[int, ...]:
        forms = {"0": (along,), "1": (3, along), "-1": (2, 2, along), "middle": (2, along, 3)}
        return () if case.layout == "0-d" else forms[case.axis]

    rng = np.random.default_rng(case.seed)
    xs = [values(rng, case.dtype, shape(h)) for h in held]
    for x in xs:
        x.flags.writeable = False
    results: dict[str, Callable[[], Any]] = {
        "all_reduce": lambda: oracle.all_reduce(xs, case.op),
        "reduce": lambda: oracle.reduce(xs, case.op, case.root),
        "broadcast": lambda: oracle.broadcast(xs, case.root),
        "all_gather": lambda: oracle.all_gather(xs, axis),
        "gather": lambda: oracle.gather(xs, axis, case.root),
        "scatter": lambda: oracle.scatter(xs[case.root], axis, cut),
        "reduce_scatter": lambda: oracle.reduce_scatter(xs, case.op, axis, cut),
        "all_to_all": lambda: oracle.all_to_all(xs, axis, matrix),
        "sendrecv": lambda: oracle.shift(xs, 1),
        "send": lambda: oracle.shift(xs, 1),
        "barrier": lambda: [None] * n,
    }
    return Plan(xs, results[case.operation](), axis, sizes, cut or held)


def _place(lengths: Sequence[int], r: int) -> slice:
    before = sum(lengths[:r])
    return slice(before, before + lengths[r])


def run_case(
    comm: Any,
    case: Case,
    where: Where = HOST,
) -> list[tuple[str, Any, Any]]:
    """Run one case on this rank; return (what, got, wanted) for everything that can be wrong."""
    put, get = where.put, where.get
    p, me, operation, layout = plan(case), comm.rank, case.operation, case.layout
    given, want = p.inputs[me], p.expected[me]
    if operation == "barrier":
        return [("result", comm.barrier(), None)]
    x = laid_out(given, layout, put)
    out = None
    if want is not None and layout in ("out", "unaligned"):
        out = poisoned(want, layout, put)
    elif operation in IN_PLACE and layout in ("fortran", "strided"):
        out = poisoned(want, "c", put)
    elif want is not None and layout == "in place":
        if operation in JOINS:
            out = poisoned(want, "c", put)
            x = out[_place(p.lengths, me)]
            where.assign(x, given)
        elif operation == "reduce":
            out = x
        elif operation in CUTS and (operation != "scatter" or me == case.root):
            out = x[_place(p.lengths, me)]
    named: dict[str, Any] = {} if out is None else {"out": out}
    if operation in REDUCTIONS:
        named["op"] = case.op
    if operation in ("broadcast", "reduce", "gather", "scatter"):
        named["root"] = case.root
    if operation in (*JOINS, *CUTS):
        named |= {"axis": p.axis, "sizes": p.sizes[me]}
    if operation in ("sendrecv", "send"):
        result = _ring(comm, case, x, out, want, where)
    elif operation == "scatter" and me != case.root:
        result = comm.scatter(None, root=case.root, **({} if out is None else {"out": out}))
    else:
        result = getattr(comm, operation)(x, **named)
    found = [("result", result if result is None else get(result), want)]
    if out is not None:
        found.append(("returns out", result is out, True))
    elif operation in IN_PLACE:
        found.append(("returns x", result is x, True))
    elif result is not None:
        found.append(("is C-contiguous", bool(result.flags.c_contiguous), True))
    if layout != "in place" and not (operation in IN_PLACE and out is None):
        found.append(("x afterwards", get(x), given))
    return found


def _ring(comm: Any, case: Case, x: Any, out: Any, want: np.ndarray, where: Where) -> Any:
    """Send x to the next rank and receive from the one before."""
    dest, source = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    if case.operation == "sendrecv":
        if out is None and want.shape != x.shape:
            out = where.put(np.empty_like(want))
        return comm.sendrecv(x, dest, source, out)
    target = (want.shape, source, want.dtype) if out is None else (out, source)
    if comm.size == 1 and not where.sends_to_itself:
        with comm.group():
            comm.send(x, dest)
            result = comm.recv(*target)
    elif comm.size == 1:
        work = comm.isend(x, dest)
        result = comm.recv(*target)
        work.wait()
    elif comm.rank % 2 == 0:
        comm.send(x, dest)
        result = comm.recv(*target)
    else:
        result = comm.recv(*target)
        comm.send(x, dest)
    return result


def failures(comm: Any, cases: Sequence[Case], where: Where = HOST) -> list[str]:
    """Run cases on this rank and return a line for everything that went wrong.

    An exception ends it: the ranks are then no longer at the same case.
    """
    lines = []
    for case in cases:
        try:
            found = run_case(comm, case, where)
        except Exception as error:
            return [*lines, f"rank {comm.rank}: {case}: {type(error).__name__}: {error}"]
        for what, got, want in found:
            wrong = where.difference(case, got, want)
            if wrong:
                lines.append(f"rank {comm.rank}: {case}: {what}: {wrong}")
    return lines
