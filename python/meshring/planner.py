"""How a tensor gets from one sharding to another: the steps, their bytes and their time. Pure."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from meshring.errors import UsageError
from meshring.exchange import Counts, Exchange
from meshring.mesh import DeviceMesh
from meshring.partition import Partial, Placement, Placements, Replicate, Shard, Sharding

LOCAL, EXCHANGE = "local", "exchange"


@dataclass(frozen=True)
class Step:
    """One operation of a plan, and what it moves: elements and messages by place of `ranks`."""

    kind: str
    """local, all_gather, all_to_all, reduce_scatter, all_reduce, or exchange (sends, receives)."""
    axes: tuple[str, ...]
    """The mesh axes along which data moves."""
    source: Sharding
    target: Sharding
    ranks: Counts
    received: Counts
    sent: Counts
    messages: Counts

    def seconds(self, itemsize: int) -> float:
        """Return the time by the slowest link it uses: latencies, then bytes by bandwidth."""
        if not self.axes:
            return 0.0
        most = max(int(self.received.max()), int(self.sent.max())) * itemsize
        link = self.source.mesh.link(*self.axes)
        return link.seconds(most, int(self.messages.max()))


class Plan:
    """The steps of a redistribution. Print it, or take to_json(), before it runs."""

    def __init__(self, steps: Sequence[Step], source: Sharding, target: Sharding, dtype: Any):
        self.steps = tuple(steps)
        self.source = source
        self.target = target
        self.dtype = np.dtype(dtype)

    @property
    def ranks(self) -> list[int]:
        """The ranks that take part, in increasing order."""
        both = np.union1d(self.source.mesh.ranks, self.target.mesh.ranks)
        return [int(r) for r in both]

    def _bytes(self, counts: str) -> list[int]:
        ranks = np.union1d(self.source.mesh.ranks, self.target.mesh.ranks)
        total = np.zeros(len(ranks), np.int64)
        for step in self.steps:
            places = np.searchsorted(ranks, step.ranks.ravel())
            total[places] += getattr(step, counts).ravel() * self.dtype.itemsize
        return [int(n) for n in total]

    @property
    def received_bytes(self) -> list[int]:
        """Bytes that each of the ranks receives."""
        return self._bytes("received")

    @property
    def sent_bytes(self) -> list[int]:
        """Bytes that each of the ranks sends."""
        return self._bytes("sent")

    @property
    def seconds(self) -> float:
        """The estimated time: the sum of the steps', by bandwidth and latency of the links."""
        return sum(step.seconds(self.dtype.itemsize) for step in self.steps)

    def to_json(self) -> str:
        """Return the plan as JSON: steps, bytes per rank, estimated seconds."""
        size = self.dtype.itemsize
        steps = [
            {
                "kind": s.kind,
                "axes": list(s.axes),
                "from": s.source.by_name(),
                "to": s.target.by_name(),
                "received_bytes_max": int(s.received.max()) * size,
                "sent_bytes_max": int(s.sent.max()) * size,
                "messages_max": int(s.messages.max()),
                "seconds": s.seconds(size),
            }
            for s in self.steps
        ]
        whole = {
            "shape": list(self.source.shape),
            "dtype": str(self.dtype),
            "mesh": _mesh_json(self.source.mesh),
            "from": self.source.by_name(),
            "to_mesh": _mesh_json(self.target.mesh),
            "to": self.target.by_name(),
            "steps": steps,
            "ranks": self.ranks,
            "received_bytes": self.received_bytes,
            "sent_bytes": self.sent_bytes,
            "seconds": self.seconds,
        }
        return json.dumps(whole)

    def __str__(self) -> str:
        size = self.dtype.itemsize
        received = self.received_bytes
        lines = [
            f"{self.source.shape} {self.dtype}: {self.source.by_name()} to {self.target.by_name()}",
            f"  at most {max(received)} B received by a rank, {sum(received)} B by all, "
            f"about {self.seconds * 1e6:.3g} us",
        ]
        for i, s in enumerate(self.steps, 1):
            along = f" along {', '.join(s.axes)}" if s.axes else ""
            lines.append(
                f"  {i}. {s.kind}{along}: to {s.target.by_name()}, at most "
                f"{int(s.received.max()) * size} B and {int(s.messages.max())} messages a rank"
            )
        return "\n".join(lines if self.steps else [lines[0], "  nothing to do"])

    __repr__ = __str__


