"""Applies the rules of rules.py to the local parts of tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from meshring import rules
from meshring.partition import Sharding
from meshring.tensor_base import TensorBase

_MAKE_ONE = "make it one: DistributedTensor.shard(x, t.mesh, placements), {} for replicated"


def _local(t: TensorBase) -> Any:
    """This rank's part; off the mesh, nothing of the same dtype."""
    return t._sample if t.local_shard is None else t.local_shard


def _part(t: TensorBase, index: tuple[Any, ...] | None) -> Any:
    local = _local(t)
    return local if index is None else local[index]


def shardings_of(tensors: Sequence[TensorBase]) -> list[Sharding]:
    """Return what the tensors' errors show."""
    return [t.sharding for t in tensors]


def _sharding(name: str, x: Any, tensors: Sequence[TensorBase]) -> Any:
    """The sharding of a tensor, None for a number; other arrays are refused."""
    if isinstance(x, TensorBase):
        return x.sharding.bare
    if getattr(x, "shape", ()):
        why = f"the other operand is a plain array {x.shape}, which could be the whole or a part"
        rules.refuse(name, shardings_of(tensors), why, _MAKE_ONE)
    return None


def elementwise(
    name: str, fn: Callable[..., Any], inputs: Sequence[Any], out: TensorBase | None = None
) -> Any:
    """Apply fn to the local parts of tensors and numbers that broadcast together."""
    tensors = [x for x in inputs if isinstance(x, TensorBase)]
    first = tensors[0]
    shardings = tuple(_sharding(name, x, tensors) for x in inputs)
    result, indices = rules.elementwise(name, shardings, first.mesh.rank)
    if out is not None and out.sharding != result:
        rules.refuse(
            name,
            shardings_of((*tensors, out)),
            f"the result would have placements {result.by_name()}, not those of out",
            "leave out= away, or redistribute first",
        )
    index = iter(indices)
    local = fn(*(_part(x, next(index)) if isinstance(x, TensorBase) else x for x in inputs))
    if out is not None:
        if not np.can_cast(local.dtype, out.dtype, "same_kind"):
            why = f"the result is {local.dtype} and out is {out.dtype}"
            rules.refuse(name, shardings_of(tensors), why, "cast it with t.astype() first")
        if out.local_shard is not None:
            out.local_shard[...] = local
        return out
    if isinstance(local, tuple):
        return tuple(first._make(first.xp.asarray(v), result) for v in local)
    return first._make(first.xp.asarray(local), result)


def reduction(t: TensorBase, name: str, axis: Any = None, keepdims: bool = False) -> Any:
    """Reduce along tensor axes: sum, mean, max, min, prod; Partial where they are cut."""
    axes = rules.axes_of(t.sharding, name, axis)
    result = rules.reduction(t.sharding.bare, name, axes, bool(keepdims))
    count = math.prod(t.shape[a] for a in axes)
    value = _reduced(t.xp, _local(t), name, axes, keepdims, count)
    return t._make(t.xp.asarray(value), result)


def _reduced(
    xp: Any, local: Any, name: str, among: frozenset[int], keepdims: bool, count: int
) -> Any:
    axes = tuple(sorted(among))
    if name == "mean":
        wide = xp.float32 if local.dtype == np.float16 else None
        narrow = local.dtype if local.dtype.kind in "fc" else np.dtype(np.float64)
        total = xp.sum(local, axis=axes, keepdims=keepdims, dtype=wide)
        return xp.asarray(xp.true_divide(total, count)).astype(narrow)
    if name in ("max", "min") and any(local.shape[a] == 0 for a in axes):
        shape = rules.kept_shape(local.shape, among, keepdims)
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


def matmul(a: Any, b: Any) -> Any:
    """Multiply (..., m, k) by (k, n): column-parallel, row-parallel (then Partial), or by rows."""
    tensors = [x for x in (a, b) if isinstance(x, TensorBase)]
    if len(tensors) != 2:
        rules.refuse(
            "matmul", shardings_of(tensors), "the other operand is a plain array", _MAKE_ONE
        )
    result, (left, right) = rules.matmul(a.sharding.bare, b.sharding.bare, a.mesh.rank)
    if a.local_shard is None:
        return a._make(a.xp.empty((0,) * a.ndim, np.result_type(a.dtype, b.dtype)), result)
    return a._make(_part(a, left) @ _part(b, right), result)


def transpose(t: TensorBase, axes: Sequence[int] | None = None) -> Any:
    """Permute the axes, reversed by default; the local part is a view."""
    wanted = tuple(int(a) for a in axes) if axes else None
    result, order = rules.transpose(t.sharding.bare, wanted)
    local = _local(t)
    return t._make(local.transpose(order) if local.ndim == len(order) else local, result)
