"""DistributedTensor: an array cut over a mesh, that knows who owns what."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from meshring import algebra, storage
from meshring.errors import UsageError
from meshring.exchange import Exchange
from meshring.mesh import DeviceMesh
from meshring.namespace import as_array, dtype_of, namespace_of
from meshring.partition import Partial, Placement, Placements, Replicate, Shard, Sharding
from meshring.planner import Plan, plan_between
from meshring.redistribute import exchange, run
from meshring.tensor_base import TensorBase


class DistributedTensor(TensorBase):
    """An array spread over the ranks of a mesh: this rank's part, and a placement per mesh axis.

    Made by shard(), from_local(), from_function(), zeros(), ones(), full(). Element-wise functions,
    sum, mean, max, min, prod, matmul and transpose keep or produce the right placements and never
    communicate; gather(), redistribute() and t[region] do, and every rank must call them.
    Errors: UsageError that names the operation, the placements and the way out.
    """

    # ---- made -------------------------------------------------------------------------------

    @classmethod
    def shard(cls, x: Any, mesh: DeviceMesh, placements: Placements = None) -> DistributedTensor:
        """Take this rank's part of x, the whole array, the same on every rank.

        Without communication. Shapes: any. Errors: UsageError where placements do not fit.
        """
        x = as_array(x, "DistributedTensor.shard", "x")
        sharding = _final(Sharding(mesh, x.shape, placements), "shard")
        if mesh.rank not in mesh:
            return cls(None, sharding, x)
        part = namespace_of(x).array(x[sharding.region(mesh.rank)])  # a copy
        return cls(part, sharding)

    @classmethod
    def from_local(
        cls,
        local: Any,
        mesh: DeviceMesh,
        placements: Placements = None,
        global_shape: Sequence[int] | None = None,
        *,
        like: Any = None,
    ) -> DistributedTensor:
        """Make a tensor of the parts that the ranks hold.

        Without global_shape, collective: the lengths of the parts are exchanged, and an axis that
        one mesh axis cuts takes them as sizes=. With it, without communication. like: an array for
        the dtype, on a rank that is not on the mesh (give global_shape there).
        Errors: UsageError where parts do not fit together.
        """
        if global_shape is None:
            local = as_array(local, "DistributedTensor.from_local", "local")
            return cls(local, _found(local, mesh, placements))
        return cls(local, Sharding(mesh, global_shape, placements), like)

    @classmethod
    def from_function(
        cls,
        fn: Callable[[tuple[slice, ...]], Any],
        shape: Sequence[int],
        mesh: DeviceMesh,
        placements: Placements = None,
    ) -> DistributedTensor:
        """Let each rank make its part: fn gets the slices of the whole that it is.

        Errors: UsageError when fn returns another shape.
        """
        sharding = _final(Sharding(mesh, shape, placements), "from_function")
        here = mesh.rank in mesh
        region = sharding.region(mesh.rank) if here else (slice(0, 0),) * len(sharding.shape)
        part = as_array(fn(region), "DistributedTensor.from_function", "fn(region)")
        return cls(part if here else None, sharding, part)

    @classmethod
    def full(
        cls,
        shape: Sequence[int],
        value: Any,
        mesh: DeviceMesh,
        placements: Placements = None,
        dtype: Any = "float64",
        *,
        like: Any = None,
    ) -> DistributedTensor:
        """Make a tensor with one value everywhere. like: a CuPy array for a tensor of CuPy's."""
        xp, wanted = namespace_of(like), dtype_of(dtype)

        def part(region: tuple[slice, ...]) -> Any:
            return xp.full([s.stop - s.start for s in region], value, wanted)

        return cls.from_function(part, shape, mesh, placements)

    @classmethod
    def zeros(
        cls,
        shape: Sequence[int],
        mesh: DeviceMesh,
        placements: Placements = None,
        dtype: Any = "float64",
        *,
        like: Any = None,
    ) -> DistributedTensor:
        """Make a tensor of zeros."""
        return cls.full(shape, 0, mesh, placements, dtype, like=like)

    @classmethod
    def ones(
        cls,
        shape: Sequence[int],
        mesh: DeviceMesh,
        placements: Placements = None,
        dtype: Any = "float64",
        *,
        like: Any = None,
    ) -> DistributedTensor:
        """Make a tensor of ones."""
        return cls.full(shape, 1, mesh, placements, dtype, like=like)

    # ---- moved ------------------------------------------------------------------------------

    def plan(self, placements: Placements, mesh: DeviceMesh | None = None) -> Plan:
        """Plan what redistribute() would do, to print or read before it runs."""
        target = Sharding(mesh or self.mesh, self.shape, placements)
        return plan_between(self.sharding.bare, target.bare, self.dtype)

    def redistribute(
        self, placements: Placements = None, mesh: DeviceMesh | None = None
    ) -> DistributedTensor:
        """Return the tensor with other placements, on this mesh or another of the same ranks.

        Collective over the ranks of both meshes: no rank receives an element twice or one that it
        holds. A tensor that is there already is returned as it is.
        Errors: UsageError where placements do not fit, and those of the operations in the plan.
        """
        return self._moved(Sharding(mesh or self.mesh, self.shape, placements))

    def _moved(self, target: Sharding) -> DistributedTensor:
        if target == self.sharding and target.mesh.communicator is self.mesh.communicator:
            return self
        way = plan_between(self.sharding.bare, target.bare, self.dtype)
        if not way.steps:
            return DistributedTensor(self.local_shard, target, self._sample)
        local = run(way, self.local_shard, self.mesh, target.mesh, self.xp)
        return DistributedTensor(local, target, self._sample)

    def gather(self, root: int | None = None) -> Any:
        """Return the whole array on every rank of the mesh, or on rank root only (None elsewhere).

        Collective. Errors: those of the operations in the plan. Source: MPI_Allgatherv.
        """
        if root is None:
            whole = self.redistribute(None)
            local = whole.local_shard
            return local.copy() if whole is self and local is not None else local
        if root not in self.mesh:
            raise UsageError(
                f"DistributedTensor.gather: argument 'root' is {root}, which is not on the mesh of "
                f"ranks {self.mesh.ranks.ravel().tolist()}"
            )
        alone = DeviceMesh(1, "root", self.mesh.communicator, ranks=[root])
        return self.redistribute(None, alone).local_shard

    def item(self) -> Any:
        """Return the one element as a Python number, on every rank. Collective."""
        if self.size != 1:
            raise UsageError(f"DistributedTensor.item: the tensor has {self.size} elements, not 1")
        return self.gather().item()

    def __getitem__(self, key: Any) -> Any:
        """Return a region of the whole as an array, on every rank; numbers and slices. Collective.

        Errors: UsageError for an index of another kind.
        """
        keys = _keys(key, self)
        if self.sharding.partial is not None:
            whole = [Replicate() if isinstance(p, Partial) else p for p in self.placements]
            return self.redistribute(whole)[key]
        bounds, inner = zip(*keys, strict=True) if keys else ((), ())
        shape = [end - start for start, end in bounds]
        region = Sharding(self.mesh, shape)
        comm = self.mesh.communicator
        if comm is None:
            return self.local_shard[key].copy()
        way = Exchange(self.sharding.bare, region.bare, [start for start, _ in bounds])
        found = exchange(comm, way, self.local_shard, self.dtype, self.xp)
        return None if found is None else found[inner]

    # ---- an array's methods -----------------------------------------------------------------

    @property
    def T(self) -> Any:
        """The tensor with its axes reversed; the local part is a view."""
        return algebra.transpose(self)

    def transpose(self, *axes: Any) -> Any:
        """Return the tensor with its axes permuted; the local part is a view."""
        given = axes[0] if len(axes) == 1 and not isinstance(axes[0], int) else axes
        return algebra.transpose(self, given)

    def astype(self, dtype: Any) -> Any:
        """Return the tensor in another dtype, with the same placements."""
        if self.sharding.partial is not None:
            raise UsageError(
                f"DistributedTensor.astype: placements {self.sharding.by_name()} hold operands of "
                "a reduction, which would be rounded each; redistribute first"
            )
        wanted = dtype_of(dtype)
        return self._make(
            (self._sample if self.local_shard is None else self.local_shard).astype(wanted),
            self.sharding,
        )

    def copy(self) -> Any:
        """Return a copy with an array of its own."""
        return self._make(
            (self._sample if self.local_shard is None else self.local_shard).copy(), self.sharding
        )

    def sum(self, axis: Any = None, keepdims: bool = False) -> Any:
        """Add up along axes; Partial("sum") along the mesh axes that cut them."""
        return algebra.reduction(self, "sum", axis, keepdims)

    def mean(self, axis: Any = None, keepdims: bool = False) -> Any:
        """Take the mean along axes; Partial("sum") along the mesh axes that cut them."""
        return algebra.reduction(self, "mean", axis, keepdims)

    def max(self, axis: Any = None, keepdims: bool = False) -> Any:
        """Take the largest along axes; Partial("max") along the mesh axes that cut them."""
        return algebra.reduction(self, "max", axis, keepdims)

    def min(self, axis: Any = None, keepdims: bool = False) -> Any:
        """Take the smallest along axes; Partial("min") along the mesh axes that cut them."""
        return algebra.reduction(self, "min", axis, keepdims)

    def prod(self, axis: Any = None, keepdims: bool = False) -> Any:
        """Multiply along axes; Partial("prod") along the mesh axes that cut them."""
        return algebra.reduction(self, "prod", axis, keepdims)

    # ---- NumPy's protocols ------------------------------------------------------------------

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        """Apply a ufunc to the local parts, where the placements of the result are known."""
        name = ufunc.__name__
        out = kwargs.pop("out", None)
        kept = {k: v for k, v in kwargs.items() if k in ("dtype", "casting")}
        if method == "reduce" and name in _REDUCED and out is None:
            axis = kwargs.get("axis", 0)
            return algebra.reduction(inputs[0], _REDUCED[name], axis, kwargs.get("keepdims", False))
        if method != "__call__" or len(kept) != len(kwargs):
            raise self._unknown(f"numpy.{name}" + ("" if method == "__call__" else f".{method}"))
        if out is not None and (len(out) != 1 or not isinstance(out[0], DistributedTensor)):
            raise self._unknown(f"numpy.{name} with out=")
        target = None if out is None else out[0]
        if ufunc is np.matmul and not kept and target is None:
            return algebra.matmul(*inputs)
        if ufunc.signature is not None:
            raise self._unknown(f"numpy.{name}")
        return algebra.elementwise(name, lambda *parts: ufunc(*parts, **kept), inputs, target)

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """Call the one of NumPy's functions that is known for tensors."""
        known = _FUNCTIONS.get(func.__name__)
        if known is None:
            raise self._unknown(f"numpy.{func.__name__}")
        try:
            inspect.signature(known).bind(*args, **kwargs)
        except TypeError as error:
            raise self._unknown(f"numpy.{func.__name__} with these arguments ({error})") from None
        return known(*args, **kwargs)

    def _unknown(self, name: str) -> UsageError:
        return UsageError(
            f"{name} is not known for DistributedTensors, here {self.shape} with placements "
            f"{self.sharding.by_name()}; use it on t.gather(), or on t.local_shard where each "
            "rank's part alone is meant"
        )

    # ---- files ------------------------------------------------------------------------------

    def to_file(self, path: Any) -> None:
        """Save to a folder: one .npy file for each different part, then a JSON manifest.

        Collective. An earlier save in the folder stays whole until this one's manifest is in place.
        Errors: UsageError for Partial placements; OSError from the file system, on every rank.
        """
        storage.save(self, path)

    @classmethod
    def from_file(
        cls, path: Any, mesh: DeviceMesh, placements: Placements = None, *, like: Any = None
    ) -> DistributedTensor:
        """Load from a folder of to_file(), on any number of ranks, reading only what is needed.

        placements: those that were saved, where None and the mesh has axes of those names.
        Errors: UsageError for a folder that is none, or is damaged.
        """
        sharding, local, sample = storage.load(path, mesh, placements, namespace_of(like))
        return cls(local, sharding, sample)


