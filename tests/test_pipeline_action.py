"""The text form of operations, the container, JSON and CSV."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshring import UsageError
from meshring.pipeline import OpKind, PipelineOp, PipelineSchedule, PipelineScheduleType

GOOD = (
    "2F0 0B12 3I4 3W4 2SEND_F0 2SEND_F0:5 2RECV_F1 0RECV_B3 1SEND_B0 4R7 0REDUCE_GRAD 1UNSHARD "
    "1RESHARD (0F1;1B0)OVERLAP_F_B (2SEND_F0;2RECV_B0)GROUP 0SEND_B3:4"
).split()
BAD = [
    *"02F0 2F F0 2SEND_F0:3 0RECV_F0 2X0 (2F0)GROUP 2f0 2F00 0UNSHARD1 2GROUP0 ٣F0 2F0:1".split(),
    *"(0B1;1F0)OVERLAP_F_B (0F1)OVERLAP_F_B ()GROUP 2SEND_F0:2 0SEND_B0 -1F0 2F-1 2F0F0".split(),
    *["", " 2F0", "2F0 ", "2F0\n", "2 F0", "(0F1; 1B0)OVERLAP_F_B"],
]

numbers = st.integers(0, 10**8)
simple = st.builds(PipelineOp, st.sampled_from(list(OpKind)[:4]), numbers, numbers)
moves = st.builds(PipelineOp, st.sampled_from(list(OpKind)[4:8]), numbers, numbers, numbers).filter(
    lambda op: op.peer != op.stage
)


@pytest.mark.parametrize("text", GOOD)
def test_parse_is_the_inverse_of_text(text: str) -> None:
    assert PipelineOp.parse(text).text == text


@pytest.mark.parametrize("text", BAD)
def test_parse_rejects_everything_else(text: str) -> None:
    with pytest.raises(UsageError, match="is no operation"):
        PipelineOp.parse(text)


@given(st.one_of(simple, moves, st.lists(moves, min_size=1).map(PipelineOp.Group)))
def test_text_of_any_operation_is_parsed_back(op: PipelineOp) -> None:
    assert PipelineOp.parse(op.text) == op


@given(st.text("0123456789FBIWR_SENDCV:();OLAPGU", max_size=12))
def test_parse_is_exact_on_any_text(text: str) -> None:
    with suppress(UsageError):
        assert PipelineOp.parse(text).text == text


def test_the_seeds_constructors() -> None:
    assert PipelineOp.Forward(3).microbatch_id == 3
    assert PipelineOp.Backward(microbatch_id=2).kind is OpKind.BACKWARD
    assert PipelineOp.SendActivation(to_stage=2).to_stage == 2
    assert PipelineOp.RecvActivation(from_stage=1).from_stage == 1
    assert PipelineOp.SendGradient(0).to_stage == 0
    assert PipelineOp.RecvGradient(4).from_stage == 4
    assert PipelineOp.Forward(3).to_stage is None
    assert str(PipelineOp.Forward(3)) == "?F3"
    with pytest.raises(UsageError, match="has no text form"):
        _ = PipelineOp.Forward(3).text


def test_the_seeds_schedule_has_three_warm_up_forwards() -> None:
    schedule = PipelineSchedule(
        num_stages=4, num_microbatches=8, schedule_type="ONE_FORWARD_ONE_BACKWARD"
    )
    kinds = [op.kind for op in schedule.get_stage_schedule(0)]
    assert kinds.index(OpKind.BACKWARD) == 4 and kinds[3:5] == [OpKind.FORWARD, OpKind.BACKWARD]
    assert schedule.get_stage_schedule(3)[:2] == [
        PipelineOp.Forward(0, stage=3),
        PipelineOp.Backward(0, stage=3),
    ]
    assert schedule == PipelineSchedule(4, 8, PipelineScheduleType.ONE_FORWARD_ONE_BACKWARD)


@pytest.mark.parametrize("kind", [k for k in PipelineScheduleType if k.value != "auto"])
def test_json_and_csv_are_read_back(kind: PipelineScheduleType, tmp_path: Path) -> None:
    schedule = PipelineSchedule(6, 5, kind)
    for made in (schedule, schedule.lower("rendezvous/one")):
        assert PipelineSchedule.from_json(made.to_json()) == made
        path = tmp_path / "a.csv"
        path.write_text(made.to_csv())
        again = PipelineSchedule.from_csv(path, placement=made.placement, replicas=made.replicas)
        assert again.ranks == made.ranks and again.num_microbatches == 5


def test_csv_of_torch_with_idle_cells() -> None:
    text = "0F0,0F1,,,0B0,,0B1\n,1F0,1B0,1F1,,1B1,\n"
    schedule = PipelineSchedule.from_csv(text)
    assert schedule.placement == (0, 1) and schedule.num_microbatches == 2
    assert schedule.to_csv() == "0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("0F0,0x0\n", "line 1, cell 2"),
        ("0F0\n0F1\n", "rank 0 and on rank 1"),
        ("1F0\n", "no operation of stage 0"),
        ("a.csv", "pathlib.Path"),
    ],
)
def test_bad_csv_says_where(source: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        PipelineSchedule.from_csv(source)


@pytest.mark.parametrize(
    "source", ["", "[]", "{}", '{"format": "other"}', '{"format": "meshring.pipeline/1"}']
)
def test_bad_json_is_refused(source: str) -> None:
    with pytest.raises(UsageError, match="from_json"):
        PipelineSchedule.from_json(source)


def test_json_refuses_operations_that_are_none() -> None:
    text = PipelineSchedule(2, 1).to_json()
    for old, new in (('"op": "F"', '"op": "Q"'), ('"stage": 0', '"stage": 7'), ('"op"', '"what"')):
        with pytest.raises(UsageError):
            PipelineSchedule.from_json(text.replace(old, new, 1))


def test_operations_are_a_sequence_made_lazily() -> None:
    schedule = PipelineSchedule(3, 4, "dualpipe").lower("rendezvous/one", comm=0.1)
    ops = schedule.ranks[1]
    assert len(list(ops)) == len(ops) and ops[-1] == list(ops)[-1] and ops[1:3] == list(ops)[1:3]
    assert any(op.kind is OpKind.GROUP for op in ops)
    rows = [row for op in ops for row in (op.parts if op.kind is OpKind.GROUP else (op,))]
    assert len(rows) == len(ops.array) and ops.array.dtype.names is not None
    assert (
        PipelineSchedule.from_ops(
            [list(r) for r in schedule.ranks], placement=schedule.placement, replicas=2
        ).ranks
        == schedule.ranks
    )
    with pytest.raises(IndexError):
        _ = ops[len(ops)]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PipelineSchedule(0, 1), "num_stages"),
        (lambda: PipelineSchedule(2, 0), "num_microbatches"),
        (lambda: PipelineSchedule(2.0, 1), "num_stages"),  # type: ignore[arg-type]
        (lambda: PipelineSchedule(2, 1, "2f2b"), "schedule_type"),
        (lambda: PipelineSchedule(2, 1, None), "schedule_type"),  # type: ignore[arg-type]
        (lambda: PipelineSchedule(2, 1, chunks=2), "chunks"),
        (lambda: PipelineSchedule(2, 1, num_ranks=3), "num_ranks"),
        (lambda: PipelineSchedule(5, 1, "looped-bfs", num_ranks=2, chunks=2), "do not fit"),
        (lambda: PipelineSchedule(3, 1, placement=[0, 1]), "placement"),
        (lambda: PipelineSchedule(3, 1, placement=[0, 1, 0]), "placement"),
        (lambda: PipelineSchedule(3, 1, placement=[0, -1, 0]), "placement"),
        (lambda: PipelineSchedule(3, 1, "zb-v", placement=[1, 0, 1]), "placement"),
        (lambda: PipelineSchedule(3, 1, placement=[0, 1, 2], num_ranks=2), "num_ranks"),
        (lambda: PipelineSchedule(3, 1, placement=[0, 1, 2], chunks=1), "chunks"),
        (lambda: PipelineSchedule(3, 1, skips=[(0, 1)]), "skips"),
        (lambda: PipelineSchedule(3, 1, skips=[(0, 3)]), "skips"),
        (lambda: PipelineSchedule(3, 1, skips=3), "skips"),  # type: ignore[arg-type]
        (lambda: PipelineSchedule(3, 1, placement=2), "placement"),  # type: ignore[arg-type]
        (lambda: PipelineSchedule.from_csv(None), "source"),  # type: ignore[arg-type]
        (lambda: PipelineSchedule(3, 1, group=2), "group"),
        (lambda: PipelineSchedule(4, 4, "interleaved-1f1b", group=1), "group"),
        (lambda: PipelineSchedule(3, 1).get_stage_schedule(3), "stage_id"),
        (lambda: PipelineSchedule(3, 1).lower("eager"), "semantics"),
        (lambda: PipelineSchedule(3, 1).lower().lower(), "call it once"),
        (lambda: PipelineSchedule.from_ops([["0F0"]], placement=[1]), "placement"),
        (lambda: PipelineSchedule.from_ops([["0F0"], ["1F5"]], num_microbatches=2), "microbatch"),
        (lambda: PipelineSchedule.from_ops([[7]]), "no operation"),  # type: ignore[list-item]
    ],
)
def test_bad_arguments_are_refused(make, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UsageError, match=words):
        make()


def test_rows_are_compact() -> None:
    schedule = PipelineSchedule(16, 64)
    assert sum(rows.nbytes for rows in schedule.rows) <= 17 * 16 * 64 * 2
    assert all(isinstance(rows, np.ndarray) for rows in schedule.rows)
