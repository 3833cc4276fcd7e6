"""Which placement a result has: element-wise functions, reductions, matmul, transpose.

Nothing here communicates. A replicated operand is sliced where the result is sharded; a reduction
over a sharded axis leaves Partial; what would need data of other ranks is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np

from meshring.errors import UsageError
from meshring.partition import Box, Partial, Placement, Replicate, Shard, Sharding
from meshring.redistribute import relative
from meshring.tensor_base import TensorBase

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


def _refuse(name: str, tensors: Sequence[TensorBase], why: str, fix: str) -> NoReturn:
    given = " and ".join(f"{t.shape} {t.sharding.by_name()}" for t in tensors)
    raise UsageError(f"{name} of DistributedTensors {given}: {why}; {fix}")


# ---- element by element ---------------------------------------------------------------------


def elementwise(
    name: str, fn: Callable[..., Any], inputs: Sequence[Any], out: TensorBase | None = None
) -> Any:
    """Apply fn to the local parts of tensors and numbers that broadcast together."""
    tensors = [x for x in inputs if isinstance(x, TensorBase)]
    first = tensors[0]
    for x in inputs:
        if not isinstance(x, TensorBase) and hasattr(x, "shape") and x.shape:
            _refuse(
                name,
                tensors,
                f"the other operand is a plain array of shape {x.shape}, which could be the whole "
                "or a part",
                "make it one: DistributedTensor.shard(x, t.mesh, placements), {} for replicated",
            )
    for t in tensors:
        if t.mesh != first.mesh:
            _refuse(name, tensors, "their meshes differ", "t.redistribute(placements, mesh)")
    try:
        shape = np.broadcast_shapes(*(t.shape for t in tensors))
    except ValueError:
        _refuse(name, tensors, "the shapes do not broadcast together", "make them fit")
    placements = [
        _partial_result(name, inputs, tensors, m) or _cut_result(tensors, m, len(shape))
        for m in range(first.mesh.ndim)
    ]
    order = next((t.sharding.order for t in tensors if any(t.sharding.nests)), None)
    result = Sharding(first.mesh, shape, placements, order)
    if out is not None and out.sharding != result:
        _refuse(
            name,
            [*tensors, out],
            f"the result would have placements {result.by_name()}, not those of out",
            "leave out= away, or redistribute first",
        )
    boxes = [_needed(t, result) for t in tensors]
    for t in tensors:
        if not _holds(t, result):
            _refuse(
                name,
                tensors,
                f"the result is sharded as {result.by_name()} and needs parts that a rank does "
                "not hold",
                "redistribute one to the placements of the other",
            )
    parts = iter(_part(t, box) for t, box in zip(tensors, boxes, strict=True))
    local = fn(*(next(parts) if isinstance(x, TensorBase) else x for x in inputs))
    if out is not None:
        if out.local_shard is not None:
            out.local_shard[...] = local
        return out
    many = tuple(first._make(_shaped(first, v, result), result) for v in _several(local))
    return many if isinstance(local, tuple) else many[0]


def _several(local: Any) -> tuple[Any, ...]:
    return local if isinstance(local, tuple) else (local,)


def _shaped(t: TensorBase, local: Any, sharding: Sharding) -> Any:
    """An array even of no axes; what NumPy returned may be a scalar."""
    return t.xp.asarray(local)


def _partial_result(
    name: str, inputs: Sequence[Any], tensors: Sequence[TensorBase], m: int
) -> Placement | None:
    """Partial where an operand is, and the function goes through the reduction."""
    found = [t.placements[m] for t in tensors if isinstance(t.placements[m], Partial)]
    if not found:
        return None
    partial = found[0]
    assert isinstance(partial, Partial)
    linear = partial.op in ("sum", "mean")
    alone = len(inputs) == len(found)
    if alone and all(p == partial for p in found):
        through = _ADDITIVE.get(name)
        if through is not None and (partial.op == through or (linear and through == "sum")):
            return partial
    if name in _LINEAR and linear:
        return partial
    if name in _SCALING and linear and len(found) == 1:
        dividend = isinstance(inputs[0], TensorBase) and inputs[0].placements[m] == partial
        if name == "multiply" or dividend:
            return partial
    axis = tensors[0].mesh.axis_names[m]
    _refuse(
        name,
        tensors,
        f"the reduction along mesh axis {axis!r} is still to be done, and {name} of the operands "
        "is not the operand of the result",
        f"redistribute the Partial axis {axis!r} to Replicate() or Shard(axis) first",
    )


def _cut_result(tensors: Sequence[TensorBase], m: int, ndim: int) -> Placement:
    for t in tensors:
        p = t.placements[m]
        if isinstance(p, Shard):
            return Shard(p.axis + ndim - t.ndim, p.split, p.sizes)
    return Replicate()


def _needed(t: TensorBase, result: Sharding) -> Box:
    """The region of an operand that this rank's part of the result needs."""
    rank = t.mesh.rank
    if rank not in t.mesh:
        return ((0, 0),) * t.ndim
    wanted = result.box(rank)[result.ndim - t.ndim :]
    return tuple(
        (0, 1) if n == 1 and r != 1 else box
        for n, r, box in zip(t.shape, result.shape[result.ndim - t.ndim :], wanted, strict=True)
    )


