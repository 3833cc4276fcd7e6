"""Named axes over ranks: DeviceMesh. Pure but for comm(), which splits the communicator."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshring import mesh_text
from meshring.communicator import Communicator
from meshring.errors import UsageError
from meshring.mesh_checks import axis_names as checked_names
from meshring.mesh_checks import check_communicator, check_ranks, checked_devices, integers
from meshring.mesh_comm import Parts
from meshring.mesh_layout import cut, merged, sliced
from meshring.topology import (
    ASSUMED,
    Grid2D,
    Grid3D,
    Linear,
    Link,
    ModelParallelStrategy,
    Network,
    Topology,
    arrange,
    crossing_groups,
    strategy_shape,
    topology_of,
    topology_shape,
)

Coordinate = Sequence[int] | Mapping[str, int]


class DeviceMesh:
    """Ranks in a grid with named axes. Immutable, hashable, equal by value; needs no processes.

    DeviceMesh((2, 4), ("dp", "tp"), comm), or by devices: DeviceMesh([0, 1, 2, 3], Grid2D(2, 2)).
    comm gives the ranks their communicator, which comm() splits; it is no part of the value.
    ranks: the rank at each place (row-major by default). device_ids: the device at each place, in
    row-major order (the ranks by default). network: hosts and links, for explain() and plans.
    Shapes: ranks like the mesh. Errors: UsageError that names the argument.
    """

    __slots__ = ("_devices", "_first", "_hash", "_index", "_names", "_ranks", "_runtime", "network")

    network: Network | None
    _devices: tuple[int, ...] | None
    _first: int | None
    _hash: int | None
    _index: tuple[NDArray[np.int64], NDArray[np.int64]] | None
    _names: tuple[str, ...]
    _ranks: NDArray[np.int64]
    _runtime: Parts

    def __init__(
        self,
        shape: int | Sequence[int],
        axis_names: str | Sequence[str] | Topology | None = None,
        comm: Communicator | None = None,
        *,
        ranks: Any = None,
        device_ids: Sequence[int] | None = None,
        network: Network | None = None,
    ) -> None:
        if isinstance(axis_names, (Linear, Grid2D, Grid3D)):
            device_ids = integers(shape, "device_ids")
            shape, axis_names = topology_shape(axis_names, len(device_ids))
        sizes = integers(shape, "shape")
        names = checked_names(axis_names, sizes)
        size = math.prod(sizes)
        layout = np.arange(size) if ranks is None else np.array(ranks)
        check_ranks(layout, sizes, ranks is not None)
        if comm is not None:
            check_communicator(comm, layout, sizes, ranks is not None)
        if network is not None and len(network.hosts) <= int(layout.max()):
            raise UsageError(
                f"DeviceMesh: argument 'network' has {len(network.hosts)} ranks, and the mesh "
                f"holds rank {layout.max()}; give one host per rank"
            )
        devices = None if device_ids is None else checked_devices(device_ids, size)
        self._set(layout.reshape(sizes), names, devices, network, Parts(comm))

    def _set(
        self,
        layout: NDArray[Any],
        names: tuple[str, ...],
        devices: tuple[int, ...] | None,
        network: Network | None,
        runtime: Parts,
    ) -> None:
        put = object.__setattr__
        held = np.array(layout, dtype=np.int64, order="C")
        held.setflags(write=False)
        flat = held.ravel()
        in_order = bool((np.diff(flat) == 1).all())
        put(self, "_ranks", held)
        put(self, "_names", names)
        put(self, "_first", int(flat[0]) if in_order else None)
        put(self, "_index", None)
        put(self, "_hash", None)
        put(self, "_devices", devices)
        put(self, "network", network)
        put(self, "_runtime", runtime)

    def _derived(self, layout: NDArray[Any], names: tuple[str, ...], part: bool) -> DeviceMesh:
        """A mesh over (some of) the same ranks; a part shares the communicators of its whole."""
        mesh = object.__new__(DeviceMesh)
        devices = None
        if self._devices is not None:
            at = [self._flat(int(r)) for r in layout.ravel()]
            devices = tuple(self._devices[a] for a in at if a is not None)
        whole = self._runtime.whole or self
        runtime = Parts(self._runtime.comm, whole if part else None)
        mesh._set(layout, names, devices, self.network, runtime)
        return mesh

    # ---- made by a rule ---------------------------------------------------------------------

    @classmethod
    def from_strategy(
        cls,
        strategy: ModelParallelStrategy,
        num_devices: int | None = None,
        comm: Communicator | None = None,
        *,
        pipeline_depth: int | None = None,
        device_ids: Sequence[int] | None = None,
    ) -> DeviceMesh:
        """Make the preset of a strategy: a line, a balanced 2-D grid, or 3-D pp x dp x tp.

        num_devices: the size of comm, or the number of device_ids, by default.
        Errors: UsageError when pipeline_depth does not fit.
        """
        if num_devices is None:
            if device_ids is None and comm is None:
                need = "give it, or device_ids=, or a communicator"
                raise UsageError(
                    f"DeviceMesh.from_strategy: argument 'num_devices' is None; {need}"
                )
            num_devices = comm.size if device_ids is None and comm else len(device_ids or ())
        (count,) = integers(num_devices, "num_devices")
        try:
            shape, names = strategy_shape(strategy, count, pipeline_depth)
        except UsageError as error:
            raise UsageError(f"DeviceMesh.from_strategy: {error}") from None
        return cls(shape, names, comm, device_ids=device_ids)

    @classmethod
    def arrange(
        cls,
        shape: Sequence[int],
        axis_names: Sequence[str],
        network: Network,
        traffic: Mapping[str, float],
        comm: Communicator | None = None,
    ) -> DeviceMesh:
        """Make the mesh whose axes that talk most lie inside a host.

        traffic: bytes that a rank exchanges along each axis, or any measure in proportion.
        Errors: UsageError when network or traffic do not fit the mesh.
        """
        sizes = integers(shape, "shape")
        names = checked_names(axis_names, sizes)
        ranks = arrange(tuple(sizes), names, network, traffic)
        return cls(sizes, names, comm, ranks=ranks, network=network)

    def with_comm(self, comm: Communicator | None) -> DeviceMesh:
        """Return the same mesh on a communicator, or on none."""
        kept: dict[str, Any] = {"device_ids": self._devices, "network": self.network}
        return DeviceMesh(self.shape, self._names, comm, ranks=self._ranks, **kept)

    # ---- what it is -------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, ...]:
        """The length of each axis."""
        return self._ranks.shape

    @property
    def axis_names(self) -> tuple[str, ...]:
        """The names of the axes, slowest first."""
        return self._names

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self._names)

    @property
    def size(self) -> int:
        """The number of places."""
        return self._ranks.size

    @property
    def ranks(self) -> NDArray[np.int64]:
        """The rank at each place, read-only."""
        return self._ranks

    @property
    def device_ids(self) -> tuple[int, ...]:
        """The device at each place, in row-major order."""
        return tuple(self._ranks.ravel().tolist()) if self._devices is None else self._devices

    @property
    def topology(self) -> Topology | None:
        """Linear, Grid2D or Grid3D; None with more than three axes."""
        return topology_of(self.shape)

    @property
    def communicator(self) -> Communicator | None:
        """The communicator in whose numbering the ranks are."""
        return self._runtime.comm

    @property
    def rank(self) -> int:
        """This process's rank. Errors: UsageError without a communicator, unless size is 1."""
        comm = self._runtime.comm
        if comm is not None:
            return comm.rank
        if self.size == 1:
            return int(self._ranks.flat[0])
        raise UsageError(
            f"{mesh_text.title(self)} has no communicator, so there is no rank of this process; "
            "make it with one: DeviceMesh(shape, names, meshring.init())"
        )

    def axis_size(self, axis: str) -> int:
        """Return the length of an axis."""
        return self.shape[self.axis_index(axis)]

    def axis_index(self, axis: str) -> int:
        """Return the position of an axis. Errors: UsageError for a name that there is not."""
        if axis not in self._names:
            raise UsageError(
                f"{mesh_text.title(self)} has no axis {axis!r}; its axes are "
                f"{', '.join(map(repr, self._names))}"
            )
        return self._names.index(axis)

    # ---- coordinates ------------------------------------------------------------------------

    def _flat(self, rank: int) -> int | None:
        """The place of a rank in row-major order, None where it is not on the mesh."""
        if self._first is not None:
            at = rank - self._first
            return at if 0 <= at < self._ranks.size else None
        index = self._index
        if index is None:
            order = np.argsort(self._ranks, axis=None)
            index = (self._ranks.ravel()[order], order)
            object.__setattr__(self, "_index", index)
        ordered, order = index
        at = int(ordered.searchsorted(rank))
        return int(order[at]) if at < ordered.size and ordered[at] == rank else None

    def __contains__(self, rank: object) -> bool:
        return isinstance(rank, (int, np.integer)) and self._flat(int(rank)) is not None

    def coordinate(self, rank: int | None = None) -> tuple[int, ...]:
        """Return the coordinate of a rank, this process's by default.

        Errors: UsageError for a rank that is not on the mesh.
        """
        if rank is None:
            rank = self.rank
        at = self._flat(rank)
        if at is None:
            raise UsageError(
                f"DeviceMesh.coordinate: rank {rank} is not on {mesh_text.title(self)}, which "
                f"holds {self.size} ranks from {self._ranks.min()} to {self._ranks.max()}"
            )
        found = []
        for length in reversed(self._ranks.shape):
            at, c = divmod(at, length)
            found.append(c)
        return tuple(reversed(found))

    def _complete(self, coordinate: Coordinate, what: str) -> tuple[int, ...]:
        if isinstance(coordinate, Mapping):
            for name in coordinate:
                self.axis_index(name)
            missing = [n for n in self._names if n not in coordinate]
            if missing:
                raise UsageError(
                    f"DeviceMesh.{what}: the coordinate lacks axes {missing}; name all of "
                    f"{list(self._names)}"
                )
            coordinate = [coordinate[n] for n in self._names]
        found = integers(coordinate, "coord", least=None)
        if len(found) != self.ndim:
            raise UsageError(
                f"DeviceMesh.{what}: the coordinate {tuple(found)} has {len(found)} numbers, and "
                f"{mesh_text.title(self)} has {self.ndim} axes"
            )
        return tuple(found)

    def device_at(self, coord: Coordinate) -> int | None:
        """Return the device at a coordinate, row-major; None outside the mesh."""
        at = self._complete(coord, "device_at")
        if not all(0 <= c < n for c, n in zip(at, self.shape, strict=True)):
            return None
        if self._devices is None:
            return int(self._ranks[at])
        return self._devices[int(np.ravel_multi_index(at, self.shape))]

    def rank_at(self, coord: Coordinate) -> int:
        """Return the rank at a coordinate, (0, 1) or {"dp": 0, "tp": 1}.

        Errors: UsageError outside the mesh.
        """
        at = self._complete(coord, "rank_at")
        if not all(0 <= c < n for c, n in zip(at, self.shape, strict=True)):
            raise UsageError(
                f"DeviceMesh.rank_at: {at} is outside {mesh_text.title(self)}; coordinates start "
                "at 0 and end below the length of the axis"
            )
        return int(self._ranks[at])

    def neighbor(
        self, axis: str, step: int = 1, periodic: bool = False, rank: int | None = None
    ) -> int | None:
        """Return the rank that many steps along an axis, None beyond an edge that is not periodic.

        rank: from where, this process by default. Source: MPI_Cart_shift.
        """
        i = self.axis_index(axis)
        at = list(self.coordinate(rank))
        at[i] += step
        if periodic:
            at[i] %= self.shape[i]
        elif not 0 <= at[i] < self.shape[i]:
            return None
        return int(self._ranks[tuple(at)])

    # ---- other meshes of the same ranks -----------------------------------------------------

    def __getitem__(self, axes: str | tuple[str, ...]) -> DeviceMesh:
        """Return the slice along the named axes that holds this process.

        Without a communicator, or on a rank that is not on the mesh, the slice at 0 of the others.
        """
        wanted = (axes,) if isinstance(axes, str) else axes
        comm = self._runtime.comm
        here = comm is not None and comm.rank in self
        at = self.coordinate() if here else (0,) * self.ndim
        others = {n: c for n, c in zip(self._names, at, strict=True) if n not in wanted}
        return self.slice(wanted, others)

    def slice(self, axes: str | Sequence[str], at: Mapping[str, int]) -> DeviceMesh:
        """Return the part along the named axes, in that order, at a place of each other axis.

        Errors: UsageError unless `at` gives a place for every other axis.
        """
        layout, names = sliced(self, (axes,) if isinstance(axes, str) else tuple(axes), at)
        return self._derived(layout, names, part=True)

    def reorder(self, *axes: str) -> DeviceMesh:
        """Return the same ranks with the axes in another order."""
        order = [self.axis_index(n) for n in axes]
        if sorted(order) != list(range(self.ndim)):
            raise UsageError(f"DeviceMesh.reorder: {axes}; name each of {self._names} once")
        return self._derived(self._ranks.transpose(order), tuple(axes), part=False)

    def flatten(self, name: str | None = None) -> DeviceMesh:
        """Return the ranks on one axis, in row-major order."""
        return self._derived(self._ranks.reshape(-1), (name or "_".join(self._names),), part=False)

    def merge(self, axes: Sequence[str], name: str | None = None) -> DeviceMesh:
        """Return the mesh with the named axes made one, at the place of the first of them."""
        layout, names = merged(self, axes, name or "_".join(axes))
        return self._derived(layout, names, part=False)

    def split(self, axis: str, shape: Sequence[int], names: Sequence[str]) -> DeviceMesh:
        """Return the mesh with one axis cut into several, slowest first.

        Errors: UsageError unless the lengths multiply to that of the axis.
        """
        layout, all_names = cut(self, axis, shape, names)
        return self._derived(layout, all_names, part=False)

    # ---- communication ----------------------------------------------------------------------

    def comm(self, *axes: str) -> Communicator:
        """Return the communicator of this rank's group along the named axes; of the mesh for none.

        The first call is collective over the mesh's communicator and makes those of all single
        axes, in the order of the axes, so ranks may ask for them in any order; several axes
        together are made at their first call. They are kept, and closed by close() or with the
        mesh's communicator. Ranks of the communicator that are not on the mesh call open().
        Errors: UsageError without a communicator or for a rank outside the mesh.
        Source: MPI_Cart_sub, ncclCommSplit.
        """
        for name in axes:
            self.axis_index(name)
        names = axes or self._names
        whole = self._runtime.whole or self
        if whole.rank not in whole:
            raise UsageError(
                f"DeviceMesh.comm: rank {whole.rank} is not on {mesh_text.title(whole)}; ranks "
                "outside take part by mesh.open()"
            )
        found = whole._runtime.get(whole, names)
        assert found is not None
        return found

    def open(self, *axes: str) -> None:
        """Take part in making the communicators of all single axes, and of `axes` together.

        Collective over the mesh's communicator; ranks that are not on the mesh call it too.
        """
        whole = self._runtime.whole or self
        whole._runtime.get(whole, axes or whole.axis_names[:1])

    @property
    def opened(self) -> bool:
        """Whether comm() needs no other rank than those of the mesh: it is the whole, or open."""
        whole = self._runtime.whole or self
        return whole._runtime.ready(whole)

    def close(self) -> None:
        """Close the communicators that comm() made, not the one that the mesh was given."""
        (self._runtime.whole or self)._runtime.close()

    def __enter__(self) -> DeviceMesh:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def link(self, *axes: str) -> Link:
        """Return the slowest link that traffic along the named axes (all for none) uses."""
        if self.network is None:
            return ASSUMED
        codes = self.network.codes()
        across = any(
            crossing_groups(self._ranks, codes, self.axis_index(n)) for n in axes or self._names
        )
        return self.network.between if across else self.network.inside

    def explain(self, traffic: Mapping[str, float] | None = None) -> str:
        """Return a table of the axes: whose groups cross hosts, and over which link.

        traffic: what a rank exchanges along each axis, to see how much of it crosses.
        """
        return mesh_text.explain(self, traffic)

    # ---- value ------------------------------------------------------------------------------

    def _key(self) -> tuple[Any, ...]:
        return (self._names, self.shape, self._devices, self.network)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DeviceMesh):
            return NotImplemented
        return self is other or (
            self._key() == other._key() and bool((self._ranks == other._ranks).all())
        )

    def __hash__(self) -> int:
        found = self._hash
        if found is None:
            found = hash((self._key(), self._ranks.tobytes()))
            object.__setattr__(self, "_hash", found)
        return found

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a DeviceMesh is immutable; make another to change {name!r}")

    def __deepcopy__(self, memo: Any = None) -> DeviceMesh:
        return self  # immutable; a pickled copy has no communicator

    __copy__ = __deepcopy__

    def __reduce__(self) -> Any:
        return _rebuild, (self._ranks, self._names, self._devices, self.network)

    def __repr__(self) -> str:
        return mesh_text.grid(self)

    def _repr_html_(self) -> str:
        return mesh_text.grid_html(self)


def _rebuild(
    ranks: NDArray[np.int64],
    names: tuple[str, ...],
    devices: tuple[int, ...] | None,
    network: Network | None,
) -> DeviceMesh:
    return DeviceMesh(ranks.shape, names, ranks=ranks, device_ids=devices, network=network)
