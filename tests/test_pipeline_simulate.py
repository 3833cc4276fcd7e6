"""Simulated timelines: times, links, idle causes, memory, published figures."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from meshring import UsageError
from meshring.pipeline import OpKind, PipelineSchedule
from meshring.pipeline.semantics import ALL
from meshring.pipeline.timeline import COMPUTE, RECV, SEND
from pipeline_published import PUBLISHED


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: f"p{row[0]}-m{row[1]}-{row[2]}")
def test_published_bubble_rates_of_the_zero_bubble_paper(row: tuple[Any, ...]) -> None:
    """Bubble rates by span, to the four digits printed."""
    p, m, f, i, w, c = row[:6]
    costs = {"forward": f, "backward_input": i, "backward_weight": w, "comm": c}
    for kind, rate in zip(("1f1b", "zb-h1", "zb-h2"), row[6:9], strict=True):
        line = PipelineSchedule(p, m, kind).simulate(**costs)
        assert round(line.bubble_rate_span, 4) == rate, kind


@pytest.mark.parametrize(
    ("number", "chunks", "rate"),
    [
        (0, 3, 0.1055),
        (1, 3, 0.0818),
        (3, 4, 0.0808),
        (4, 4, 0.0628),
        (6, 3, 0.1104),
        (9, 2, 0.1493),
    ],
)
def test_published_bubble_rates_of_interleaved_1f1b(number: int, chunks: int, rate: float) -> None:
    """They follow only if nothing but a group's first microbatch waits on its way from the last
    rank back to the first one; with all dependencies the bubble is larger.
    """
    p, m, f, i, w, c = PUBLISHED[number][:6]
    schedule = PipelineSchedule(p * chunks, m, "interleaved-1f1b", num_ranks=p)
    costs = {"forward": f / chunks, "backward": (i + w) / chunks, "comm": c}
    line = schedule.simulate(**costs)
    loose = m * (f + i + w) / _without_waiting_between_chunks(schedule, costs)
    assert round(1 - loose, 4) == rate < line.bubble_rate_span


def _without_waiting_between_chunks(schedule: PipelineSchedule, costs: dict[str, float]) -> float:
    p, last = schedule.num_ranks, schedule.num_stages - 1
    done: dict[tuple[bool, int, int], float] = {}
    clock, left = [0.0] * p, [list(reversed(rows.tolist())) for rows in schedule.rows]
    while any(left):
        for rank in range(p):
            while left[rank]:
                kind, stage, batch = left[rank][-1][:3]
                forward = kind == OpKind.FORWARD
                before = (forward, stage - 1 if forward else stage + 1, batch)
                free = stage == 0 if forward else stage == last
                wraps = rank == 0 if forward else rank == p - 1
                if not free and not (wraps and batch % p):
                    if before not in done:
                        break
                    clock[rank] = max(clock[rank], done[before] + costs["comm"])
                clock[rank] += costs["forward" if forward else "backward"]
                done[forward, stage, batch] = clock[rank]
                left[rank].pop()
    return max(clock)


def test_published_bubbles_of_the_dualpipe_table() -> None:
    """1F1B (PP-1)(F+B), ZB1P (PP-1)(F+B-2W), DualPipe and DualPipeV (PP/2-1)(F&B+B-3W)."""
    f, w, both = 1.0, 1.0, 2.5
    b = 2.0
    costs = {"forward": f, "backward_weight": w, "backward_input": b - w, "overlapped": both}
    for stages in (4, 8, 16):
        m = 3 * stages
        for kind, bubble in (
            ("1f1b", (stages - 1) * (f + b)),
            ("zb-h1", (stages - 1) * (f + b - 2 * w)),
            ("dualpipe", (stages // 2 - 1) * (both + b - 3 * w)),
            ("dualpipev", (stages // 2 - 1) * (both + b - 3 * w)),
        ):
            line = PipelineSchedule(stages, m, kind).simulate(**costs)
            assert line.makespan - line.busy.min() == pytest.approx(bubble), kind


def test_a_small_case_by_hand() -> None:
    line = PipelineSchedule(2, 2).simulate(forward=1, backward=2, comm=0.5)
    got = {
        (int(e["rank"]), OpKind(e["kind"]).code, int(e["microbatch"])): (e["start"], e["end"])
        for e in line.events
    }
    assert got[0, "F", 1] == (1, 2) and got[1, "F", 0] == (1.5, 2.5)
    assert got[1, "B", 0] == (2.5, 4.5) and got[0, "B", 0] == (5, 7)
    assert got[1, "F", 1] == (4.5, 5.5) and got[1, "B", 1] == (5.5, 7.5)
    assert got[0, "B", 1] == (8, 10) and line.makespan == 10
    assert line.peak_activations.tolist() == [2, 1]


def test_durations_per_stage_microbatch_and_rank() -> None:
    schedule = PipelineSchedule(2, 2)
    table = [[1.0, 2.0], [3.0, 4.0]]
    line = schedule.simulate(forward=table, backward=[5, 6], rank_factor=[1, 10])
    length = line.events["end"] - line.events["start"]
    for event, duration in zip(line.events, length, strict=True):
        rank, batch = int(event["rank"]), int(event["microbatch"])
        expected = table[rank][batch] if event["kind"] == OpKind.FORWARD else 5 + rank
        assert duration == pytest.approx(expected * (1, 10)[rank])


def test_links_have_latency_and_bandwidth_of_their_own() -> None:
    latency = np.zeros((2, 2))
    latency[0, 1], latency[1, 0] = 1.0, 2.0
    schedule = PipelineSchedule(2, 1)
    costs: dict[str, Any] = {"latency": latency, "message_bytes": 8, "bandwidth": 4}
    assert schedule.simulate(**costs).makespan == 6 + (1 + 2) + (2 + 2)
    lowered = schedule.lower("rendezvous/one", **costs)
    line = lowered.simulate(**costs)
    assert line.makespan == 6 + (1 + 2) + (2 + 2)
    moves = line.events[line.events["lane"] != COMPUTE]
    assert sorted(moves["lane"].tolist()) == [SEND, SEND, RECV, RECV]
    assert (moves["end"] - moves["start"]).min() == 3


def test_stages_of_one_rank_exchange_at_once() -> None:
    together = PipelineSchedule(4, 1, "interleaved-1f1b", placement=[0, 0, 1, 1])
    assert together.simulate(comm=5).makespan == 4 + 5 + 8 + 5
    alone = PipelineSchedule(3, 3, num_ranks=1)
    assert alone.simulate(comm=100).makespan == 3 * 3 * 3


@pytest.mark.parametrize("how", ALL, ids=str)
@pytest.mark.parametrize("kind", ["1f1b", "zb-v", "dualpipe"])
def test_idle_time_is_explained(kind: str, how: object) -> None:
    schedule = PipelineSchedule(4, 6, kind)
    line = schedule.lower(how, comm=0.4).simulate(comm=0.4)  # type: ignore[arg-type]
    causes = line.idle_causes
    assert set(causes) == {
        *("start", "activation", "gradient", "queue", "transfer", "blocked", "end")
    }
    np.testing.assert_allclose(sum(causes.values()), line.idle, atol=1e-9)
    assert min(c.min() for c in causes.values()) >= 0


def test_a_send_in_front_of_others_is_a_stall_of_the_queue() -> None:
    text = "0F0,0F1,0SEND_F0,0SEND_F1\n1RECV_F0,1F0,1RECV_F1,1F1"
    schedule = PipelineSchedule.from_csv(text)
    line = schedule.simulate(semantics="buffered/one", forward=1, comm=0.25)
    assert line.idle_causes["start"][1] == pytest.approx(2.25)
    slow = "0F0,0SEND_F0,0F1,0F2,0SEND_F1,0SEND_F2\n1RECV_F0,1F0,1RECV_F1,1F1,1RECV_F2,1F2"
    line = PipelineSchedule.from_csv(slow).simulate(
        semantics="buffered/one", forward=[1, 0.5], comm=0.25
    )
    assert line.idle_causes["queue"][1] == pytest.approx(1.0)
    assert line.idle_causes["transfer"][1] == pytest.approx(0.25)


def test_bytes_count_weights_activations_and_receive_buffers() -> None:
    schedule = PipelineSchedule(4, 8)
    costs = {"comm": 0.3, "activation_bytes": 100, "weight_bytes": 1000, "message_bytes": 10}
    line = schedule.simulate(**costs)
    assert line.peak_bytes is not None
    assert line.peak_bytes.tolist() == [1410, 1320, 1220, 1110]
    assert schedule.simulate(forward=1).peak_bytes is None
    split = PipelineSchedule(4, 8, "zb-h1")
    whole = split.simulate(activation_bytes=100).peak_bytes
    part = split.simulate(activation_bytes=100, weight_gradient_bytes=20).peak_bytes
    assert whole is not None and part is not None
    assert whole.tolist() == [400, 400, 400, 400] and part[3] == 100 + 3 * 20


def test_recomputation_keeps_inputs_only() -> None:
    plain = PipelineSchedule.from_csv("0F0,0F1,0F2,0B0,0B1,0B2")
    again = PipelineSchedule.from_csv("0F0,0F1,0F2,0R0,0B0,0R1,0B1,0R2,0B2")
    costs = {"activation_bytes": 100, "message_bytes": 10}
    for schedule, peak, time in ((plain, 300, 9), (again, 120, 12)):
        line = schedule.simulate(**costs)
        assert line.peak_bytes is not None and line.peak_bytes.tolist() == [peak]
        assert line.makespan == time


def test_overlapped_pairs_are_two_events_at_once() -> None:
    line = PipelineSchedule(2, 6, "dualpipev").simulate(overlapped=2.5)
    starts, counts = np.unique(line.events["start"], return_counts=True)
    twice = line.events[np.isin(line.events["start"], starts[counts == 2])]
    assert len(twice) and set((twice["end"] - twice["start"]).tolist()) == {2.5}


def test_forward_only_runs_too() -> None:
    assert PipelineSchedule.from_csv("0F0,0F1\n1F0,1F1").simulate(forward=2).makespan == 6


@pytest.mark.parametrize(
    ("costs", "words"),
    [
        ({"forward": -1}, "forward"),
        ({"forward": float("nan")}, "forward"),
        ({"forward": float("inf")}, "forward"),
        ({"forward": "fast"}, "forward"),
        ({"forward": [1, 2]}, "forward"),
        ({"backward": 1, "backward_input": 2}, "backward_input"),
        ({"latency": [[1]]}, "latency"),
        ({"comm": 1, "latency": 1}, "same"),
        ({"bandwidth": 0}, "bandwidth"),
        ({"foward": 1}, "foward"),
        ({"semantics": "rendezvous"}, "semantics"),
    ],
)
def test_bad_costs_are_refused(costs: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        PipelineSchedule(3, 4).lower().simulate(**costs)


def test_a_deadlock_is_refused() -> None:
    text = "0F0,0B0,0F1,0B1\n1F1,1B1,1F0,1B0"
    with pytest.raises(UsageError, match="waits for ever in front of 0B0"):
        PipelineSchedule.from_csv(text).simulate()
    with pytest.raises(UsageError, match="wait for each other"):
        PipelineSchedule.from_csv(text).lower()
