"""split(): who is in which group, groups of groups, and that closed groups leave nothing behind."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable

import numpy as np
import pytest

import meshring as mr
from procs import run_ranks
from test_bad_input import raised, still_works

LIMIT = 20.0


def part_of(comm: mr.Communicator, color: int, key: int = 0) -> mr.Communicator:
    part = comm.split(color, key)
    assert part is not None
    return part


# color and key of each rank of five, and the groups that come of them, in order of their ranks
SPLITS: dict[str, tuple[Callable[[int], tuple[int | None, int]], list[tuple[int, ...]]]] = {
    "all": (lambda r: (0, 0), [(0, 1, 2, 3, 4)]),
    "odd and even": (lambda r: (r % 2, 0), [(0, 2, 4), (1, 3)]),
    "reversed": (lambda r: (7, -r), [(4, 3, 2, 1, 0)]),
    "keys with ties": (lambda r: (0, r % 2), [(0, 2, 4, 1, 3)]),
    "each alone": (lambda r: (r, 0), [(0,), (1,), (2,), (3,), (4,)]),
    "some in none": (lambda r: (None if r in (1, 3) else 1 << 40, -r), [(4, 2, 0)]),
    "all in none": (lambda r: (None, 0), []),
}


@pytest.mark.parametrize("name", SPLITS)
def test_members(name: str) -> None:
    choose, groups = SPLITS[name]

    def rank_main(comm: mr.Communicator) -> None:
        part = comm.split(*choose(comm.rank))
        mine = [g for g in groups if comm.rank in g]
        if part is None:
            assert mine == []
        else:
            assert part.world_ranks == mine[0]
            assert part.rank == mine[0].index(comm.rank)
            assert part.size == len(mine[0])
            assert part.timeout == comm.timeout
            assert type(part) is type(comm)
            got = part.all_gather(np.array([comm.rank]))
            assert got.tolist() == list(mine[0])
            part.close()
        still_works(comm)

    mr.run_local(rank_main, 5, timeout=LIMIT)


def test_split_of_split_and_calls_on_all_of_them_in_turn() -> None:
    def rank_main(comm: mr.Communicator) -> None:
        r = comm.rank
        half = part_of(comm, r // 3, -r)  # (2, 1, 0) and (5, 4, 3)
        pair = half.split(half.rank if half.rank == 2 else 0)  # the last of each is alone
        assert pair is not None
        assert pair.world_ranks == {2: (2, 1), 1: (2, 1), 0: (0,), 5: (5, 4), 4: (5, 4), 3: (3,)}[r]
        with half, pair:
            for count in (1, 5000, 100_000):
                sums = [c.all_reduce(np.full(count, r))[-1] for c in (comm, pair, half, comm, pair)]
                in_pair = sum(pair.world_ranks)
                assert sums == [15, in_pair, 3 if r < 3 else 12, 15, in_pair]
            peer = half.size - 1 - half.rank
            assert half.sendrecv(np.array([r]), peer, peer)[0] == half.world_ranks[peer]
            error = raised(mr.UsageError, lambda: pair.send(np.ones(1), pair.size))
            assert f"(rank {pair.rank}/{pair.size})" in str(error)

    mr.run_local(rank_main, 6, timeout=LIMIT)


def test_errors_in_a_part_speak_its_numbers() -> None:
    def rank_main(comm: mr.Communicator) -> None:
        with part_of(comm, 0, -comm.rank) as part:
            x = np.zeros(3 + (comm.rank == 0))
            error = raised(mr.MismatchError, lambda: part.all_reduce(x))
            assert error.ranks == (2,)
            assert f"(rank {2 - comm.rank}/3)" in str(error)
            still_works(part)
        still_works(comm)

    mr.run_local(rank_main, 3, timeout=LIMIT)


def test_closed_part_is_told_to_those_who_wait_for_it() -> None:
    def rank_main(comm: mr.Communicator) -> None:
        part = part_of(comm, 0)
        if comm.rank == 1:
            part.close()
        else:
            error = raised(mr.PeerLostError, lambda: part.all_reduce(np.ones(2)))
            assert error.ranks == (1,)
            assert "closed this communicator" in str(error)
            part.close()
        still_works(comm)

    mr.run_local(rank_main, 3, timeout=LIMIT)


def test_parts_outlive_the_communicator_that_they_come_from() -> None:
    def rank_main(comm: mr.Communicator) -> None:
        half = part_of(comm, 0)
        quarter = part_of(half, 0)
        half.close()
        still_works(quarter)
        quarter.close()
        still_works(comm)

    mr.run_local(rank_main, 2, timeout=LIMIT)


def test_many_parts_open_at_once() -> None:
    def rank_main(comm: mr.Communicator) -> None:
        parts = [part_of(comm, 0, (-1) ** i * comm.rank) for i in range(40)]
        for part in reversed(parts):
            part.all_reduce(np.ones(10_000))
        for part in parts:
            still_works(part)
            part.close()

    mr.run_local(rank_main, 3, timeout=LIMIT)


CYCLES = """
import gc, os, sys
import numpy as np
import meshring as mr

def count(comm):
    gc.collect()
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

def cycle(comm, i):
    with comm.split(0, -comm.rank if i % 2 else 0) as part:
        part.all_reduce(np.ones(20_000))
        part.isend(np.ones(10), part.rank)
        part.recv(10, part.rank, float)
        part.barrier(async_op=True).wait()

comm = mr.init(timeout=30)
for i in range(10):
    cycle(comm, i)
comm.barrier()
before, mapped = count(comm), os.fstat(int(os.environ["MESHRING_SEGMENT_FD"])).st_size
for i in range(200):
    cycle(comm, i)
comm.barrier()
after, mapped_after = count(comm), os.fstat(int(os.environ["MESHRING_SEGMENT_FD"])).st_size
assert after == before, f"descriptors and threads grew from {before} to {after}"
assert mapped_after == mapped, f"the segment grew from {mapped} to {mapped_after} bytes"
maps = sum("meshring" in line for line in open("/proc/self/maps"))
assert maps <= 8, f"{maps} mappings are left"
"""


def test_200_parts_one_after_the_other_leave_nothing() -> None:
    result = run_ranks(CYCLES, 3, timeout=60)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.left == []


def test_jobs_of_threads_one_after_the_other_leave_nothing() -> None:
    def count() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    def rank_main(comm: mr.Communicator) -> None:
        with part_of(comm, comm.rank % 2) as part:
            part.all_reduce(np.ones(4))

    mr.run_local(rank_main, 3, timeout=LIMIT)
    before = count()
    for _ in range(50):
        mr.run_local(rank_main, 3, timeout=LIMIT)
    assert count() == before