# ---- helpers --------------------------------------------------------------------------------


def _final(sharding: Sharding, what: str) -> Sharding:
    if sharding.partial is not None:
        raise UsageError(
            f"DistributedTensor.{what}: placements {sharding.by_name()} have a Partial, and the "
            "operands of the reduction are not known; use from_local() with each rank's operand"
        )
    return sharding


def _found(local: Any, mesh: DeviceMesh, placements: Placements) -> Sharding:
    """The sharding that the shapes of all ranks' parts make."""
    comm = mesh.comm() if mesh.size > 1 else None
    mine = np.array(local.shape, np.int64)
    if comm is None:
        return Sharding(mesh, local.shape, placements)
    ndims = comm.all_gather(np.array([local.ndim]))
    if (ndims != local.ndim).any():
        raise UsageError(
            f"DistributedTensor.from_local (rank {mesh.rank}): the parts have "
            f"{ndims.tolist()} axes by rank; one number of axes is needed"
        )
    shapes = comm.all_gather(mine[None]).reshape(*mesh.shape, local.ndim)
    probe = Sharding(mesh, (0,) * local.ndim, placements)
    whole, new = [], dict(enumerate(probe.placements))
    for axis, nest in enumerate(probe.nests):
        others = tuple(m for m in range(mesh.ndim) if m not in nest)
        lengths = shapes[(..., axis)].min(axis=others)
        whole.append(int(lengths.sum()) if nest else int(shapes[..., axis].max()))
        shard = probe.placements[nest[0]] if nest else None
        if len(nest) == 1 and isinstance(shard, Shard) and shard.sizes is None:
            cut = [shard.bounds(whole[-1], len(lengths), i) for i in range(len(lengths))]
            if [e - s for s, e in cut] != lengths.tolist():
                new[nest[0]] = Shard(axis, sizes=tuple(lengths.tolist()))
    found = Sharding(mesh, whole, list(new.values()))
    for rank in mesh.ranks.ravel().tolist():
        given = tuple(shapes[mesh.coordinate(rank)].tolist())
        if given != found.local_shape(rank):
            raise UsageError(
                f"DistributedTensor.from_local: rank {rank} has a part of shape {given}, and "
                f"{found} gives it {found.local_shape(rank)}; the parts do not fit together"
            )
    return found


