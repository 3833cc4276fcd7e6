"""What goes between stages: tuples, skips, shapes, reductions; and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import meshring as mr
from meshring.pipeline.stage import ArraySpec, ValueSpec, decode, encode
from pipeline_model import Dense, data, square_loss

TIMEOUT = 60.0


def run(
    schedule: mr.PipelineSchedule,
    make: Any,
    inputs: Any,
    targets: Any = None,
    *,
    loss: Any = square_loss,
    runs: int = 1,
    **options: Any,
) -> list[Any]:
    """Per rank the last result and the stages."""

    def program(comm: mr.Communicator) -> Any:
        with mr.Pipeline(schedule, make, comm, loss=loss, **options) as pipeline:
            for _ in range(runs):
                result = pipeline.run(inputs, targets)
        return result, pipeline.stages

    return mr.run_local(program, schedule.num_ranks, timeout=TIMEOUT)


class Pair:
    """Hands on (x + 1, number of calls): floats with a gradient and integers without."""

    def forward(self, value: Any) -> tuple[Any, Any]:
        x, count = value
        return (x * 2, count + 1), None

    def backward(self, saved: Any, gy: Any) -> Any:
        gx, gcount = gy
        assert gcount is None
        return gx * 2, None


def test_tuples_with_arrays_that_have_no_gradient() -> None:
    x = np.ones((6, 2), "f4")
    counts = np.zeros((6, 1), "i8")

    def loss(y: Any) -> Any:
        values, seen = y
        assert seen.dtype == np.int64 and (seen == 3).all() and values.dtype == np.float32
        return float(values.sum()), (np.ones_like(values), None)

    found = run(mr.PipelineSchedule(3, 2), lambda *_: Pair(), (x, counts), loss=loss, runs=2)
    assert found[2][0].loss == 8 * 12
    gradient = found[0][0].input_gradients[1]
    assert (gradient[0] == 8).all() and gradient[1] is None


class Joint:
    """y = x + a * the value of a skip; one parameter."""

    def __init__(self, number: int, skips: int) -> None:
        self.a, self.g, self.skips, self.number = 0.5 + number, 0.0, skips, number

    def forward(self, x: Any, *skips: Any) -> tuple[Any, Any]:
        assert len(skips) == self.skips
        return self.a * x + sum(skips), x

    def backward(self, x: Any, gy: Any) -> Any:
        self.g += float((x * gy).sum())
        return self.a * gy if not self.skips else (self.a * gy, *([gy] * self.skips))


@pytest.mark.parametrize("kind", ["1f1b", "gpipe", "zb-h1", "interleaved-1f1b", "dualpipev"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_skip_connections(kind: str, checkpointing: bool) -> None:
    skips = [(0, 3), (1, 3), (0, 2)]
    into = {2: 1, 3: 2}
    ranks = 2 if kind in ("interleaved-1f1b", "dualpipev") else 4
    schedule = mr.PipelineSchedule(4, 6, kind, num_ranks=ranks, skips=skips)
    x, target = data(12)
    found = run(
        schedule,
        lambda n, _: Joint(n, into.get(n, 0)),
        x,
        target,
        gradient_checkpointing=checkpointing,
    )
    a = [0.5, 1.5, 2.5, 3.5]
    y0 = a[0] * x
    y1 = a[1] * y0
    y2 = a[2] * y1 + y0
    y3 = a[3] * y2 + y0 + y1
    value, g3 = square_loss(y3, target)
    g2 = a[3] * g3
    g1 = a[2] * g2 + g3
    g0 = a[1] * g1 + g3 + g2
    expected = [(x * g0).sum(), (y0 * g1).sum(), (y1 * g2).sum(), (y2 * g3).sum()]
    stages = {n: s for _, mine in found for n, s in mine.items()}
    assert [stages[n].g for n in range(4)] == pytest.approx(expected)
    losses = {k: v for result, _ in found for k, v in result.losses.items()}
    assert sum(losses.values()) == pytest.approx(value)
    parts = {k: v for result, _ in found for k, v in result.input_gradients.items()}
    assert np.allclose(np.concatenate([parts[i] for i in range(6)]), a[0] * g0)


class Encoder:
    """Sends something else through its skip than to the next stage."""

    def forward(self, x: Any) -> tuple[Any, Any, Any]:
        return x[:, :1].copy(), x, {2: x[:, 1:].copy()}

    def backward(self, x: Any, gy: Any, gskips: Any) -> Any:
        return np.concatenate([gy, gskips[2]], axis=1)


class Same:
    def forward(self, x: Any) -> tuple[Any, Any]:
        return 3 * x, None

    def backward(self, saved: Any, gy: Any) -> Any:
        return 3 * gy


class Decoder:
    def forward(self, x: Any, skip: Any) -> tuple[Any, Any]:
        return np.concatenate([x, skip], axis=1), None

    def backward(self, saved: Any, gy: Any) -> Any:
        return gy[:, :1].copy(), gy[:, 1:].copy()


def test_a_skip_can_carry_another_value() -> None:
    x, target = data(8)
    schedule = mr.PipelineSchedule(3, 2, skips=[(0, 2)])
    make = lambda n, _: [Encoder, Same, Decoder][n]()  # noqa: E731
    found = run(schedule, make, x, target)
    y = np.concatenate([3 * x[:, :1], x[:, 1:]], axis=1)
    value, gradient = square_loss(y, target)
    assert found[2][0].loss == pytest.approx(value)
    gradient[:, 0] *= 3
    parts = found[0][0].input_gradients
    assert np.allclose(np.concatenate([parts[0], parts[1]]), gradient)


def test_data_parallel_gradients_are_reduced_while_others_run() -> None:
    """Two pipelines of two ranks: the mean of what each computes on its half."""
    x, target = data(16)
    schedule = mr.PipelineSchedule(2, 4)

    def program(comm: mr.Communicator) -> Any:
        replica, place = divmod(comm.rank, 2)
        pipe, peers = comm.split(replica, place), comm.split(place, replica)
        half = slice(8 * replica, 8 * replica + 8)
        with (
            pipe,
            peers,
            mr.Pipeline(
                schedule, lambda n, _: Dense(n), pipe, loss=square_loss, data_parallel=peers
            ) as pipeline,
        ):
            pipeline.run(x[half], target[half], reduce=False)
            alone = pipeline.stages[place].g.copy()
            pipeline.stages[place].g[...] = 0
            result = pipeline.run(x[half], target[half], record=True)
            kinds = result.timeline.events["kind"]
            return place, alone, pipeline.stages[place].g, int((kinds == 9).sum())

    found = mr.run_local(program, 4, timeout=TIMEOUT)
    for place in range(2):
        (_, a, ga, count), (_, b, gb, _) = (f for f in found if f[0] == place)
        assert np.allclose(ga, (a + b) / 2) and (ga == gb).all() and not np.allclose(a, b)
        assert count == 2


def test_operations_on_parameters_run_where_the_schedule_has_them() -> None:
    class Logged(Dense):
        def unshard(self) -> None:
            self.calls.append("unshard")

        def reshard(self) -> None:
            self.calls.append("reshard")

        def gradients(self) -> list[Any]:
            self.calls.append("gradients")
            return super().gradients()

    schedule = mr.PipelineSchedule.from_ops(
        [["0UNSHARD", "0F0", "0F1", "0R0", "0B0", "0B1", "0REDUCE_GRAD", "0RESHARD"]]
    )
    x, target = data(4)

    def program(comm: mr.Communicator) -> Any:
        stage = Logged(0)
        options = {"loss": square_loss, "data_parallel": comm}
        result = mr.run_pipeline(schedule, stage, comm, x, target, record=True, **options)
        return stage.calls, result.timeline.events["kind"].tolist()

    ((calls, kinds),) = mr.run_local(program, 1, timeout=TIMEOUT)
    both = ["backward_input", "backward_weight"]
    middle = ["forward", "forward", "forward", *both, *both]
    assert calls == ["unshard", *middle, "gradients", "reshard"]
    assert kinds == [10, 0, 0, 8, 1, 1, 11, 9], "the reduction ends last"


def test_shapes_are_given_or_learned_or_sent_every_time() -> None:
    schedule = mr.PipelineSchedule(2, 2)
    x, target = data(8)
    make = lambda n, _: Dense(n)  # noqa: E731
    spec = ((4, 6), "float64")
    for shapes in ({0: spec, 1: spec}, lambda stage, microbatch: spec, {0: np.empty((4, 6))}):
        assert run(schedule, make, x, target, shapes=shapes, runs=2)[1][0].loss

    def changing(comm: mr.Communicator, **options: Any) -> Any:
        with mr.Pipeline(schedule, make, comm, loss=square_loss, **options) as pipeline:
            pipeline.run(x, target)
            return pipeline.run(x[:6], target[:6]).loss

    assert mr.run_local(lambda c: changing(c, dynamic_shapes=True), 2, timeout=TIMEOUT)[1]
    with pytest.raises(mr.StageError, match=r"was float64 \(4, 6\) before.*dynamic_shapes=True"):
        mr.run_local(changing, 2, timeout=TIMEOUT)
    with pytest.raises(mr.StageError, match="by 'shapes'"):
        run(schedule, make, x, target, shapes={0: ((4, 5), "float64")})


def test_headers_describe_any_value() -> None:
    many = ValueSpec(tuple(ArraySpec((i, 2, 3), "float16") for i in range(30)), True)
    for spec in (
        ValueSpec((ArraySpec((), "bfloat16"),), False),
        ValueSpec((), True),
        ValueSpec((ArraySpec((0, 5), "bool", True), ArraySpec((2,), "complex64")), True),
        many,
    ):
        head, *rest = encode(spec)
        count = int(head[0])
        assert len(head) == 64 and bool(rest) == (spec is many)
        numbers = rest[0] if rest else head[1 : count + 1]
        assert decode(numbers.tolist()) == spec
    with pytest.raises(mr.UsageError, match="datetime64"):
        encode(ValueSpec((ArraySpec((1,), "datetime64[s]"),), False))


class Many:
    """Sends forty arrays, more than one header holds, and scalars and empty ones among them."""

    def __init__(self, number: int) -> None:
        self.number = number

    def forward(self, x: Any) -> tuple[Any, Any]:
        if self.number == 0:
            return tuple(np.full((i % 3,) * (i % 4), float(i)) for i in range(40)), None
        return np.array(sum(float(a.sum()) for a in x)), x

    def backward(self, saved: Any, gy: Any) -> Any:
        if self.number == 0:
            assert len(gy) == 40 and all((g == 2).all() for g in gy)
            return None
        return tuple(np.full_like(a, float(gy)) for a in saved)


def test_many_small_arrays() -> None:
    found = run(
        mr.PipelineSchedule(2, 3),
        lambda n, _: Many(n),
        np.zeros(3),
        loss=lambda y: (float(y), 2.0 * np.ones_like(y)),
        runs=2,
    )
    value = sum(float(np.full((i % 3,) * (i % 4), float(i)).sum()) for i in range(40))
    assert found[1][0].losses == {0: value, 1: value, 2: value}
