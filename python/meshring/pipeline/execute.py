"""Pipelines: a schedule's operations run by ranks that hold the stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np

from meshring.communicator import Communicator
from meshring.errors import UsageError
from meshring.pipeline.action import OpKind
from meshring.pipeline.agree import agree_on_arguments, agree_on_end, same_everywhere
from meshring.pipeline.channels import Channels, Pair
from meshring.pipeline.copies import sum_copies
from meshring.pipeline.execute_rank import RankPlan, RankRun
from meshring.pipeline.execute_record import gathered_timeline
from meshring.pipeline.links import Links
from meshring.pipeline.operations import op_of
from meshring.pipeline.schedule import PipelineSchedule, PipelineScheduleType, kind_of
from meshring.pipeline.schedules import USUAL_CHUNKS, family_of
from meshring.pipeline.stage import (
    PipelineStage,
    Value,
    ValueSpec,
    cut,
    given_spec,
    has_method,
    stages_by_number,
)
from meshring.pipeline.timeline import Timeline
from meshring.pipeline.transform import with_gradient_reduction, with_recomputation

Loss = Callable[..., tuple[Any, Value]]


@dataclass
class PipelineResult:
    """What one run of a pipeline gave, on this rank.

    A rank that holds no last stage has no losses and outputs; one that holds no first stage has no
    input gradients.
    """

    losses: dict[int, Any] = field(default_factory=dict)
    """The loss of each microbatch, by its number."""
    outputs: dict[int, Value] = field(default_factory=dict)
    """The result of the last stage for each microbatch; with keep_outputs=True, or no loss."""
    input_gradients: dict[int, Value] = field(default_factory=dict)
    """What the first stage's backward returned for each microbatch, where that is not None."""
    timeline: Timeline | None = None
    """What all ranks did when, with record=True."""

    @property
    def loss(self) -> Any:
        """The sum of the microbatches' losses, added in their order; None where there are none."""
        ordered = [self.losses[i] for i in sorted(self.losses)]
        return sum(ordered[1:], ordered[0]) if ordered else None