def _keys(key: Any, t: DistributedTensor) -> list[tuple[tuple[int, int], Any]]:
    """For each axis, the range that is needed and the index into it."""
    given = list(key) if isinstance(key, tuple) else [key]
    dots = [i for i, k in enumerate(given) if k is Ellipsis]
    if len(dots) > 1 or len(given) - len(dots) > t.ndim:
        raise UsageError(f"DistributedTensor: index {key!r} does not fit the shape {t.shape}")
    fill: list[Any] = [slice(None)] * (t.ndim - len(given) + len(dots))
    at = dots[0] if dots else len(given)
    given[at : at + 1] = fill
    found: list[tuple[tuple[int, int], Any]] = []
    for axis, (k, n) in enumerate(zip(given, t.shape, strict=True)):
        if isinstance(k, slice):
            picked = range(n)[k]
            low, high = (min(picked), max(picked) + 1) if picked else (0, 0)
            step = picked.step
            inner = slice(None, None, step)
            found.append(((low, high), inner))
            continue
        try:
            i = -1 if isinstance(k, (bool, np.bool_)) else operator.index(k)
        except TypeError:
            i, k = n, type(k).__name__
        if isinstance(k, (bool, np.bool_)) or not -n <= i < n:
            raise UsageError(
                f"DistributedTensor: index {k!r} on axis {axis} of length {n}; integers in range "
                "and slices are known, for others use t.gather()"
            )
        found.append(((i % n, i % n + 1), 0))
    return found


