"""Which placement a result has: element-wise functions, reductions, matmul, transpose. Pure.

Nothing here communicates. A replicated operand is sliced where the result is sharded; a reduction
over a sharded axis leaves Partial; what would need data of other ranks is refused. The last rules
found are remembered, since programs apply the same ones over and over.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np

from meshring.errors import UsageError
from meshring.partition import Box, Partial, Placement, Replicate, Shard, Sharding
from meshring.redistribute import relative

_ADDITIVE = {"add": "sum", "subtract": "sum", "maximum": "max", "minimum": "min"}
_LINEAR = ("negative", "positive", "conjugate")
_SCALING = ("multiply", "divide", "true_divide")
_COMMUTES = {
    "sum": ("sum", "mean"),
    "mean": ("sum", "mean"),
    "max": ("max",),
    "min": ("min",),
    "prod": ("prod",),
}


class Rule(NamedTuple):
    """The sharding of a result, and what of each operand's local part makes this rank's part."""

    result: Sharding
    parts: tuple[tuple[Any, ...] | None, ...]
    """An index into the operand's local part, None for all of it."""


def refuse(name: str, operands: Sequence[Sharding], why: str, fix: str) -> NoReturn:
    """Raise the sentence that names operation, operands, reason and way out."""
    given = " and ".join(f"{s.shape} {s.by_name()}" for s in operands)
    raise UsageError(f"{name} of DistributedTensors {given}: {why}; {fix}")


def contains(mine: Any, wanted: Any) -> bool:
    """Say whether intervals lie in others, at every place of the mesh; empty ones do."""
    (low, high), (start, end) = mine, wanted
    return bool((((low <= start) & (end <= high)) | (start >= end)).all())


def _one_mesh(name: str, operands: Sequence[Sharding]) -> None:
    if any(s.mesh != operands[0].mesh for s in operands):
        refuse(name, operands, "their meshes differ", "t.redistribute(placements, mesh)")


def _part(operand: Sharding, box: Box, rank: int) -> tuple[Any, ...] | None:
    if rank not in operand.mesh:
        return None
    held = operand.box(rank)
    return None if box == held else relative(tuple((s, max(s, e)) for s, e in box), held)


# ---- element by element ---------------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def elementwise(name: str, inputs: tuple[Sharding | None, ...], rank: int) -> Rule:
    """Return the rule of a function of operands that broadcast together; None is a number."""
    operands = [s for s in inputs if s is not None]
    _one_mesh(name, operands)
    try:
        shape = np.broadcast_shapes(*(s.shape for s in operands))
    except ValueError:
        refuse(name, operands, "the shapes do not broadcast together", "make them fit")
    mesh = operands[0].mesh
    placements = [
        _partial_result(name, inputs, operands, m) or _cut_result(operands, m, len(shape))
        for m in range(mesh.ndim)
    ]
    order = next((s.order for s in operands if any(s.nests)), None)
    result = Sharding(mesh, shape, placements, order)
    if not all(_holds(s, result) for s in operands):
        refuse(
            name,
            operands,
            f"the result is sharded as {result.by_name()} and needs what some ranks do not hold",
            "redistribute one to the placements of the other",
        )
    return Rule(result, tuple(_part(s, _needed(s, result, rank), rank) for s in operands))


def _partial_result(
    name: str, inputs: Sequence[Sharding | None], operands: Sequence[Sharding], m: int
) -> Placement | None:
    """Partial where an operand is, and the function goes through the reduction."""
    found = [p for p in (s.placements[m] for s in operands) if isinstance(p, Partial)]
    if not found:
        return None
    partial = found[0]
    linear = partial.op in ("sum", "mean")
    if len(inputs) == len(found) and all(p == partial for p in found):
        through = _ADDITIVE.get(name)
        if through is not None and (partial.op == through or (linear and through == "sum")):
            return partial
    if name in _LINEAR and linear:
        return partial
    if name in _SCALING and linear and len(found) == 1:
        first = inputs[0]
        if name == "multiply" or (first is not None and first.placements[m] == partial):
            return partial
    axis = operands[0].mesh.axis_names[m]
    refuse(
        name,
        operands,
        f"the reduction along mesh axis {axis!r} is still to be done, and {name} does not go "
        "through it",
        f"redistribute the Partial axis {axis!r} to Replicate() or Shard(axis) first",
    )


def _cut_result(operands: Sequence[Sharding], m: int, ndim: int) -> Placement:
    for s in operands:
        p = s.placements[m]
        if isinstance(p, Shard):
            return Shard(p.axis + ndim - s.ndim, p.split, p.sizes)
    return Replicate()


def _needed(operand: Sharding, result: Sharding, rank: int) -> Box:
    """The region of an operand that a rank's part of the result needs."""
    if rank not in operand.mesh:
        return ()
    skipped = result.ndim - operand.ndim
    wanted, lengths = result.box(rank)[skipped:], result.shape[skipped:]
    return tuple(
        (0, 1) if n == 1 and r != 1 else box
        for n, r, box in zip(operand.shape, lengths, wanted, strict=True)
    )


def _holds(operand: Sharding, result: Sharding) -> bool:
    """Whether every rank holds what its part of the result needs."""
    for axis in range(operand.ndim):
        target = axis + result.ndim - operand.ndim
        wanted: Any = result.cuts_by_place(target)
        if operand.shape[axis] == 1 and result.shape[target] != 1:
            wanted = (np.zeros((), int), np.ones((), int))
        if not contains(operand.cuts_by_place(axis), wanted):
            return False
    return True


