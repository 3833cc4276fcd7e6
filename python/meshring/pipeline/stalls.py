"""Why ranks of a lowered schedule wait."""

from __future__ import annotations

import numpy as np

from meshring.pipeline.flow import Floats
from meshring.pipeline.linear import Wiring
from meshring.pipeline.operations import communicates
from meshring.pipeline.program import Program
from meshring.pipeline.transfers import SENDS, Place, messages

CAUSES = ("start", "activation", "gradient", "queue", "transfer", "blocked", "end")


def idle_causes(
    program: Program, times: list[tuple[Floats, Floats]], begun: dict[Place, float]
) -> dict[str, Floats]:
    """Idle time of each rank by cause; the causes add up to all of it.

    start: before the rank's first operation; end: after its last; activation, gradient: the
    operation's input was not made yet; queue: it was made, but its send or receive stood behind
    others; transfer: it was on its way; blocked: it was there, but the rank was busy with other
    transfers.
    """
    wiring = Wiring(program)
    made, left, there = _transfer_times(program, wiring, times, begun)
    first = min((float(s.min()) for s, _ in times if s.size), default=0.0)
    last = max((float(e.max()) for _, e in times if e.size), default=0.0)
    causes = {name: np.zeros(program.num_ranks) for name in CAUSES}
    for rank, rows in enumerate(program.rows):
        chosen = np.flatnonzero(~communicates(rows["kind"]))
        if not chosen.size:
            causes["start"][rank] = last - first
            continue
        start, end = times[rank][0][chosen], times[rank][1][chosen]
        causes["start"][rank] = start[0] - first
        causes["end"][rank] = last - end[-1]
        for place in np.flatnonzero(start[1:] > end[:-1]).tolist():
            takes = wiring.takes[rank][int(chosen[place + 1])]
            late = max(takes, key=lambda t: there.get(t, 0.0), default=-1)
            gap = (float(end[place]), float(start[place + 1]))
            gradient = late >= 0 and wiring.edges.all[late // wiring.m].gradient
            marks = (made.get(late, 0.0), left.get(late, 0.0), there.get(late, 0.0), gap[1])
            names = ("gradient" if gradient else "activation", "queue", "transfer", "blocked")
            _share(causes, rank, gap, names, marks)
    return causes


def _share(
    causes: dict[str, Floats],
    rank: int,
    gap: tuple[float, float],
    names: tuple[str, ...],
    marks: tuple[float, ...],
) -> None:
    """Cut a gap at the marks; each piece goes to the name of the mark that ends it."""
    reached = gap[0]
    for name, mark in zip(names, marks, strict=True):
        until = min(max(mark, reached), gap[1])
        causes[name][rank] += until - reached
        reached = until


def _transfer_times(
    program: Program,
    wiring: Wiring,
    times: list[tuple[Floats, Floats]],
    begun: dict[Place, float],
) -> tuple[dict[int, float], dict[int, float], dict[int, float]]:
    """When each transfer's data were made, when they set out, and when they were there."""
    made = {t: float(times[r][1][row]) for t, (r, row) in wiring.made_by.items()}
    left, there = {}, {}
    for rank, mine in enumerate(messages(program, wiring.edges)):
        for message in mine:
            if int(program.rows[rank]["kind"][message.row]) not in SENDS:
                transfer = message.edge * wiring.m + message.batch
                left[transfer] = begun[rank, message.row]
                there[transfer] = float(times[rank][1][message.row])
    return made, left, there
