"""Runs a plan on one rank: slices, collectives along mesh axes, sends and receives."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from meshring.communicator import Communicator
from meshring.errors import UsageError
from meshring.exchange import Exchange, Piece, elements
from meshring.mesh import DeviceMesh
from meshring.partition import Box, Partial, Shard, Sharding
from meshring.planner import LOCAL, Plan, Step

# From so many bytes to each peer, one scatter per rank straight into place beats packing.
_IN_PLACE_BYTES = 64 * 1024


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
            local = _step(step, local, mesh, rank, xp)
    return local if rank in target_mesh else None


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


def _lengths(sharding: Sharding, m: int, rank: int, axis: int) -> list[int]:
    return [box[axis][1] - box[axis][0] for box in _group(sharding, m, rank)]


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
    late = []
    with comm.group():
        for peer, box in sends:
            comm.send(local[relative(box, held)], peer)
        for peer, box in receives:
            assert out is not None and wanted is not None
            place = out[relative(box, wanted)]
            if place.flags.c_contiguous:
                comm.recv(place, peer)
            else:
                late.append((place, comm.recv(xp.empty(place.shape, dtype), peer)))
        if kept is not None and wanted is not None and out is not None:
            out[relative(kept, wanted)] = local[relative(kept, held)]
    for place, arrived in late:
        place[...] = arrived
    return out


# ---- all_to_all -----------------------------------------------------------------------------


def _all_to_all(step: Step, local: Any, comm: Communicator, m: int, rank: int, xp: Any) -> Any:
    """Shard(a) to Shard(b) along mesh axis m: my part of b from everyone's part of a."""
    before, after = step.source.placements[m], step.target.placements[m]
    assert isinstance(before, Shard) and isinstance(after, Shard)
    held, wanted = step.source.box(rank), step.target.box(rank)
    sources, targets = _group(step.source, m, rank), _group(step.target, m, rank)
    if before.axis == after.axis:
        axis = before.axis
        cuts = [_meet(box, held)[axis] for box in targets]
        return comm.all_to_all(local, axis, [e - s for s, e in cuts])
    out = xp.empty([e - s for s, e in wanted], local.dtype)
    places = [out[relative(_meet(wanted, box), wanted)] for box in sources]
    parts = [local[relative(_meet(box, held), held)] for box in targets]
    # Asked of the whole group's boxes, so that all its ranks choose the same.
    in_place = all(e - s <= 1 for box in targets for s, e in box[: before.axis])
    largest = max(map(elements, sources)) * local.dtype.itemsize // comm.size
    if in_place and xp is np and largest >= _IN_PLACE_BYTES:
        return _scatters(local, out, places, comm, after.axis, [p.shape[after.axis] for p in parts])
    sent = _joined(parts, local, xp)
    counts = [part.size for part in parts]
    if in_place:
        comm.all_to_all(sent, 0, counts, out=out.reshape(-1))
        return out
    arrived = comm.all_to_all(sent, 0, counts)
    start = 0
    for place in places:
        place[...] = arrived[start : start + place.size].reshape(place.shape)
        start += place.size
    return out


def _scatters(
    local: Any, out: Any, places: list[Any], comm: Communicator, axis: int, sizes: list[int]
) -> Any:
    """Each rank in turn deals out its part; the blocks go straight to where they belong."""
    mine = np.ascontiguousarray(local)
    for root, place in enumerate(places):
        if root == comm.rank:
            comm.scatter(mine, root, axis, sizes, out=place)
        else:
            comm.scatter(None, root, axis, out=place)
    return out


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
