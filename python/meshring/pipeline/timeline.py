"""The Timeline: what a simulated or a measured run of a schedule looks like."""

from __future__ import annotations

from meshring.pipeline.timeline_base import COMPUTE, EVENT, RECV, SEND, TimelineBase

__all__ = ["COMPUTE", "EVENT", "RECV", "SEND", "Timeline"]


class Timeline(TimelineBase):
    """What ran when on which rank: figures, pictures and traces of one pipeline run.

    Shapes: events is a one-dimensional array of dtype EVENT, in any order. Units: those of the
    durations that were given; seconds where it was measured. Errors: UsageError for events that
    are none.
    """

    def __repr__(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        return (
            f"<Timeline {self.title or 'of'} {self.num_ranks} ranks, {self.events.size} events, "
            f"makespan {self.makespan:.6g}{unit}>"
        )
