"""The communicators along the axes of a mesh: made once, in one safe order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from meshring import mesh_text
from meshring.communicator import Communicator
from meshring.errors import UsageError

if TYPE_CHECKING:
    from meshring.mesh import DeviceMesh


class Parts:
    """The communicators that a mesh has made: what is not its value."""

    def __init__(self, comm: Communicator | None, whole: DeviceMesh | None = None) -> None:
        self.comm = comm
        self.whole = whole
        self.bare: DeviceMesh | None = None
        self.made: dict[tuple[str, ...], Communicator | None] = {}

    def get(self, mesh: DeviceMesh, axes: Sequence[str]) -> Communicator | None:
        """Return the communicator along these axes; collective where it has to be made."""
        names = tuple(n for n in mesh.axis_names if n in axes)
        if self.comm is None:
            raise UsageError(
                f"{mesh_text.title(mesh)} has no communicator; make it with one: "
                "DeviceMesh(shape, names, meshring.init())"
            )
        whole = mesh.size == self.comm.size and bool((np.diff(mesh.ranks.ravel()) == 1).all())
        if whole and math.prod(map(mesh.axis_size, names)) == mesh.size:
            return self.comm
        if not self.made:
            for i, name in enumerate(mesh.axis_names):
                self.made[(name,)] = self._split(mesh, [i])
        if names not in self.made:
            self.made[names] = self._split(mesh, [mesh.axis_index(n) for n in names])
        return self.made[names]

    def ready(self, mesh: DeviceMesh) -> bool:
        """Say whether the ranks of the mesh alone can get communicators along its axes."""
        return self.comm is None or mesh.size == self.comm.size or bool(self.made)

    def _split(self, mesh: DeviceMesh, kept: list[int]) -> Communicator | None:
        assert self.comm is not None
        if self.comm.rank not in mesh:
            self.comm.split(None)
            return None
        at = mesh.coordinate()
        other, key, size = 0, 0, 1
        for i, (c, length) in enumerate(zip(at, mesh.shape, strict=True)):
            if i in kept:
                key, size = key * length + c, size * length
            else:
                other = other * length + c
        color = sum(1 << i for i in kept) * mesh.size + other  # of no other set of axes
        part = self.comm.split(color, key)
        if part is None or part.size != size:
            got = 0 if part is None else part.size
            raise UsageError(
                f"DeviceMesh.comm (rank {self.comm.rank}/{self.comm.size}): {got} ranks came to a "
                f"group of {size}; all ranks must ask for the same axes, of equal meshes, in one "
                "order"
            )
        self.comm._adopt(part)
        return part

    def close(self) -> None:
        """Close what was made."""
        for part in self.made.values():
            if part is not None:
                part.close()
        self.made.clear()
