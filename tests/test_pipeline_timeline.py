"""Timelines: the figures that follow from events, against hand-made runs."""

from __future__ import annotations

import numpy as np
import pytest

import meshring as mr
from meshring.pipeline.action import OpKind
from meshring.pipeline.timeline import COMPUTE, EVENT, RECV, SEND

F, B, W = OpKind.FORWARD, OpKind.BACKWARD, OpKind.BACKWARD_WEIGHT
IN, R = OpKind.BACKWARD_INPUT, OpKind.RECOMPUTE


def events(*rows: tuple[float, ...]) -> np.ndarray:
    """rank, kind, stage, microbatch, start, end [, lane] of each event."""
    made = np.zeros(len(rows), EVENT)
    made["peer"] = -1
    for i, (rank, kind, stage, microbatch, start, end, *lane) in enumerate(rows):
        made[i] = (rank, kind, stage, microbatch, -1, start, end, lane[0] if lane else COMPUTE)
    return made


TWO_RANKS = events(
    (1, B, 1, 0, 3, 5),  # in no order
    (0, F, 0, 0, 1, 2),
    (0, F, 0, 1, 2, 3),
    (1, F, 1, 0, 2, 3),
    (0, B, 0, 0, 6, 8),
    (1, F, 1, 1, 5, 6),
    (1, B, 1, 1, 6, 8),
    (0, B, 0, 1, 9, 11),
    (0, OpKind.SEND_ACTIVATION, 0, 0, 2, 2.5, SEND),
)


def test_times_and_both_bubbles() -> None:
    t = mr.Timeline(2, TWO_RANKS)
    assert t.start == 1 and t.makespan == 10 and t.span == 10
    assert t.busy.tolist() == [6, 6] and t.idle.tolist() == [4, 4]
    assert t.work == 6 and t.bubble_makespan == 4 and t.bubble_span == 4
    assert t.bubble_rate_makespan == pytest.approx(0.4)
    later = mr.Timeline(2, events((0, F, 0, 0, 0, 2), (1, F, 1, 0, 3, 5)))
    assert later.makespan == 5 and later.span == 2
    assert later.bubble_makespan == 3 and later.bubble_span == 0


def test_idle_time_has_causes_that_add_up() -> None:
    t = mr.Timeline(2, TWO_RANKS)
    causes = {name: times.tolist() for name, times in t.idle_causes.items()}
    assert causes["start"] == [0, 1] and causes["end"] == [0, 3]
    assert causes["gradient"] == [4, 0] and causes["activation"] == [0, 0]
    assert np.allclose(sum(t.idle_causes.values()), t.idle)


def test_overlapped_events_count_once() -> None:
    t = mr.Timeline(1, events((0, F, 0, 0, 0, 3), (0, B, 0, 1, 0, 3), (0, W, 0, 1, 2, 4)))
    assert t.busy.tolist() == [4] and t.bubble_makespan == 0


@pytest.mark.parametrize(
    ("rows", "peak"),
    [
        ([(0, F, 0, 0, 0, 1), (0, F, 0, 1, 1, 2), (0, B, 0, 0, 2, 3), (0, B, 0, 1, 3, 4)], 2),
        ([(0, F, 0, 0, 0, 1), (0, B, 0, 0, 1, 2), (0, F, 0, 1, 2, 3), (0, B, 0, 1, 3, 4)], 1),
        ([(0, F, 0, 0, 0, 1), (0, IN, 0, 0, 1, 2), (0, F, 0, 1, 2, 3), (0, W, 0, 0, 3, 4)], 2),
        ([(0, F, 0, 0, 0, 1), (0, F, 0, 1, 1, 2), (0, R, 0, 0, 2, 3), (0, B, 0, 0, 3, 4)], 1),
    ],
)
def test_live_activations(rows: list[tuple[float, ...]], peak: int) -> None:
    assert mr.Timeline(1, events(*rows)).peak_activations.tolist() == [peak]


def test_what_a_simulation_knows_better_is_kept() -> None:
    given = {"memory": np.array([1.0, 0.0])}
    t = mr.Timeline(
        2, TWO_RANKS, idle_causes=given, peak_activations=np.array([7, 8]), title="x", unit="s"
    )
    assert t.idle_causes == given and t.peak_activations.tolist() == [7, 8]
    assert "x 2 ranks, 9 events, makespan 10 s" in repr(t)


def test_durations_are_means_per_stage() -> None:
    t = mr.Timeline(2, TWO_RANKS)
    assert t.durations() == {"forward": [1, 1], "backward": [2, 2]}
    copies = mr.Timeline(2, events((0, F, 0, 0, 0, 1), (1, F, 2, 0, 0, 3), (1, F, 1, 0, 3, 4)))
    assert copies.durations(2) == {"forward": [2, 1]}


def test_empty_and_idle_ranks() -> None:
    t = mr.Timeline(3, events())
    assert (
        t.makespan == 0 and t.bubble_rate_makespan == 0 and t.peak_activations.tolist() == [0] * 3
    )
    t = mr.Timeline(2, events((1, F, 0, 0, 0, 2)))
    assert t.idle.tolist() == [2, 0] and t.idle_causes["start"].tolist() == [2, 0]
    assert t.summary()["bubble_makespan"] == 0


def test_large_timelines_are_vectorised() -> None:
    ranks, count = 64, 2000
    big = np.zeros(ranks * count, EVENT)
    big["rank"] = np.repeat(np.arange(ranks), count)
    big["microbatch"] = np.tile(np.arange(count), ranks)
    big["start"] = big["microbatch"] * 2.0 + big["rank"]
    big["end"] = big["start"] + 1.5
    shuffled = np.random.default_rng(0).permutation(big)
    t = mr.Timeline(ranks, shuffled)
    assert np.allclose(t.busy, 1.5 * count)
    assert t.makespan == pytest.approx(2 * (count - 1) + 1.5 + ranks - 1)
    assert (t.compute(5)["microbatch"] == np.arange(count)).all()


@pytest.mark.parametrize(
    ("ranks", "rows", "words"),
    [
        (0, events(), "num_ranks"),
        (2, [1, 2], "events"),
        (2, np.zeros(3), "events"),
        (2, events((2, F, 0, 0, 0, 1)), "rank 2"),
        (2, events((0, F, 0, 0, 1, 0)), "event 0"),
        (2, events((0, F, 0, 0, 0, float("nan"))), "event 0"),
    ],
)
def test_what_is_no_timeline_is_refused(ranks: int, rows: object, words: str) -> None:
    with pytest.raises(mr.UsageError, match=words):
        mr.Timeline(ranks, rows)  # type: ignore[arg-type]


def test_lanes() -> None:
    assert (COMPUTE, SEND, RECV) == (0, 1, 2)
