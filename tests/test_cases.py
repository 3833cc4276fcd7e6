"""The case table against the oracle: between threads, between processes on each transport, and on
more ranks than cores. And the same bits on every rank, run, transport and out of every kind of call.
"""

from __future__ import annotations

import array
import ctypes
import hashlib
import json
import mmap
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cases
import meshring as mr
import oracle
from procs import run_ranks

TESTS = Path(__file__).parent
TRANSPORTS = {"default": {}, "CMA off": {"MESHRING_CMA": "off"}}
LIMIT = 30.0  # seconds for any one call: nothing here may come near it


@lru_cache(maxsize=2)
def cases_by_ranks(strength: int) -> dict[int, list[cases.Case]]:
    """The table, sorted by the number of ranks."""
    found: dict[int, list[cases.Case]] = {n: [] for n in cases.RANKS}
    for case in cases.table(strength=strength):
        found[case.ranks].append(case)
    return found


def say(lines: Sequence[str]) -> str:
    return f"{len(lines)} failures:\n" + "\n".join(lines[:20])


# ---- the table ------------------------------------------------------------------------------


def test_the_table_covers_what_it_says() -> None:
    table = list(cases.table())
    assert len(set(table)) == len(table)
    types = Counter((c.operation, c.dtype, c.op) for c in table)
    for operation in cases.OPERATIONS:
        for dtype in oracle.DTYPES if operation != "barrier" else ["float32"]:
            for op in oracle.OPS if operation in cases.REDUCTIONS else ["sum"]:
                legal = operation not in cases.REDUCTIONS or oracle.supports(dtype, op)
                assert (types[operation, dtype, op] >= len(cases.RANKS)) == legal
    names = ("layout", "axis", "uneven", "size", "ranks")
    pairs = {
        (c.operation, a, getattr(c, a), b, getattr(c, b))
        for c in table
        for a in names
        for b in names
    }
    for operation in ("all_gather", "reduce_scatter", "all_to_all", "gather", "scatter"):
        for n in cases.RANKS:
            for size in cases.SIZES:
                assert (operation, "size", size, "ranks", n) in pairs
                for uneven in cases.UNEVEN:
                    assert (operation, "size", size, "uneven", uneven) in pairs
                for layout in ("c", "fortran", "strided", "unaligned", "out"):
                    assert (operation, "size", size, "layout", layout) in pairs
                    assert (operation, "ranks", n, "layout", layout) in pairs


@pytest.mark.parametrize(
    ("got", "want", "equal"),
    [
        (np.float32([1, 2]), np.float32([1, 2]), True),
        (np.float32([1, 2]), np.float32([1, 2.0000002]), False),
        (np.float32([0.0]), np.float32([-0.0]), False),
        (np.float32([np.nan, 1]), -np.float32([np.nan, -1]), True),
        (np.float32([np.nan, 1]), np.float32([1, np.nan]), False),
        (np.complex64([1 + 2j]), np.complex64([1 - 2j]), False),
        (np.zeros((2, 3)), np.zeros((3, 2)), False),
        (np.zeros(3, "i4"), np.zeros(3, "u4"), False),
        (None, np.zeros(1), False),
        (np.array(448, oracle.dtype_of("float8_e4m3fn")), np.array(np.nan, "f4"), False),
        (np.zeros(()), np.zeros(()), True),
    ],
)
def test_the_comparison_can_tell(got: Any, want: Any, equal: bool) -> None:
    assert (oracle.difference(got, want) is None) == equal


@pytest.mark.parametrize("n", cases.RANKS)
def test_between_threads(n: int) -> None:
    table = cases_by_ranks(3 if n <= 3 else 2)[n]
    found = mr.run_local(lambda comm: cases.failures(comm, table), n, timeout=LIMIT)
    lines = [line for rank in found for line in rank]
    assert not lines, say(lines)


JOB = """
import hashlib, json, os, sys
sys.path.insert(0, sys.argv[1])
folder, what = sys.argv[2], sys.argv[3]
if what == "oversubscribed":
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
import cases, meshring as mr, test_cases
comm = mr.init(timeout=60)
if what == "bits":
    found = test_cases.digests(comm)
else:
    found = cases.failures(comm, test_cases.selection(what, comm.size))
with open(os.path.join(folder, f"rank{comm.rank}.json"), "w") as f:
    json.dump({"transport": comm.transport, "found": found}, f)
"""


