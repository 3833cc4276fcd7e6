"""Who sends what to whom: the direct intersection of two shardings. Pure.

Each rank receives every element that it needs and does not hold, once. Where several ranks hold an
element, it comes from the one at the receiver's own place along the mesh axes that replicate it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from meshring.partition import Box, Shard, Sharding

Counts = NDArray[np.int64]


# Pairs of parts of one tensor axis up to which all are compared at once, in 128 MiB.
_MAX_PAIRS = 1 << 24


class Piece(NamedTuple):
    """A region that goes to or comes from a peer, in indices of the source tensor."""

    peer: int
    box: Box


class Totals(NamedTuple):
    """Elements received and sent, and messages sent, by rank."""

    received: Counts
    sent: Counts
    messages: Counts


def elements(box: Box) -> int:
    """Return the number of elements in a box."""
    return math.prod(end - start for start, end in box)


def intersection(a: Box, b: Box) -> Box | None:
    """Return the common part of two boxes, None where it is empty."""
    found = tuple((max(s, t), min(e, f)) for (s, e), (t, f) in zip(a, b, strict=True))
    return found if all(s < e for s, e in found) else None


class Exchange:
    """The messages that bring a tensor from one sharding to another, or to a region of it.

    origin: where the target tensor starts in the source tensor. The meshes may differ; their ranks
    are those of one communicator. Partial axes count as replicated ones: each rank's operand goes
    to its own place along them.
    """

    def __init__(
        self, source: Sharding, target: Sharding, origin: Sequence[int] | None = None
    ) -> None:
        self.source = source
        self.target = target
        self.origin = tuple(origin) if origin is not None else (0,) * source.ndim
        self.one_mesh = source.mesh == target.mesh
        self._copies = [m for m, p in enumerate(source.placements) if not isinstance(p, Shard)]

    def wanted(self, rank: int) -> Box | None:
        """Return what a rank needs, in indices of the source; None off the target's mesh."""
        if rank not in self.target.mesh:
            return None
        box = self.target.box(rank)
        return tuple((s + o, e + o) for (s, e), o in zip(box, self.origin, strict=True))

    def kept(self, rank: int) -> Box | None:
        """Return the part of what a rank needs that it holds."""
        wanted = self.wanted(rank)
        if wanted is None or rank not in self.source.mesh:
            return None
        return intersection(wanted, self.source.box(rank))

    def _copy_for(self, rank: int) -> tuple[int, ...]:
        """The place along the source mesh, of which the axes that replicate count, to ask."""
        mesh = self.source.mesh
        if rank in mesh:
            return mesh.coordinate(rank)
        at = self.target.mesh.coordinate(rank)
        place = int(np.ravel_multi_index(at, self.target.mesh.shape))
        found = [0] * mesh.ndim
        for m in reversed(self._copies):
            place, found[m] = divmod(place, mesh.shape[m])
        return tuple(found)

    def receives(self, rank: int) -> list[Piece]:
        """Return what a rank receives, and from whom."""
        wanted = self.wanted(rank)
        if wanted is None:
            return []
        at = list(self._copy_for(rank))
        found = []
        for cell, box in _cells(self.source, wanted):
            for m, c in cell:
                at[m] = c
            peer = int(self.source.mesh.ranks[tuple(at)])
            if peer != rank:
                found.append(Piece(peer, box))
        return found

    def sends(self, rank: int) -> list[Piece]:
        """Return what a rank sends, and to whom."""
        if rank not in self.source.mesh:
            return []
        mesh = self.target.mesh
        here = self.source.mesh.coordinate(rank)
        held = tuple(
            (s - o, e - o) for (s, e), o in zip(self.source.box(rank), self.origin, strict=True)
        )
        fixed = {m: here[m] for m in self._copies} if self.one_mesh else {}
        cut = {m for nest in self.target.nests for m in nest}
        free = [m for m in range(mesh.ndim) if m not in cut and m not in fixed]
        found = []
        for cell, box in _cells(self.target, held):
            at = dict.fromkeys(range(mesh.ndim), 0) | fixed | dict(cell)
            if any(at[m] != c for m, c in fixed.items()):
                continue
            shifted = tuple((s + o, e + o) for (s, e), o in zip(box, self.origin, strict=True))
            for places in itertools.product(*(range(mesh.shape[m]) for m in free)):
                at.update(zip(free, places, strict=True))
                peer = int(mesh.ranks[tuple(at[m] for m in range(mesh.ndim))])
                if peer != rank and self._asks(peer, here):
                    found.append(Piece(peer, shifted))
        return found

    def _asks(self, peer: int, holder: tuple[int, ...]) -> bool:
        """Whether `peer` takes the holder's region from this holder: one of several copies."""
        if self.one_mesh:
            return True
        asked = self._copy_for(peer)
        return all(asked[m] == holder[m] for m in self._copies)

    # ---- sums over all ranks ----------------------------------------------------------------

    def totals(self) -> Totals:
        """Return the elements that each rank receives and sends, and its messages.

        Shapes: those of the mesh; with two meshes, one entry for each of ranks().
        """
        pairs = (
            math.prod(self.source.mesh.shape[m] for m in self.source.nests[a])
            * math.prod(self.target.mesh.shape[m] for m in self.target.nests[a])
            for a in range(self.source.ndim)
        )
        dense = self.one_mesh and max(pairs, default=1) <= _MAX_PAIRS
        return self._totals_on_one_mesh() if dense else self._totals_by_rank()

    def ranks(self) -> Counts:
        """Return the ranks that the totals are for."""
        if self.one_mesh:
            return self.source.mesh.ranks
        return np.union1d(self.source.mesh.ranks, self.target.mesh.ranks)

    def _totals_by_rank(self) -> Totals:
        ranks = self.ranks()
        place = {r: i for i, r in enumerate(ranks.ravel().tolist())}
        received, sent, messages = (np.zeros(ranks.size, np.int64) for _ in range(3))
        for rank in self.target.mesh.ranks.ravel().tolist():
            for peer, box in self.receives(rank):
                count = elements(box)
                received[place[rank]] += count
                sent[place[peer]] += count
                messages[place[peer]] += 1
        return Totals(*(a.reshape(ranks.shape) for a in (received, sent, messages)))

    def _totals_on_one_mesh(self) -> Totals:
        mesh, axes = self.source.mesh, range(self.source.ndim)
        wanted = np.ones(mesh.shape, np.int64)
        kept = np.ones(mesh.shape, np.int64)
        for a in axes:
            s, e = self.source.cuts_by_place(a)
            t, f = (cut + self.origin[a] for cut in self.target.cuts_by_place(a))
            wanted *= f - t
            kept *= np.maximum(np.minimum(e, f) - np.maximum(s, t), 0)
        # Every pair of ranks at once: what they share along each tensor axis, multiplied. A letter
        # per mesh axis of the sender, another of the receiver where both need not be equal.
        receiver = [m if m in self._copies else m + mesh.ndim for m in range(mesh.ndim)]
        shared: list[Any] = []
        names: list[list[int]] = []
        for a in axes:
            s, e = self.source.cuts(a)
            t, f = (cut + self.origin[a] for cut in self.target.cuts(a))
            shape = t.shape + (1,) * s.ndim
            common = np.asarray(np.minimum(f.reshape(shape), e))
            common -= np.maximum(t.reshape(shape), s)
            np.maximum(common, 0, out=common)
            shared.append(common)
            names.append([*(receiver[m] for m in self.target.nests[a]), *self.source.nests[a]])
        sent = self._summed(shared, names, receiver) - kept
        messages = self._summed([np.sign(o) for o in shared], names, receiver) - (kept > 0)
        return Totals(wanted - kept, sent, messages)

    def _summed(self, shared: list[Any], names: list[list[int]], receiver: list[int]) -> Counts:
        """The product of arrays, summed over all receivers of each sender."""
        shape = self.source.mesh.shape
        present = {letter for each in names for letter in each}
        senders = [m for m in range(len(shape)) if m in present]
        operands = [x for pair in zip(shared, names, strict=True) for x in pair]
        einsum: Any = np.einsum
        total = einsum(*operands, senders, optimize="greedy") if operands else np.ones((), np.int64)
        alike = (shape[m] for m, letter in enumerate(receiver) if letter not in {*present, m})
        placed = np.asarray(total).reshape([n if m in senders else 1 for m, n in enumerate(shape)])
        found: Counts = np.broadcast_to(placed, shape) * math.prod(alike)
        return found


def _cells(sharding: Sharding, box: Box) -> Iterator[tuple[tuple[tuple[int, int], ...], Box]]:
    """The parts of a sharding that meet a box: places along the cutting mesh axes, common part."""
    choices = []
    for axis, (low, high) in enumerate(box):
        starts, ends = sharding.cuts(axis)
        nest, shape = sharding.nests[axis], starts.shape
        flat_starts, flat_ends = starts.ravel(), ends.ravel()
        first = int(flat_ends.searchsorted(low, "right"))
        last = int(flat_starts.searchsorted(high, "left"))
        found = []
        for i in range(first, last):
            start, end = max(int(flat_starts[i]), low), min(int(flat_ends[i]), high)
            if start < end:
                at = np.unravel_index(i, shape)
                found.append((tuple(zip(nest, map(int, at), strict=True)), (start, end)))
        choices.append(found)
    for combination in itertools.product(*choices):
        yield (
            tuple(itertools.chain.from_iterable(c[0] for c in combination)),
            tuple(c[1] for c in combination),
        )