_REDUCED = {"add": "sum", "maximum": "max", "minimum": "min", "multiply": "prod"}


def _reduces(name: str) -> Callable[..., Any]:
    def reduce(a: Any, axis: Any = None, out: None = None, keepdims: bool = False) -> Any:
        if out is not None:
            raise a._unknown(f"numpy.{name} with out=")
        return algebra.reduction(a, name, axis, keepdims)

    return reduce


def _where(condition: Any, x: Any, y: Any) -> Any:
    inputs = (condition, x, y)
    xp = next(i.xp for i in inputs if isinstance(i, DistributedTensor))
    return algebra.elementwise("where", xp.where, inputs)


def _clip(a: Any, a_min: Any = None, a_max: Any = None) -> Any:
    xp = next(i.xp for i in (a, a_min, a_max) if isinstance(i, DistributedTensor))
    return algebra.elementwise("clip", xp.clip, (a, a_min, a_max))


def _full_like(a: DistributedTensor, value: Any, dtype: Any = None) -> DistributedTensor:
    final: list[Placement] = [Replicate() if isinstance(p, Partial) else p for p in a.placements]
    like, dtype = a._sample, a.dtype if dtype is None else dtype
    return type(a).full(a.shape, value, a.mesh, final, dtype, like=like)


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{name: _reduces(name) for name in ("sum", "mean", "max", "min", "prod")},
    "amax": _reduces("max"),
    "amin": _reduces("min"),
    "transpose": lambda a, axes=None: algebra.transpose(a, axes),
    "where": _where,
    "clip": _clip,
    "dot": algebra.matmul,
    "copy": lambda a: a.copy(),
    "shape": lambda a: a.shape,
    "ndim": lambda a: a.ndim,
    "size": lambda a: a.size,
    "zeros_like": lambda a, dtype=None: _full_like(a, 0, dtype),
    "ones_like": lambda a, dtype=None: _full_like(a, 1, dtype),
    "full_like": lambda a, fill_value, dtype=None: _full_like(a, fill_value, dtype),
}
