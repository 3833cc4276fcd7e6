"""Schedules with two copies of the model (DualPipe): their gradients are added up."""

from __future__ import annotations

from typing import Any

from meshring.pipeline.channels import Channels
from meshring.pipeline.program import Program
from meshring.pipeline.stage import PipelineStage, spec_of


def sum_copies(
    schedule: Program,
    stages: dict[int, PipelineStage],
    channels: Channels,
    timeout: float | None,
) -> None:
    """Make each stage's gradients the sum over its two copies, on both their ranks. Collective.

    Both sides add the same two numbers, so the copies stay bitwise equal.
    """
    count = schedule.num_stages
    waiting: list[tuple[Any, Any]] = []
    sent = []
    for stage in sorted(stages, key=lambda s: s % count):
        copy = (stage + count) % (2 * count)
        unit: Any = stages[stage]
        peer = schedule.placement[copy]
        if peer == channels.comm.rank:
            if stage < copy:
                other: Any = stages[copy]
                for mine, theirs in zip(unit.gradients(), other.gradients(), strict=True):
                    mine += theirs
                    theirs[...] = mine
            continue
        for mine in unit.gradients():
            sent.append(channels.send(mine.copy(), peer))
            buffer = spec_of(mine).arrays[0].empty()
            waiting.append((mine, channels.receive(buffer, peer)))
    for mine, work in waiting:
        mine += work.wait(timeout)
    for work in sent:
        work.wait(timeout)
