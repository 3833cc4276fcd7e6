"""Operations that run beside the program: async_op, isend and irecv, group(), and rings of messages."""

from __future__ import annotations

import gc
import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import cases
import meshring as mr
import oracle
from test_bad_input import raised, still_works

LIMIT = 20.0
MIB = 1 << 18  # float32 elements

# ---- async_op -------------------------------------------------------------------------------

COLLECTIVES: dict[str, Callable[..., Any]] = {
    "all_reduce": lambda c, x, **k: c.all_reduce(x, "prod", **k),
    "broadcast": lambda c, x, **k: c.broadcast(x, 1, **k),
    "reduce": lambda c, x, **k: c.reduce(x, "max", 1, **k),
    "barrier": lambda c, x, **k: c.barrier(**k),
    "all_gather": lambda c, x, **k: c.all_gather(x, **k),
    "all_gather auto": lambda c, x, **k: c.all_gather(x[c.rank :], sizes="auto", **k),
    "gather": lambda c, x, **k: c.gather(x, 1, **k),
    "reduce_scatter": lambda c, x, **k: c.reduce_scatter(x, sizes="auto", **k),
    "scatter": lambda c, x, **k: c.scatter(x, 1, sizes="auto", **k),
    "all_to_all": lambda c, x, **k: c.all_to_all(x, sizes="auto", **k),
    "strided": lambda c, x, **k: c.all_gather(x[::-2], sizes="auto", **k),
}


@pytest.mark.parametrize("count", [7, 20_001, MIB + 1])
@pytest.mark.parametrize("name", COLLECTIVES)
def test_asynchronous_gives_the_same(name: str, count: int) -> None:
    call = COLLECTIVES[name]

    def rank_main(comm: mr.Communicator) -> None:
        x = cases.values(np.random.default_rng(comm.rank), "float32", (count,))
        want = call(comm, x.copy())
        work = call(comm, x.copy(), async_op=True)
        assert isinstance(work, mr.Work)
        got = work.wait()
        assert oracle.difference(got, want) is None
        assert work.done()
        assert work.wait() is got
        assert work.wait(0) is got
        assert work.result is got

    mr.run_local(rank_main, 3, timeout=LIMIT)


@pytest.mark.parametrize("backwards", [False, True])
def test_many_in_flight_run_in_order(backwards: bool) -> None:
    def rank_main(comm: mr.Communicator) -> None:
        arrays = [np.full(1 + (37 * i) % 9000, comm.rank + i, "i8") for i in range(50)]
        works = [comm.all_reduce(x, async_op=True) for x in arrays]
        comm.barrier()  # comes after all of them
        assert all(w.done() for w in works)
        x = np.zeros(3)
        last = [comm.all_reduce(x, async_op=True) for _ in range(4)]  # on one array, in turn
        x_works = works + last
        for work in reversed(x_works) if backwards else x_works:
            work.wait()
        for i, a in enumerate(arrays):
            assert (a == 3 * i + 3).all()
        numbers = [r["number"] for r in comm.trace()]
        assert numbers == sorted(numbers)
        assert numbers[-1] == 55

    mr.run_local(rank_main, 3, timeout=LIMIT)


def test_not_done_before_the_last_rank_comes() -> None:
    turn = threading.Event()

    def rank_main(comm: mr.Communicator) -> None:
        if comm.rank == 1:
            assert turn.wait(LIMIT)
        work = comm.all_gather(np.full(2, comm.rank), async_op=True)
        if comm.rank == 0:
            early, result = work.done(), work.result
            turn.set()
            assert not early
            assert result is None
        assert work.wait().tolist() == [0, 0, 1, 1]

    mr.run_local(rank_main, 2, timeout=LIMIT)


def test_work_that_is_dropped_still_happens() -> None:
    """Its arrays stay alive, and what is allocated afterwards does not get into it."""

    def rank_main(comm: mr.Communicator) -> None:
        y = np.zeros(MIB, "f4")
        for i in range(8):
            comm.all_reduce(np.full(MIB, i, "f4"), out=y, async_op=True)
            comm.all_gather(np.full(100_000, i, "f4"), async_op=True)
            gc.collect()
            np.full(MIB, 1e9, "f4")
        assert comm.unfinished <= 16
        comm.barrier()
        assert (y == 7 * comm.size).all()
        still_works(comm)

    mr.run_local(rank_main, 2, timeout=LIMIT)


