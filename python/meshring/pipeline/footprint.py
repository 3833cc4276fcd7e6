"""Bytes that ranks hold: weights, live activations, what was received and not used yet."""

from __future__ import annotations

import numpy as np

from meshring.pipeline.action import OpKind
from meshring.pipeline.costs import Costs
from meshring.pipeline.flow import Edges, Floats, Ints
from meshring.pipeline.program import Program
from meshring.pipeline.timeline_base import RECV, Events


def peak_bytes(program: Program, costs: Costs, events: Events) -> Ints | None:
    """Most bytes of each rank at one time; None without `activation_bytes`.

    An activation counts from the start of its forward to the end of its backward, or with
    `weight_gradient_bytes` less from the end of I to that of W. With recomputation the forward
    keeps what it received, and the rest from the start of R. A message counts at its receiver from
    the time that it sets out until the operation that takes it starts, a gradient until it ends.
    """
    if costs.activation_bytes is None:
        return None
    times = _Tables(program, events)
    size = costs.sizes(program, "activation_bytes")
    message = costs.sizes(program, "message_bytes")
    late = size
    if costs.weight_gradient_bytes is not None:
        late = np.minimum(size, costs.sizes(program, "weight_gradient_bytes"))
    placement = np.array(program.placement)
    changes: list[tuple[Ints, Floats, Floats]] = []  # rank, time, bytes

    def change(stage: Ints, time: Floats, amount: Floats) -> None:
        changes.append((placement[stage], time, amount))

    stage, batch = np.nonzero(~np.isnan(times.start[OpKind.FORWARD]))
    again = times.start[OpKind.RECOMPUTE][stage, batch]
    redone = ~np.isnan(again)
    kept = np.where(redone, np.minimum(size, np.roll(message, 1))[stage], size[stage])
    change(stage, times.start[OpKind.FORWARD][stage, batch], kept)
    change(stage[redone], again[redone], (size[stage] - kept)[redone])
    for kind, amount in (
        (OpKind.BACKWARD, size),
        (OpKind.BACKWARD_INPUT, size - late),
        (OpKind.BACKWARD_WEIGHT, late),
    ):
        stage, batch = np.nonzero(~np.isnan(times.end[kind]))
        change(stage, times.end[kind][stage, batch], -amount[stage])
    for edge in Edges(program).all:
        if placement[edge.source] == placement[edge.target]:
            continue
        since, until = times.held(edge.source, edge.target, edge.gradient)
        used = ~np.isnan(since) & ~np.isnan(until)
        amount = message[edge.target if edge.gradient else edge.source]
        target = np.full(used.sum(), edge.target)
        change(target, since[used], np.full(used.sum(), amount))
        change(target, until[used], np.full(used.sum(), -amount))
    weights = np.bincount(
        placement, costs.sizes(program, "weight_bytes"), minlength=program.num_ranks
    )
    return np.ceil(weights + _highest(changes, program.num_ranks)).astype(np.int64)


def _highest(changes: list[tuple[Ints, Floats, Floats]], num_ranks: int) -> Floats:
    """The highest sum of each rank; at one time, what is freed goes first."""
    rank, time, amount = (np.concatenate(column) for column in zip(*changes, strict=True))
    peaks = np.zeros(num_ranks)
    order = np.lexsort((amount, time, rank))
    bounds = np.searchsorted(rank[order], np.arange(num_ranks + 1))
    for number in range(num_ranks):
        mine = amount[order[bounds[number] : bounds[number + 1]]]
        peaks[number] = np.cumsum(mine).max(initial=0.0)
    return peaks


class _Tables:
    """Start and end of each kind of operation, shape (stages, microbatches), NaN where none."""

    def __init__(self, program: Program, events: Events) -> None:
        shape = (len(program.placement), program.num_microbatches)
        self.start: dict[int, Floats] = {}
        self.end: dict[int, Floats] = {}
        for kind in OpKind:
            if not kind.has_microbatch:
                continue
            mine = events[events["kind"] == kind]
            place = (mine["stage"], mine["microbatch"])
            for table, name in ((self.start, "start"), (self.end, "end")):
                table[kind] = np.full(shape, np.nan)
                table[kind][place] = mine[name]
        receives = events[events["lane"] == RECV]
        self.received = {
            (stage, peer, kind): receives[
                (receives["stage"] == stage)
                & (receives["peer"] == peer)
                & (receives["kind"] == kind)
            ]
            for stage, peer, kind in set(
                zip(*(receives[n].tolist() for n in ("stage", "peer", "kind")), strict=True)
            )
        }

    def held(self, source: int, target: int, gradient: bool) -> tuple[Floats, Floats]:
        """From when until when the target's rank holds each microbatch's message."""
        kind = OpKind.RECV_GRADIENT if gradient else OpKind.RECV_ACTIVATION
        back = (OpKind.BACKWARD, OpKind.BACKWARD_INPUT)
        if gradient:
            made = np.fmax(*(self.end[k][source] for k in back))
            until = np.fmax(*(self.end[k][target] for k in back))
        else:
            made, until = self.end[OpKind.FORWARD][source], self.start[OpKind.FORWARD][target]
        found = self.received.get((target, source, int(kind)))
        if found is None:
            return made, until
        since = np.full(made.shape, np.nan)
        since[found["microbatch"]] = found["start"]
        return since, until
