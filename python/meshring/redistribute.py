"""Runs a plan on one rank: slices, collectives along mesh axes, sends and receives."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from meshring.communicator import Communicator
from meshring.errors import UsageError
from meshring.exchange import Exchange, Piece, elements
from meshring.mesh import DeviceMesh
from meshring.partition import Box, Partial, Shard, Sharding
from meshring.planner import LOCAL, Plan, Step

# Bytes to a peer from which separate messages, and one scatter per rank, beat packing everything
# for one all_to_all (measured between processes of one host: benchmarks/redistribute.py).
_MESSAGES = 64 << 10
_SCATTERS = 1 << 20


def run(plan: Plan, local: Any, mesh: DeviceMesh, target_mesh: DeviceMesh, xp: Any) -> Any:
    """Run a plan on this rank and return its new part, None off the target's mesh.

    local: the part that this rank holds, None off the source's mesh. mesh, target_mesh: equal to
    the plan's, with their communicators. Collective over the ranks of both.
    """
    comm = mesh.communicator
    alone = mesh.size == target_mesh.size == 1
    if not alone and (comm is None or target_mesh.communicator is not comm):
        raise UsageError(
            "redistribute: both meshes must be on one communicator; make them with "
            "DeviceMesh(shape, names, comm, ranks=...)"
        )
    rank = comm.rank if comm is not None else mesh.rank
    for step in plan.steps:
        if step.kind == "exchange":
            assert comm is not None
            local = exchange(comm, Exchange(step.source, step.target), local, plan.dtype, xp)
        elif rank in step.source.mesh:
            if step.kind != LOCAL and not mesh.opened:
                local = _without_parts(step, local, comm, plan.dtype, xp)
            else:
                local = _step(step, local, mesh, rank, xp)
    return local if rank in target_mesh else None


def _without_parts(step: Step, local: Any, comm: Communicator | None, dtype: Any, xp: Any) -> Any:
    """A step on a mesh of some ranks, whose communicators would need the other ranks."""
    if comm is None or step.kind in ("all_reduce", "reduce_scatter"):
        raise UsageError(
            f"redistribute: {step.kind} along {step.axes[0]!r} needs the communicators of a mesh "
            "that has not all ranks; call mesh.open() once, on all ranks of the communicator"
        )
    return exchange(comm, Exchange(step.source, step.target), local, dtype, xp)


def _step(step: Step, local: Any, mesh: DeviceMesh, rank: int, xp: Any) -> Any:
    if step.kind == LOCAL:
        return _local(step, local, rank, xp)
    (name,) = step.axes
    m = mesh.axis_index(name)
    comm = mesh.comm(name)
    before, after = step.source.placements[m], step.target.placements[m]
    if step.kind == "all_reduce":
        assert isinstance(before, Partial)
        local = xp.ascontiguousarray(local).reshape(local.shape)
        return comm.all_reduce(local, before.op, out=xp.empty_like(local))
    if step.kind == "reduce_scatter":
        assert isinstance(before, Partial) and isinstance(after, Shard)
        sizes = _lengths(step.target, m, rank, after.axis)
        return comm.reduce_scatter(local, before.op, axis=after.axis, sizes=sizes)
    if step.kind == "all_gather":
        assert isinstance(before, Shard)
        return comm.all_gather(local, before.axis, _lengths(step.source, m, rank, before.axis))
    assert isinstance(before, Shard) and isinstance(after, Shard)
    return _all_to_all(step, local, comm, m, rank, xp)


def _group(sharding: Sharding, m: int, rank: int) -> list[Box]:
    """The boxes of the ranks along mesh axis m, at this rank's place along the others."""
    mesh = sharding.mesh
    at = list(mesh.coordinate(rank))
    found = []
    for place in range(mesh.shape[m]):
        at[m] = place
        found.append(sharding.box(int(mesh.ranks[tuple(at)])))
    return found


@functools.lru_cache(maxsize=256)
def _lengths(sharding: Sharding, m: int, rank: int, axis: int) -> list[int] | None:
    """The lengths of the group's parts along a tensor axis, None where all are equal."""
    found = [box[axis][1] - box[axis][0] for box in _group(sharding, m, rank)]
    return None if len(set(found)) == 1 else found


def relative(box: Box, frame: Box) -> tuple[Any, ...]:
    """Return a box as an index into an array that holds the region `frame`; it makes a view."""
    cuts = (slice(s - o, e - o) for (s, e), (o, _) in zip(box, frame, strict=True))
    return (..., *cuts)


def _local(step: Step, local: Any, rank: int, xp: Any) -> Any:
    """What needs no message: a part of what is held, or an operand of a reduction to come."""
    wanted, held = step.target.box(rank), step.source.box(rank)
    if not elements(wanted):
        return xp.empty([e - s for s, e in wanted], local.dtype)
    part = local[relative(wanted, held)].copy()
    at = step.target.mesh.coordinate(rank)
    pairs = zip(step.source.placements, step.target.placements, at, strict=True)
    for before, after, c in pairs:
        if isinstance(after, Partial) and not isinstance(before, Partial) and c:
            if after.op == "sum":  # the first rank alone brings the value
                part[...] = 0
            elif after.op == "prod":
                part[...] = 1
    return part


# ---- sends and receives ---------------------------------------------------------------------


@functools.lru_cache(maxsize=512)
def _pieces(
    source: Sharding, target: Sharding, origin: tuple[int, ...], rank: int
) -> tuple[Box | None, Box | None, list[Piece], list[Piece]]:
    way = Exchange(source, target, origin)
    return way.wanted(rank), way.kept(rank), way.receives(rank), way.sends(rank)


