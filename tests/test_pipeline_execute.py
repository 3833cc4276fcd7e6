"""Pipelines that run: every schedule gives the numbers of the model without a pipeline."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import meshring as mr
from meshring.pipeline.action import OpKind
from meshring.pipeline.schedules import USUAL_CHUNKS, family_of
from meshring.pipeline.semantics import ALL
from meshring.pipeline.timeline import COMPUTE, RECV, SEND
from pipeline_model import Dense, Whole, data, square_loss, without_pipeline

SEMANTICS = [str(s) for s in ALL]
KINDS = [k.value for k in mr.PipelineScheduleType if k.value != "sequential"]
TIMEOUT = 60.0


def schedule_of(kind: str, ranks: int, microbatches: int, **more: Any) -> mr.PipelineSchedule:
    stages = ranks * USUAL_CHUNKS[family_of(kind)]
    return mr.PipelineSchedule(stages, microbatches, kind, num_ranks=ranks, **more)


def train(
    schedule: mr.PipelineSchedule,
    *,
    rows: int = 23,
    model: Any = Dense,
    runs: int = 1,
    **options: Any,
) -> tuple[list[mr.PipelineResult], dict[int, Any], Any]:
    """Run the model on threads: results per rank, the stages by number, the whole loss."""
    x, target = data(rows)

    def program(comm: mr.Communicator) -> tuple[mr.PipelineResult, dict[int, Any]]:
        make = lambda number, count: model(number)  # noqa: E731
        with mr.Pipeline(schedule, make, comm, loss=square_loss, **options) as pipeline:
            for left in range(runs - 1, -1, -1):
                result = pipeline.run(x, target, record=True, reduce=left == 0)
        return result, pipeline.stages

    found = mr.run_local(program, schedule.num_ranks, timeout=TIMEOUT)
    stages = {number: stage for _, mine in found for number, stage in mine.items()}
    losses: dict[int, Any] = {}
    for result, _ in found:
        losses |= result.losses
    return [result for result, _ in found], stages, sum(losses[i] for i in sorted(losses))


def check(schedule: mr.PipelineSchedule, runs: int = 1, **options: Any) -> list[mr.PipelineResult]:
    rows = options.pop("rows", 23)
    results, stages, loss = train(schedule, rows=rows, runs=runs, **options)
    count = schedule.num_stages
    expected, gradients, first = without_pipeline(count, rows)
    assert loss == pytest.approx(expected, rel=1e-12)
    for number, stage in stages.items():
        assert np.allclose(stage.g, runs * gradients[number % count], rtol=1e-10, atol=1e-12)
    parts: dict[int, Any] = {}
    for result in results:
        parts |= result.input_gradients
    assert np.allclose(np.concatenate([parts[i] for i in sorted(parts)]), first, atol=1e-12)
    return results


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_schedule_gives_the_model_s_numbers(kind: str, checkpointing: bool) -> None:
    schedule = schedule_of(kind, 4, 10)
    results = check(schedule, gradient_checkpointing=checkpointing)
    timeline = results[0].timeline
    assert timeline is not None
    compute = timeline.events[timeline.events["lane"] == COMPUTE]
    again = compute["kind"] == OpKind.RECOMPUTE
    assert again.sum() == (schedule.num_stages * 10 if checkpointing else 0)
    forwards = compute[compute["kind"] == OpKind.FORWARD]
    keys = set(zip(forwards["stage"].tolist(), forwards["microbatch"].tolist(), strict=True))
    assert len(keys) == len(forwards) == schedule.num_stages * 10


@pytest.mark.parametrize("kind", ["gpipe", "1f1b", "interleaved-1f1b", "zb-h1", "zb-v"])
@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 1), (1, 3), (2, 5), (3, 2), (4, 1)])
def test_few_microbatches_and_few_ranks(kind: str, ranks: int, microbatches: int) -> None:
    check(schedule_of(kind, ranks, microbatches))


@pytest.mark.parametrize("kind", ["1f1b", "zb-h1", "dualpipe"])
def test_a_backward_in_one_part_serves_split_schedules_too(kind: str) -> None:
    schedule = schedule_of(kind, 4, 10)
    check(schedule, model=Whole)
    _, stages, _ = train(schedule, model=Whole, gradient_checkpointing=True)
    calls = [call for stage in stages.values() for call in stage.calls]
    assert calls.count("forward") == 2 * calls.count("backward") == 80


@pytest.mark.parametrize("kind", ["1f1b", "dualpipe", "zb-v"])
def test_gradients_accumulate_over_runs(kind: str) -> None:
    check(schedule_of(kind, 4, 8), runs=3)


def test_stages_of_one_rank_need_not_be_even() -> None:
    check(mr.PipelineSchedule(7, 5, "1f1b", num_ranks=3))
    check(mr.PipelineSchedule(5, 6, "interleaved-1f1b", placement=[0, 1, 0, 1, 1]))


@pytest.mark.parametrize("semantics", ["buffered/pair", "rendezvous/rank", "rendezvous/one"])
def test_a_schedule_lowered_for_other_semantics_runs(semantics: str) -> None:
    for kind in ("1f1b", "interleaved-1f1b", "zb-v", "dualpipev"):
        check(schedule_of(kind, 3, 6).lower(semantics))


def test_a_schedule_read_from_a_file_runs() -> None:
    lowered = schedule_of("zb-v", 2, 4).lower()
    check(mr.PipelineSchedule.from_csv(lowered.to_csv()))
    check(mr.PipelineSchedule.from_json(lowered.to_json()), gradient_checkpointing=True)


@settings(max_examples=40)
@given(st.data())
def test_any_combination(draw: st.DataObject) -> None:
    kind = draw.draw(st.sampled_from(KINDS))
    ranks = draw.draw(st.integers(1, 4))
    stages = draw.draw(st.integers(ranks, ranks * USUAL_CHUNKS[family_of(kind)] + 2))
    microbatches = draw.draw(st.integers(1, 9))
    schedule = mr.PipelineSchedule(stages, microbatches, kind, num_ranks=ranks)
    check(
        schedule,
        rows=draw.draw(st.sampled_from([9, 10, 23, 1400])) + microbatches,
        model=draw.draw(st.sampled_from([Dense, Whole])),
        gradient_checkpointing=draw.draw(st.booleans()),
        dynamic_shapes=draw.draw(st.booleans()),
        semantics=draw.draw(st.sampled_from(SEMANTICS)),
        runs=draw.draw(st.integers(1, 2)),
    )


def test_transfers_stand_beside_the_operations() -> None:
    """As `validate` has it for a queue per pair: places among the operations do not matter."""
    text = (
        "0F0,0F1,0B0,0B1,0SEND_F0,0SEND_F1,0RECV_B0,0RECV_B1\n"
        "1SEND_B0,1SEND_B1,1F0,1B0,1F1,1B1,1RECV_F0,1RECV_F1\n"
    )
    schedule = mr.PipelineSchedule.from_csv(text)
    assert schedule.validate("rendezvous/pair").ok
    for rows in (8, 4000):
        check(schedule, rows=rows, runs=2)


def test_the_timeline_is_that_of_all_ranks_on_one_clock() -> None:
    schedule = schedule_of("1f1b", 4, 8)
    (first, *others) = check(schedule)
    t = first.timeline
    assert t is not None and t.unit == "s" and t.num_ranks == 4
    for other in others:
        assert other.timeline is not None and (other.timeline.events == t.events).all()
    rows = t.events
    compute = {(k, s, m): (a, b) for _, k, s, m, _, a, b, lane in rows.tolist() if lane == COMPUTE}
    for stage in range(1, 4):
        for m in range(8):
            before, after = compute[0, stage - 1, m], compute[0, stage, m]
            assert before[1] <= after[0], "a forward starts behind the one before it"
    for rank in range(4):
        mine = t.compute(rank)
        assert (mine["start"][1:] >= mine["end"][:-1]).all()
    for lane, kinds in ((SEND, {4, 6}), (RECV, {5, 7})):
        assert set(np.unique(rows["kind"][rows["lane"] == lane]).tolist()) == kinds
    assert rows["start"].min() == 0 and t.idle_causes["end"].min() >= 0


def test_rows_are_cut_unevenly_and_lists_are_taken_as_they_are() -> None:
    x, target = data(23)
    sizes: list[int] = []

    class Seen(Dense):
        def forward(self, x: Any) -> tuple[Any, Any]:
            sizes.append(len(x))
            return super().forward(x)

    check(schedule_of("1f1b", 1, 5), model=Seen)
    assert sorted(sizes) == [4, 4, 5, 5, 5]
    edges = [0, 1, 8, 9, 23]
    pieces = [x[i:j] for i, j in pairwise(edges)]
    goals = [target[i:j] for i, j in pairwise(edges)]
    schedule = schedule_of("1f1b", 2, 4)

    def program(comm: mr.Communicator) -> Any:
        return mr.run_pipeline(
            schedule, lambda n, _: Dense(n), comm, pieces, goals, loss=square_loss
        ).loss

    losses = mr.run_local(program, 2, timeout=TIMEOUT)
    assert losses[0] is None and losses[1] == pytest.approx(without_pipeline(2, 23)[0])


@pytest.mark.parametrize("rows", [8, 4096])
def test_messages_of_all_sizes(rows: int) -> None:
    check(schedule_of("1f1b", 3, 4), rows=rows)


def test_inference_gives_the_outputs() -> None:
    x, _ = data(12)
    forwards = mr.PipelineSchedule.from_ops([["0F0", "0F1", "0F2"], ["1F0", "1F1", "1F2"]])

    def program(comm: mr.Communicator) -> Any:
        return mr.run_pipeline(forwards, lambda n, _: Dense(n), comm, x).outputs

    first, last = mr.run_local(program, 2, timeout=TIMEOUT)
    expected = Dense(1).forward(Dense(0).forward(x)[0])[0]
    assert first == {} and np.allclose(np.concatenate([last[i] for i in range(3)]), expected)


def test_build_pipeline_makes_schedule_and_pipeline() -> None:
    x, target = data(16)

    def program(comm: mr.Communicator) -> Any:
        with mr.build_pipeline(
            lambda n, _: Dense(n),
            4,
            "zb-v",
            comm=comm,
            depth=2,
            gradient_checkpointing=True,
            loss=square_loss,
        ) as pipeline:
            result = pipeline.run(x, target, record=True)
        again = (result.timeline.events["kind"] == OpKind.RECOMPUTE).sum()
        return pipeline.schedule.num_stages, int(again), result.loss

    found = mr.run_local(program, 2, timeout=TIMEOUT)
    assert [f[:2] for f in found] == [(4, 16)] * 2
    assert found[0][2] == pytest.approx(without_pipeline(4, 16)[0])
    options = {"skips": [(0, 2)], "placement": [0, 1, 1]}

    def with_skip(comm: mr.Communicator) -> Any:
        with mr.build_pipeline(
            lambda n, _: Dense(n),
            2,
            comm=comm,
            num_stages=3,
            schedule_options=options,
            loss=square_loss,
        ) as pipeline:
            return pipeline.schedule.skips, pipeline.schedule.placement

    assert mr.run_local(with_skip, 2, timeout=TIMEOUT) == [(((0, 2),), (0, 1, 1))] * 2
    with pytest.raises(mr.UsageError, match="'depth' is 3"):
        mr.run_local(lambda c: mr.build_pipeline(Dense, 4, comm=c, depth=3), 2, timeout=TIMEOUT)
