"""Lines up computing and transfers of all ranks, one after the other: no such order deadlocks."""

from __future__ import annotations

from collections import deque
from heapq import heappop, heappush
from itertools import count

import numpy as np

from meshring.pipeline.action import OpKind
from meshring.pipeline.flow import Edges, Floats, Ints, needs_and_gives
from meshring.pipeline.operations import OP, Rows
from meshring.pipeline.program import Program


class Wiring:
    """Per rank and row, which transfers must come before it and which it makes possible.

    A transfer is a number, edge * microbatches + microbatch; only those between ranks are here.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.edges = Edges(program)
        self.m = program.num_microbatches
        self.takes: list[list[list[int]]] = []
        self.feeds: list[list[list[int]]] = []
        for rows in program.rows:
            take, feed, batches = needs_and_gives(rows, self.edges)
            width = take.shape[1]
            self.takes.append(self._remote(take, batches[:, :width]))
            self.feeds.append(self._remote(feed, batches[:, width:]))
        ends = [(program.placement[e.source], program.placement[e.target]) for e in self.edges.all]
        self.ends = ends
        self.made_by = {
            transfer: (rank, row)
            for rank, feeds in enumerate(self.feeds)
            for row, made in enumerate(feeds)
            for transfer in made
        }

    def _remote(self, edge: Ints, batch: Ints) -> list[list[int]]:
        numbers = np.where(self.edges.local[edge], -1, edge * self.m + batch).tolist()
        return [[n for n in row if n >= 0] for row in numbers]

    def channel(self, transfer: int) -> tuple[int, int]:
        """From which rank to which."""
        return self.ends[transfer // self.m]

    def row(self, transfer: int, send: bool) -> tuple[int, int, int, int, int]:
        """The send or the receive of a transfer, as a row."""
        edge, batch = self.edges.all[transfer // self.m], transfer % self.m
        if edge.gradient:
            kind = OpKind.SEND_GRADIENT if send else OpKind.RECV_GRADIENT
        else:
            kind = OpKind.SEND_ACTIVATION if send else OpKind.RECV_ACTIVATION
        ends = (edge.source, edge.target) if send else (edge.target, edge.source)
        return (int(kind), ends[0], batch, ends[1], -1)


class Line:
    """The ranks' lists while they grow: operations, sends and receives in one common order."""

    def __init__(self, wiring: Wiring) -> None:
        self.wiring = wiring
        self.out: list[list[tuple[int, ...]]] = [[] for _ in wiring.takes]
        self.source = [rows.tolist() for rows in wiring.program.rows]
        self.head = [0] * len(self.out)
        self.offered = [-1] * len(self.out)
        self.received: set[int] = set()
        self.on_the_way: dict[tuple[int, int], deque[int]] = {}

    def missing(self, rank: int) -> list[int]:
        """What the next operation of a rank still waits for."""
        return [t for t in self.wiring.takes[rank][self.head[rank]] if t not in self.received]

    def done(self, rank: int) -> bool:
        """Whether a rank has no operation left."""
        return self.head[rank] == len(self.source[rank])

    def ready(self, rank: int) -> bool:
        """Whether the rank's next operation can run; true once for each operation."""
        if self.done(rank) or self.offered[rank] == self.head[rank] or self.missing(rank):
            return False
        self.offered[rank] = self.head[rank]
        return True

    def compute(self, rank: int) -> list[int]:
        """Append the rank's next operation; returns the transfers that it makes possible."""
        row = self.head[rank]
        self.out[rank].append(self.source[rank][row])
        self.head[rank] += 1
        return self.wiring.feeds[rank][row]

    def send(self, transfer: int) -> None:
        """Append a send."""
        channel = self.wiring.channel(transfer)
        self.out[channel[0]].append(self.wiring.row(transfer, True))
        self.on_the_way.setdefault(channel, deque()).append(transfer)

    def receive(self, transfer: int) -> None:
        """Append its receive, behind those of what was sent before on the same channel."""
        channel = self.wiring.channel(transfer)
        while transfer not in self.received:
            first = self.on_the_way[channel].popleft()
            self.out[channel[1]].append(self.wiring.row(first, False))
            self.received.add(first)

    def rows(self) -> list[Rows]:
        """The lists as arrays."""
        return [np.array(rows, OP) if rows else np.empty(0, OP) for rows in self.out]