def _holds(t: TensorBase, result: Sharding) -> bool:
    """Whether every rank holds what its part of the result needs."""
    for axis in range(t.ndim):
        target = axis + result.ndim - t.ndim
        mine = t.sharding.cuts_by_place(axis)
        if t.shape[axis] == 1 and result.shape[target] != 1:
            wanted: Any = (np.zeros((), int), np.ones((), int))
        else:
            wanted = result.cuts_by_place(target)
        if not contains(mine, wanted):
            return False
    return True


def contains(mine: Any, wanted: Any) -> bool:
    """Say whether intervals lie in others, at every place of the mesh; empty ones do."""
    (low, high), (start, end) = mine, wanted
    return bool((((low <= start) & (end <= high)) | (start >= end)).all())


def _part(t: TensorBase, box: Box) -> Any:
    rank = t.mesh.rank
    if rank not in t.mesh:
        return t._sample
    held = t.sharding.box(rank)
    if box == held:
        return t.local_shard
    return t.local_shard[relative(tuple((s, max(s, e)) for s, e in box), held)]


# ---- reductions -----------------------------------------------------------------------------


def reduction(t: TensorBase, name: str, axis: Any = None, keepdims: bool = False) -> Any:
    """Reduce along tensor axes: sum, mean, max, min, prod; Partial where they are cut."""
    axes = _axes(t, name, axis)
    placements: list[Placement] = []
    for m, p in enumerate(t.placements):
        if isinstance(p, Partial) and p.op not in _COMMUTES[name]:
            _refuse(
                name,
                [t],
                f"{name} does not go through the {p.op} along mesh axis "
                f"{t.mesh.axis_names[m]!r} that is still to be done",
                "redistribute that axis to Replicate() or Shard(axis) first",
            )
        if isinstance(p, Shard) and p.axis in axes:
            p = Partial("sum" if name == "mean" else name)
        elif isinstance(p, Shard) and not keepdims:
            p = Shard(p.axis - sum(a < p.axis for a in axes), p.split, p.sizes)
        placements.append(p)
    kept = [1 if a in axes else n for a, n in enumerate(t.shape)]
    shape = kept if keepdims else [n for a, n in enumerate(t.shape) if a not in axes]
    result = Sharding(t.mesh, shape, placements, t.sharding.order)
    local = t._sample if t.local_shard is None else t.local_shard
    count = math.prod(t.shape[a] for a in axes)
    if count == 0 and name in ("max", "min"):
        _refuse(name, [t], "the axes to reduce have no elements", "give axes with a length > 0")
    value = _reduced(t.xp, local, name, tuple(sorted(axes)), keepdims, count)
    return t._make(_shaped(t, value, result), result)


def _axes(t: TensorBase, name: str, axis: Any) -> set[int]:
    given = range(t.ndim) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    found = set()
    for a in given:
        if not isinstance(a, (int, np.integer)) or not -t.ndim <= a < t.ndim:
            _refuse(name, [t], f"axis {a!r} is none of its {t.ndim}", "give an axis that it has")
        found.add(int(a) % t.ndim)
    return found