def _mesh_json(mesh: DeviceMesh) -> dict[str, int]:
    return dict(zip(mesh.axis_names, mesh.shape, strict=True))


def plan(
    mesh: DeviceMesh,
    shape: Sequence[int],
    source: Placements,
    target: Placements,
    dtype: Any = "float32",
    *,
    target_mesh: DeviceMesh | None = None,
) -> Plan:
    """Plan the way from one placement of a tensor to another, without running it.

    Shapes: shape is the global one. Units: the estimate in seconds, by mesh.network.
    Errors: UsageError where placements do not fit. Source: Rink et al., "Memory-efficient array
    redistribution through portable collective communication", 2021, for the problem.
    """
    start = Sharding(mesh, shape, source)
    end = Sharding(target_mesh or mesh, shape, target)
    return plan_between(start, end, dtype)


@functools.lru_cache(maxsize=256)
def plan_between(source: Sharding, target: Sharding, dtype: Any = "float32") -> Plan:
    """Plan the way between two shardings of one shape; the last ones are remembered."""
    if source.shape != target.shape:
        raise UsageError(f"plan: shapes {source.shape} and {target.shape} differ; give one shape")
    ways = []
    for scatter in (False, True):
        steps: list[Step] = []
        current = _reduce(source, target, scatter, steps)
        filled = _without_partial(target, current)
        steps += _move(current, filled)
        if filled.placements != target.placements:
            steps.append(_step(LOCAL, (), filled, target))
        ways.append(Plan(steps, source, target, dtype))
        if current is source:
            return ways[0]
    return min(ways, key=lambda way: (sum(way.received_bytes), len(way.steps)))


def _step(
    kind: str,
    axes: Sequence[int],
    source: Sharding,
    target: Sharding,
    counts: tuple[Any, Any, Any] | None = None,
) -> Step:
    mesh = source.mesh
    zero = np.zeros(mesh.shape, np.int64)
    received, sent, messages = (
        (zero, zero, zero)
        if counts is None
        else (np.broadcast_to(np.asarray(c, np.int64), mesh.shape) for c in counts)
    )
    names = tuple(mesh.axis_names[m] for m in axes)
    return Step(kind, names, source, target, mesh.ranks, received, sent, messages)


# ---- reductions -----------------------------------------------------------------------------


def _keeps(source: Sharding, target: Sharding, m: int) -> bool:
    """Whether a Partial of the source stays as it is."""
    return source.mesh == target.mesh and target.placements[m] == source.placements[m]