# ---- reductions -----------------------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def reduction(operand: Sharding, name: str, axes: frozenset[int], keepdims: bool) -> Sharding:
    """Return the sharding of a reduction along axes: Partial where they are cut."""
    placements: list[Placement] = []
    for m, p in enumerate(operand.placements):
        if isinstance(p, Partial) and p.op not in _COMMUTES[name]:
            axis = operand.mesh.axis_names[m]
            refuse(
                name,
                [operand],
                f"{name} does not go through the {p.op} along mesh axis {axis!r} that is still to "
                "be done",
                "redistribute that axis to Replicate() or Shard(axis) first",
            )
        if isinstance(p, Shard) and p.axis in axes:
            p = Partial("sum" if name == "mean" else name)
        elif isinstance(p, Shard) and not keepdims:
            p = Shard(p.axis - sum(a < p.axis for a in axes), p.split, p.sizes)
        placements.append(p)
    if name in ("max", "min") and any(operand.shape[a] == 0 for a in axes):
        refuse(name, [operand], "an axis to reduce has no elements", "give axes with a length > 0")
    return Sharding(
        operand.mesh, kept_shape(operand.shape, axes, keepdims), placements, operand.order
    )


def kept_shape(shape: Sequence[int], axes: frozenset[int], keepdims: bool) -> list[int]:
    """Return the shape of a reduction along axes."""
    if keepdims:
        return [1 if a in axes else n for a, n in enumerate(shape)]
    return [n for a, n in enumerate(shape) if a not in axes]


def axes_of(operand: Sharding, name: str, axis: Any) -> frozenset[int]:
    """Return the axes that are meant: None all, a number or a tuple of them."""
    ndim = operand.ndim
    given = range(ndim) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    for a in given:
        if not isinstance(a, (int, np.integer)) or not -ndim <= a < ndim:
            refuse(name, [operand], f"axis {a!r} is none of its {ndim}", "give one that it has")
    return frozenset(int(a) % ndim for a in given)


# ---- products and views ---------------------------------------------------------------------

_MATMUL_FIX = (
    "of each mesh axis: cut rows of the first, or columns of the second, or k of both (then the "
    "result is Partial), and replicate the other operand; redistribute to that"
)


@functools.lru_cache(maxsize=1024)
def matmul(a: Sharding, b: Sharding, rank: int) -> Rule:
    """Return the rule of (..., m, k) by (k, n)."""
    if a.ndim < 2 or b.ndim != 2 or a.shape[-1] != b.shape[0]:
        refuse("matmul", [a, b], "shapes (..., m, k) and (k, n) are needed", "make them fit")
    _one_mesh("matmul", [a, b])
    last = a.ndim - 1
    placements = [_product(a, b, m, last) for m in range(a.mesh.ndim)]
    order = a.order if any(a.nests) else b.order
    result = Sharding(a.mesh, (*a.shape[:-1], b.shape[1]), placements, order)
    inner, axis = (a, last) if a.nests[last] else (b, 0)
    shared = inner.cuts_by_place(axis)
    rows = all(contains(a.cuts_by_place(i), result.cuts_by_place(i)) for i in range(last))
    columns = contains(b.cuts_by_place(1), result.cuts_by_place(last))
    middle = contains(a.cuts_by_place(last), shared) and contains(b.cuts_by_place(0), shared)
    if not (rows and columns and middle):
        refuse("matmul", [a, b], "the operands are not cut alike", _MATMUL_FIX)
    if rank not in a.mesh:
        return Rule(result, (None, None))
    box, k = result.box(rank), inner.box(rank)[axis]
    return Rule(result, (_part(a, (*box[:-1], k), rank), _part(b, (k, box[-1]), rank)))


def _product(a: Sharding, b: Sharding, m: int, last: int) -> Placement:
    p, q = a.placements[m], b.placements[m]
    if isinstance(p, Partial) or isinstance(q, Partial):
        one, other = (p, q) if isinstance(p, Partial) else (q, p)
        if isinstance(one, Partial) and one.op in ("sum", "mean") and other == Replicate():
            return one
    elif isinstance(p, Shard) and p.axis < last:
        if q == Replicate():
            return p
    elif isinstance(q, Shard) and q.axis == 1:
        if p == Replicate():
            return Shard(last, q.split, q.sizes)
    elif isinstance(p, Shard) or isinstance(q, Shard):
        return Partial("sum")
    else:
        return Replicate()
    name = a.mesh.axis_names[m]
    refuse(
        "matmul", [a, b], f"{p} and {q} along mesh axis {name!r} do not go together", _MATMUL_FIX
    )


@functools.lru_cache(maxsize=256)
def transpose(operand: Sharding, axes: tuple[int, ...] | None) -> tuple[Sharding, tuple[int, ...]]:
    """Return the sharding with its axes permuted, reversed for None, and the permutation."""
    ndim = operand.ndim
    order = tuple(reversed(range(ndim))) if axes is None else tuple(a % ndim for a in axes)
    if sorted(order) != list(range(ndim)):
        refuse("transpose", [operand], f"axes {axes} are no permutation", "name each axis once")
    placements = [
        Shard(order.index(p.axis), p.split, p.sizes) if isinstance(p, Shard) else p
        for p in operand.placements
    ]
    shape = [operand.shape[a] for a in order]
    return Sharding(operand.mesh, shape, placements, operand.order), order