def _reduced(
    xp: Any, local: Any, name: str, axes: tuple[int, ...], keepdims: bool, count: int
) -> Any:
    if name == "mean":
        wide = xp.float32 if local.dtype == np.float16 else None
        narrow = local.dtype if local.dtype.kind in "fc" else np.dtype(np.float64)
        total = xp.sum(local, axis=axes, keepdims=keepdims, dtype=wide)
        return xp.asarray(xp.true_divide(total, count)).astype(narrow)
    if name in ("max", "min") and any(local.shape[a] == 0 for a in axes):
        shape = [1 if a in axes else n for a, n in enumerate(local.shape)]
        if not keepdims:
            shape = [n for a, n in enumerate(local.shape) if a not in axes]
        return xp.full(shape, _least(local.dtype, name), local.dtype)
    return getattr(xp, name)(local, axis=axes, keepdims=keepdims)


def _least(dtype: np.dtype[Any], name: str) -> Any:
    """What max or min of nothing is."""
    low = name == "max"
    if dtype.kind == "b":
        return not low
    if dtype.kind in "iu":
        return np.iinfo(dtype).min if low else np.iinfo(dtype).max
    return -np.inf if low else np.inf


# ---- products and views ---------------------------------------------------------------------


def matmul(a: Any, b: Any) -> Any:
    """Multiply (..., m, k) by (k, n): column-parallel, row-parallel (then Partial), or by rows."""
    tensors = [x for x in (a, b) if isinstance(x, TensorBase)]
    if len(tensors) != 2:
        _refuse(
            "matmul",
            tensors,
            "the other operand is a plain array",
            "make it one: DistributedTensor.shard(x, t.mesh, placements), {} for replicated",
        )
    if a.ndim < 2 or b.ndim != 2 or a.shape[-1] != b.shape[0]:
        _refuse("matmul", tensors, "shapes (..., m, k) and (k, n) are needed", "make them fit")
    if a.mesh != b.mesh:
        _refuse("matmul", tensors, "their meshes differ", "t.redistribute(placements, mesh)")
    last = a.ndim - 1
    placements = [_product(a, b, m, last) for m in range(a.mesh.ndim)]
    order = a.sharding.order if any(a.sharding.nests) else b.sharding.order
    result = Sharding(a.mesh, (*a.shape[:-1], b.shape[1]), placements, order)
    inner, axis = (a.sharding, last) if a.sharding.nests[last] else (b.sharding, 0)
    shared = inner.cuts_by_place(axis)
    fits = contains(a.sharding.cuts_by_place(last), shared)
    fits &= contains(b.sharding.cuts_by_place(0), shared)
    fits &= all(contains(a.sharding.cuts_by_place(i), result.cuts_by_place(i)) for i in range(last))
    fits &= contains(b.sharding.cuts_by_place(1), result.cuts_by_place(last))
    if not fits:
        _refuse("matmul", tensors, "the operands are not cut alike", _MATMUL_FIX)
    rank = a.mesh.rank
    if rank not in a.mesh:
        return a._make(a.xp.empty((0,) * a.ndim, np.result_type(a.dtype, b.dtype)), result)
    k = inner.box(rank)[axis]
    box = result.box(rank)
    left = _part(a, (*box[:-1], k))
    right = _part(b, (k, box[-1]))
    return a._make(left @ right, result)


_MATMUL_FIX = (
    "of each mesh axis: cut rows of the first, or columns of the second, or k of both (then the "
    "result is Partial), and replicate the other operand; redistribute to that"
)


def _product(a: TensorBase, b: TensorBase, m: int, last: int) -> Placement:
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
    _refuse(
        "matmul", [a, b], f"{p} and {q} along mesh axis {name!r} do not go together", _MATMUL_FIX
    )


def transpose(t: TensorBase, axes: Sequence[int] | None = None) -> Any:
    """Permute the axes, reversed by default; the local part is a view."""
    order = tuple(reversed(range(t.ndim))) if not axes else tuple(int(a) % t.ndim for a in axes)
    if sorted(order) != list(range(t.ndim)):
        _refuse("transpose", [t], f"axes {axes} are no permutation", "name each axis once")
    placements = [
        Shard(order.index(p.axis), p.split, p.sizes) if isinstance(p, Shard) else p
        for p in t.placements
    ]
    shape = [t.shape[a] for a in order]
    result = Sharding(t.mesh, shape, placements, t.sharding.order)
    local = t._sample if t.local_shard is None else t.local_shard
    return t._make(local.transpose(order), result)
