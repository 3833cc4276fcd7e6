"""Puts sends and receives into a schedule, in the order that suits the backend's semantics."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from meshring.errors import UsageError
from meshring.pipeline.costs import Costs
from meshring.pipeline.engine import run
from meshring.pipeline.flow import Edges, Floats, compute_steps
from meshring.pipeline.linear import Wiring, by_time, in_rounds, meeting, on_need
from meshring.pipeline.operations import Rows, communicates
from meshring.pipeline.program import P, Program
from meshring.pipeline.search import BlockingSearch
from meshring.pipeline.semantics import Semantics
from meshring.pipeline.transfers import GRADIENTS, SENDS, edge_times, lowered_queues

LARGE = 100_000  # operations above which only the first candidate is made
SEARCHED = 4_000  # operations and transfers up to which orders are searched
WIDTH = 16
Candidate = Callable[[], list[Rows]]


def lower(program: P, semantics: Semantics, costs: Costs) -> P:
    """The program with sends and receives that need no tags and cannot deadlock.

    Several orders are made, each consistent with one common order of all ranks, and the one of the
    smallest simulated makespan under `semantics` is taken.
    """
    if program.is_lowered:
        raise UsageError("PipelineSchedule.lower: it has sends and receives already; call it once")
    best: tuple[float, P] | None = None
    durations = costs.durations(program)
    for make in _candidates(program, semantics, costs, durations):
        made = program.replaced(make(), semantics=str(semantics))
        if program.num_operations > LARGE:
            return made
        time = makespan(made, semantics, costs)
        if best is None or time < best[0] * (1 - 1e-12):
            best = (time, made)
    assert best is not None
    return best[1]


def makespan(program: Program, semantics: Semantics, costs: Costs) -> float:
    """When the last operation of a lowered program ends; infinite where it never does."""
    queues = lowered_queues(program, semantics, costs.durations(program), costs)
    outcome = run(queues.steps, queues.num_tokens)
    if outcome.stuck:
        return float("inf")
    ends = [
        float((starts + steps["duration"]).max())
        for starts, steps in zip(outcome.starts, queues.steps, strict=True)
        if len(starts)
    ]
    return max(ends, default=0.0)


def _candidates(
    program: Program, semantics: Semantics, costs: Costs, durations: list[Floats]
) -> Iterator[Candidate]:
    wiring = Wiring(program)
    latency, wire = edge_times(program, wiring.edges, costs)
    starts, made = ideal_times(program, wiring.edges, durations, latency + wire)
    way = np.repeat((latency + wire)[:-1], wiring.m)
    blocking = semantics.queues == "one"
    if semantics.sends == "buffered" and semantics.queues != "pair":
        yield lambda: on_need(wiring, starts, None)
        yield lambda: on_need(wiring, starts, made + way)
    yield lambda: together(by_time(wiring, starts, made), wiring, made)
    if semantics.queues == "pair":
        return
    wanted = _wanted(wiring, starts, made)
    yield lambda: in_rounds(wiring)
    yield lambda: by_time(wiring, starts, made, transfers_first=False)
    yield lambda: by_time(wiring, starts, np.maximum(made, wanted - way))
    yield lambda: by_time(wiring, starts, made + way)
    if blocking:
        unit = max((float(d.max()) for d in durations if d.size), default=0.0)
        if semantics.sends == "rendezvous":
            search = BlockingSearch(wiring, durations, latency + wire)
            if search.size <= SEARCHED:
                yield lambda: grouped(search.best(WIDTH))
        for part in (0.0, 0.25, 0.5, 1.0, -0.25):
            rows = meeting(wiring, durations, latency + wire, part * unit)
            yield lambda rows=rows: rows  # type: ignore[misc]
            yield lambda rows=rows: grouped(rows)  # type: ignore[misc]
        for order in (in_rounds(wiring), by_time(wiring, starts, made)):
            yield lambda rows=order: grouped(rows)  # type: ignore[misc]


def ideal_times(
    program: Program, edges: Edges, durations: list[Floats], delay: Floats
) -> tuple[list[Floats], Floats]:
    """When each row starts if data travel by themselves, and when each transfer's data are made."""
    steps = [
        compute_steps(rows, np.arange(len(rows)), durations[rank], edges, delay)
        for rank, rows in enumerate(program.rows)
    ]
    outcome = run(steps, edges.num_tokens)
    if outcome.stuck:
        raise UsageError("PipelineSchedule.lower: operations wait for each other; see validate()")
    made = np.zeros(edges.num_tokens // 2)
    starts = []
    for number, begin in zip(steps, outcome.starts, strict=True):
        main = number["main"]
        starts.append(begin[main])
        gives = number["give"] >= 0
        made[number["give"][gives]] = (begin + number["duration"])[gives]
    return starts, made


def _wanted(wiring: Wiring, starts: list[Floats], made: Floats) -> Floats:
    """When the operation starts that needs each transfer."""
    wanted = made.copy()
    for rank, takes in enumerate(wiring.takes):
        for row, transfers in enumerate(takes):
            wanted[transfers] = starts[rank][row]
    return wanted


def grouped(ranks: list[Rows]) -> list[Rows]:
    """Each run of sends and receives as one group, which starts them all together.

    Where computing and transfers share one queue this never makes an operation later.
    """
    return [_numbered(rows, lambda row, last: True) for rows in ranks]


def together(ranks: list[Rows], wiring: Wiring, made: Floats) -> list[Rows]:
    """What goes the same way and is made at the same time, grouped."""
    edges, m, placement = wiring.edges, wiring.m, wiring.program.placement

    def belongs(row: tuple[int, ...], last: tuple[int, ...]) -> bool:
        times = []
        for kind, stage, batch, peer, _ in (row, last):
            ends = (stage, peer) if kind in SENDS else (peer, stage)
            times.append(made[edges.find[(*ends, kind in GRADIENTS)] * m + batch])
        same_way = (row[0] in SENDS) == (last[0] in SENDS)
        return same_way and placement[row[3]] == placement[last[3]] and times[0] == times[1]

    return [_numbered(rows, belongs) for rows in ranks]


def _numbered(rows: Rows, belongs: Callable[[tuple[int, ...], tuple[int, ...]], bool]) -> Rows:
    """The rows with consecutive transfers in one group where `belongs` says so."""
    rows = rows.copy()
    places = np.flatnonzero(communicates(rows["kind"]))
    group, last_place, last = 0, -2, None
    for place, row in zip(places.tolist(), rows[places].tolist(), strict=True):
        if last is not None and place == last_place + 1 and belongs(row, last):
            rows["pair"][last_place : place + 1] = group
        else:
            group += 1
        last_place, last = place, row
    return rows
