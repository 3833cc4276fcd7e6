"""PipelineSchedule: what users hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from typing import Any

from meshring.errors import UsageError
from meshring.pipeline.automatic import make_auto
from meshring.pipeline.costs import Costs, costs_of
from meshring.pipeline.lowering import lower
from meshring.pipeline.program import Program, positive
from meshring.pipeline.schedules import find_layout, make
from meshring.pipeline.semantics import Semantics, semantics_of
from meshring.pipeline.simulate import simulate
from meshring.pipeline.timeline import Timeline
from meshring.pipeline.validate import Report, validate


class PipelineScheduleType(str, Enum):
    """The orders that PipelineSchedule can make."""

    SEQUENTIAL = "sequential"
    GPIPE = "gpipe"
    ONE_FORWARD_ONE_BACKWARD = "1f1b"
    INTERLEAVED_ONE_F1B = "interleaved-1f1b"
    LOOPED_BFS = "looped-bfs"
    ZB_H1 = "zb-h1"
    ZB_H2 = "zb-h2"
    ZB_V = "zb-v"
    V_HALF = "v-half"
    V_MIN = "v-min"
    DUALPIPE = "dualpipe"
    DUALPIPEV = "dualpipev"
    AUTO = "auto"


class PipelineSchedule(Program):
    """The order in which every rank runs its stages' forwards and backwards.

    `num_stages` counts the stages of the model over all ranks, `chunks` those of one rank: 1, or 2
    for the V and interleaved kinds (any number for interleaved ones). `num_ranks` follows from
    them. `placement` gives the rank of each stage instead. Any number of microbatches will do.
    "auto" finds an order for `costs`, the fields of Costs: the shortest makespan, or by `objective`
    the shortest span, within `memory_limit`, one number or one per rank: bytes if costs have
    activation_bytes, else live activations; without it, as many as there are ranks.
    Errors: UsageError for a kind that there is not, and for stages that do not fit.
    """

    def __init__(
        self,
        num_stages: int,
        num_microbatches: int,
        schedule_type: str | PipelineScheduleType = PipelineScheduleType.ONE_FORWARD_ONE_BACKWARD,
        *,
        num_ranks: int | None = None,
        chunks: int | None = None,
        placement: Sequence[int] | None = None,
        group: int | None = None,
        skips: Iterable[tuple[int, int]] = (),
        costs: Costs | Mapping[str, Any] | None = None,
        memory_limit: float | Sequence[float] | None = None,
        objective: str = "makespan",
    ) -> None:
        kind = kind_of(schedule_type)
        positive("num_stages", num_stages)
        positive("num_microbatches", num_microbatches)
        if kind == PipelineScheduleType.AUTO.value:
            layout = find_layout(kind, num_stages, num_ranks, chunks, placement)
            model = costs if isinstance(costs, Costs) else costs_of(dict(costs or {}))
            rows = make_auto(num_stages, num_microbatches, layout, model, memory_limit, objective)
            found, replicas = layout.placement, 1
        elif costs is not None or memory_limit is not None:
            raise UsageError(
                "PipelineSchedule: 'costs' and 'memory_limit' are for schedule_type 'auto', not "
                f"for {kind}; give costs to simulate() and lower()"
            )
        else:
            found, rows, replicas = make(
                kind, num_stages, num_microbatches, num_ranks, chunks, placement, group
            )
        super().__init__(
            num_stages,
            num_microbatches,
            found,
            rows,
            replicas=replicas,
            skips=skips,
            schedule_type=kind,
        )

    def lower(
        self, semantics: str | Semantics = "rendezvous/pair", **costs: Any
    ) -> PipelineSchedule:
        """The schedule with its sends and receives, made for a backend's semantics.

        They match by their order on each pair of ranks, without tags, and never deadlock.
        `semantics` is sends, "buffered" or "rendezvous", and queues of transfers: one for each
        ordered "pair" of ranks, one per "rank", or "one" for transfers and computing. `costs`, the
        fields of Costs, say what to optimise for. Errors: UsageError.
        """
        return lower(self, semantics_of(semantics), costs_of(costs))

    def validate(self, semantics: str | Semantics | None = None) -> Report:
        """Check that it is complete, in order, matched and free of deadlocks.

        Sends and receives are checked under `semantics`, else under those that the schedule was
        lowered for, else under all. Errors: UsageError that lists what is wrong, with the cycle of
        a deadlock: rank, operation, what it waits for.
        """
        return validate(self, semantics)

    def simulate(
        self, *, semantics: str | Semantics | None = None, unit: str = "", **costs: Any
    ) -> Timeline:
        """The Timeline of this schedule under a cost model; `costs` are the fields of Costs.

        A schedule without sends is simulated with transfers that nothing holds up; after
        `lower()`, with those of its semantics. Units: the caller's, named by `unit`.
        Errors: UsageError for costs that are none, and for a schedule that cannot run.
        """
        return simulate(self, costs_of(costs), semantics, unit)


def kind_of(schedule_type: str | PipelineScheduleType) -> str:
    """The name of a kind of schedule; also its name in the enumeration. Errors: UsageError."""
    if isinstance(schedule_type, PipelineScheduleType):
        return schedule_type.value
    name = schedule_type.lower().replace("_", "-") if isinstance(schedule_type, str) else ""
    for kind in PipelineScheduleType:
        if name in (kind.value, kind.name.lower().replace("_", "-")):
            return kind.value
    raise UsageError(
        f"PipelineSchedule: argument 'schedule_type' is {schedule_type!r}; give one of "
        f"{', '.join(kind.value for kind in PipelineScheduleType)}"
    )