class Pipeline:
    """A schedule, this rank's stages and a communicator, ready to run.

    Made by all ranks of `comm` together; rank r of it runs rank r of the schedule. It works on a
    communicator of its own, so that messages of the program cannot get between.

    stages: one PipelineStage, a list in the order of schedule.stages_of(comm.rank), a dict by
    number, or a function that makes stage `number` of a model of `count` and is called with both.
    loss(y, target) returns (value, gradient of y); it runs behind the last stage's forward.
    shapes: the result of each stage, as {stage: (shape, dtype)} or as a function of stage and
    microbatch; without it the first run sends headers in front. With dynamic_shapes=True every run
    does. gradient_checkpointing: keep a stage's input only, and run its forward again in front of
    its backward. data_parallel: a communicator of the ranks that hold the same stages; their
    `gradients()` are reduced with reduce_op while later operations run. semantics: what a schedule
    without sends and receives is lowered for; transfers run beside the stages, in the order of each
    pair of ranks.
    Units: none. Errors: UsageError. Source: torch.distributed.pipelining, GPipe (Huang et al.,
    2019).
    """

    def __init__(
        self,
        schedule: PipelineSchedule,
        stages: Any,
        comm: Communicator,
        *,
        loss: Loss | None = None,
        shapes: Any = None,
        dynamic_shapes: bool = False,
        gradient_checkpointing: bool = False,
        data_parallel: Communicator | None = None,
        reduce_op: str = "mean",
        semantics: str = "rendezvous/pair",
    ) -> None:
        for name, given in (("comm", comm), ("data_parallel", data_parallel)):
            if not isinstance(given, Communicator) and (name == "comm" or given is not None):
                raise UsageError(
                    f"Pipeline: argument {name!r} is {type(given).__name__}; give a Communicator, "
                    "from meshring.init() or split()"
                )
        self.comm = comm
        self._loss = loss
        self._reduce_op = reduce_op
        self._shapes = shapes
        self._closed: str | None = None
        self._own: Communicator | None = None
        self._channels: Channels | None = None
        self._own_data: Communicator | None = None
        failure: Exception | None = None
        try:
            self.schedule = _prepared(
                schedule, comm, gradient_checkpointing, data_parallel, semantics
            )
            mine = self.schedule.stages_of(comm.rank)
            found = stages_by_number(stages, mine, self.schedule.num_stages, comm.rank)
            self._plan = RankPlan(self.schedule, comm.rank, found)
            self._check(data_parallel)
        except Exception as error:
            failure = error
        agree_on_arguments("Pipeline", comm, failure)
        options = (dynamic_shapes, shapes is None, reduce_op)
        same_everywhere(self.schedule, options, comm)
        self._own = comm.split(0, comm.rank)
        if data_parallel is not None:
            self._own_data = data_parallel.split(0, data_parallel.rank)
        assert self._own is not None
        self._channels = Channels(self._own, self._pairs())
        self._links = Links(
            self._channels, self.schedule.placement, dynamic=dynamic_shapes, given=self._given
        )

    def _pairs(self) -> set[Pair]:
        """Which rank sends to which, anywhere in the pipeline."""
        schedule, place = self.schedule, self.schedule.placement
        pairs: set[Pair] = set()
        for rank in range(schedule.num_ranks):
            rows = schedule.rows[rank]
            for kind in (OpKind.SEND_ACTIVATION, OpKind.SEND_GRADIENT):
                peers = np.unique(rows["peer"][rows["kind"] == kind])
                pairs |= {(rank, place[peer]) for peer in peers.tolist()}
        if self._sums_copies:
            half = schedule.num_stages
            pairs |= {(place[s], place[(s + half) % (2 * half)]) for s in range(2 * half)}
        return {(a, b) for a, b in pairs if a != b}

    @property
    def stages(self) -> dict[int, PipelineStage]:
        """This rank's stages by their number in the schedule."""
        return self._plan.stages

    def _check(self, data_parallel: Communicator | None) -> None:
        plan, rank = self._plan, self.comm.rank
        if self._reduce_op not in ("sum", "mean"):
            raise UsageError(
                f"Pipeline (rank {rank}): argument 'reduce_op' is {self._reduce_op!r}; give 'sum' "
                "or 'mean'"
            )
        if self._loss is not None and not callable(self._loss):
            raise UsageError(
                f"Pipeline (rank {rank}): argument 'loss' is {type(self._loss).__name__}; give a "
                "function (y, target) -> (value, gradient of y)"
            )
        if self._sums_copies:
            for stage, unit in plan.stages.items():
                if not has_method(unit, "gradients"):
                    raise UsageError(
                        f"Pipeline (rank {rank}): {self.schedule.schedule_type} trains two copies "
                        f"of each stage, and stage {stage} has no method gradients(); add it, so "
                        "that the copies' gradients can be added up"
                    )
        if self._shapes is not None and not callable(self._shapes):
            for stage in self._shapes:
                self._given(stage, 0)
        if plan.trains and plan.last and self._loss is None:
            raise UsageError(
                f"Pipeline (rank {rank}): argument 'loss' is missing; this rank holds stage "
                f"{min(plan.last)}, the last one, and the schedule has backwards: give "
                "loss(y, target) -> (value, gradient of y)"
            )
        methods = {OpKind.UNSHARD: "unshard", OpKind.RESHARD: "reshard"}
        if plan.reduces:
            methods[OpKind.REDUCE_GRAD] = "gradients"
            if data_parallel is None:
                raise UsageError(
                    f"Pipeline (rank {rank}): the schedule has REDUCE_GRAD, and argument "
                    "'data_parallel' is missing; give the communicator of the ranks that hold the "
                    "same stages"
                )
        for kind, stage, *_ in plan.rows:
            method = methods.get(OpKind(kind))
            if method and not has_method(plan.stages[stage], method):
                raise UsageError(
                    f"Pipeline (rank {rank}): the schedule has {OpKind(kind).code} of stage "
                    f"{stage}, which has no method {method}(); add it, or leave the operation out"
                )

    @property
    def _sums_copies(self) -> bool:
        return self.schedule.replicas == 2 and self._plan.trains

    def _given(self, stage: int, microbatch: int) -> ValueSpec | None:
        if self._shapes is None:
            return None
        if callable(self._shapes):
            given = self._shapes(stage, microbatch)
        else:
            given = self._shapes.get(stage)
        return None if given is None else given_spec(given)

    def run(
        self,
        inputs: Value | list[Value] | None = None,
        targets: Any = None,
        *,
        record: bool = False,
        keep_outputs: bool = False,
        reduce: bool = True,
        timeout: float | None = None,
    ) -> PipelineResult:
        """Run every operation of the schedule once: one step, on all ranks together.

        inputs and targets are needed where the first and the last stage are, and ignored
        elsewhere: a list with one entry for each microbatch, or an array, or tuple of arrays, that
        is cut along axis 0 into parts that differ by one row at most. Gradients add up in the
        stages until they are cleared there; to accumulate them over several runs give reduce=False
        to all but the last, which then leave out the sum over data-parallel ranks and over copies
        of a stage. record=True gathers a Timeline of all ranks, in seconds.
        Units: timeout in seconds, for each wait. Errors: UsageError where an argument is wrong;
        StageError on every rank where an operation of one fails; DeadlineError, PeerLostError.
        """
        if self._closed is not None or self._own is None:
            raise UsageError(
                f"Pipeline.run: this pipeline is closed{self._closed or ''}; make a new one"
            )
        plan, count = self._plan, self.schedule.num_microbatches
        failure: Exception | None = None
        try:
            check_timeout(timeout)
            x = self._cut("inputs", inputs, count) if plan.first else None
            has_targets = bool(plan.last) and targets is not None
            goals = self._cut("targets", targets, count) if has_targets else None
        except Exception as error:
            failure = error
        agree_on_arguments("Pipeline.run", self.comm, failure)
        run = RankRun(
            plan,
            self._links,
            inputs=x,
            targets=goals,
            loss=self._loss,
            keep_outputs=keep_outputs or self._loss is None,
            data_parallel=self._own_data,
            reduce_op=self._reduce_op,
            reduce=reduce,
        )
        self._links.timeout = timeout
        self._perform(run, timeout)
        result = PipelineResult(run.losses, run.outputs, run.input_gradients)
        if record:
            title = f"{self.schedule.schedule_type}, measured"
            result.timeline = gathered_timeline(self.comm, run.records, title)
        return result

    def _cut(self, name: str, value: Any, count: int) -> list[Any]:
        if value is None:
            raise UsageError(
                f"Pipeline.run (rank {self.comm.rank}): argument {name!r} is missing; this rank "
                f"holds stage {min(self._plan.first)}, the first one"
            )
        return cut(name, value, count)

    def _perform(self, run: RankRun, timeout: float | None) -> None:
        failure: Exception | None = None
        try:
            run.run()
            if run.reduce and self._sums_copies:
                sum_copies(self.schedule, self._plan.stages, self._links.channels, timeout)
        except Exception as error:
            failure = error
        except BaseException:
            self._leave(", since it was interrupted")
            raise
        if failure is not None:
            self._leave(", since one of its operations failed")
        try:
            agree_on_end(self.comm, failure, self._action(run), timeout)
        except BaseException:
            self._leave(", since one of its operations failed")
            raise

    def _action(self, run: RankRun) -> str:
        if run.at >= len(self._plan.rows):
            return "the end of the schedule"
        return str(op_of(self._plan.rows[run.at]))

    def _leave(self, why: str) -> None:
        self._closed = self._closed or why
        if self._channels is not None:
            self._channels.close(abort=bool(why))
        for comm in (self._own, self._own_data):
            if comm is not None:
                comm.close()

    def close(self) -> None:
        """Give the pipeline's own communicators back; safe to call twice."""
        self._leave("")

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.close()


