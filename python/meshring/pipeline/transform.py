"""Schedules with further operations: recomputation, reduction of gradients."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from meshring.pipeline.action import OpKind
from meshring.pipeline.operations import OP, Rows
from meshring.pipeline.program import Program

P = TypeVar("P", bound=Program)
_GRADIENT = [int(OpKind.BACKWARD), int(OpKind.BACKWARD_INPUT)]
_LAST = [int(OpKind.BACKWARD), int(OpKind.BACKWARD_WEIGHT)]


def with_recomputation(schedule: P) -> P:
    """The schedule with a RECOMPUTE in front of each backward or input gradient.

    A schedule that has such operations already is returned as it is.
    Source: Chen et al., Training Deep Nets with Sublinear Memory Cost, 2016.
    """
    if _has(schedule, OpKind.RECOMPUTE):
        return schedule
    changed = []
    for rows in schedule.rows:
        stages, batches, overlapped = _backwards(rows)
        at = np.flatnonzero(np.isin(rows["kind"], _GRADIENT) | overlapped)
        changed.append(_insert(rows, at, OpKind.RECOMPUTE, stages[at], batches[at]))
    return schedule.replaced(changed)


def with_gradient_reduction(schedule: P) -> P:
    """The schedule with a REDUCE_GRAD of each stage behind its last backward.

    A schedule that has such operations already is returned as it is.
    Source: Li et al., PyTorch Distributed, 2020 (overlapped reduction).
    """
    if _has(schedule, OpKind.REDUCE_GRAD):
        return schedule
    changed = []
    for rows in schedule.rows:
        stages, _, overlapped = _backwards(rows)
        last = np.flatnonzero(np.isin(rows["kind"], _LAST) | overlapped)
        places = {int(stages[i]): int(i) + 1 for i in last}  # the last one of a stage wins
        order = sorted(places.items(), key=lambda item: item[1])
        at = np.array([place for _, place in order], np.int64)
        of = np.array([stage for stage, _ in order], np.int32)
        changed.append(_insert(rows, at, OpKind.REDUCE_GRAD, of, np.full(at.size, -1)))
    return schedule.replaced(changed)


def _has(schedule: Program, kind: OpKind) -> bool:
    return any((rows["kind"] == kind).any() for rows in schedule.rows)


def _backwards(rows: Rows) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.bool_]]:
    """Stage and microbatch of each row, of its backward where it overlaps a forward with one."""
    overlapped = rows["kind"] == OpKind.OVERLAP_F_B
    stages = np.where(overlapped, rows["peer"], rows["stage"])
    return stages, np.where(overlapped, rows["pair"], rows["microbatch"]), overlapped


def _insert(
    rows: Rows, at: NDArray[np.int64], kind: OpKind, stages: NDArray[np.int32], batches: Rows
) -> Rows:
    new = np.zeros(at.size, OP)
    new["kind"], new["stage"], new["microbatch"] = int(kind), stages, batches
    new["peer"] = new["pair"] = -1
    found: Rows = np.insert(rows, at, new)
    return found