def exchange(comm: Communicator, way: Exchange, local: Any, dtype: Any, xp: Any) -> Any:
    """Send and receive the pieces of an exchange; return what this rank needs, or None."""
    rank = comm.rank
    wanted, kept, receives, sends = _pieces(way.source, way.target, way.origin, rank)
    out = None
    if wanted is not None:
        out = xp.empty([e - s for s, e in wanted], dtype)
    held = way.source.box(rank) if rank in way.source.mesh else ()
    out_of = [(peer, local[relative(box, held)]) for peer, box in sends]
    into = []
    if wanted is not None and out is not None:
        into = [(peer, out[relative(box, wanted)]) for peer, box in receives]
        if kept is not None:
            into.append((rank, out[relative(kept, wanted)]))
            out_of.append((rank, local[relative(kept, held)]))
    _swap(comm, out_of, into, xp)
    return out


def _swap(
    comm: Communicator, out_of: list[tuple[int, Any]], into: list[tuple[int, Any]], xp: Any
) -> None:
    """Send arrays and receive others, one at most to and from each peer, this rank included."""
    mine = [part for peer, part in out_of if peer == comm.rank]
    late = []
    with comm.group():
        for peer, part in out_of:
            if peer != comm.rank and part.size:
                comm.send(part, peer)
        for peer, place in into:
            if peer == comm.rank:
                continue
            if place.flags.c_contiguous and place.size:
                comm.recv(place, peer)
            elif place.size:
                late.append((place, comm.recv(xp.empty(place.shape, place.dtype), peer)))
        for peer, place in into:
            if peer == comm.rank:
                place[...] = mine[0]
    for place, arrived in late:
        place[...] = arrived


# ---- all_to_all -----------------------------------------------------------------------------


class _Turn(NamedTuple):
    """How one rank changes the axis that a mesh axis cuts."""

    wanted: Box
    parts: tuple[tuple[Any, ...], ...]
    """What goes to each rank of the group, in the local part."""
    places: tuple[tuple[Any, ...], ...]
    """Where what each sends goes, in the new part."""
    in_place: bool
    """Whether every place is contiguous, on all ranks."""
    even: bool
    """Whether all parts of all ranks have one size."""
    largest: int
    """The largest part in elements: the same on all ranks of the group."""


@functools.lru_cache(maxsize=256)
def _turn(source: Sharding, target: Sharding, m: int, rank: int) -> _Turn:
    held, wanted = source.box(rank), target.box(rank)
    sources, targets = _group(source, m, rank), _group(target, m, rank)
    before = source.placements[m]
    assert isinstance(before, Shard)
    # Asked of the whole group's boxes, so that all its ranks choose the same.
    in_place = all(e - s <= 1 for box in targets for s, e in box[: before.axis])
    sizes = {elements(_meet(t, s)) for s in sources for t in targets}
    return _Turn(
        wanted,
        tuple(relative(_meet(box, held), held) for box in targets),
        tuple(relative(_meet(wanted, box), wanted) for box in sources),
        in_place,
        len(sizes) == 1,
        max(sizes),
    )


def _all_to_all(step: Step, local: Any, comm: Communicator, m: int, rank: int, xp: Any) -> Any:
    """Shard(a) to Shard(b) along mesh axis m: my part of b from everyone's part of a."""
    before, after = step.source.placements[m], step.target.placements[m]
    assert isinstance(before, Shard) and isinstance(after, Shard)
    if before.axis == after.axis:
        axis, held = before.axis, step.source.box(rank)
        cuts = [_meet(box, held)[axis] for box in _group(step.target, m, rank)]
        return comm.all_to_all(local, axis, [e - s for s, e in cuts])
    turn = _turn(step.source, step.target, m, rank)
    out = xp.empty([e - s for s, e in turn.wanted], local.dtype)
    places = [out[place] for place in turn.places]
    parts = [local[part] for part in turn.parts]
    largest = turn.largest * local.dtype.itemsize
    if xp is np and turn.in_place and largest >= _SCATTERS:
        _scatters(local, places, comm, after.axis, [p.shape[after.axis] for p in parts])
        return out
    if xp is np and not turn.in_place and largest >= _MESSAGES:
        _swap(comm, list(enumerate(parts)), list(enumerate(places)), xp)
        return out
    sent = _joined(parts, local, xp)
    counts = None if turn.even else [part.size for part in parts]
    if turn.in_place:
        comm.all_to_all(sent, 0, counts, out=out.reshape(-1))
        return out
    arrived = comm.all_to_all(sent, 0, counts)
    start = 0
    for place in places:
        place[...] = arrived[start : start + place.size].reshape(place.shape)
        start += place.size
    return out


def _scatters(
    local: Any, places: list[Any], comm: Communicator, axis: int, sizes: list[int]
) -> None:
    """Each rank in turn deals out its part; the blocks go straight to where they belong."""
    mine = np.ascontiguousarray(local)
    for root, place in enumerate(places):
        if root == comm.rank:
            comm.scatter(mine, root, axis, sizes, out=place)
        else:
            comm.scatter(None, root, axis, out=place)


def _joined(parts: list[Any], local: Any, xp: Any) -> Any:
    """The parts one after another in one array: the local one itself where it is that already."""
    if local.flags.c_contiguous and all(part.flags.c_contiguous for part in parts):
        return local.reshape(-1)
    joined = xp.empty(local.size, local.dtype)
    start = 0
    for part in parts:
        joined[start : start + part.size].reshape(part.shape)[...] = part
        start += part.size
    return joined


def _meet(wanted: Box, held: Box) -> Box:
    """The common part of a box along all axes, empty boxes included."""
    return tuple(
        (max(s, t), max(max(s, t), min(e, f))) for (s, e), (t, f) in zip(wanted, held, strict=True)
    )