def by_time(
    wiring: Wiring, starts: list[Floats], when: Floats, transfers_first: bool = True
) -> list[Rows]:
    """Operations at `starts`, each transfer with both its ends at its time in `when`."""
    line, tie = Line(wiring), count()
    first = 0 if transfers_first else 2
    heap: list[tuple[float, int, int, int]] = []

    def offer(rank: int) -> None:
        if line.ready(rank):
            heappush(heap, (float(starts[rank][line.head[rank]]), 1, next(tie), -1 - rank))

    for rank in range(len(starts)):
        offer(rank)
    while heap:
        _, _, _, what = heappop(heap)
        if what < 0:
            for transfer in line.compute(-1 - what):
                heappush(heap, (float(when[transfer]), first, next(tie), transfer))
            offer(-1 - what)
        else:
            line.send(what)
            line.receive(what)
            offer(wiring.channel(what)[1])
    return line.rows()


def on_need(wiring: Wiring, starts: list[Floats], arrivals: Floats | None) -> list[Rows]:
    """Sends at once; each receive at its arrival, or just before the operation that needs it.

    Only for buffered sends: a receive may stand far behind its send.
    """
    line, tie = Line(wiring), count()
    sent: set[int] = set()
    heap: list[tuple[float, int, int]] = []

    def offer(rank: int) -> None:
        if arrivals is None and not line.done(rank):
            missing = line.missing(rank)
            if all(transfer in sent for transfer in missing):
                for transfer in missing:
                    line.receive(transfer)
        if line.ready(rank):
            heappush(heap, (float(starts[rank][line.head[rank]]), next(tie), -1 - rank))

    for rank in range(len(starts)):
        offer(rank)
    while heap:
        _, _, what = heappop(heap)
        if what >= 0:
            line.receive(what)
            offer(wiring.channel(what)[1])
            continue
        fed = line.compute(-1 - what)
        for transfer in fed:
            line.send(transfer)
        sent.update(fed)
        offer(-1 - what)
        for transfer in fed:
            if arrivals is None:
                offer(wiring.channel(transfer)[1])
            else:
                heappush(heap, (float(arrivals[transfer]), next(tie), transfer))
    return line.rows()


def in_rounds(wiring: Wiring) -> list[Rows]:
    """One operation per rank and round, each followed by its transfers, both ends at once.

    Source: the order of torch.distributed.pipelining's default lowering.
    """
    line = Line(wiring)
    moved = True
    while moved:
        moved = False
        for rank in range(len(line.out)):
            if line.ready(rank):
                moved = True
                for transfer in line.compute(rank):
                    line.send(transfer)
                    line.receive(transfer)
    return line.rows()


def meeting(wiring: Wiring, durations: list[Floats], times: Floats, patience: float) -> list[Rows]:
    """A run with blocking calls: each rank computes, or meets another for a transfer.

    What can start earliest goes first; a transfer may start `patience` later and still goes first.
    """
    line, tie = Line(wiring), count()
    clock = [0.0] * len(durations)
    heap: list[tuple[float, int, int, int]] = []

    def begin(what: int) -> float:
        if what < 0:
            return clock[-1 - what]
        a, b = wiring.channel(what)
        return max(clock[a], clock[b]) - patience

    def push(what: int) -> None:
        heappush(heap, (begin(what), int(what < 0), next(tie), what))

    for rank in range(len(durations)):
        if line.ready(rank):
            push(-1 - rank)
    while heap:
        old, _, _, what = heappop(heap)
        if begin(what) > old:
            push(what)
        elif what < 0:
            rank = -1 - what
            clock[rank] += float(durations[rank][line.head[rank]])
            for transfer in line.compute(rank):
                push(transfer)
            if line.ready(rank):
                push(what)
        else:
            a, b = wiring.channel(what)
            clock[a] = clock[b] = begin(what) + patience + float(times[what // wiring.m])
            line.send(what)
            line.receive(what)
            if line.ready(b):
                push(-1 - b)
    return line.rows()
