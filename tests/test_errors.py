"""Ranks that disagree, and ranks that do not come: who is named, and what is usable afterwards."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import meshring as mr
from procs import run_ranks
from test_bad_input import raised, still_works

LIMIT = 20.0
Call = Callable[[mr.Communicator, np.ndarray, np.ndarray], Any]

# What all ranks but rank 1 call, what rank 1 calls, and the word for the difference. One line a
# lambda, so that its first line is the line of the call.
# fmt: off
DIFFERENCES: dict[str, tuple[Call, Call, str]] = {
    "operation": (
        lambda c, x, out: c.all_reduce(x, out=out),
        lambda c, x, out: c.broadcast(x, 0, out),
        "operation"),
    "barrier": (
        lambda c, x, out: c.all_reduce(x, out=out),
        lambda c, x, out: c.barrier(),
        "operation"),
    "split": (
        lambda c, x, out: c.split(0),
        lambda c, x, out: c.barrier(),
        "operation"),
    "dtype": (
        lambda c, x, out: c.all_reduce(x, out=out),
        lambda c, x, out: c.all_reduce(x.view("i4"), out=out.view("i4")),
        "dtype"),
    "count": (
        lambda c, x, out: c.all_reduce(x, out=out),
        lambda c, x, out: c.all_reduce(x[1:], out=out[1:]),
        "shape"),
    "count in place": (
        lambda c, x, out: c.all_reduce(x),
        lambda c, x, out: c.all_reduce(x[1:]),
        "shape"),
    "reduction": (
        lambda c, x, out: c.reduce(x, "sum", 2),
        lambda c, x, out: c.reduce(x, "max", 2),
        "reduction"),
    "root": (
        lambda c, x, out: c.broadcast(x, 0),
        lambda c, x, out: c.broadcast(x, 2),
        "root"),
    "root of scatter": (
        lambda c, x, out: c.scatter(x, 0, out=out[:x.size // 3]),
        lambda c, x, out: c.scatter(x, 1, out=out[:x.size // 3]),
        "root"),
    "axis": (
        lambda c, x, out: c.all_to_all(x.reshape(6, -1), 0, out=out.reshape(6, -1)),
        lambda c, x, out: c.all_to_all(x.reshape(6, -1), 1, out=out.reshape(6, -1)),
        "axis"),
    "shape": (
        lambda c, x, out: c.all_gather(x.reshape(2, -1)),
        lambda c, x, out: c.all_gather(x.reshape(3, -1)),
        "shape"),
    "sizes": (
        lambda c, x, out: c.reduce_scatter(x, sizes=[1, x.size - 1, 0]),
        lambda c, x, out: c.reduce_scatter(x, sizes=[2, x.size - 2, 0]),
        "sizes"),
    "sizes and none": (
        lambda c, x, out: c.reduce_scatter(x),
        lambda c, x, out: c.reduce_scatter(x, sizes=[1, x.size - 1, 0]),
        "sizes"),
    "auto and none": (
        lambda c, x, out: c.all_gather(x),
        lambda c, x, out: c.all_gather(x, sizes="auto"),
        "sizes"),
    "asynchronous": (
        lambda c, x, out: c.all_reduce(x, async_op=True).wait(),
        lambda c, x, out: c.all_reduce(x, "max", async_op=True).wait(),
        "reduction"),
    "asynchronous on one": (
        lambda c, x, out: c.all_reduce(x),
        lambda c, x, out: c.all_reduce(x, "max", async_op=True).wait(),
        "reduction"),
}
# fmt: on


def site(call: Call) -> str:
    return f"{call.__code__.co_filename}:{call.__code__.co_firstlineno}"


def mismatch(comm: mr.Communicator, name: str, count: int) -> None:
    """Run one disagreement on this rank and check everything about it."""
    usual, odd, word = DIFFERENCES[name]
    x, out = np.arange(count, dtype="f4"), np.full(count, 7, "f4")
    mine = odd if comm.rank == 1 else usual
    error = raised(mr.MismatchError, lambda: mine(comm, x, out))
    text = str(error)
    assert error.ranks == (1,), text
    first = text.splitlines()[0]
    assert f"(rank {comm.rank}/3)" in first, text
    assert f"disagree in {word}:" in first, text
    assert text.count("(this rank)") == 1, text
    assert "No data moved" in text, text
    for ranks, call in (("ranks 0 and 2: ", usual), ("rank 1: ", odd)):
        lines = [line for line in text.splitlines() if line.strip().startswith(ranks)]
        assert len(lines) == 1, text
        assert site(call) in lines[0], f"{site(call)} in {text}"
    assert (x == np.arange(count)).all(), "x was written to"
    assert (out == 7).all(), "out was written to"
    still_works(comm)


@pytest.mark.parametrize("count", [36, 36_000, 36 << 13])
@pytest.mark.parametrize("name", DIFFERENCES)
def test_ranks_that_disagree(name: str, count: int) -> None:
    mr.run_local(lambda comm: mismatch(comm, name, count), 3, timeout=LIMIT)


JOB = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import meshring as mr, test_errors
comm = mr.init(timeout=30)
found = []
for name in test_errors.DIFFERENCES:
    for count in (36, 36000, 36 << 13):
        try:
            test_errors.mismatch(comm, name, count)
        except BaseException as error:
            found.append(f"{name}, {count}: {type(error).__name__}: {error}")
            if comm.poisoned or not isinstance(error, AssertionError):
                break
with open(os.path.join(sys.argv[2], f"rank{comm.rank}.json"), "w") as f:
    json.dump(found, f)
"""