def selection(what: str, n: int) -> list[cases.Case]:
    """The cases of one job."""
    if what == "oversubscribed":
        types = ("float32", "bfloat16", "int16", "complex128")
        sizes = ("seven", "slot+", "round+")
        return list(cases.table([n], dtypes=types, layouts=("c",), sizes=sizes))
    return cases_by_ranks(2)[n]


def job(folder: Path, what: str, n: int, env: dict[str, str]) -> list[dict[str, Any]]:
    """Run one process set; return what each rank found."""
    result = run_ranks(JOB, n, str(TESTS), str(folder), what, env=env, timeout=100)
    assert result.returncode == 0, result.stderr[-4000:]
    found = [json.loads((folder / f"rank{r}.json").read_text()) for r in range(n)]
    assert result.left == []
    if env:
        assert {f["transport"] for f in found} == {"shared slots"}
    return found


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("n", cases.RANKS)
def test_between_processes(n: int, transport: str, tmp_path: Path) -> None:
    found = job(tmp_path, "table", n, TRANSPORTS[transport])
    lines = [line for rank in found for line in rank["found"]]
    assert not lines, say(lines)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_more_ranks_than_cores(transport: str, tmp_path: Path) -> None:
    found = job(tmp_path, "oversubscribed", 8, TRANSPORTS[transport])
    lines = [line for rank in found for line in rank["found"]]
    assert not lines, say(lines)


# ---- the same bits everywhere ---------------------------------------------------------------


def digests(comm: mr.Communicator) -> dict[str, str]:
    """A hash of the result of every reduction and dtype, the same in 20 runs or 'differs'."""
    found = {}
    for dtype in oracle.DTYPES:
        for op in oracle.OPS:
            if not oracle.supports(dtype, op):
                continue
            for count in (5, 3000, 70001):
                rng = np.random.default_rng([count, comm.rank])
                x = cases.values(rng, dtype, (count,))
                runs = 20 if count < 70000 else 3
                seen = {comm.all_reduce(x, op, np.empty_like(x)).tobytes() for _ in range(runs)}
                text = seen.pop() if len(seen) == 1 else b""
                found[f"{op} of {count} {dtype}"] = (
                    hashlib.sha256(text).hexdigest() if text else f"differs on rank {comm.rank}"
                )
    return found


@pytest.mark.parametrize("n", [2, 3])
def test_same_bits_on_every_rank_run_and_transport(n: int, tmp_path: Path) -> None:
    reference, *others = mr.run_local(digests, n, timeout=LIMIT)
    assert not [v for v in reference.values() if v.startswith("differs")]
    for name, env in TRANSPORTS.items():
        folder = tmp_path / name
        folder.mkdir()
        others += [rank["found"] for rank in job(folder, "bits", n, env)]
    for other in others:
        assert {k: v for k, v in other.items() if reference[k] != v} == {}
    assert len(reference) == 3 * sum(
        oracle.supports(d, o) for d in oracle.DTYPES for o in oracle.OPS
    )


def test_axis_and_root_do_not_change_a_bit() -> None:
    """reduce, reduce_scatter and all_reduce of the same numbers, along any axis."""

    def rank_main(comm: mr.Communicator) -> None:
        for dtype in ("float16", "bfloat16", "float8_e4m3fn", "float32", "complex64"):
            x = cases.values(np.random.default_rng(comm.rank), dtype, (6, 9, 12))
            whole = comm.all_reduce(x.copy(), "mean")
            for root in range(comm.size):
                part = comm.reduce(x, "mean", root)
                assert (part is None) == (root != comm.rank)
                assert part is None or oracle.difference(part, whole) is None
            for axis in (0, 1, 2, -1):
                part = comm.reduce_scatter(x, "mean", axis)
                assert oracle.difference(comm.all_gather(part, axis), whole) is None

    mr.run_local(rank_main, 3, timeout=LIMIT)


# ---- arrays of other kinds ------------------------------------------------------------------


class Exporter:
    """Nothing but DLPack."""

    def __init__(self, x: np.ndarray) -> None:
        self.x = x

    def __dlpack__(self, **options: Any) -> Any:
        return self.x.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.x.__dlpack_device__()


class Interface:
    """Nothing but NumPy's array interface."""

    def __init__(self, x: np.ndarray) -> None:
        self.x = x
        self.__array_interface__ = x.__array_interface__


def pages(data: bytes) -> mmap.mmap:
    memory = mmap.mmap(-1, len(data))
    memory[:] = data
    return memory


