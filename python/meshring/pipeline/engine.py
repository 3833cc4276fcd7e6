"""Queues of steps that wait for each other: the event-driven core of checks and simulations."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

STEP = np.dtype(
    [
        ("need", "i8"),  # the token that must have arrived, or -1
        ("give", "i8"),  # the token that this step makes, or -1
        ("duration", "f8"),
        ("latency", "f8"),  # from the step's end to the token's arrival
        ("row", "i8"),  # the row of the operation that this step is part of
        ("main", "?"),  # whether it is the step that takes the operation's time
    ]
)
Steps = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Outcome:
    """When each step of each queue started, and which queues wait for a token for ever."""

    starts: list[NDArray[np.float64]]
    stuck: dict[int, int]  # token: queue; the queue's next step is number len(starts[queue])


def run(queues: list[Steps], num_tokens: int) -> Outcome:
    """Run each queue's steps in order, each as soon as its token has arrived; O(steps).

    A token has one giver and one taker.
    """
    arrived = [-1.0] * num_tokens
    waiting: dict[int, int] = {}
    woken = list(range(len(queues) - 1, -1, -1))
    starts = [array("d") for _ in queues]
    walkers = [
        _walk(number, steps, arrived, waiting, woken, starts[number])
        for number, steps in enumerate(queues)
    ]
    while woken:
        next(walkers[woken.pop()], None)
    return Outcome([np.frombuffer(s, np.float64) if s else np.empty(0) for s in starts], waiting)


def _walk(
    number: int,
    steps: Steps,
    arrived: list[float],
    waiting: dict[int, int],
    woken: list[int],
    starts: Any,
) -> Iterator[None]:
    clock = 0.0
    record = starts.append
    names = ("need", "give", "duration", "latency")
    columns: list[Any] = [memoryview(np.ascontiguousarray(steps[name])) for name in names]  # type: ignore[arg-type]
    for need, give, duration, latency in zip(*columns, strict=True):
        if need >= 0:
            if arrived[need] < 0.0:
                waiting[need] = number
                yield
            if arrived[need] > clock:
                clock = arrived[need]
        record(clock)
        clock += duration
        if give >= 0:
            arrived[give] = clock + latency
            if give in waiting:
                woken.append(waiting.pop(give))
