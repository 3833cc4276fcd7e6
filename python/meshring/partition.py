"""Who owns what: splits of an axis, placements, and the sharding of a tensor over a mesh. Pure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from meshring.errors import UsageError
from meshring.mesh import DeviceMesh

Box = tuple[tuple[int, int], ...]
"""A region of a tensor: start and end along each axis."""

OPS = ("sum", "prod", "min", "max", "mean")
SPLITS = ("balanced", "ceil")
Index = TypeVar("Index", int, "NDArray[np.int64]")


@dataclass(frozen=True)
class Shard:
    """Cut a tensor axis along a mesh axis.

    split: "balanced" (numpy.array_split: lengths differ by at most one) or "ceil" (parts of
    ceil(length / parts), the last ones shorter or empty; torch's rule). sizes: the length of each
    part instead, zeros allowed.
    """

    axis: int
    split: str = "balanced"
    sizes: tuple[int, ...] | None = None
    offsets: tuple[int, ...] = field(default=(), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.axis, (int, np.integer)) or isinstance(self.axis, bool):
            raise UsageError(f"Shard: argument 'axis' is {self.axis!r}; give a tensor axis, 0 say")
        if self.split not in SPLITS:
            raise UsageError(
                f"Shard: argument 'split' is {self.split!r}; give 'balanced' or 'ceil', or the "
                "length of each part by sizes="
            )
        if self.sizes is None:
            return
        try:
            sizes = tuple(s.__index__() for s in self.sizes)
        except (TypeError, AttributeError):
            sizes = (-1,)
        if not sizes or min(sizes) < 0:
            raise UsageError(
                f"Shard: argument 'sizes' is {self.sizes!r}; give one length >= 0 for each part"
            )
        object.__setattr__(self, "sizes", sizes)
        object.__setattr__(self, "offsets", tuple(itertools.accumulate(sizes, initial=0)))

    def bounds(self, length: Index, parts: int, index: Index) -> tuple[Index, Index]:
        """Return start and end of a part, in O(1); arrays of lengths or parts work too."""
        if self.sizes is not None:
            if isinstance(index, np.ndarray):
                table = np.array(self.offsets, np.int64)
                return table[index], table[index + 1]
            return self.offsets[index], self.offsets[index + 1]
        least: Any = np.minimum if isinstance(index + length, np.ndarray) else min
        if self.split == "ceil":
            chunk = -(-length // parts)
            return least(index * chunk, length), least((index + 1) * chunk, length)
        q, r = length // parts, length % parts
        return index * q + least(index, r), (index + 1) * q + least(index + 1, r)

    def __repr__(self) -> str:
        if self.sizes is not None:
            return f"Shard({self.axis}, sizes={self.sizes})"
        return f"Shard({self.axis})" if self.split == "balanced" else f"Shard({self.axis}, 'ceil')"


@dataclass(frozen=True)
class Replicate:
    """Every rank along the mesh axis holds the same."""

    def __repr__(self) -> str:
        return "Replicate()"


@dataclass(frozen=True)
class Partial:
    """Every rank along the mesh axis holds one operand of a reduction that is still to be done."""

    op: str = "sum"

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise UsageError(f"Partial: argument 'op' is {self.op!r}; give one of {', '.join(OPS)}")

    def __repr__(self) -> str:
        return f"Partial({self.op!r})"


Placement = Shard | Replicate | Partial
Placements = Placement | int | Sequence[Placement | int] | Mapping[str, Placement | int] | None


def placements_of(given: Placements, mesh: DeviceMesh) -> tuple[Placement, ...]:
    """Return one placement for each axis of the mesh.

    given: {"tp": 1} or {"tp": Shard(1)} by the names of mesh axes, the others being replicated; or
    one for each mesh axis in order; a number n stands for Shard(n); None replicates all.
    """
    if given is None:
        return (Replicate(),) * mesh.ndim
    if isinstance(given, (Shard, Replicate, Partial, int, np.integer)):
        given = [given]
    if isinstance(given, Mapping):
        for name in given:
            mesh.axis_index(name)
        given = [given.get(name, Replicate()) for name in mesh.axis_names]
    if not isinstance(given, Sequence) or isinstance(given, str) or len(given) != mesh.ndim:
        raise UsageError(
            f"placements {given!r} do not fit a mesh with axes {mesh.axis_names}; give a dict such "
            f'as {{"{mesh.axis_names[-1]}": 0}}, or one placement for each mesh axis'
        )
    found: list[Placement] = []
    for item in given:
        if isinstance(item, (int, np.integer)) and not isinstance(item, bool):
            item = Shard(int(item))
        if not isinstance(item, (Shard, Replicate, Partial)):
            raise UsageError(
                f"placement {item!r} is none; give Shard(axis), Replicate(), Partial(op), or the "
                "number of a tensor axis"
            )
        found.append(item)
    return tuple(found)


@dataclass(frozen=True)
class TensorPartition:
    """The part of one tensor axis that a rank owns: indices start_idx up to end_idx."""

    split_dim: int
    start_idx: int
    end_idx: int
    num_partitions: int
    partition_rank: int

    @classmethod
    def of(
        cls,
        length: int,
        num_partitions: int,
        partition_rank: int,
        split_dim: int = 0,
        split: str = "ceil",
    ) -> TensorPartition:
        """Return the part of an axis of that length; the default rule is ceil-div, clamped."""
        if length < 0 or not 0 <= partition_rank < num_partitions:
            raise UsageError(
                f"TensorPartition.of: length {length}, part {partition_rank} of {num_partitions}; "
                "length >= 0 and 0 <= partition_rank < num_partitions are needed"
            )
        start, end = Shard(split_dim, split).bounds(length, num_partitions, partition_rank)
        return cls(split_dim, start, end, num_partitions, partition_rank)

    @property
    def size(self) -> int:
        """The number of indices."""
        return self.end_idx - self.start_idx


class Sharding:
    """A tensor's shape, its mesh and a placement for each mesh axis. Immutable, equal by value.

    Several mesh axes may cut one tensor axis: `order`, that of the mesh by default, says which
    cuts first. Errors: UsageError where placements do not fit the shape or the mesh.
    """

    __slots__ = ("_bare", "_cuts", "_hash", "mesh", "nests", "order", "placements", "shape")

    def __init__(
        self,
        mesh: DeviceMesh,
        shape: Sequence[int],
        placements: Placements = None,
        order: Sequence[int] | None = None,
    ) -> None:
        self.mesh = mesh
        self.shape = tuple(int(n) for n in shape)
        self.order = tuple(range(mesh.ndim)) if order is None else tuple(order)
        if min(self.shape, default=0) < 0:
            raise UsageError(f"Sharding: argument 'shape' is {self.shape}; lengths >= 0 are needed")
        given = placements_of(placements, mesh)
        self.placements = tuple(self._checked(p, m) for m, p in enumerate(given))
        if len({p.op for p in self.placements if isinstance(p, Partial)}) > 1:
            raise UsageError(
                f"Sharding: placements {self.placements} mix the operations of Partial, whose "
                "order would matter; reduce one of them first"
            )
        nests: list[list[int]] = [[] for _ in self.shape]
        for m in self.order:
            p = self.placements[m]
            if isinstance(p, Shard):
                nests[p.axis].append(m)
        self.nests = tuple(map(tuple, nests))
        """For each tensor axis, the mesh axes that cut it, the first cut first."""
        self._hash: int | None = None
        self._bare: Sharding | None = None
        self._cuts: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
        for axis, nest in enumerate(self.nests):
            if any(self._shard(m).sizes is not None for m in nest):
                self.cuts(axis)  # checks that the sizes fit

    def on(self, mesh: DeviceMesh) -> Sharding:
        """Return the same sharding on an equal mesh, whose communicator may be another."""
        if self.mesh is mesh:
            return self
        twin = object.__new__(Sharding)
        for name in self.__slots__:
            setattr(twin, name, getattr(self, name))
        twin.mesh = mesh
        twin._bare = None if mesh.communicator is None else self.bare
        return twin

    @property
    def bare(self) -> Sharding:
        """The same sharding on the mesh without its communicator: what caches may keep."""
        parts = self.mesh._runtime
        if parts.comm is None:
            return self
        if self._bare is None:
            if parts.bare is None:
                parts.bare = self.mesh.with_comm(None)
            self._bare = self.on(parts.bare)
        return self._bare

    def _checked(self, placement: Placement, m: int) -> Placement:
        if not isinstance(placement, Shard):
            return placement
        axis, ndim = int(placement.axis), len(self.shape)
        if not -ndim <= axis < ndim:
            raise UsageError(
                f"Sharding: {placement} along mesh axis {self.mesh.axis_names[m]!r}: a tensor of "
                f"shape {self.shape} has no axis {axis}; give one from {-ndim} to {ndim - 1}"
            )
        if placement.sizes is not None and len(placement.sizes) != self.mesh.shape[m]:
            raise UsageError(
                f"Sharding: {placement} has {len(placement.sizes)} sizes, and mesh axis "
                f"{self.mesh.axis_names[m]!r} has length {self.mesh.shape[m]}"
            )
        return Shard(axis % ndim, placement.split, placement.sizes)

    def _shard(self, m: int) -> Shard:
        placement = self.placements[m]
        assert isinstance(placement, Shard)
        return placement

    @property
    def ndim(self) -> int:
        """The number of axes of the tensor."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of elements of the tensor."""
        return math.prod(self.shape)

    @property
    def partial(self) -> str | None:
        """The operation of the reduction that is still to be done, None where there is none."""
        return next((p.op for p in self.placements if isinstance(p, Partial)), None)

    def box(self, rank: int) -> Box:
        """Return the region that a rank owns, in O(1): start and end along each axis."""
        at = self.mesh.coordinate(rank)
        found = []
        for length, nest in zip(self.shape, self.nests, strict=True):
            start, end = 0, length
            for m in nest:
                first, last = self._shard(m).bounds(end - start, self.mesh.shape[m], at[m])
                start, end = start + first, start + last
            found.append((start, end))
        return tuple(found)

    def region(self, rank: int) -> tuple[slice, ...]:
        """Return the region that a rank owns as slices: full[sharding.region(rank)]."""
        return tuple(slice(start, end) for start, end in self.box(rank))

    def local_shape(self, rank: int) -> tuple[int, ...]:
        """Return the shape of what a rank holds."""
        return tuple(end - start for start, end in self.box(rank))

    def partitions(self, rank: int) -> tuple[TensorPartition, ...]:
        """Return the part of each axis that is cut, for one rank."""
        at = self.mesh.coordinate(rank)
        found = []
        for axis, ((start, end), nest) in enumerate(zip(self.box(rank), self.nests, strict=True)):
            if nest:
                lengths = [self.mesh.shape[m] for m in nest]
                place = 0
                for m, n in zip(nest, lengths, strict=True):
                    place = place * n + at[m]
                found.append(TensorPartition(axis, start, end, math.prod(lengths), place))
        return tuple(found)

    def cuts(self, axis: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return starts and ends of all parts of a tensor axis, one array axis per cutting axis."""
        if axis not in self._cuts:
            start = np.zeros((), np.int64)
            end = np.full((), self.shape[axis], np.int64)
            for m in self.nests[axis]:
                shard, n = self._shard(m), self.mesh.shape[m]
                length = (end - start)[..., None]
                if shard.sizes is not None and (length != shard.offsets[-1]).any():
                    raise UsageError(
                        f"Sharding: {shard} along mesh axis {self.mesh.axis_names[m]!r} adds up to "
                        f"{shard.offsets[-1]}, and axis {axis} of the tensor has "
                        f"{' or '.join(map(str, sorted(set(length.ravel().tolist()))))} there"
                    )
                index = np.arange(n)
                first, last = shard.bounds(length, n, index)
                start, end = start[..., None] + first, start[..., None] + last
            self._cuts[axis] = (start, end)
        return self._cuts[axis]

    def cuts_by_place(self, axis: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return starts and ends along a tensor axis, in arrays that broadcast to the mesh."""
        nest = self.nests[axis]
        shape = [n if m in nest else 1 for m, n in enumerate(self.mesh.shape)]
        turn = np.argsort(nest, kind="stable") if nest else ()
        start, end = (a.transpose(turn).reshape(shape) for a in self.cuts(axis))
        return start, end

    def nested(self, nests: Sequence[Sequence[int]], shards: Mapping[int, Placement]) -> Sharding:
        """Return the sharding with other cuts; `shards` has a placement for each mesh axis."""
        cut = [m for nest in nests for m in nest]
        order = cut + [m for m in range(self.mesh.ndim) if m not in cut]
        if all(list(nest) == sorted(nest) for nest in nests):
            order = list(range(self.mesh.ndim))
        return Sharding(self.mesh, self.shape, [shards[m] for m in range(self.mesh.ndim)], order)

    def same_regions(self, other: Sharding) -> bool:
        """Say whether every rank owns the same region in both, on one mesh."""
        for axis in range(self.ndim):
            for mine, theirs in zip(
                self.cuts_by_place(axis), other.cuts_by_place(axis), strict=True
            ):
                if not np.array_equal(
                    np.broadcast_to(mine, self.mesh.shape), np.broadcast_to(theirs, self.mesh.shape)
                ):
                    return False
        return True

    def by_name(self) -> str:
        """Return the placements as text, by the names of the mesh axes."""
        names = self.mesh.axis_names
        text = ", ".join(f"{n}: {p}" for n, p in zip(names, self.placements, strict=True))
        return "{" + text + "}"

    def _key(self) -> tuple[Any, ...]:
        return (self.shape, self.placements, self.nests, self.mesh)

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, Sharding) and self._key() == other._key()

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = hash(self._key())
        return self._hash

    def __repr__(self) -> str:
        return f"Sharding({self.shape}, {self.by_name()})"
