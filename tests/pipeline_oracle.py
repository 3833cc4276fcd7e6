"""The best makespan over all orders of sends and receives, by exhaustive search; tiny cases only."""

from __future__ import annotations

from functools import cache

import numpy as np

from meshring.pipeline.costs import Costs
from meshring.pipeline.linear import Wiring
from meshring.pipeline.program import Program
from meshring.pipeline.semantics import Semantics
from meshring.pipeline.transfers import edge_times

State = tuple[tuple[int, ...], frozenset[int], frozenset[int]]  # heads, sent, received
Times = tuple[tuple[float, ...], tuple[float, ...], tuple[tuple[int, float], ...]]


class Search:
    """All states that ranks can reach, with the times in each that no other times beat.

    Times are: each rank's computing queue, its transfer queue, and for data under way when they
    were made or have arrived. With one queue and rendezvous, transfers between two operations of a
    rank may start together, as in a group.
    """

    def __init__(self, program: Program, semantics: Semantics, costs: Costs) -> None:
        self.wiring = Wiring(program)
        self.one = semantics.queues == "one"
        self.rendezvous = semantics.sends == "rendezvous"
        self.durations = [d.tolist() for d in costs.durations(program)]
        latency, wire = edge_times(program, self.wiring.edges, costs)
        self.latency, self.wire = np.repeat(latency, self.wiring.m), np.repeat(wire, self.wiring.m)
        self.taker = {
            transfer: (rank, row)
            for rank, takes in enumerate(self.wiring.takes)
            for row, found in enumerate(takes)
            for transfer in found
        }
        self.tail = cache(self._tail)

    def _tail(self, rank: int, row: int) -> float:
        """The least time from the start of an operation to the end of everything."""
        if row == len(self.durations[rank]):
            return 0.0
        after = [self.tail(rank, row + 1)]
        for transfer in self.wiring.feeds[rank][row]:
            way = float(self.latency[transfer] + self.wire[transfer])
            after.append(way + self.tail(*self.taker[transfer]))
        return self.durations[rank][row] + max(after)

    def beats(self, limit: float) -> bool:
        """Whether some order ends before `limit`."""
        ranks = range(len(self.durations))
        zero = tuple(0.0 for _ in ranks)
        start: State = (tuple(0 for _ in ranks), frozenset(), frozenset())
        level: dict[State, list[Times]] = {start: [(zero, zero, ())]}
        while level:
            following: dict[State, list[Times]] = {}
            for state, fronts in level.items():
                if all(h == len(self.durations[r]) for r, h in enumerate(state[0])):
                    return True
                for times in fronts:
                    for after, then in self._moves(state, times):
                        if self._bound(after, then) < limit:
                            _insert(following.setdefault(after, []), then)
            level = following
        return False

    def _bound(self, state: State, times: Times) -> float:
        return max(times[0][r] + self.tail(r, h) for r, h in enumerate(state[0]))

    def _moves(self, state: State, times: Times):  # type: ignore[no-untyped-def]
        heads, sent, received = state
        compute, moving, under_way = times
        known = dict(under_way)
        for rank, row in enumerate(heads):
            if row == len(self.durations[rank]):
                continue
            takes = self.wiring.takes[rank][row]
            if any(t not in received for t in takes):
                continue
            begin = max([compute[rank], *(known[t] for t in takes)])
            end = begin + self.durations[rank][row]
            left = {t: v for t, v in known.items() if t not in takes}
            left.update(dict.fromkeys(self.wiring.feeds[rank][row], end))
            after = (_put(heads, rank, row + 1), sent, received)
            yield after, self._times(compute, moving, left, {rank: end}, {})
        for transfer, ready in under_way:
            if transfer in received:
                continue
            a, b = self.wiring.channel(transfer)
            latency, wire = float(self.latency[transfer]), float(self.wire[transfer])
            if self.rendezvous:
                end = max(moving[a], moving[b], ready) + latency + wire
                after = (heads, sent, received | {transfer})
                yield (
                    after,
                    self._times(compute, moving, {**known, transfer: end}, {}, {a: end, b: end}),
                )
            elif transfer not in sent:
                end = max(moving[a], ready) + wire
                after = (heads, sent | {transfer}, received)
                yield (
                    after,
                    self._times(compute, moving, {**known, transfer: end + latency}, {}, {a: end}),
                )
            else:
                end = max(moving[b], ready)
                after = (heads, sent, received | {transfer})
                yield after, self._times(compute, moving, {**known, transfer: end}, {}, {b: end})

    def _times(self, compute, moving, known, computed, moved) -> Times:  # type: ignore[no-untyped-def]
        """With one queue, `moving` is when a rank's present group of transfers began."""
        if self.one:
            compute = tuple(
                max(t, computed.get(r, 0.0), moved.get(r, 0.0)) for r, t in enumerate(compute)
            )
            starts = computed if self.rendezvous else {**computed, **moved}
        else:
            compute = tuple(computed.get(r, t) for r, t in enumerate(compute))
            starts = moved
        moving = tuple(starts.get(r, t) for r, t in enumerate(moving))
        return compute, moving, tuple(sorted(known.items()))


def _put(values: tuple[int, ...], place: int, value: int) -> tuple[int, ...]:
    return (*values[:place], value, *values[place + 1 :])


def _vector(times: Times) -> tuple[float, ...]:
    return (*times[0], *times[1], *(v for _, v in times[2]))


def _insert(front: list[Times], times: Times) -> None:
    mine = _vector(times)
    for other in front:
        if all(x <= y + 1e-12 for x, y in zip(_vector(other), mine, strict=True)):
            return
    front[:] = [o for o in front if any(x < y for x, y in zip(_vector(o), mine, strict=True))]
    front.append(times)
