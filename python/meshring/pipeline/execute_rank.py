"""One rank's run through its operations: calls the stages and moves values between them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from meshring.communicator import Communicator
from meshring.errors import UsageError
from meshring.pipeline.action import OpKind
from meshring.pipeline.links import Link, Links, Message
from meshring.pipeline.operations import Rows
from meshring.pipeline.program import Program
from meshring.pipeline.stage import (
    PipelineStage,
    Value,
    add_gradients,
    full_gradient,
    gradient_arrays,
    has_method,
)
from meshring.pipeline.timeline_base import COMPUTE, RECV, SEND

Key = tuple[int, int]
"""Stage and microbatch."""
Record = tuple[int, int, int, int, int, int, int]
"""Kind, stage, microbatch, peer, start and end in nanoseconds, lane."""

_now = time.perf_counter_ns


class RankPlan:
    """What stays the same over all runs of one rank: its stages, their neighbours, its rows."""

    def __init__(self, program: Program, rank: int, stages: dict[int, PipelineStage]) -> None:
        rows: Rows = program.rows[rank]
        self.rows: list[tuple[int, int, int, int, int]] = rows.tolist()
        self.placement = program.placement
        self.rank = rank
        self.stages = stages
        count = program.num_stages
        self.whole = {s for s, unit in stages.items() if has_method(unit, "backward")}
        self.split = {s for s, unit in stages.items() if has_method(unit, "backward_input")}
        self.first = {s for s in stages if s % count == 0}
        self.last = {s for s in stages if s % count == count - 1}
        self.sources: dict[int, list[int]] = {}
        self.targets: dict[int, list[int]] = {}
        for stage in stages:
            copy, place = divmod(stage, count)
            skips = [(a + copy * count, b + copy * count) for a, b in program.skips]
            before = [] if place == 0 else [stage - 1]
            behind = [] if place == count - 1 else [stage + 1]
            self.sources[stage] = before + sorted(a for a, b in skips if b == stage)
            self.targets[stage] = behind + sorted(b for a, b in skips if a == stage)
        self.receives, self.sends = _transfers(self.rows, program.placement)
        self.receive_number = {key: number for number, key in enumerate(self.receives)}
        kinds = {row[0] for row in self.rows}
        self.recomputed = {(s, m) for k, s, m, *_ in self.rows if k == OpKind.RECOMPUTE}
        self.trains = bool(
            kinds & {OpKind.BACKWARD, OpKind.BACKWARD_INPUT, OpKind.OVERLAP_F_B, OpKind.RECOMPUTE}
        )
        self.reduces = OpKind.REDUCE_GRAD in kinds


def _transfers(
    rows: Sequence[tuple[int, int, int, int, int]], placement: Sequence[int]
) -> tuple[list[tuple[Link, bool]], dict[int, list[tuple[int, int, int]]]]:
    """The receives in order, and for each rank what is sent to it: from stage, to stage, number."""
    receives: list[tuple[Link, bool]] = []
    sends: dict[int, list[tuple[int, int, int]]] = {}
    for kind, stage, microbatch, peer, _ in rows:
        if kind == OpKind.RECV_ACTIVATION:
            receives.append(((peer, stage, microbatch), False))
        elif kind == OpKind.RECV_GRADIENT:
            receives.append(((stage, peer, microbatch), True))
        elif kind in (OpKind.SEND_ACTIVATION, OpKind.SEND_GRADIENT):
            sends.setdefault(placement[peer], []).append((stage, peer, microbatch))
    return receives, sends


class RankRun:
    """The state of one run on one rank.

    Transfers are queues beside the operations, one for each ordered pair of ranks: a value is sent
    when it is made and those before it are sent; a receive is posted in its turn, or before it when
    an operation needs its value.
    """

    def __init__(
        self,
        plan: RankPlan,
        links: Links,
        *,
        inputs: Sequence[Value] | None,
        targets: Sequence[Any] | None,
        loss: Callable[..., tuple[Any, Value]] | None,
        keep_outputs: bool,
        data_parallel: Communicator | None,
        reduce_op: str,
        reduce: bool,
    ) -> None:
        self.reduce = reduce
        self.plan, self.links = plan, links
        self.inputs, self.targets, self.loss = inputs, targets, loss
        self.keep_outputs = keep_outputs
        self.data_parallel, self.reduce_op = data_parallel, reduce_op
        self.losses: dict[int, Any] = {}
        self.outputs: dict[int, Value] = {}
        self.input_gradients: dict[int, Value] = {}
        self.records: list[Record] = []
        self.at = -1  # the row that runs
        self._incoming: dict[tuple[Link, bool], Message] = {}
        self._local: dict[tuple[Link, bool], Value] = {}
        self._outgoing: dict[tuple[int, int, int], Value] = {}  # from stage, to stage, microbatch
        self._due = {rank: deque(order) for rank, order in plan.sends.items()}
        self._reached = self._posted = 0  # receives
        self._arguments: dict[Key, tuple[Value, ...]] = {}
        self._saved: dict[Key, Any] = {}
        self._rest: dict[Key, Any] = {}
        self._loss_gradients: dict[int, Value] = {}
        self._separate: set[Key] = set()  # forwards that returned values for their skips
        self._reductions: list[tuple[int, int, list[Any]]] = []

    def run(self) -> None:
        """Run all operations in order, then wait for what was started."""
        do: dict[int, Callable[[int, int, int, int], None]] = {
            OpKind.FORWARD: self._forward,
            OpKind.BACKWARD: self._backward,
            OpKind.BACKWARD_INPUT: self._backward_input,
            OpKind.BACKWARD_WEIGHT: self._backward_weight,
            OpKind.SEND_ACTIVATION: self._send,
            OpKind.RECV_ACTIVATION: self._receive,
            OpKind.SEND_GRADIENT: self._send,
            OpKind.RECV_GRADIENT: self._receive,
            OpKind.RECOMPUTE: self._recompute,
            OpKind.REDUCE_GRAD: self._reduce_grad,
            OpKind.UNSHARD: self._unshard,
            OpKind.RESHARD: self._reshard,
            OpKind.OVERLAP_F_B: self._overlap,
        }
        for kind, stage, microbatch, peer, pair in self.plan.rows:
            self.at += 1
            do[kind](stage, microbatch, peer, pair)
        self.at += 1
        self._nothing_left()
        self.links.finish()
        for stage, start, works in self._reductions:
            for work in works:
                work.wait(self.links.timeout)
            self._record(OpKind.REDUCE_GRAD, stage, -1, -1, start, SEND)

    def _record(
        self, kind: int, stage: int, microbatch: int, peer: int, start: int, lane: int
    ) -> None:
        self.records.append((kind, stage, microbatch, peer, start, _now(), lane))

    # ------------------------------------------------------------ values from and to others

    def _take(self, link: Link, gradient: bool) -> Value:
        """A value that another stage made: of this rank, or of another one, then it is awaited."""
        self._post(self.plan.receive_number.get((link, gradient), -1) + 1)
        message = self._incoming.pop((link, gradient), None)
        if message is None:
            try:
                return self._local.pop((link, gradient))
            except KeyError:
                what = "gradient" if gradient else "result"
                where = link[1] if gradient else link[0]
                raise UsageError(
                    f"the {what} of stage {where} for microbatch {link[2]} is needed before it "
                    "was made or received; schedule.validate() says what is out of order"
                ) from None
        start = _now()
        value = self.links.take(message)
        kind = OpKind.RECV_GRADIENT if gradient else OpKind.RECV_ACTIVATION
        source, target, microbatch = link
        here, there = (source, target) if gradient else (target, source)
        self._record(kind, here, microbatch, there, start, RECV)
        return value

    def _give(self, link: Link, gradient: bool, value: Value) -> None:
        """Hand a value on: to a stage of this rank now, else when its turn to be sent comes."""
        here, there = (link[1], link[0]) if gradient else (link[0], link[1])
        rank = self.plan.placement[there]
        if gradient:
            value = gradient_arrays(self.links.specs[link], value)
        else:
            self.links.learn(link, value)
        if rank == self.plan.rank:
            if gradient:
                value = full_gradient(self.links.specs[link], value)
            self._local[link, gradient] = value
            return
        self._outgoing[here, there, link[2]] = value
        if rank in self._due:
            self._send_due(rank)

    def _receive(self, *_: int) -> None:
        self._reached += 1
        self._post(self._reached)

    def _post(self, count: int) -> None:
        """Post the first so many receives of the schedule, but those that are posted."""
        while self._posted < count:
            link, gradient = self.plan.receives[self._posted]
            self._incoming[link, gradient] = self.links.expect(link, gradient)
            self._posted += 1

    def _send(self, *_: int) -> None:
        """Nothing: it was sent when it was made, or will be."""

    def _send_due(self, rank: int) -> None:
        """Send what is made, in the order of the schedule; the rest is sent once it is made."""
        due = self._due[rank]
        while due and due[0] in self._outgoing:
            stage, peer, microbatch = due[0]
            value, start = self._outgoing.pop(due.popleft()), _now()
            if peer > stage:
                self.links.send_activation((stage, peer, microbatch), value)
                kind = OpKind.SEND_ACTIVATION
            else:
                self.links.send_gradient((peer, stage, microbatch), value)
                kind = OpKind.SEND_GRADIENT
            self._record(kind, stage, microbatch, peer, start, SEND)

    def _nothing_left(self) -> None:
        for due in self._due.values():
            for stage, peer, microbatch in due:
                raise UsageError(
                    f"the schedule sends from stage {stage} to stage {peer} for microbatch "
                    f"{microbatch} what is never made; schedule.validate() says more"
                )

    # ------------------------------------------------------------ forward

    def _forward(self, stage: int, microbatch: int, *_: int) -> None:
        plan, key = self.plan, (stage, microbatch)
        arguments: tuple[Value, ...] = ()
        if stage in plan.first:
            assert self.inputs is not None
            arguments = (self.inputs[microbatch],)
        arguments += tuple(self._take((s, stage, microbatch), False) for s in plan.sources[stage])
        start = _now()
        y, saved, skips = self._call_forward(stage, arguments)
        if skips is not None:
            self._separate.add(key)
        if stage in plan.last:
            self._finish_forward(microbatch, y)
        if key in plan.recomputed:
            self._arguments[key] = arguments
        elif plan.trains:
            self._saved[key] = saved
        self._record(OpKind.FORWARD, stage, microbatch, -1, start, COMPUTE)
        for target in plan.targets[stage]:
            value = y if skips is None or target == stage + 1 else skips[target]
            self._give((stage, target, microbatch), False, value)

    def _call_forward(
        self, stage: int, arguments: tuple[Value, ...]
    ) -> tuple[Value, Any, dict[int, Value] | None]:
        result = self.plan.stages[stage].forward(*arguments)
        if isinstance(result, tuple) and len(result) == 2:
            return result[0], result[1], None
        skips = [t for t in self.plan.targets[stage] if t != stage + 1]
        if isinstance(result, tuple) and len(result) == 3 and isinstance(result[2], dict):
            if set(result[2]) == set(skips):
                return result
            raise UsageError(
                f"forward() of stage {stage} returned values for the stages {sorted(result[2])}; "
                f"its skip connections go to {skips}"
            )
        raise UsageError(
            f"forward() of stage {stage} returned {_shortly(result)}; return (y, saved)"
        )

    def _finish_forward(self, microbatch: int, y: Value) -> None:
        if self.loss is not None:
            arguments = (y,) if self.targets is None else (y, self.targets[microbatch])
            result = self.loss(*arguments)
            if not isinstance(result, tuple) or len(result) != 2:
                raise UsageError(
                    f"loss() returned {_shortly(result)}; return (value, gradient of y)"
                )
            self.losses[microbatch], self._loss_gradients[microbatch] = result
        if self.keep_outputs:
            self.outputs[microbatch] = y

    def _recompute(self, stage: int, microbatch: int, *_: int) -> None:
        start, key = _now(), (stage, microbatch)
        self._saved[key] = self._call_forward(stage, self._arguments.pop(key))[1]
        self._record(OpKind.RECOMPUTE, stage, microbatch, -1, start, COMPUTE)

    # ------------------------------------------------------------ backward

    def _gradients(self, stage: int, microbatch: int) -> tuple[Value, ...]:
        """What backward gets beside `saved`: the gradient of y, and of separate skip values."""
        plan = self.plan
        if stage in plan.last:
            gradient = self._loss_gradients.pop(microbatch)
        else:
            gradient = self._take((stage, stage + 1, microbatch), True)
        skips = {
            t: self._take((stage, t, microbatch), True)
            for t in plan.targets[stage]
            if t != stage + 1
        }
        if (stage, microbatch) in self._separate:
            return gradient, skips
        for skip in skips.values():
            gradient = add_gradients(gradient, skip)
        return (gradient,)

    def _hand_back(self, stage: int, microbatch: int, gradient: Value) -> None:
        sources = self.plan.sources[stage]
        skips = [s for s in sources if s != stage - 1]
        parts: tuple[Value, ...] = (gradient,)
        if skips:
            needed = 1 + len(skips)
            if not isinstance(gradient, tuple) or len(gradient) != needed:
                raise UsageError(
                    f"the backward of stage {stage} returned {_shortly(gradient)}; return a tuple "
                    f"of {needed}: the gradients of x and of the skip values from stages {skips}"
                )
            parts = gradient
        if stage in self.plan.first:
            if parts[0] is not None:
                self.input_gradients[microbatch] = parts[0]
            parts = parts[1:]
        for source, part in zip(sources, parts, strict=True):
            self._give((source, stage, microbatch), True, part)

    def _backward(self, stage: int, microbatch: int, *_: int) -> None:
        gradients = self._gradients(stage, microbatch)
        start, saved = _now(), self._saved.pop((stage, microbatch))
        unit: Any = self.plan.stages[stage]
        if stage in self.plan.whole:
            gradient = unit.backward(saved, *gradients)
        else:
            gradient, rest = _pair(stage, unit.backward_input(saved, *gradients))
            unit.backward_weight(rest)
        self._record(OpKind.BACKWARD, stage, microbatch, -1, start, COMPUTE)
        self._hand_back(stage, microbatch, gradient)

    def _backward_input(self, stage: int, microbatch: int, *_: int) -> None:
        gradients = self._gradients(stage, microbatch)
        start, key = _now(), (stage, microbatch)
        unit: Any = self.plan.stages[stage]
        if stage in self.plan.split:
            found = unit.backward_input(self._saved.pop(key), *gradients)
            gradient, self._rest[key] = _pair(stage, found)
        else:
            gradient = unit.backward(self._saved.pop(key), *gradients)
        self._record(OpKind.BACKWARD_INPUT, stage, microbatch, -1, start, COMPUTE)
        self._hand_back(stage, microbatch, gradient)

    def _backward_weight(self, stage: int, microbatch: int, *_: int) -> None:
        start, key = _now(), (stage, microbatch)
        if key in self._rest:
            unit: Any = self.plan.stages[stage]
            unit.backward_weight(self._rest.pop(key))
        self._record(OpKind.BACKWARD_WEIGHT, stage, microbatch, -1, start, COMPUTE)

    def _overlap(self, stage: int, microbatch: int, other_stage: int, other: int) -> None:
        self._forward(stage, microbatch)
        self._backward(other_stage, other)

    # ------------------------------------------------------------ parameters

    def _reduce_grad(self, stage: int, *_: int) -> None:
        if not self.reduce:
            return
        start = _now()
        assert self.data_parallel is not None
        unit: Any = self.plan.stages[stage]
        works = [
            self.data_parallel.all_reduce(array, self.reduce_op, async_op=True)
            for array in unit.gradients()
        ]
        self._reductions.append((stage, start, works))

    def _unshard(self, stage: int, *_: int) -> None:
        self._call(stage, "unshard", OpKind.UNSHARD)

    def _reshard(self, stage: int, *_: int) -> None:
        self._call(stage, "reshard", OpKind.RESHARD)

    def _call(self, stage: int, method: str, kind: OpKind) -> None:
        start = _now()
        getattr(self.plan.stages[stage], method)()
        self._record(kind, stage, -1, -1, start, COMPUTE)


def _pair(stage: int, result: Any) -> tuple[Any, Any]:
    if isinstance(result, tuple) and len(result) == 2:
        return result
    raise UsageError(
        f"backward_input() of stage {stage} returned {_shortly(result)}; return (gx, rest), where "
        "rest is what backward_weight() gets"
    )


def _shortly(value: Any) -> str:
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    return type(value).__name__