@pytest.mark.parametrize("env", [{}, {"MESHRING_CMA": "off"}], ids=["default", "CMA off"])
def test_processes_that_disagree(env: dict[str, str], tmp_path: Path) -> None:
    result = run_ranks(JOB, 3, str(Path(__file__).parent), str(tmp_path), env=env, timeout=100)
    assert result.returncode == 0, result.stderr[-3000:]
    for rank in range(3):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert found == [], f"rank {rank}: {len(found)}:\n" + "\n".join(found[:5])


def test_of_two_the_second_is_named_and_of_three_the_others() -> None:
    def rank_main(comm: mr.Communicator) -> None:
        x = np.zeros(3 + comm.rank)
        error = raised(mr.MismatchError, lambda: comm.all_reduce(x))
        assert error.ranks == tuple(range(1, comm.size))
        for rank in range(comm.size):
            assert f"rank {rank}: all_reduce(float64 ({3 + rank},)" in str(error)
        still_works(comm)

    for n in (2, 3, 5):
        mr.run_local(rank_main, n, timeout=LIMIT)


def test_a_program_that_is_one_call_behind() -> None:
    """Every call of it disagrees; the ranks meet again when it has caught up."""

    def rank_main(comm: mr.Communicator) -> None:
        x = np.zeros(4)
        if comm.rank != 0:
            assert raised(mr.MismatchError, comm.barrier).ranks == (0,)
        else:
            assert raised(mr.MismatchError, lambda: comm.all_gather(x)).ranks == (0,)
        assert [r["state"] for r in comm.trace()] == ["failed"]
        still_works(comm)

    mr.run_local(rank_main, 4, timeout=LIMIT)


# ---- messages -------------------------------------------------------------------------------

MESSAGES = {
    "count": (5, "f4"),
    "dtype": (4, "i4"),
    "nothing": (0, "f4"),
}


