"""What the ranks recorded, as one Timeline on every rank."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from meshring.communicator import Communicator
from meshring.pipeline.timeline import EVENT, Timeline

_ROUNDS = 9


def gathered_timeline(
    comm: Communicator,
    records: Sequence[tuple[int, int, int, int, int, int, int]],
    title: str,
) -> Timeline:
    """The events of all ranks on one clock, in seconds from the first one. Collective."""
    mine = np.array(records, np.int64).reshape(-1, 7)
    mine[:, 4:6] += _clock_offset(comm)
    counts = comm.all_gather(np.array([len(mine)])).tolist()
    rows = comm.all_gather(mine, axis=0, sizes=counts)
    events = np.zeros(len(rows), EVENT)
    events["rank"] = np.repeat(np.arange(comm.size), counts)
    for column, name in enumerate(("kind", "stage", "microbatch", "peer")):
        events[name] = rows[:, column]
    origin = rows[:, 4].min() if len(rows) else 0
    events["start"] = (rows[:, 4] - origin) * 1e-9
    events["end"] = (rows[:, 5] - origin) * 1e-9
    events["lane"] = rows[:, 6]
    return Timeline(comm.size, events, title=title, unit="s")


def _clock_offset(comm: Communicator) -> int:
    """What to add to this rank's clock, in nanoseconds, to get rank 0's.

    Ranks of one boot share a monotonic clock. Others compare theirs with rank 0's; the shortest of
    some round trips counts. Source: Cristian, Probabilistic clock synchronization, 1989.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().replace("-", "")
    except OSError:
        boot = ""
    name = int(boot[:15] or "0", 16)
    names = comm.all_gather(np.array([name]))
    if name and (names == name).all():
        return 0
    best, offset = None, 0
    for rank in range(1, comm.size):
        for _ in range(_ROUNDS):
            if comm.rank == rank:
                sent = time.perf_counter_ns()
                comm.send(np.array([sent]), 0)
                there = int(comm.recv((1,), 0, "int64")[0])
                back = time.perf_counter_ns()
                if best is None or back - sent < best:
                    best, offset = back - sent, there - (sent + back) // 2
            elif comm.rank == 0:
                comm.recv((1,), rank, "int64")
                comm.send(np.array([time.perf_counter_ns()]), rank)
    return offset
