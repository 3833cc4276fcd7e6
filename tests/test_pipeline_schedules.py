"""Every kind of schedule for any number of ranks, microbatches and stages per rank."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from meshring import UsageError
from meshring.pipeline import OpKind, PipelineSchedule, PipelineScheduleType

KINDS = [kind.value for kind in PipelineScheduleType if kind.value != "auto"]
LOOPS = ("interleaved-1f1b", "looped-bfs")
FOLDS = ("zb-v", "v-half", "v-min", "dualpipev")


@pytest.mark.parametrize("kind", KINDS)
def test_is_valid_for_any_ranks_and_microbatches(kind: str) -> None:
    chunks = (1, 2, 3) if kind in LOOPS else (2,) if kind in FOLDS else (1,)
    for p, v, m in product(range(1, 7), chunks, (1, 2, 3, 5, 7, 12, 13)):
        schedule = PipelineSchedule(p * v, m, kind, num_ranks=p)
        assert schedule.num_ranks == p
        schedule.validate()


@pytest.mark.parametrize("kind", KINDS)
def test_is_valid_for_unequal_stages_per_rank(kind: str) -> None:
    for stages, ranks in ((3, 2), (5, 3), (7, 3), (9, 2), (11, 5)):
        for m in (1, 4, 9):
            schedule = PipelineSchedule(stages, m, kind, num_ranks=ranks)
            schedule.validate()
            held = [len(schedule.stages_of(rank)) for rank in range(ranks)]
            assert sum(held) == stages * schedule.replicas and min(held) >= 1


@pytest.mark.parametrize(
    ("kind", "placement"),
    [
        ("1f1b", [0, 0, 1, 2, 2, 2]),
        ("1f1b", [2, 0, 0, 1]),
        ("gpipe", [1, 0]),
        ("interleaved-1f1b", [0, 1, 1, 0, 2, 0]),
        ("interleaved-1f1b", [0, 1, 2, 2, 1, 0]),
        ("looped-bfs", [2, 1, 0]),
        ("zb-v", [0, 0, 1, 2, 1, 0]),
        ("dualpipev", [0, 1, 2, 2, 2, 1]),
        ("dualpipe", [0, 0, 1, 2]),
        ("zb-h2", [0, 1, 1, 2]),
        ("auto", [1, 1, 0]),
    ],
)
def test_placement_by_hand(kind: str, placement: list[int]) -> None:
    for m in (1, 5, 8):
        schedule = PipelineSchedule(len(placement), m, kind, placement=placement)
        schedule.validate()
        assert schedule.placement[: len(placement)] == tuple(placement)


def test_two_copies_of_the_model_share_the_microbatches() -> None:
    schedule = PipelineSchedule(4, 10, "dualpipe")
    assert schedule.replicas == 2 and schedule.placement == (0, 1, 2, 3, 3, 2, 1, 0)
    for stage in range(8):
        seen = {op.microbatch for op in schedule.get_stage_schedule(stage)}
        assert seen == set(range(5) if stage < 4 else range(5, 10))


def test_interleaved_group_size() -> None:
    schedule = PipelineSchedule(6, 12, "interleaved-1f1b", num_ranks=3, group=6)
    schedule.validate()
    first = [(op.stage, op.microbatch) for op in schedule.ranks[0] if op.kind is OpKind.FORWARD]
    assert first[:7] == [*((0, i) for i in range(6)), (3, 0)]
    assert schedule != PipelineSchedule(6, 12, "interleaved-1f1b", num_ranks=3)


def test_dualpipe_overlaps_in_its_steady_state() -> None:
    schedule = PipelineSchedule(8, 20, "dualpipe")
    for ops in schedule.ranks:
        paired = [op for op in ops if op.kind is OpKind.OVERLAP_F_B]
        assert len(paired) >= 9
        assert all(f.stage != b.stage for f, b in (op.parts for op in paired))


def test_skips_reach_every_part() -> None:
    schedule = PipelineSchedule(4, 3, skips=[(0, 2), (0, 3)])
    lowered = schedule.lower("rendezvous/one")
    lowered.validate()
    texts = [str(op) for op in lowered.get_stage_schedule(0)]
    assert "0SEND_F1:3" in texts and "0RECV_B1:2" in texts
    assert PipelineSchedule.from_json(lowered.to_json()).skips == ((0, 2), (0, 3))
    slow = schedule.simulate(comm=10.0)
    assert slow.makespan > PipelineSchedule(4, 3).simulate(comm=1.0).makespan


def test_a_million_operations_are_made_at_once() -> None:
    schedule = PipelineSchedule(256, 2048)
    assert schedule.num_operations == 2 * 256 * 2048
    assert all(rows.dtype.itemsize <= 20 for rows in schedule.rows)
    assert np.array_equal(schedule.rows[255]["microbatch"][:4], [0, 0, 1, 1])


@pytest.mark.parametrize("kind", ["1f1b", "zb-v"])
def test_auto_takes_no_wrong_arguments(kind: str) -> None:
    with pytest.raises(UsageError, match="'auto'"):
        PipelineSchedule(4, 4, kind, costs={"forward": 1})
    for wrong, words in (
        ({"memory_limit": 0.5}, "memory_limit"),
        ({"memory_limit": [1, 2]}, "memory_limit"),
        ({"memory_limit": "much"}, "memory_limit"),
        ({"objective": "fast"}, "objective"),
        ({"costs": {"forwards": 1}}, "forwards"),
        ({"costs": {"forward": -1}}, "forward"),
    ):
        with pytest.raises(UsageError, match=words):
            PipelineSchedule(4, 4, "auto", **wrong)  # type: ignore[arg-type]