def test_work_outlives_names_of_its_arrays_and_communicator() -> None:
    def start(comm: mr.Communicator) -> mr.Work:
        part = comm.split(0)
        assert part is not None
        return part.all_gather(np.full(MIB, comm.rank, "f4"), async_op=True)

    def rank_main(comm: mr.Communicator) -> None:
        works = [start(comm) for _ in range(4)]
        gc.collect()
        for work in works:
            result = work.wait()
            assert (result[:MIB] == 0).all()
            assert (result[MIB:] == 1).all()

    mr.run_local(rank_main, 2, timeout=LIMIT)


def test_close_finishes_what_is_queued() -> None:
    def rank_main(comm: mr.Communicator) -> None:
        part = comm.split(0)
        assert part is not None
        x = np.ones(MIB, "f4")
        work = part.all_reduce(x, async_op=True)
        part.close()
        assert work.done()
        assert work.wait() is x
        assert (x == 3).all()

    mr.run_local(rank_main, 3, timeout=LIMIT)


def test_two_communicators_at_once() -> None:
    """Each has a thread of its own, so opposite orders cannot deadlock."""

    def rank_main(comm: mr.Communicator) -> None:
        a, b = comm.split(0), comm.split(0)
        assert a is not None
        assert b is not None
        with a, b:
            x, y = np.ones(30_000), np.ones(30_000)
            order = [(a, x), (b, y)] if comm.rank == 0 else [(b, y), (a, x)]
            for work in [c.all_reduce(z, async_op=True) for c, z in order]:
                work.wait()
            assert (x == 2).all()
            assert (y == 2).all()

    mr.run_local(rank_main, 2, timeout=LIMIT)


# ---- messages -------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 8192, 8193, MIB], ids="{} floats".format)
def test_both_ways_at_once(count: int) -> None:
    def rank_main(comm: mr.Communicator) -> None:
        peer = 1 - comm.rank
        for way in range(3):
            x = np.full(count, comm.rank + way, "f4")
            y = np.zeros(count, "f4")
            if way == 0:
                works = [comm.isend(x, peer), comm.irecv(y, peer)]
                assert works[0].wait() is None
                assert works[1].wait() is y
            elif way == 1:
                with comm.group():
                    comm.send(x, peer)
                    assert comm.recv(y, peer) is y
            else:
                y = comm.sendrecv(x, peer, peer)
            assert y.shape == (count,)
            assert (y == peer + way).all()

    mr.run_local(rank_main, 2, timeout=LIMIT)


def test_many_messages_in_flight_keep_their_order() -> None:
    """Far more than are buffered, of mixed sizes, both ways, waited for in any order."""
    sizes = [(i * 7919) % 20_000 if i % 5 else 0 for i in range(60)]
    sizes[30] = MIB

    def rank_main(comm: mr.Communicator) -> None:
        rng = random.Random(comm.rank)
        works, targets = [], []
        for peer in range(comm.size):
            for i, size in enumerate(sizes):
                works.append(comm.isend(np.full(size, 100 * comm.rank + i, "i4"), peer))
                targets.append((100 * peer + i, comm.irecv(size, peer, "i4")))
        rng.shuffle(works)
        rng.shuffle(targets)
        for value, work in targets:
            assert (work.wait() == value).all()
        for work in works:
            assert work.wait() is None

    mr.run_local(rank_main, 3, timeout=LIMIT)


def test_messages_between_collectives() -> None:
    def rank_main(comm: mr.Communicator) -> None:
        right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
        x = np.full(MIB, comm.rank, "f4")
        target = np.zeros(MIB, "f4")
        receive = comm.irecv(target, left)
        total = comm.all_reduce(np.ones(5))
        send = comm.isend(x, right)
        later = comm.all_reduce(np.ones(MIB), async_op=True)
        comm.barrier()
        assert receive.wait() is target
        assert (target == left).all()
        send.wait()
        assert (later.wait() == comm.size).all()
        assert (total == comm.size).all()

    mr.run_local(rank_main, 4, timeout=LIMIT)


