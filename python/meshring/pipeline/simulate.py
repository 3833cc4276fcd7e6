"""Runs a schedule in simulated time: who computes what when, who waits, what is kept."""

from __future__ import annotations

import numpy as np

from meshring.errors import UsageError
from meshring.pipeline.action import OpKind
from meshring.pipeline.costs import Costs
from meshring.pipeline.engine import Outcome, Steps, run
from meshring.pipeline.flow import Edges, Floats, Ints, compute_steps
from meshring.pipeline.operations import communicates
from meshring.pipeline.program import Program
from meshring.pipeline.semantics import Semantics, semantics_of
from meshring.pipeline.timeline import COMPUTE, EVENT, RECV, SEND, Timeline
from meshring.pipeline.timeline_base import Events
from meshring.pipeline.transfers import Queues, edge_times, lowered_queues


def simulate(
    program: Program, costs: Costs, semantics: str | Semantics | None = None, unit: str = ""
) -> Timeline:
    """The Timeline of a program under these costs.

    Without sends and receives in the program, data travel by themselves, each as soon as it is
    made: no schedule of transfers can be faster. Errors: UsageError where operations wait for each
    other for ever; `validate` shows the cycle.
    """
    durations = costs.durations(program)
    if program.is_lowered:
        how = semantics_of(semantics or program.semantics or "buffered/pair")
        queues = lowered_queues(program, how, durations, costs)
        outcome = run(queues.steps, queues.num_tokens)
        _refuse_stuck(outcome, queues.steps, queues.ranks, program)
        events = _lowered_events(program, queues, outcome)
    else:
        events = _ideal_events(program, costs, durations)
    return Timeline(
        program.num_ranks,
        events,
        num_stages=len(program.placement),
        title=program.schedule_type,
        unit=unit,
        peak_activations=peak_activations(program),
    )


def _ideal_events(program: Program, costs: Costs, durations: list[Floats]) -> Events:
    edges = Edges(program)
    latency, wire = edge_times(program, edges, costs)
    steps = [
        compute_steps(rows, np.arange(len(rows)), durations[rank], edges, latency + wire)
        for rank, rows in enumerate(program.rows)
    ]
    outcome = run(steps, edges.num_tokens)
    ranks = list(range(program.num_ranks))
    _refuse_stuck(outcome, steps, ranks, program)
    return np.concatenate(
        [_compute_events(program, rank, steps[rank], outcome.starts[rank]) for rank in ranks]
    )


def _compute_events(program: Program, rank: int, steps: Steps, starts: Floats) -> Events:
    """The events of one queue's operations that compute; an overlapped pair gives two."""
    main = steps["main"]
    picked, begin = steps[main], starts[main]
    rows = program.rows[rank][picked["row"]]
    keep = ~communicates(rows["kind"])
    picked, begin, rows = picked[keep], begin[keep], rows[keep]
    events = np.zeros(len(rows), EVENT)
    events["rank"], events["lane"], events["peer"] = rank, COMPUTE, -1
    for name in ("kind", "stage", "microbatch"):
        events[name] = rows[name]
    events["start"], events["end"] = begin, begin + picked["duration"]
    paired = rows["kind"] == OpKind.OVERLAP_F_B
    if not paired.any():
        return events
    second = events[paired]
    events["kind"][paired] = OpKind.FORWARD
    second["kind"] = OpKind.BACKWARD
    second["stage"], second["microbatch"] = rows["peer"][paired], rows["pair"][paired]
    return np.insert(events, np.flatnonzero(paired) + 1, second)


def _lowered_events(program: Program, queues: Queues, outcome: Outcome) -> Events:
    parts, begun = [], {}
    ends: dict[tuple[int, int], float] = {}
    for rank, steps, starts in zip(queues.ranks, queues.steps, outcome.starts, strict=True):
        parts.append(_compute_events(program, rank, steps, starts))
        main = steps["main"] & communicates(program.rows[rank]["kind"])[steps["row"]]
        times = zip(steps[main].tolist(), starts[main].tolist(), strict=True)
        for (_, _, duration, _, row, _), start in times:
            begun[rank, row] = start
            ends[rank, row] = start + duration
    rows = []
    for (rank, row), end in ends.items():
        kind, stage, batch, peer, _ = program.rows[rank][row].tolist()
        send = kind in (OpKind.SEND_ACTIVATION, OpKind.SEND_GRADIENT)
        start = begun[rank, row]
        if not send:
            start = min(begun[queues.sender_of[rank, row]], end)
        rows.append((rank, kind, stage, batch, peer, start, end, SEND if send else RECV))
    return np.concatenate([*parts, np.array(sorted(rows), EVENT)])


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
