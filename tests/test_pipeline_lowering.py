"""Lowered schedules: matched, free of deadlocks, and close to what is possible."""

from __future__ import annotations

from typing import Any

import pytest

from meshring.pipeline import OpKind, PipelineSchedule, PipelineScheduleType
from meshring.pipeline.costs import costs_of
from meshring.pipeline.linear import Wiring, in_rounds
from meshring.pipeline.lowering import makespan
from meshring.pipeline.semantics import ALL, Semantics
from pipeline_oracle import Search

KINDS = [k.value for k in PipelineScheduleType if k.value not in ("auto", "sequential")]
COSTS: list[dict[str, Any]] = [
    {"comm": 0.1},
    {"comm": 0.4},
    {"latency": 0.05, "message_bytes": 1, "bandwidth": 4},
]
BESIDE = [how for how in ALL if how.queues == "pair"]
SHARED = [how for how in ALL if how.queues != "pair"]


def made(kind: str, p: int, m: int) -> PipelineSchedule:
    chunks = PipelineSchedule(2, 1, kind).num_ranks == 1
    return PipelineSchedule(p * (1 + chunks), m, kind, num_ranks=p)


@pytest.mark.parametrize("how", ALL, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_matches_and_never_deadlocks(kind: str, how: Semantics) -> None:
    for p, m in ((1, 2), (2, 1), (2, 5), (3, 4), (4, 7)):
        schedule = made(kind, p, m)
        lowered = schedule.lower(how)
        lowered.validate()
        assert lowered.semantics == str(how)
        kept = [[op for op in ops if not op.kind.is_communication] for ops in lowered.ranks]
        flat = [[op for op in ops if op.kind is not OpKind.GROUP] for ops in kept]
        assert flat == [list(ops) for ops in schedule.ranks]


@pytest.mark.parametrize("kind", KINDS)
def test_one_order_runs_under_every_semantics(kind: str) -> None:
    """What was lined up for blocking rendezvous calls runs under all."""
    for p, m in ((2, 3), (3, 5), (4, 8)):
        lowered = made(kind, p, m).lower("rendezvous/one")
        for how in ALL:
            lowered.validate(how)


@pytest.mark.parametrize("how", BESIDE, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_queues_per_pair_reach_the_bound(kind: str, how: Semantics) -> None:
    for p, m in ((2, 4), (3, 4), (5, 11)):
        schedule = made(kind, p, m)
        for comm in (0.05, 0.3, 1.0):
            bound = schedule.simulate(comm=comm).makespan
            time = schedule.lower(how, comm=comm).simulate(comm=comm).makespan
            assert time <= 1.05 * bound, (p, m, comm)


@pytest.mark.parametrize("how", SHARED, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_no_slower_than_one_operation_a_round(kind: str, how: Semantics) -> None:
    """The order of torch's default lowering."""
    for p, m in ((2, 4), (4, 7)):
        schedule = made(kind, p, m)
        rounds = schedule.replaced(in_rounds(Wiring(schedule)), semantics=str(how))
        rounds.validate()
        for costs in COSTS[1:]:
            time = schedule.lower(how, **costs).simulate(**costs).makespan
            assert time <= rounds.simulate(**costs).makespan * (1 + 1e-9), (p, m, costs)


@pytest.mark.parametrize("how", SHARED, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_close_to_the_exhaustive_optimum(kind: str, how: Semantics) -> None:
    for p, m in ((2, 2), (2, 4), (3, 3)):
        schedule = made(kind, p, m)
        for given in COSTS:
            costs = costs_of(given)
            time = makespan(schedule.lower(how, **given), how, costs)
            if time > 1.05 * schedule.simulate(**given).makespan:
                assert not Search(schedule, how, costs).beats(time / 1.05), (p, m, given)


def test_the_exhaustive_search_finds_what_is_there() -> None:
    schedule, how, costs = made("1f1b", 2, 3), ALL[-1], costs_of({"comm": 0.4})
    time = makespan(schedule.lower(how, comm=0.4), how, costs)
    assert Search(schedule, how, costs).beats(time * 1.0001)
    bound = schedule.simulate(comm=0.4).makespan
    assert not Search(schedule, how, costs).beats(bound * 0.9999)


def test_blocking_calls_are_grouped_where_ranks_exchange() -> None:
    lowered = PipelineSchedule(4, 8).lower("rendezvous/one", comm=0.2)
    groups = [op for ops in lowered.ranks for op in ops if op.kind is OpKind.GROUP]
    both = [op for op in groups if len({part.kind.is_send for part in op.parts}) == 2]
    assert both


def test_large_schedules_are_lowered_too() -> None:
    schedule = PipelineSchedule(32, 128, "interleaved-1f1b", num_ranks=16)
    lowered = schedule.lower("rendezvous/pair", comm=0.1)
    assert lowered.num_operations == schedule.num_operations + 4 * 31 * 128
    lowered.validate()
