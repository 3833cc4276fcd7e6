"""Runs a schedule in simulated time: who computes what when, who waits, what is kept."""

from __future__ import annotations

import numpy as np

from meshring.errors import UsageError
from meshring.pipeline.action import OpKind
from meshring.pipeline.costs import Costs
from meshring.pipeline.engine import Outcome, Steps, run
from meshring.pipeline.flow import Edges, Floats, Ints, compute_steps
from meshring.pipeline.footprint import peak_bytes
from meshring.pipeline.operations import communicates
from meshring.pipeline.program import Program
from meshring.pipeline.semantics import Semantics, semantics_of
from meshring.pipeline.stalls import idle_causes
from meshring.pipeline.timeline import COMPUTE, EVENT, RECV, SEND, Timeline
from meshring.pipeline.timeline_base import Events
from meshring.pipeline.transfers import SENDS, Place, edge_times, lowered_queues

Times = list[tuple[Floats, Floats]]  # per rank, start and end of each row


def simulate(
    program: Program, costs: Costs, semantics: str | Semantics | None = None, unit: str = ""
) -> Timeline:
    """The Timeline of a program under these costs.

    Without sends and receives in the program, data travel by themselves, each as soon as it is
    made: no schedule of transfers can be faster. Errors: UsageError where operations wait for each
    other for ever; `validate` shows the cycle.
    """
    durations = costs.durations(program)
    causes = None
    if program.is_lowered:
        how = semantics_of(semantics or program.semantics or "buffered/pair")
        queues = lowered_queues(program, how, durations, costs)
        outcome = run(queues.steps, queues.num_tokens)
        times = _row_times(program, queues.steps, queues.ranks, outcome)
        begun = _transfer_starts(times, queues.sender_of)
        events = np.concatenate(
            [_compute_events(program, times), _transfer_events(program, times, begun)]
        )
        causes = idle_causes(program, times, begun)
    else:
        events = _compute_events(program, _ideal_times(program, costs, durations))
    return Timeline(
        program.num_ranks,
        events,
        num_stages=len(program.placement),
        title=program.schedule_type,
        unit=unit,
        idle_causes=causes,
        peak_activations=peak_activations(program),
        peak_bytes=peak_bytes(program, costs, events),
    )


def _ideal_times(program: Program, costs: Costs, durations: list[Floats]) -> Times:
    edges = Edges(program)
    latency, wire = edge_times(program, edges, costs)
    steps = [
        compute_steps(rows, np.arange(len(rows)), durations[rank], edges, latency + wire)
        for rank, rows in enumerate(program.rows)
    ]
    outcome = run(steps, edges.num_tokens)
    return _row_times(program, steps, list(range(program.num_ranks)), outcome)


def _row_times(program: Program, steps: list[Steps], ranks: list[int], outcome: Outcome) -> Times:
    _refuse_stuck(outcome, steps, ranks, program)
    times = [(np.zeros(len(rows)), np.zeros(len(rows))) for rows in program.rows]
    for rank, queue, starts in zip(ranks, steps, outcome.starts, strict=True):
        main = queue["main"]
        row, start = queue["row"][main], starts[main]
        times[rank][0][row] = start
        times[rank][1][row] = start + queue["duration"][main]
    return times


def _transfer_starts(times: Times, sender_of: dict[Place, Place]) -> dict[Place, float]:
    """For each receive, when its data set out."""
    return {
        receive: min(float(times[send[0]][0][send[1]]), float(times[receive[0]][1][receive[1]]))
        for receive, send in sender_of.items()
    }


def _compute_events(program: Program, times: Times) -> Events:
    """The events of the operations that compute; an overlapped pair gives two."""
    parts = []
    for rank, (rows, (start, end)) in enumerate(zip(program.rows, times, strict=True)):
        chosen = np.flatnonzero(~communicates(rows["kind"]))
        rows = rows[chosen]
        events = np.zeros(len(rows), EVENT)
        events["rank"], events["lane"], events["peer"] = rank, COMPUTE, -1
        for name in ("kind", "stage", "microbatch"):
            events[name] = rows[name]
        events["start"], events["end"] = start[chosen], end[chosen]
        paired = rows["kind"] == OpKind.OVERLAP_F_B
        if paired.any():
            second = events[paired]
            events["kind"][paired] = OpKind.FORWARD
            second["kind"] = OpKind.BACKWARD
            second["stage"], second["microbatch"] = rows["peer"][paired], rows["pair"][paired]
            events = np.insert(events, np.flatnonzero(paired) + 1, second)
        parts.append(events)
    return np.concatenate(parts)


def _transfer_events(program: Program, times: Times, begun: dict[Place, float]) -> Events:
    rows = []
    for rank, ops in enumerate(program.rows):
        start, end = times[rank]
        chosen = np.flatnonzero(communicates(ops["kind"]))
        for row, values in zip(chosen.tolist(), ops[chosen].tolist(), strict=True):
            kind, stage, batch, peer, _ = values
            lane = SEND if kind in SENDS else RECV
            first = begun.get((rank, row), start[row])
            rows.append((rank, kind, stage, batch, peer, first, end[row], lane))
    return np.array(rows, EVENT)


def _refuse_stuck(outcome: Outcome, steps: list[Steps], ranks: list[int], program: Program) -> None:
    if not outcome.stuck:
        return
    queue = min(outcome.stuck.values())
    row = int(steps[queue]["row"][len(outcome.starts[queue])])
    raise UsageError(
        f"simulate: rank {ranks[queue]} waits for ever in front of "
        f"{program.ranks[ranks[queue]].text_of(row)}; validate() shows why"
    )


def peak_activations(program: Program) -> Ints:
    """Most live activations of each rank: one per stage and microbatch, from F to B or W."""
    peaks = np.zeros(program.num_ranks, np.int64)
    for rank, rows in enumerate(program.rows):
        kinds = rows["kind"]
        born = np.isin(kinds, (OpKind.FORWARD, OpKind.OVERLAP_F_B)).astype(np.int64)
        freed = np.isin(kinds, (OpKind.BACKWARD, OpKind.BACKWARD_WEIGHT, OpKind.OVERLAP_F_B))
        before: Ints = np.cumsum(freed) - freed
        peaks[rank] = (np.cumsum(born) - before).max(initial=0)
    return peaks