KINDS: dict[str, Callable[[np.ndarray], Any]] = {
    "memoryview": memoryview,
    "array.array": lambda x: array.array("i", x.tolist()),
    "ctypes": lambda x: (ctypes.c_int * x.size)(*x.tolist()),
    "subclass": lambda x: x.view(np.recarray),
    "DLPack": Exporter,
    "array interface": Interface,
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_arrays(kind: str) -> None:
    def numbers(x: Any) -> list[int]:
        return (x.x if isinstance(x, (Exporter, Interface)) else np.asarray(x)).tolist()

    def rank_main(comm: mr.Communicator) -> None:
        x, y = (KINDS[kind](np.arange(5, dtype="i4") + comm.rank) for _ in range(2))
        assert comm.all_gather(x).tolist() == [0, 1, 2, 3, 4, 1, 2, 3, 4, 5]
        assert comm.broadcast(x, root=1, out=y) is y
        assert numbers(y) == [1, 2, 3, 4, 5]
        assert comm.all_reduce(x) is x
        assert numbers(x) == [1, 3, 5, 7, 9]

    mr.run_local(rank_main, 2, timeout=LIMIT)


@pytest.mark.parametrize("kind", [bytearray, pages])
def test_bytes_in_place(kind: Any) -> None:
    def rank_main(comm: mr.Communicator) -> None:
        x = kind(bytes([1, 2, 250 + comm.rank]))
        assert comm.all_reduce(x) is x
        assert bytes(x[:]) == bytes([2, 4, 501 - 256])
        if comm.rank == 0:
            comm.send(b"abc", 1)  # read-only is well for an input
        else:
            assert bytes(comm.recv(bytearray(3), 0)) == b"abc"

    mr.run_local(rank_main, 2, timeout=LIMIT)


def test_more_dimensions_than_are_recorded() -> None:
    def rank_main(comm: mr.Communicator) -> None:
        shape = (1, 2) * 6  # 12 dimensions
        x = np.arange(64.0).reshape(shape) * (comm.rank + 1)
        whole = np.arange(64.0).reshape(shape)
        assert (
            oracle.difference(comm.all_gather(x, 11), np.concatenate([whole, whole * 2], 11))
            is None
        )
        both = comm.reduce_scatter(x, axis=-1)
        assert oracle.difference(both, 3 * np.split(whole, 2, 11)[comm.rank]) is None
        assert oracle.difference(comm.all_reduce(x), whole * 3) is None

    mr.run_local(rank_main, 2, timeout=LIMIT)


def test_zero_in_another_axis() -> None:
    def rank_main(comm: mr.Communicator) -> None:
        assert comm.all_gather(np.ones((0, 4)), axis=1).shape == (0, 12)
        assert comm.reduce_scatter(np.ones((3, 0))).shape == (1, 0)
        assert comm.all_to_all(np.ones((6, 0, 2)), axis=0, sizes="auto").shape == (6, 0, 2)
        x = np.ones((2, 0)) if comm.rank == 0 else None
        assert comm.scatter(x, axis=1).shape == (2, 0)

    mr.run_local(rank_main, 3, timeout=LIMIT)


def test_packed_bytes_counts_the_copies_of_inputs() -> None:
    def rank_main(comm: mr.Communicator) -> None:
        x = np.ones((64, 64), "f4")
        comm.all_gather(x, axis=1)
        assert comm.packed_bytes == 0
        comm.all_gather(x.T)
        comm.all_gather(x[:, ::2])
        assert comm.packed_bytes == x.nbytes + x.nbytes // 2

    mr.run_local(rank_main, 2, timeout=LIMIT)


@pytest.mark.parametrize("sizes", [None, [2, 2], (2, 2), np.array([2, 2]), "auto"])
def test_every_way_to_say_equal_shards(sizes: Any) -> None:
    """They are one call, so ranks may even differ in it, "auto" excepted."""

    def rank_main(comm: mr.Communicator) -> None:
        mine = sizes if comm.rank == 0 or isinstance(sizes, str) else None
        x = np.arange(4.0) + comm.rank
        assert comm.reduce_scatter(x, sizes=mine).tolist() == [[1, 3], [5, 7]][comm.rank]
        assert comm.all_gather(x[:2], sizes=mine).tolist() == [0, 1, 1, 2]

    mr.run_local(rank_main, 2, timeout=LIMIT)