def run_pipeline(
    schedule: PipelineSchedule,
    stages: Any,
    comm: Communicator,
    inputs: Value | list[Value] | None = None,
    targets: Any = None,
    *,
    record: bool = False,
    keep_outputs: bool = False,
    timeout: float | None = None,
    **options: Any,
) -> PipelineResult:
    """Run a schedule once: a Pipeline that is made, run and closed; all ranks together.

    For many steps keep a Pipeline: it remembers the shapes. Arguments, units, errors: as there.
    """
    with Pipeline(schedule, stages, comm, **options) as pipeline:
        return pipeline.run(
            inputs, targets, record=record, keep_outputs=keep_outputs, timeout=timeout
        )


def build_pipeline(
    stages: Any,
    num_microbatches: int,
    schedule_type: str | PipelineScheduleType = PipelineScheduleType.ONE_FORWARD_ONE_BACKWARD,
    *,
    comm: Communicator,
    depth: int | None = None,
    num_stages: int | None = None,
    schedule_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Pipeline:
    """A Pipeline over all ranks of `comm`, its schedule made from a kind and the sizes.

    depth: the number of ranks, comm.size where it is None. num_stages: of the whole model; by
    default one for each rank, or two for the kinds that fold or loop. schedule_options: further
    arguments of PipelineSchedule, such as skips, or costs for "auto". Options: as in Pipeline.
    Errors: UsageError where depth is not the size of comm.
    """
    if depth is not None and depth != comm.size:
        raise UsageError(
            f"build_pipeline (rank {comm.rank}/{comm.size}): argument 'depth' is {depth}, and the "
            f"communicator has {comm.size} ranks; make a mesh whose pipeline axis has {depth}"
        )
    if num_stages is None:
        num_stages = comm.size * USUAL_CHUNKS[family_of(kind_of(schedule_type))]
    more = {"num_ranks": comm.size, **(schedule_options or {})}
    schedule = PipelineSchedule(num_stages, num_microbatches, schedule_type, **more)
    return Pipeline(schedule, stages, comm, **options)


def check_timeout(timeout: Any) -> None:
    """Refuse what is no duration. Errors: UsageError."""
    if timeout is None or (isinstance(timeout, (int, float)) and timeout >= 0):
        return
    raise UsageError(
        f"Pipeline.run: argument 'timeout' is {timeout!r}; give seconds >= 0, or leave it out"
    )


def _prepared(
    schedule: PipelineSchedule,
    comm: Communicator,
    gradient_checkpointing: bool,
    data_parallel: Communicator | None,
    semantics: str,
) -> PipelineSchedule:
    """The schedule with what the options add to it, and with sends and receives."""
    where = f"Pipeline (rank {comm.rank}/{comm.size})"
    if not isinstance(schedule, PipelineSchedule):
        raise UsageError(
            f"{where}: argument 'schedule' is {type(schedule).__name__}; give a PipelineSchedule"
        )
    if schedule.num_ranks != comm.size:
        raise UsageError(
            f"{where}: argument 'schedule' is for {schedule.num_ranks} ranks, and the communicator "
            f"has {comm.size}; give the schedule num_ranks={comm.size}, or split the communicator"
        )
    if gradient_checkpointing:
        schedule = with_recomputation(schedule)
    if data_parallel is not None:
        schedule = with_gradient_reduction(schedule)
    ready = schedule.semantics is not None or schedule.is_lowered
    if ready or schedule.schedule_type == "custom":  # what a user wrote, perhaps
        schedule.validate("rendezvous/pair" if schedule.is_lowered else None)
    return schedule if ready else schedule.lower(semantics)
