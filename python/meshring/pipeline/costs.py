"""What operations and transfers cost: the model that simulations and searches share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshring.errors import UsageError
from meshring.pipeline.action import OpKind
from meshring.pipeline.operations import Rows
from meshring.pipeline.program import Program

Floats = NDArray[np.float64]
Cost = float | Sequence[float] | Sequence[Sequence[float]] | Floats


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Durations of operations, times of links, sizes of messages and of what is kept.

    Each duration is a number, one per stage of the model, or a table [stage][microbatch].
    `rank_factor` multiplies the durations of a rank. Defaults: backward_input and
    backward_weight are half of `backward`, which is twice `forward`; `backward` is their sum;
    `overlapped`, a forward and a backward together, is `forward` + `backward`; `recompute` is
    `forward`. A transfer takes latency + message_bytes / bandwidth, each link's latency and
    bandwidth a number or a table [from rank][to rank]; `comm` is another name for latency.
    Units: the caller's; bytes for sizes. Errors: UsageError.
    """

    forward: Cost = 1.0
    backward: Cost | None = None
    backward_input: Cost | None = None
    backward_weight: Cost | None = None
    overlapped: Cost | None = None
    recompute: Cost | None = None
    reduce_grad: Cost = 0.0
    unshard: Cost = 0.0
    reshard: Cost = 0.0
    rank_factor: Cost = 1.0
    comm: Cost | None = None
    latency: Cost = 0.0
    bandwidth: Cost = math.inf
    message_bytes: Cost = 0.0
    activation_bytes: Cost | None = None
    weight_gradient_bytes: Cost | None = None
    weight_bytes: Cost = 0.0

    def table(self, program: Program) -> dict[int, Floats]:
        """Per kind of operation the durations, shape (stages, microbatches), broadcast."""

        def of(name: str, value: Any) -> Floats:
            return _per_stage(name, value, program)

        forward = of("forward", self.forward)
        if self.backward is not None:
            whole = of("backward", self.backward)
        elif self.backward_input is None and self.backward_weight is None:
            whole = 2 * forward
        else:
            whole = None
        if self.backward_input is not None and self.backward_weight is not None:
            inputs = of("backward_input", self.backward_input)
            weights = of("backward_weight", self.backward_weight)
        elif self.backward_input is not None:
            inputs = of("backward_input", self.backward_input)
            weights = inputs if whole is None else _rest("backward_input", whole, inputs)
        elif self.backward_weight is not None:
            weights = of("backward_weight", self.backward_weight)
            inputs = weights if whole is None else _rest("backward_weight", whole, weights)
        else:
            inputs = weights = (2 * forward if whole is None else whole) / 2
        whole = inputs + weights if whole is None else whole
        both = forward + whole if self.overlapped is None else of("overlapped", self.overlapped)
        again = forward if self.recompute is None else of("recompute", self.recompute)
        return {
            OpKind.FORWARD: forward,
            OpKind.BACKWARD: whole,
            OpKind.BACKWARD_INPUT: inputs,
            OpKind.BACKWARD_WEIGHT: weights,
            OpKind.OVERLAP_F_B: both,
            OpKind.RECOMPUTE: again,
            OpKind.REDUCE_GRAD: of("reduce_grad", self.reduce_grad),
            OpKind.UNSHARD: of("unshard", self.unshard),
            OpKind.RESHARD: of("reshard", self.reshard),
        }

    def durations(self, program: Program) -> list[Floats]:
        """The duration of each row of each rank; 0 for sends and receives."""
        table = self.table(program)
        factor = self.factors(program)
        return [_look_up(rows, table) * factor[rank] for rank, rows in enumerate(program.rows)]

    def factors(self, program: Program) -> Floats:
        """What the durations of each rank are multiplied by."""
        return _vector("rank_factor", self.rank_factor, program.num_ranks)

    def wire(self, program: Program) -> tuple[Floats, Floats]:
        """Latency and seconds per byte of each link, both of shape (ranks, ranks)."""
        given = self.latency if self.comm is None else self.comm
        if self.comm is not None and np.any(np.asarray(self.latency, float)):
            raise UsageError("simulate: 'comm' and 'latency' are the same; give one of them")
        latency = _square("latency", given, program.num_ranks)
        bandwidth = _square("bandwidth", self.bandwidth, program.num_ranks)
        if (bandwidth == 0).any():
            raise UsageError("simulate: argument 'bandwidth' has 0; give bytes per unit of time")
        return latency, 1.0 / bandwidth

    def sizes(self, program: Program, name: str) -> Floats:
        """One of the sizes for each stage, copies of the model included."""
        return _stages(name, getattr(self, name), program)


def costs_of(given: dict[str, Any]) -> Costs:
    """These keyword arguments as Costs. Errors: UsageError for a name that is none."""
    known = [field.name for field in fields(Costs)]
    for name in given:
        if name not in known:
            raise UsageError(f"simulate: there is no argument {name!r}; give {', '.join(known)}")
    return Costs(**given)


def _look_up(rows: Rows, table: dict[int, Floats]) -> Floats:
    found = np.zeros(len(rows))
    kinds = rows["kind"]
    for kind, costs in table.items():
        chosen = np.flatnonzero(kinds == kind)
        if chosen.size:
            stages = rows["stage"][chosen]
            batches = rows["microbatch"][chosen] if costs.strides[1] else 0
            found[chosen] = costs[stages, batches]
    return found


def _numbers(name: str, value: Any) -> Floats:
    try:
        numbers = np.asarray(value, np.float64)
    except (TypeError, ValueError) as error:
        raise UsageError(f"simulate: argument {name!r} is {value!r}; give numbers") from error
    if np.isnan(numbers).any() or (numbers < 0).any():
        raise UsageError(f"simulate: argument {name!r} has {numbers.min()}; give numbers >= 0")
    if name != "bandwidth" and np.isinf(numbers).any():
        raise UsageError(f"simulate: argument {name!r} is infinite; give finite numbers")
    return numbers


def _per_stage(name: str, value: Any, program: Program) -> Floats:
    numbers = _numbers(name, value)
    stages, batches = program.num_stages, program.num_microbatches
    if numbers.shape == (stages, batches):
        return np.tile(numbers, (program.replicas, 1))
    column = _stages(name, numbers, program, f", or a table of {stages} x {batches}")
    return np.broadcast_to(column[:, None], (len(column), batches))


def _stages(name: str, value: Any, program: Program, more: str = "") -> Floats:
    return np.tile(_vector(name, value, program.num_stages, more), program.replicas)


def _vector(name: str, value: Any, length: int, more: str = "") -> Floats:
    numbers = _numbers(name, value)
    if numbers.shape not in ((), (length,)):
        raise UsageError(
            f"simulate: argument {name!r} has shape {numbers.shape}; give one number, "
            f"or {length}{more}"
        )
    return np.broadcast_to(numbers, (length,)).astype(np.float64)


def _square(name: str, value: Any, length: int) -> Floats:
    numbers = _numbers(name, value)
    if numbers.shape not in ((), (length, length)):
        raise UsageError(
            f"simulate: argument {name!r} has shape {numbers.shape}; give one number, or a table "
            f"of {length} x {length}, from rank and to rank"
        )
    return np.broadcast_to(numbers, (length, length)).astype(np.float64)


def _rest(name: str, whole: Floats, part: Floats) -> Floats:
    if (part > whole).any():
        raise UsageError(f"simulate: argument {name!r} is larger than 'backward'; give the parts")
    return whole - part
