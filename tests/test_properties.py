"""Laws that hold for any arrays, and random programs of random groups against the oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import cases
import meshring as mr
import oracle

LIMIT = 30.0
COMMON = settings(deadline=None, max_examples=150, derandomize=True)


def same(got: Any, want: Any, what: str = "result") -> None:
    wrong = oracle.difference(got, want)
    assert wrong is None, f"{what}: {wrong}"


@st.composite
def arrays_to_cut(draw: st.DrawFn, dtypes: tuple[str, ...] = oracle.DTYPES) -> dict[str, Any]:
    """A number of ranks, a shape, an axis of it, and lengths that add up to that axis."""
    n = draw(st.integers(1, 5))
    sizes = draw(st.lists(st.integers(0, 9) | st.integers(0, 3000), min_size=n, max_size=n))
    shape = draw(st.lists(st.integers(1, 4), max_size=3))
    axis = draw(st.integers(0, len(shape)))
    shape.insert(axis, sum(sizes))
    return {
        "n": n,
        "sizes": sizes,
        "shape": tuple(shape),
        "axis": axis if draw(st.booleans()) else axis - len(shape),
        "dtype": draw(st.sampled_from(dtypes)),
        "seed": draw(st.integers(0, 1 << 30)),
        "fortran": draw(st.booleans()),
    }


def inputs(a: dict[str, Any], n: int) -> list[np.ndarray]:
    rng = np.random.default_rng(a["seed"])
    xs = [cases.values(rng, a["dtype"], a["shape"]) for _ in range(n)]
    return [np.asfortranarray(x) if a["fortran"] else x for x in xs]


@COMMON
@given(arrays_to_cut())
def test_gathered_pieces_are_the_whole(a: dict[str, Any]) -> None:
    whole = inputs(a, 1)[0]
    pieces = np.split(whole, np.cumsum(a["sizes"])[:-1], axis=a["axis"])

    def rank_main(comm: mr.Communicator) -> None:
        x = pieces[comm.rank]
        for sizes in (a["sizes"], "auto"):
            same(comm.all_gather(x, a["axis"], sizes), whole)

    mr.run_local(rank_main, a["n"], timeout=LIMIT)


@COMMON
@given(arrays_to_cut(), st.data())
def test_reduce_scatter_then_all_gather_is_all_reduce(
    a: dict[str, Any], data: st.DataObject
) -> None:
    op = data.draw(st.sampled_from([o for o in oracle.OPS if oracle.supports(a["dtype"], o)]))
    xs = inputs(a, a["n"])

    def rank_main(comm: mr.Communicator) -> None:
        x = xs[comm.rank]
        part = comm.reduce_scatter(x, op, a["axis"], a["sizes"])
        both = comm.all_gather(part, a["axis"], a["sizes"])
        same(both, comm.all_reduce(np.ascontiguousarray(x), op, np.empty(x.shape, x.dtype)))
        same(both, oracle.reduced(xs, op), "the reduction itself")

    mr.run_local(rank_main, a["n"], timeout=LIMIT)


@COMMON
@given(arrays_to_cut(), st.data())
def test_scatter_then_gather_is_identity(a: dict[str, Any], data: st.DataObject) -> None:
    whole = inputs(a, 1)[0]
    one, other = (data.draw(st.integers(0, a["n"] - 1)) for _ in range(2))

    def rank_main(comm: mr.Communicator) -> None:
        x = whole if comm.rank == one else None
        part = comm.scatter(x, one, a["axis"], a["sizes"])
        assert part.shape[a["axis"]] == a["sizes"][comm.rank]
        back = comm.gather(part, other, a["axis"], a["sizes"])
        same(back, whole if comm.rank == other else None)

    mr.run_local(rank_main, a["n"], timeout=LIMIT)


@COMMON
@given(arrays_to_cut(), st.data())
def test_all_to_all_there_and_back_is_identity(a: dict[str, Any], data: st.DataObject) -> None:
    n, axis = a["n"], a["axis"]
    row = st.lists(st.integers(0, 50), min_size=n, max_size=n)
    matrix = np.array(data.draw(st.lists(row, min_size=n, max_size=n)))
    rng = np.random.default_rng(a["seed"])
    shapes = [list(a["shape"]) for _ in range(n)]
    for r in range(n):
        shapes[r][axis] = int(matrix[r].sum())
    xs = [cases.values(rng, a["dtype"], shape) for shape in shapes]
    there = oracle.all_to_all(xs, axis, matrix)

    def rank_main(comm: mr.Communicator) -> None:
        r = comm.rank
        y = comm.all_to_all(xs[r], axis, matrix[r])
        same(y, there[r])
        same(comm.all_to_all(y, axis, matrix[:, r]), xs[r])

    mr.run_local(rank_main, n, timeout=LIMIT)


# ---- programs -------------------------------------------------------------------------------

KINDS = [o for o in cases.OPERATIONS if o != "send"]


@st.composite
def programs(draw: st.DrawFn) -> tuple[list[list[int]], list[tuple[int, cases.Case, bool]]]:
    """Groups of five ranks as colors, and ten calls: on which grouping, what, and whether beside."""
    color = st.lists(st.integers(0, 2), min_size=5, max_size=5)
    groupings = [[0] * 5, *draw(st.lists(color, min_size=1, max_size=3))]
    calls = []
    while len(calls) < 10:
        case = cases.Case(
            draw(st.sampled_from(KINDS)),
            1,
            draw(st.sampled_from(oracle.DTYPES)),
            "sum",
            draw(st.sampled_from(("c", "fortran", "strided", "out"))),
            draw(st.sampled_from(cases.AXES)),
            draw(st.sampled_from(cases.UNEVEN)),
            draw(st.sampled_from(("empty", "one", "seven", "line+", "slot", "slot+"))),
        )
        if case.operation == "barrier":
            case = cases.Case("barrier", 1)
        if cases.legal(case):
            calls.append((draw(st.integers(0, len(groupings) - 1)), case, draw(st.booleans())))
    return groupings, calls


@settings(COMMON, max_examples=120)
@given(programs())
def test_random_programs(
    program: tuple[list[list[int]], list[tuple[int, cases.Case, bool]]],
) -> None:
    groupings, calls = program

    def rank_main(comm: mr.Communicator) -> None:
        parts = [comm.split(colors[comm.rank], -comm.rank) for colors in groupings]
        beside = []
        for which, case, later in calls:
            part = parts[which]
            case = cases.Case(**{**vars(case), "ranks": part.size})
            if later:  # something else is under way meanwhile
                x = np.full(9, part.rank)
                beside.append((part, part.all_reduce(x, async_op=True)))
            for what, got, want in cases.run_case(part, case):
                same(got, want, f"{case}, {what}")
        for part, work in beside:
            assert work.wait().tolist() == [sum(range(part.size))] * 9
        for part in parts:
            part.close()

    mr.run_local(rank_main, 5, timeout=LIMIT)