@pytest.mark.parametrize("n", cases.RANKS)
def test_ring(n: int) -> None:
    """Each array goes all the way round."""

    def rank_main(comm: mr.Communicator) -> None:
        for count in (3, 50_000):
            x = np.full((count, 2), comm.rank, "f2")[:, ::-1]
            for step in range(1, n + 1):
                x = comm.sendrecv(x, (comm.rank + 1) % n, (comm.rank - 1) % n)
                assert (x == (comm.rank - step) % n).all()

    mr.run_local(rank_main, n, timeout=LIMIT)


def test_send_to_self() -> None:
    def rank_main(comm: mr.Communicator) -> None:
        me = comm.rank
        for i in range(4):  # that many are buffered
            comm.send(np.full(8192, i, "f4"), me)
        for i in range(4):
            assert (comm.recv(8192, me, "f4") == i).all()
        big = np.arange(MIB)
        assert (comm.sendrecv(big, me, me) == big).all()
        work = comm.isend(big, me)
        assert (comm.recv(big.shape, me, big.dtype) == big).all()
        work.wait()
        error = raised(mr.DeadlineError, lambda: comm.send(big, me, timeout=0.1))
        assert error.ranks == (me,)

    for n in (1, 2):
        mr.run_local(rank_main, n, timeout=LIMIT)


@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_recv_makes_arrays_of_every_dtype(dtype: str) -> None:
    def rank_main(comm: mr.Communicator) -> None:
        x = cases.values(np.random.default_rng(7), dtype, (3, 4))
        if comm.rank == 0:
            for _ in range(3):
                comm.send(x, 1)
        else:
            for form in (dtype, x.dtype, x.dtype.type):
                assert oracle.difference(comm.recv((3, 4), 0, form), x) is None

    mr.run_local(rank_main, 2, timeout=LIMIT)


# ---- group ----------------------------------------------------------------------------------


def test_group_exchanges_everything_with_everybody() -> None:
    def rank_main(comm: mr.Communicator) -> None:
        mine = [np.full(20_000, 10 * comm.rank + p, "f4") for p in range(comm.size)]
        with comm.group():
            for p in range(comm.size):
                comm.send(mine[p], p)
            got = [comm.recv(20_000, p, "f4") for p in range(comm.size)]
            both = comm.sendrecv(mine[0], (comm.rank + 1) % 4, (comm.rank - 1) % 4)
        for p, a in enumerate(got):
            assert (a == 10 * p + comm.rank).all()
        assert (both == 10 * ((comm.rank - 1) % 4)).all()

    mr.run_local(rank_main, 4, timeout=LIMIT)


def test_groups_nest_and_may_hold_collectives() -> None:
    def rank_main(comm: mr.Communicator) -> None:
        peer = 1 - comm.rank
        a, b = np.zeros(MIB, "f4"), np.zeros(MIB, "f4")
        with comm.group():
            comm.send(np.full(MIB, comm.rank, "f4"), peer)
            with comm.group():
                comm.send(np.full(MIB, comm.rank + 5, "f4"), peer)
                comm.recv(a, peer)
            assert comm.all_reduce(np.ones(2)).tolist() == [2, 2]
            comm.recv(b, peer)
        assert (a == peer).all()
        assert (b == peer + 5).all()
        with comm.group():
            pass

    mr.run_local(rank_main, 2, timeout=LIMIT)


def test_exception_in_a_group_is_the_one_that_comes_out() -> None:
    def rank_main(comm: mr.Communicator) -> None:
        peer = 1 - comm.rank
        target = np.zeros(4)

        def body() -> None:
            with comm.group():
                comm.send(np.full(4, comm.rank), peer)
                comm.recv(target, peer)
                raise KeyError("mine")

        raised(KeyError, body)
        comm.barrier()
        assert comm.sendrecv(np.ones(2), peer, peer).tolist() == [1, 1]  # no longer in a group
        still_works(comm)

    mr.run_local(rank_main, 2, timeout=LIMIT)


def test_bad_call_in_a_group_leaves_the_others_of_it() -> None:
    def rank_main(comm: mr.Communicator) -> None:
        peer = 1 - comm.rank
        with comm.group():
            comm.send(np.full(4, comm.rank), peer)
            assert "argument 'dest'" in str(raised(mr.UsageError, lambda: comm.send(np.ones(4), 9)))
            got = comm.recv(4, peer, int)
        assert got.tolist() == [peer] * 4
        still_works(comm)

    mr.run_local(rank_main, 2, timeout=LIMIT)
