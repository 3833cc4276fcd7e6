"""A failure on one rank stops all, says where, and leaves the communicator usable."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

import meshring as mr
from pipeline_model import Dense, data, square_loss
from procs import run_ranks

TIMEOUT = 60.0
X, TARGET = data(12)


def make(number: int, count: int) -> Dense:
    return Dense(number)


class Fails(Dense):
    """A stage whose method raises at the n-th call."""

    def __init__(self, number: int, method: str, call: int) -> None:
        super().__init__(number)
        self.method, self.call = method, call

    def _count(self, method: str) -> None:
        if method == self.method:
            self.call -= 1
            if self.call == 0:
                raise ZeroDivisionError(f"the {method} went wrong")

    def forward(self, x: Any) -> Any:
        self._count("forward")
        return super().forward(x)

    def backward_input(self, saved: Any, gy: Any) -> Any:
        self._count("backward_input")
        return super().backward_input(saved, gy)


def errors_of(program: Any, ranks: int) -> list[BaseException]:
    """What each rank raises; afterwards the communicator must still add up."""

    def guarded(comm: mr.Communicator) -> BaseException | None:
        error = None
        try:
            program(comm)
        except Exception as raised:
            error = raised
        assert comm.all_reduce(np.ones(1))[0] == ranks
        return error

    found = mr.run_local(guarded, ranks, timeout=TIMEOUT)
    assert all(found), found
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize(
    ("kind", "rank", "method", "call", "action"),
    [
        ("1f1b", 0, "forward", 1, "0F0"),
        ("1f1b", 1, "forward", 3, "1F2"),
        ("1f1b", 3, "forward", 6, "3F5"),
        ("1f1b", 2, "backward_input", 2, "2B1"),
        ("zb-h1", 0, "backward_input", 6, "0I5"),
        ("dualpipe", 1, "backward_input", 1, "6B5"),
    ],
)
def test_a_failing_stage_stops_all_ranks(
    kind: str, rank: int, method: str, call: int, action: str, record: bool
) -> None:
    schedule = mr.PipelineSchedule(4, 6 if kind != "dualpipe" else 10, kind)

    def program(comm: mr.Communicator) -> None:
        fails = comm.rank == rank
        stage = (lambda n, _: Fails(n, method, call)) if fails else make
        with mr.Pipeline(schedule, stage, comm, loss=square_loss) as pipeline:
            with pytest.raises(mr.StageError) as caught:
                pipeline.run(X, TARGET, record=record)
            with pytest.raises(mr.UsageError, match="closed, since one of its operations failed"):
                pipeline.run(X, TARGET)
        raise caught.value

    errors = errors_of(program, 4)
    for number, error in enumerate(errors):
        text = str(error)
        assert isinstance(error, mr.StageError) and error.ranks == (rank,)
        assert error.action.startswith(action) and error.action in text
        assert f"(rank {number}/4)" in text and f"the {method} went wrong" in text
        assert ("Traceback of rank" in text) == (number != rank)
        if number != rank:
            assert f"in {method}" in text and "self._count" in text
    assert isinstance(errors[rank].__cause__, ZeroDivisionError)


def test_run_local_raises_where_it_happened() -> None:
    def program(comm: mr.Communicator) -> None:
        stage = (lambda n, _: Fails(n, "forward", 2)) if comm.rank == 2 else make
        mr.run_pipeline(mr.PipelineSchedule(3, 4), stage, comm, X, TARGET, loss=square_loss)

    with pytest.raises(mr.StageError, match=r"\(rank 2/3\): 2F1 failed") as caught:
        mr.run_local(program, 3, timeout=TIMEOUT)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_failing_loss_and_a_failing_recomputation() -> None:
    def loss(y: Any, target: Any) -> Any:
        raise KeyError("no such class")

    schedule = mr.PipelineSchedule(2, 2)

    def with_loss(comm: mr.Communicator) -> None:
        mr.run_pipeline(schedule, make, comm, X, TARGET, loss=loss)

    for error in errors_of(with_loss, 2):
        assert "1F0 failed with KeyError: 'no such class'" in str(error)
        assert "1F0 is: forward of microbatch 0 on stage 1." in str(error)

    def again(comm: mr.Communicator) -> None:
        mr.run_pipeline(
            schedule,
            lambda n, _: Fails(n, "forward", 3 if n == 0 else 99),
            comm,
            X,
            TARGET,
            loss=square_loss,
            gradient_checkpointing=True,
        )

    for error in errors_of(again, 2):
        assert "0R0 failed with ZeroDivisionError" in str(error)


class Returns:
    """A stage that returns what it is told to."""

    def __init__(self, y: Any, gx: Any) -> None:
        self.y, self.gx = y, gx

    def forward(self, x: Any) -> Any:
        return self.y

    def backward(self, saved: Any, gy: Any) -> Any:
        return self.gx


@pytest.mark.parametrize(
    ("y", "gx", "words"),
    [
        (np.zeros(3), None, "forward() of stage 1 returned ndarray; return (y, saved)"),
        ((1.5, None), None, "holds float; give an array or a tuple of arrays"),
        (([np.zeros(3)], None), None, "holds list; give an array"),
        ((np.zeros(3, "M8[s]"), None), None, "datetime64[s]"),
        ((np.zeros(3), None), np.zeros(2), "gradient is float64 (2,), and the value is float64"),
        ((np.zeros(3), None), np.zeros((4, 6), "f4"), "return a gradient of the same shape and"),
        ((np.zeros(3), None), 7, "the gradient is int (), and"),
        (
            (np.zeros(3), None),
            None,
            "1B0 failed with meshring.errors.UsageError: the gradient of float64 (4, 6) is None",
        ),
        ((np.zeros(3), None, {5: 1}), None, "returned values for the stages [5]"),
    ],
)
def test_what_stages_must_not_return(y: Any, gx: Any, words: str) -> None:
    schedule = mr.PipelineSchedule(3, 3)

    def program(comm: mr.Communicator) -> None:
        stages = (
            Returns(y, gx) if comm.rank == 1 else Returns((np.zeros((4, 6)), None), np.zeros(3))
        )
        mr.run_pipeline(schedule, stages, comm, X, TARGET, loss=lambda *_: (0.0, np.zeros((4, 6))))

    for error in errors_of(program, 3):
        assert isinstance(error, mr.StageError) and words in str(error), error


def test_wrong_arguments_of_one_rank_are_told_to_all() -> None:
    schedule = mr.PipelineSchedule(2, 2)

    def lacks(comm: mr.Communicator) -> None:
        mr.Pipeline(schedule, {} if comm.rank else {0: Dense(0)}, comm, loss=square_loss)

    first, second = errors_of(lacks, 2)
    assert "Pipeline (rank 1): argument 'stages' lacks stage 1" in str(second)
    assert "rank 1 refused" in str(first) and "lacks stage 1" in str(first)
    assert isinstance(first, mr.UsageError) and isinstance(second, mr.UsageError)

    def no_inputs(comm: mr.Communicator) -> None:
        with mr.Pipeline(schedule, make, comm, loss=square_loss) as pipeline:
            with pytest.raises(mr.UsageError, match="'inputs'"):
                pipeline.run(targets=TARGET)
            with pytest.raises(mr.UsageError, match="'timeout' is -1"):
                pipeline.run(X, TARGET, timeout=-1)
            assert pipeline.run(X, TARGET) is not None, "it is still usable"
            pipeline.run([X], TARGET)

    for error in errors_of(no_inputs, 2):
        assert "argument 'inputs' has 1 microbatches; the schedule has 2" in str(error)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schedule": "1f1b"}, "argument 'schedule' is str"),
        ({"schedule": mr.PipelineSchedule(3, 2)}, "is for 3 ranks, and the communicator has 2"),
        ({"stages": 5}, "argument 'stages' is int"),
        ({"stages": [Dense(0), Dense(1)]}, "'stages' has 2 entries"),
        ({"stages": object()}, "argument 'stages' is object"),
        ({"stages": lambda n, c: object()}, "which has no method forward()"),
        ({"loss": None}, "argument 'loss' is missing"),
        ({"loss": 5}, "argument 'loss' is int"),
        ({"reduce_op": "max"}, "argument 'reduce_op' is 'max'"),
        ({"data_parallel": 3}, "argument 'data_parallel' is int; give a Communicator"),
        ({"semantics": "maybe"}, "argument 'semantics' is 'maybe'"),
        ({"shapes": {0: "wide"}}, "argument 'shapes' has 'wide'"),
        (
            {"schedule": mr.PipelineSchedule(2, 2, "dualpipe")},
            "two copies of each stage, and stage 0 has no method gradients",
        ),
        (
            {
                "schedule": mr.PipelineSchedule.from_ops(
                    [["0F0", "0B0", "0REDUCE_GRAD"], ["1F0", "1B0"]]
                )
            },
            "REDUCE_GRAD, and argument 'data_parallel' is missing",
        ),
        (
            {
                "schedule": mr.PipelineSchedule.from_ops(
                    [["0UNSHARD", "0F0", "0B0"], ["1F0", "1B0"]]
                )
            },
            "has UNSHARD of stage 0, which has no method unshard()",
        ),
    ],
)
def test_bad_arguments(change: dict[str, Any], words: str) -> None:
    class Bare:
        def forward(self, x: Any) -> Any:
            return x, None

        def backward(self, saved: Any, gy: Any) -> Any:
            return gy

    arguments: dict[str, Any] = {
        "schedule": mr.PipelineSchedule(2, 2),
        "stages": lambda n, c: Bare(),
        "loss": square_loss,
        **change,
    }
    schedule, stages = arguments.pop("schedule"), arguments.pop("stages")

    def program(comm: mr.Communicator) -> None:
        mr.Pipeline(schedule, stages, comm, **arguments)

    errors = errors_of(program, 2)
    assert all(isinstance(error, mr.UsageError) for error in errors)
    assert any(words in str(error) for error in errors), errors


def test_a_gradient_within_a_rank_is_checked_too() -> None:
    def program(comm: mr.Communicator) -> None:
        stages = [Dense(0), Returns((X, None), np.zeros(3))]
        schedule = mr.PipelineSchedule(2, 1, num_ranks=1)
        mr.run_pipeline(schedule, stages, comm, X, TARGET, loss=square_loss)

    (error,) = errors_of(program, 1)
    assert "1B0 failed with" in str(error) and "gradient is float64 (3,)" in str(error)


def test_different_schedules_are_noticed() -> None:
    def program(comm: mr.Communicator) -> None:
        kind = "gpipe" if comm.rank == 2 else "1f1b"
        mr.Pipeline(mr.PipelineSchedule(3, 4, kind), make, comm, loss=square_loss)

    for error in errors_of(program, 3):
        assert isinstance(error, mr.MismatchError) and "rank 2 others than rank 0" in str(error)
        assert error.ranks == (2,)

    def options(comm: mr.Communicator) -> None:
        schedule = mr.PipelineSchedule(3, 4)
        mr.Pipeline(schedule, make, comm, loss=square_loss, dynamic_shapes=comm.rank > 0)

    for error in errors_of(options, 3):
        assert isinstance(error, mr.MismatchError) and error.ranks == (1, 2)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "0F0,0F1,0SEND_F0,0SEND_F1,0RECV_B0,0B0,0RECV_B1,0B1\n"
            "1RECV_F1,1RECV_F0,1F0,1B0,1SEND_B0,1F1,1B1,1SEND_B1\n",
            "message 0 is sent by 0SEND_F0 and received by 1RECV_F1",
        ),
        ("0F0,0SEND_F0,0B0\n1RECV_F0,1F0,1B0,1SEND_B0\n", "0B0"),
        ("0F0,0B0,0F1\n1F0,1B0,1F1,1B1\n", "stage 0, microbatch 1: 0 B, 0 I"),
        ("0F0,0B0,0F1,0B1\n1F1,1F0,1B1,1B0\n", "deadlock"),
    ],
)
def test_a_wrong_schedule_is_refused_not_hung(text: str, words: str) -> None:
    wrong = mr.PipelineSchedule.from_csv(text)

    def program(comm: mr.Communicator) -> None:
        mr.run_pipeline(wrong, make, comm, X, TARGET, loss=square_loss)

    for error in errors_of(program, 2):
        assert isinstance(error, mr.UsageError) and words in str(error), error


def test_a_late_rank_is_a_deadline_error() -> None:
    over = threading.Event()

    class Slow(Dense):
        def forward(self, x: Any) -> Any:
            assert over.wait(TIMEOUT)
            return super().forward(x)

    def program(comm: mr.Communicator) -> None:
        stage = Slow(0) if comm.rank == 0 else Dense(1)
        with mr.Pipeline(mr.PipelineSchedule(2, 1), stage, comm, loss=square_loss) as pipeline:
            if comm.rank == 0:
                pipeline.run(X, TARGET)
            else:
                with pytest.raises((mr.DeadlineError, mr.StageError)) as caught:
                    try:
                        pipeline.run(X, TARGET, timeout=0.2)
                    finally:
                        over.set()
                raise caught.value

    def late(comm: mr.Communicator) -> BaseException | None:
        try:
            program(comm)
        except (mr.DeadlineError, mr.PeerLostError, mr.StageError) as error:
            return error
        return None

    waiting = mr.run_local(late, 2, timeout=TIMEOUT)[1]
    assert isinstance(waiting, mr.DeadlineError)


def test_data_parallel_pipelines_stop_too() -> None:
    schedule = mr.PipelineSchedule(2, 2)

    def program(comm: mr.Communicator) -> None:
        replica, place = divmod(comm.rank, 2)
        pipe, peers = comm.split(replica, place), comm.split(place, replica)
        stage = Fails(place, "backward_input", 2) if comm.rank == 0 else Dense(place)
        with pipe, peers:
            mr.run_pipeline(schedule, stage, pipe, X, TARGET, loss=square_loss, data_parallel=peers)

    errors = errors_of(program, 4)
    assert all("0B1 failed with ZeroDivisionError" in str(e) for e in errors[:2])
    assert all(isinstance(e, (mr.PeerLostError, mr.StageError)) for e in errors[2:])


def test_messages_of_the_program_do_not_get_between() -> None:
    schedule = mr.PipelineSchedule(2, 3)

    def program(comm: mr.Communicator) -> Any:
        other = 1 - comm.rank
        sent = comm.isend(np.full(3, comm.rank), other)
        result = mr.run_pipeline(schedule, make, comm, X, TARGET, loss=square_loss)
        found = comm.recv((3,), other, "int64")
        sent.wait()
        return found.tolist(), result.loss

    found = mr.run_local(program, 2, timeout=TIMEOUT)
    assert [f[0] for f in found] == [[1, 1, 1], [0, 0, 0]] and found[1][1] > 0


KILLED = """
import os, signal
import numpy as np
import meshring as mr

class Stage:
    def forward(self, x):
        if comm.rank == 1 and x[0] == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return x.copy(), None
    def backward(self, saved, gy):
        return gy

comm = mr.init(timeout=60)
try:
    mr.run_pipeline(mr.PipelineSchedule(3, 4), Stage(), comm, [np.full(2, float(i)) for i in range(4)],
                    loss=lambda y: (0.0, y))
except mr.PeerLostError as error:
    print("lost", error.ranks, "SIGKILL" in str(error), flush=True)
"""


def test_a_killed_rank_is_a_lost_peer() -> None:
    done = run_ranks(KILLED, 3, timeout=60)
    assert done.returncode == 128 + 9 and not done.left
    assert done.stdout.count("lost (1,) True") == 2, done.stdout + done.stderr
