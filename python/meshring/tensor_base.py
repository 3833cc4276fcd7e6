"""What a sharded tensor is: this rank's part, the sharding, and the arrays' module."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from meshring.errors import UsageError
from meshring.mesh import DeviceMesh
from meshring.namespace import as_array, namespace_of
from meshring.partition import Placement, Sharding, TensorPartition


class TensorBase(NDArrayOperatorsMixin):
    """The parts of a DistributedTensor that need no communication."""

    local_shard: Any
    """This rank's part, a NumPy or CuPy array; None on a rank that is not on the mesh."""

    def __init__(self, local_shard: Any, sharding: Sharding, like: Any = None) -> None:
        rank = sharding.mesh.rank
        here = rank in sharding.mesh
        sample = as_array(local_shard if here else like, "DistributedTensor", "local_shard")
        if here and tuple(local_shard.shape) != sharding.local_shape(rank):
            raise UsageError(
                f"DistributedTensor (rank {rank}): argument 'local_shard' has shape "
                f"{tuple(local_shard.shape)}, and {sharding} gives this rank "
                f"{sharding.local_shape(rank)}; use DistributedTensor.from_local to find the shape"
            )
        self.local_shard = local_shard if here else None
        self.sharding = sharding
        self._sample = (
            sample if here else namespace_of(sample).empty((0,) * self.ndim, sample.dtype)
        )

    def _make(self, local: Any, sharding: Sharding) -> Any:
        """A tensor of the same kind; local: its part, or on a rank off the mesh any like it.

        sharding: on a mesh equal to this one's, whose communicator the new tensor keeps.
        """
        sharding = sharding.on(self.mesh)
        return type(self)(
            local if self.sharding.mesh.rank in sharding.mesh else None, sharding, local
        )

    # ---- the seed's names -------------------------------------------------------------------

    @property
    def global_shape(self) -> tuple[int, ...]:
        """The shape of the whole tensor."""
        return self.sharding.shape

    @property
    def partition(self) -> TensorPartition | None:
        """This rank's part of the first axis that is cut, None where no axis is."""
        parts = self.partitions
        return parts[0] if parts else None

    @property
    def partitions(self) -> tuple[TensorPartition, ...]:
        """This rank's part of each axis that is cut."""
        rank = self.mesh.rank
        return self.sharding.partitions(rank) if rank in self.mesh else ()

    @property
    def device_id(self) -> int | None:
        """The device of this rank by the mesh, None off the mesh."""
        rank = self.mesh.rank
        return self.mesh.device_at(self.mesh.coordinate(rank)) if rank in self.mesh else None

    def local_shape(self) -> tuple[int, ...]:
        """Return the shape of this rank's part."""
        return () if self.local_shard is None else tuple(self.local_shard.shape)

    def requires_communication(self) -> bool:
        """Say whether a rank lacks a part of the tensor's value."""
        return any(
            n > 1 and p != q
            for n, p, q in zip(
                self.mesh.shape, self.placements, Sharding(self.mesh, ()).placements, strict=True
            )
        )

    # ---- an array's names -------------------------------------------------------------------

    @property
    def mesh(self) -> DeviceMesh:
        """The mesh that the tensor is spread over."""
        return self.sharding.mesh

    @property
    def placements(self) -> tuple[Placement, ...]:
        """One placement for each axis of the mesh."""
        return self.sharding.placements

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole tensor."""
        return self.sharding.shape

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.sharding.shape)

    @property
    def size(self) -> int:
        """The number of elements of the whole tensor."""
        return self.sharding.size

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype."""
        found: np.dtype[Any] = self._sample.dtype
        return found

    @property
    def xp(self) -> Any:
        """The module of the local array: numpy or cupy."""
        return namespace_of(self._sample)

    @property
    def nbytes(self) -> int:
        """The bytes of the whole tensor, once."""
        return self.size * self.dtype.itemsize

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of a tensor without axes")
        return self.shape[0]

    def __repr__(self) -> str:
        local = "no part here" if self.local_shard is None else f"local {self.local_shape()}"
        return f"DistributedTensor({self.shape}, {self.dtype}, {self.sharding.by_name()}, {local})"

    # ---- what an array does and this cannot -------------------------------------------------

    def _refuse(self, what: str) -> UsageError:
        return UsageError(
            f"{what} of a DistributedTensor {self.shape} with placements "
            f"{self.sharding.by_name()}: a rank has its part only; take t.gather() for the whole "
            "array on every rank, or t.local_shard for this rank's part"
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(np.ndarray, name):
            raise AttributeError(f"'DistributedTensor' object has no attribute {name!r}")
        raise AttributeError(
            f"a DistributedTensor has no {name}: a rank has its part only; use t.gather().{name} "
            f"for the whole, or t.local_shard.{name} for this rank's part"
        )

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        raise self._refuse("numpy.asarray()")

    def __bool__(self) -> bool:
        raise self._refuse("bool()")

    def __float__(self) -> float:
        raise self._refuse("float()")

    def __int__(self) -> int:
        raise self._refuse("int()")

    def __iter__(self) -> Any:
        raise self._refuse("iteration")

    def __setitem__(self, key: Any, value: Any) -> None:
        raise self._refuse("assignment to elements")