@pytest.mark.parametrize("scale", [1, 1 << 16], ids=["eager", "large"])
@pytest.mark.parametrize("kind", MESSAGES)
@pytest.mark.parametrize("way", ["send", "isend", "group"])
def test_sides_that_disagree(way: str, kind: str, scale: int) -> None:
    count, dtype = MESSAGES[kind]

    def rank_main(comm: mr.Communicator) -> None:
        x = np.ones(4 * scale, "f4")
        if comm.rank == 0:
            if scale > 1:
                error = raised(mr.MismatchError, lambda: transfer(comm, way, x))
                assert error.ranks == (1,)
                assert f"send (rank 0/2): rank 1 receives {count * scale} x " in str(error)
                assert f"this rank sends {4 * scale} x float32" in str(error)
            else:
                transfer(comm, way, x)  # was buffered: only the receiver can tell
            comm.send(x, 1)
        else:
            target = np.full(count * scale, 7, dtype)
            error = raised(mr.MismatchError, lambda: transfer(comm, way, target))
            assert error.ranks == (0,)
            assert f"recv (rank 1/2): rank 0 sends {4 * scale} x float32" in str(error)
            assert f"this rank receives {count * scale} x {target.dtype}" in str(error)
            assert (target == 7).all()
            assert (comm.recv(np.zeros_like(x), 0) == x).all()
        still_works(comm)

    mr.run_local(rank_main, 2, timeout=LIMIT)


def transfer(comm: mr.Communicator, way: str, x: np.ndarray) -> None:
    """Send from rank 0 to rank 1."""
    if way == "isend":
        (comm.isend(x, 1) if comm.rank == 0 else comm.irecv(x, 0)).wait()
    elif way == "send":
        comm.send(x, 1) if comm.rank == 0 else comm.recv(x, 0)
    else:
        with comm.group():
            comm.send(x, 1) if comm.rank == 0 else comm.recv(x, 0)


def test_half_an_exchange_that_disagrees() -> None:
    """The other half of sendrecv arrives."""

    def rank_main(comm: mr.Communicator) -> None:
        peer = 1 - comm.rank
        x = np.full(4 + comm.rank, comm.rank, "f4")
        out = np.full(5 if comm.rank == 0 else 9, 7, "f4")
        if comm.rank == 0:
            assert (comm.sendrecv(x, peer, peer, out) == 1).all()
        else:
            assert "sends 4 x float32" in str(
                raised(mr.MismatchError, lambda: comm.sendrecv(x, peer, peer, out))
            )
            assert (out == 7).all()
        still_works(comm)

    mr.run_local(rank_main, 2, timeout=LIMIT)


# ---- ranks that do not come -----------------------------------------------------------------

LATE: dict[str, Callable[[mr.Communicator, float], Any]] = {
    "all_reduce": lambda c, t: c.all_reduce(np.ones(3), timeout=t),
    "all_reduce large": lambda c, t: c.all_reduce(np.ones(1 << 17), timeout=t),
    "broadcast": lambda c, t: c.broadcast(np.ones(3), 2, timeout=t),
    "reduce": lambda c, t: c.reduce(np.ones(3), timeout=t),
    "barrier": lambda c, t: c.barrier(timeout=t),
    "all_gather": lambda c, t: c.all_gather(np.ones(3), timeout=t),
    "all_gather auto": lambda c, t: c.all_gather(np.ones(3), sizes="auto", timeout=t),
    "gather": lambda c, t: c.gather(np.ones(3), timeout=t),
    "reduce_scatter": lambda c, t: c.reduce_scatter(np.ones(3), timeout=t),
    "scatter": lambda c, t: c.scatter(np.ones(3), 2, timeout=t),
    "all_to_all": lambda c, t: c.all_to_all(np.ones(3), timeout=t),
    "recv": lambda c, t: c.recv(np.ones(3), 2, timeout=t),
    "send": lambda c, t: c.send(np.ones(1 << 17), 2, timeout=t),
    "split": lambda c, t: c.split(0, timeout=t),
    "all_reduce asynchronous": lambda c, t: c.all_reduce(
        np.ones(3), timeout=t, async_op=True
    ).wait(),
    "recv beside": lambda c, t: c.irecv(np.ones(3), 2).wait(t),
}