def _reduce(source: Sharding, target: Sharding, scatter: bool, steps: list[Step]) -> Sharding:
    """Do the reductions that the target does not keep; return where that leads.

    scatter: by reduce_scatter also where the target does not shard along that axis.
    """
    current = source
    for m, placement in enumerate(source.placements):
        if not isinstance(placement, Partial) or _keeps(source, target, m):
            continue
        wish = target.placements[m] if source.mesh == target.mesh else Replicate()
        new: Placement = Replicate()
        if isinstance(wish, Shard):
            new = _fitting(current, wish, m)
        elif scatter and current.ndim:
            new = Shard(int(np.argmax([_shortest(current, a) for a in range(current.ndim)])))
        after = _with(current, m, new)
        n = source.mesh.shape[m]
        whole, part = _local_sizes(current), _local_sizes(after)
        if n == 1:
            steps.append(_step(LOCAL, (), current, after))
        elif isinstance(new, Shard):
            counts = ((n - 1) * part, whole - part, n - 1)
            steps.append(_step("reduce_scatter", [m], current, after, counts))
        else:
            moved = 2 * (whole - whole // n)
            steps.append(_step("all_reduce", [m], current, after, (moved, moved, 2 * (n - 1))))
        current = after
    return current


def _shortest(sharding: Sharding, axis: int) -> int:
    start, end = sharding.cuts(axis)
    return int((end - start).min())


def _fitting(current: Sharding, wish: Shard, m: int) -> Shard:
    """The wished cut, or a balanced one where explicit sizes do not fit inside other cuts."""
    if wish.sizes is None or not current.nests[wish.axis]:
        return wish
    start, end = current.cuts(wish.axis)
    return wish if (end - start == wish.offsets[-1]).all() else Shard(wish.axis)


def _with(sharding: Sharding, m: int, placement: Placement) -> Sharding:
    """The sharding with another placement along mesh axis m, which cuts last."""
    placements = dict(enumerate(sharding.placements)) | {m: placement}
    nests = [[k for k in nest if k != m] for nest in sharding.nests]
    if isinstance(placement, Shard):
        nests[placement.axis].append(m)
    return sharding.nested(nests, placements)


def _without_partial(target: Sharding, current: Sharding) -> Sharding:
    """The target before its local last step: Partial only where the data is Partial by now."""
    placements = [
        Replicate() if isinstance(p, Partial) and not _has_partial(current, target, m) else p
        for m, p in enumerate(target.placements)
    ]
    return Sharding(target.mesh, target.shape, placements, target.order)


def _has_partial(current: Sharding, target: Sharding, m: int) -> bool:
    return current.mesh == target.mesh and isinstance(current.placements[m], Partial)


def _local_sizes(sharding: Sharding) -> Counts:
    """The number of elements at each place of the mesh."""
    total = np.ones(sharding.mesh.shape, np.int64)
    for axis in range(sharding.ndim):
        start, end = sharding.cuts_by_place(axis)
        total *= end - start
    return total


# ---- moves ----------------------------------------------------------------------------------


def _move(source: Sharding, target: Sharding) -> list[Step]:
    """The steps between shardings that differ in Shard and Replicate only."""
    if source.mesh == target.mesh and source.same_regions(target):
        return [] if source.placements == target.placements else [_step(LOCAL, (), source, target)]
    direct = Exchange(source, target)
    totals = direct.totals()
    if source.mesh == target.mesh:
        if not totals.received.any():
            return [_step(LOCAL, (), source, target)]
        chain = _chain(source, target)
        if chain is not None:
            moved = functools.reduce(np.add, [step.received for step in chain])
            if np.array_equal(moved, totals.received):
                return chain
    axes = source.mesh.axis_names
    if source.mesh == target.mesh:
        changed = zip(axes, source.placements, target.placements, strict=True)
        axes = tuple(name for name, p, q in changed if p != q) or axes
    return [Step(EXCHANGE, axes, source, target, direct.ranks(), *totals)]


def _chain(source: Sharding, target: Sharding) -> list[Step] | None:
    """Local cuts, then all_to_all, then all_gather, each along one mesh axis; None if it fails."""
    mesh = source.mesh
    current, steps = source, []
    for nest in target.nests:
        for m in nest:
            if not isinstance(current.placements[m], Shard):
                after = _with(current, m, target.placements[m])
                steps.append(_step(LOCAL, (), current, after))
                current = after
    for m in range(mesh.ndim):
        p, q = current.placements[m], target.placements[m]
        if isinstance(p, Shard) and isinstance(q, Shard) and p != q:
            if current.nests[p.axis][-1] != m:
                return None
            after = _with(current, m, q)
            steps.append(
                _step("all_to_all", [m], current, after, Exchange(current, after).totals())
            )
            current = after
    for axis in range(source.ndim):
        for m in reversed(current.nests[axis]):
            if m not in target.nests[axis]:
                if current.nests[axis][-1] != m:
                    return None
                after = _with(current, m, Replicate())
                mine, peers = _local_sizes(current), mesh.shape[m] - 1
                counts = (_local_sizes(after) - mine, peers * mine, peers * np.sign(mine))
                steps.append(_step("all_gather", [m], current, after, counts))
                current = after
    if not current.same_regions(target):
        return None
    return _merged(steps, target)


def _merged(steps: list[Step], target: Sharding) -> list[Step]:
    """The steps with neighbouring local ones made one, ending in the target itself."""
    found: list[Step] = []
    for step in steps:
        if found and step.kind == found[-1].kind == LOCAL:
            step = _step(LOCAL, (), found.pop().source, step.target)
        found.append(step)
    last = found.pop()
    counts = (last.received, last.sent, last.messages)
    found.append(Step(last.kind, last.axes, last.source, target, last.ranks, *counts))
    return found
