"""What ran when on which rank, and what follows from it: bubbles, idle time, live activations."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshring.errors import UsageError
from meshring.pipeline.action import OpKind

COMPUTE, SEND, RECV = 0, 1, 2

EVENT = np.dtype(
    [
        ("rank", "i4"),
        ("kind", "i1"),  # a value of OpKind
        ("stage", "i4"),
        ("microbatch", "i4"),
        ("peer", "i4"),  # the other stage of a transfer, else -1
        ("start", "f8"),
        ("end", "f8"),
        ("lane", "i1"),  # COMPUTE, SEND or RECV
    ]
)

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Events = NDArray[Any]

CAUSES = ("start", "activation", "gradient", "other", "end")
_CAUSE_OF = {
    OpKind.FORWARD: "activation",
    OpKind.OVERLAP_F_B: "activation",
    OpKind.BACKWARD: "gradient",
    OpKind.BACKWARD_INPUT: "gradient",
}
_FREES = (OpKind.BACKWARD, OpKind.BACKWARD_WEIGHT)  # ends the life of an activation
_COST_NAMES = {
    OpKind.FORWARD: "forward",
    OpKind.BACKWARD: "backward",
    OpKind.BACKWARD_INPUT: "backward_input",
    OpKind.BACKWARD_WEIGHT: "backward_weight",
    OpKind.RECOMPUTE: "recompute",
}


class TimelineBase:
    """The events of a pipeline run and the figures that follow from them.

    An overlapped forward and backward are two events with the same start and end.
    """

    def __init__(
        self,
        num_ranks: int,
        events: Events,
        *,
        num_stages: int | None = None,
        title: str = "",
        unit: str = "",
        idle_causes: Mapping[str, Floats] | None = None,
        peak_activations: Ints | None = None,
        peak_bytes: Ints | None = None,
    ) -> None:
        self.num_ranks = num_ranks
        self.events = _checked(num_ranks, events)
        stages = int(self.events["stage"].max()) + 1 if self.events.size else 0
        self.num_stages = stages if num_stages is None else num_stages
        self.title = title
        self.unit = unit
        self._given_causes = idle_causes
        self._given_activations = peak_activations
        self.peak_bytes = peak_bytes
        """Highest number of live bytes per rank; None where bytes were not followed."""

    # ------------------------------------------------------------ time

    @cached_property
    def start(self) -> float:
        """The start of the first event."""
        return float(self.events["start"].min()) if self.events.size else 0.0

    @cached_property
    def makespan(self) -> float:
        """Time from the first start to the last end over all ranks, transfers included."""
        return float(self.events["end"].max()) - self.start if self.events.size else 0.0

    @cached_property
    def _compute(self) -> tuple[Events, Ints]:
        """Compute events by (rank, start), and where each rank's begin and end."""
        rows = self.events
        mask = rows["lane"] == COMPUTE
        if not mask.all():
            rows = rows[mask]
        rank, start = rows["rank"], rows["start"]
        ordered = (rank[1:] > rank[:-1]) | ((rank[1:] == rank[:-1]) & (start[1:] >= start[:-1]))
        if not ordered.all():
            rows = rows[np.lexsort((start, rank))]
        bounds = np.searchsorted(rows["rank"], np.arange(self.num_ranks + 1))
        return rows, bounds.astype(np.int64)

    def compute(self, rank: int) -> Events:
        """The compute events of one rank, by their start."""
        rows, bounds = self._compute
        return rows[bounds[rank] : bounds[rank + 1]]

    @cached_property
    def _first_last_busy(self) -> tuple[Floats, Floats, Floats, dict[str, Floats]]:
        first = np.full(self.num_ranks, self.start)
        last, busy = first.copy(), np.zeros(self.num_ranks)
        causes = {name: np.zeros(self.num_ranks) for name in CAUSES}
        cause_of = np.full(128, CAUSES.index("other"))
        for kind, name in _CAUSE_OF.items():
            cause_of[int(kind)] = CAUSES.index(name)
        for rank in range(self.num_ranks):
            rows = self.compute(rank)
            if not rows.size:
                causes["start"][rank] = self.makespan
                continue
            reached = np.maximum.accumulate(rows["end"])
            gaps = np.maximum(rows["start"][1:] - reached[:-1], 0.0)
            by_cause = np.bincount(cause_of[rows["kind"][1:]], gaps, len(CAUSES))
            first[rank], last[rank] = rows["start"][0], reached[-1]
            busy[rank] = last[rank] - first[rank] - gaps.sum()
            for name, seconds in zip(CAUSES, by_cause, strict=True):
                causes[name][rank] = seconds
            causes["start"][rank] = first[rank] - self.start
            causes["end"][rank] = self.start + self.makespan - last[rank]
        return first, last, busy, causes

    @property
    def busy(self) -> Floats:
        """Time that each rank computes; overlapped operations count once."""
        return self._first_last_busy[2]

    @property
    def idle(self) -> Floats:
        """Time of the makespan that each rank does not compute."""
        return np.maximum(self.makespan - self.busy, 0.0)

    @property
    def idle_causes(self) -> dict[str, Floats]:
        """Idle time per rank by cause; the causes add up to `idle`.

        start: before the rank's first operation; activation, gradient: until an input came;
        other: in front of any other operation; end: after the rank's last one. A simulation
        that knows more names the causes itself.
        """
        return dict(self._first_last_busy[3] if self._given_causes is None else self._given_causes)

    @cached_property
    def span(self) -> float:
        """The longest time from a rank's own first start to its own last end.

        Source: Qi et al., Zero Bubble Pipeline Parallelism, 2023, whose bubbles are measured so.
        """
        first, last, _, _ = self._first_last_busy
        return float((last - first).max()) if self.num_ranks else 0.0

    @property
    def work(self) -> float:
        """The computing time of the busiest rank."""
        return float(self.busy.max()) if self.num_ranks else 0.0

    @property
    def bubble_makespan(self) -> float:
        """Makespan minus the work of the busiest rank."""
        return max(self.makespan - self.work, 0.0)

    @property
    def bubble_span(self) -> float:
        """Span minus the work of the busiest rank."""
        return max(self.span - self.work, 0.0)

    @property
    def bubble_rate_makespan(self) -> float:
        """bubble_makespan as a part of the makespan."""
        return self.bubble_makespan / self.makespan if self.makespan else 0.0

    @property
    def bubble_rate_span(self) -> float:
        """bubble_span as a part of the span."""
        return self.bubble_span / self.span if self.span else 0.0

    # ------------------------------------------------------------ memory

    @cached_property
    def peak_activations(self) -> Ints:
        """Highest number of live activations per rank, one for each (stage, microbatch).

        An activation lives from the start of its forward to the end of its backward, or of its
        weight gradient where the backward is split. On a rank that recomputes, it lives from its
        recomputation on.
        """
        if self._given_activations is not None:
            return np.asarray(self._given_activations)
        peaks = np.zeros(self.num_ranks, np.int64)
        for rank in range(self.num_ranks):
            rows = self.compute(rank)
            again = rows["kind"] == OpKind.RECOMPUTE
            born = rows["start"][again if again.any() else rows["kind"] == OpKind.FORWARD]
            freed = np.sort(rows["end"][np.isin(rows["kind"], [int(k) for k in _FREES])])
            if born.size:
                dead = np.searchsorted(freed, born, side="right")
                peaks[rank] = (np.arange(1, born.size + 1) - dead).max()
        return peaks

    def durations(self, num_stages: int | None = None) -> dict[str, list[float]]:
        """The mean duration of each kind of operation per stage: what simulate() takes.

        num_stages: of the model, where the schedule has two copies of each stage. A stage that has
        no operation of a kind gets the mean over all stages.
        """
        rows, count = self._compute[0], num_stages or self.num_stages
        found = {}
        for kind, name in _COST_NAMES.items():
            part = rows[rows["kind"] == kind]
            if not part.size:
                continue
            stage, times = part["stage"] % count, part["end"] - part["start"]
            number = np.bincount(stage, minlength=count)
            total = np.bincount(stage, times, minlength=count)
            mean = np.where(number > 0, total / np.maximum(number, 1), times.mean())
            found[name] = mean.tolist()
        return found

    def summary(self) -> dict[str, Any]:
        """The figures as plain Python values."""
        figures: dict[str, Any] = {
            name: getattr(self, name)
            for name in (
                "num_ranks num_stages makespan span work bubble_makespan bubble_span "
                "bubble_rate_makespan bubble_rate_span"
            ).split()
        }
        figures["idle"] = self.idle.tolist()
        figures["idle_causes"] = {k: np.asarray(v).tolist() for k, v in self.idle_causes.items()}
        figures["peak_activations"] = self.peak_activations.tolist()
        if self.peak_bytes is not None:
            figures["peak_bytes"] = np.asarray(self.peak_bytes).tolist()
        return figures


def _checked(num_ranks: int, events: Events) -> Events:
    if not isinstance(num_ranks, int) or num_ranks < 1:
        raise UsageError(f"Timeline: argument 'num_ranks' is {num_ranks!r}; give a number >= 1")
    if getattr(events, "dtype", None) != EVENT or events.ndim != 1:
        given = getattr(events, "dtype", type(events).__name__)
        raise UsageError(
            f"Timeline: argument 'events' is {given}; give a one-dimensional array of "
            f"meshring.pipeline.timeline.EVENT, whose fields are {', '.join(EVENT.names or ())}"
        )
    if events.size:
        low, high = int(events["rank"].min()), int(events["rank"].max())
        if low < 0 or high >= num_ranks:
            wrong = low if low < 0 else high
            raise UsageError(
                f"Timeline: an event has rank {wrong}; the ranks are 0 to {num_ranks - 1}"
            )
        bad = np.flatnonzero(~(events["end"] >= events["start"]))
        if bad.size:
            raise UsageError(f"Timeline: event {bad[0]} ends before it starts, or at no number")
    return events