@pytest.mark.parametrize("name", LATE)
def test_a_rank_that_does_not_come(name: str) -> None:
    operation = name.split()[0]
    over = threading.Barrier(3, timeout=LIMIT)

    def rank_main(comm: mr.Communicator) -> None:
        still_works(comm)
        if comm.rank == 2:
            over.wait()
            late = raised(mr.MeshringError, lambda: [comm.barrier(timeout=LIMIT) for _ in range(2)])
            if isinstance(late, mr.MismatchError):  # the call that the others gave up was another
                late = raised(mr.MeshringError, lambda: comm.barrier(timeout=LIMIT))
            assert isinstance(late, (mr.DeadlineError, mr.PeerLostError)), late
            comm.close()
            return
        error = raised(mr.DeadlineError, lambda: LATE[name](comm, 0.3))
        over.wait()
        text = str(error)
        assert isinstance(error, TimeoutError)
        assert error.ranks == (2,), text
        assert text.startswith(operation), text
        assert f"(rank {comm.rank}/3): rank 2 did not " in text, text
        assert "within 0.3 s" in text, text
        rows = [line for line in text.splitlines() if "MISSING" in line]
        assert len(rows) == 1, text
        assert rows[0].strip().startswith("rank 2 (pid "), text
        assert "last call was all_gather(" in rows[0], text
        assert text.count("(this rank)") == 1, text
        assert comm.poisoned is not None
        assert "rank 2 did not" in comm.poisoned
        after = raised(mr.UsageError, lambda: comm.all_reduce(np.ones(3)))
        assert f"all_reduce (rank {comm.rank}/3): " in str(after), after
        assert "rank 2 did not" in str(after), after
        assert comm.trace()[-1]["state"] == "failed"
        assert "poisoned" in repr(comm)
        comm.close()
        assert comm.closed

    mr.run_local(rank_main, 3, timeout=LIMIT)


def test_the_rank_in_another_communicator_is_said_to_be_there() -> None:
    gone = threading.Barrier(2, timeout=LIMIT)

    def rank_main(comm: mr.Communicator) -> None:
        part = comm.split(0)
        assert part is not None
        with part:
            if comm.rank == 0:
                error = raised(mr.DeadlineError, lambda: comm.barrier(timeout=0.3))
                assert error.ranks == (1,)
                assert "is in all_reduce #1 of another communicator" in str(error)
                gone.wait()
                part.all_reduce(np.ones(1))
            else:
                helper = threading.Thread(target=gone.wait)
                helper.start()
                part.all_reduce(np.ones(1))
                helper.join()

    mr.run_local(rank_main, 2, timeout=LIMIT)


def test_work_that_is_not_done_yet_goes_on() -> None:
    turn = threading.Event()

    def rank_main(comm: mr.Communicator) -> None:
        if comm.rank == 1:
            assert turn.wait(LIMIT)
        x = np.ones(3)
        work = comm.all_reduce(x, async_op=True)
        if comm.rank == 0:
            try:
                error = raised(mr.DeadlineError, lambda: work.wait(0.05))
                done = work.done()
            finally:
                turn.set()
            assert "all_reduce #1 (rank 0/2)" in str(error)
            assert "0.05 s" in str(error)
            assert "wait() for it again" in str(error)
            assert comm.poisoned is None
            assert not done
        assert work.wait() is x
        assert x.tolist() == [2, 2, 2]
        still_works(comm)

    mr.run_local(rank_main, 2, timeout=LIMIT)


def test_timeout_zero_is_enough_when_all_are_there() -> None:
    def rank_main(comm: mr.Communicator) -> None:
        comm.all_reduce(np.ones(1), timeout=float("inf"))
        if comm.rank == 0:
            comm.send(np.ones(3), 1)
        comm.barrier()
        if comm.rank == 1:
            assert comm.recv(np.zeros(3), 0, timeout=0).tolist() == [1, 1, 1]
        still_works(comm)

    mr.run_local(rank_main, 2, timeout=LIMIT)
