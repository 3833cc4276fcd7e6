"""Shapes of a mesh and the links under it: presets, hosts, bandwidth and latency. Pure."""

from __future__ import annotations

import enum
import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshring.errors import UsageError

_MAX_ORDERS = 5040  # axis orders that arrange() tries: all of up to seven axes


class ModelParallelStrategy(enum.Enum):
    """How a model is spread over devices: by stages, by pieces of its tensors, or both."""

    PIPELINE = "pipeline"
    TENSOR = "tensor"
    HYBRID = "hybrid"


@dataclass(frozen=True)
class Linear:
    """A line of devices; size None takes all that are given."""

    size: int | None = None


@dataclass(frozen=True)
class Grid2D:
    """A grid of rows x cols devices, row-major."""

    rows: int
    cols: int


@dataclass(frozen=True)
class Grid3D:
    """A grid of x * y * z devices, row-major: z varies fastest."""

    x: int
    y: int
    z: int


Topology = Linear | Grid2D | Grid3D


def topology_shape(topology: Topology, count: int) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return the shape and the axis names of a topology over `count` devices."""
    if isinstance(topology, Linear):
        return (count if topology.size is None else topology.size,), ("x",)
    if isinstance(topology, Grid2D):
        return (topology.rows, topology.cols), ("rows", "cols")
    return (topology.x, topology.y, topology.z), ("x", "y", "z")


def topology_of(shape: tuple[int, ...]) -> Topology | None:
    """Return the topology of that shape, None where it has more than three axes."""
    if len(shape) == 1:
        return Linear(shape[0])
    if len(shape) == 2:
        return Grid2D(*shape)
    return Grid3D(*shape) if len(shape) == 3 else None


def balanced_factors(count: int, parts: int) -> tuple[int, ...]:
    """Cut `count` into that many factors, as equal as possible, smallest first."""
    if parts == 1:
        return (count,)
    firsts = [f for f in range(1, int(count ** (1 / parts) + 1e-9) + 1) if count % f == 0]
    cuts = [(f, *balanced_factors(count // f, parts - 1)) for f in firsts]
    return tuple(sorted(min(cuts, key=lambda cut: max(cut) / min(cut))))


def strategy_shape(
    strategy: ModelParallelStrategy, count: int, pipeline_depth: int | None = None
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return shape and axis names of a strategy: a line, a balanced 2-D grid, or pp x dp x tp.

    pipeline_depth is the length of pp; without it the three axes of a hybrid are balanced.
    Errors: UsageError when the depth does not divide the devices, or does not fit the strategy.
    """
    depth = pipeline_depth
    if depth is not None and (depth < 1 or count % depth):
        raise UsageError(
            f"pipeline_depth is {depth}, which does not divide {count} devices; give one of "
            f"{[d for d in range(1, count + 1) if count % d == 0]}"
        )
    if strategy is ModelParallelStrategy.PIPELINE:
        if depth not in (None, count):
            raise UsageError(
                f"pipeline_depth is {depth}, and a pipeline of {count} devices has {count} stages; "
                "leave it out, or take strategy HYBRID for fewer stages than devices"
            )
        return (count,), ("pp",)
    if strategy is ModelParallelStrategy.TENSOR:
        if depth not in (None, 1):
            raise UsageError(
                f"pipeline_depth is {depth}, and strategy TENSOR has no stages; leave it out, or "
                "take strategy HYBRID"
            )
        return balanced_factors(count, 2), ("rows", "cols")
    if depth is None:
        return balanced_factors(count, 3), ("pp", "dp", "tp")
    return (depth, *balanced_factors(count // depth, 2)), ("pp", "dp", "tp")


# ---- links ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Link:
    """A connection between two ranks. Units: bandwidth in bytes per second, latency in seconds."""

    bandwidth: float = 10e9
    latency: float = 5e-6

    def __post_init__(self) -> None:
        if not (self.bandwidth > 0 and self.latency >= 0):
            raise UsageError(
                f"Link: bandwidth {self.bandwidth!r} B/s and latency {self.latency!r} s; "
                "bandwidth > 0 and latency >= 0 are needed"
            )

    def seconds(self, nbytes: float, messages: int) -> float:
        """Return the time of that many messages with that many bytes in all, one after another."""
        return messages * self.latency + nbytes / self.bandwidth


ASSUMED = Link()


class Network:
    """Which host each rank is on, and the links inside a host and between hosts.

    hosts: one name per rank, in the numbering of the communicator.
    """

    __slots__ = ("between", "hosts", "inside")

    def __init__(
        self,
        hosts: Sequence[Hashable],
        inside: Link = ASSUMED,
        between: Link = ASSUMED,
    ) -> None:
        if isinstance(hosts, str) or len(hosts) == 0:
            raise UsageError(
                f"Network: argument 'hosts' is {hosts!r}; give one host per rank, for example "
                "['a', 'a', 'b', 'b']"
            )
        self.hosts = tuple(hosts)
        self.inside = inside
        self.between = between

    @classmethod
    def from_links(cls, bandwidth: Any, latency: Any = 0.0) -> Network:
        """Find the hosts in a matrix of bandwidths: ranks joined by links of the faster kind.

        A link is of the faster kind above the geometric mean of the fastest and the slowest.
        Shapes: (ranks, ranks), latency too or one number. Units: bytes per second, seconds.
        Errors: UsageError unless square, positive off the diagonal and symmetric.
        """
        rates = np.asarray(bandwidth, dtype=float)
        n = len(rates)
        off = ~np.eye(n, dtype=bool)
        if rates.shape != (n, n) or n < 1 or (rates[off] <= 0).any() or (rates != rates.T).any():
            raise UsageError(
                f"Network.from_links: argument 'bandwidth' has shape {rates.shape}; a symmetric "
                "square matrix, positive off the diagonal, is needed"
            )
        delays = np.broadcast_to(np.asarray(latency, dtype=float), (n, n))
        if n == 1:
            return cls([0])
        fast = off & (rates >= math.sqrt(rates[off].max() * rates[off].min()))
        hosts = list(range(n))
        for i, j in zip(*np.nonzero(fast), strict=True):
            old, new = hosts[j], hosts[i]
            hosts = [new if h == old else h for h in hosts]
        same = np.equal.outer(hosts, hosts)
        links = []
        for kind in (same & off, ~same):
            slowest = rates[kind].min() if kind.any() else rates[off].min()
            links.append(Link(float(slowest), float(delays[kind].max() if kind.any() else 0.0)))
        return cls(hosts, links[0], links[1])

    def codes(self) -> NDArray[np.int64]:
        """Return one number per rank, equal on ranks of one host."""
        numbers: dict[Hashable, int] = {}
        return np.array([numbers.setdefault(h, len(numbers)) for h in self.hosts], np.int64)

    def _key(self) -> tuple[Any, ...]:
        return (self.hosts, self.inside, self.between)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Network) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        count = len(set(self.hosts))
        return f"Network({len(self.hosts)} ranks on {count} hosts, {self.inside}, {self.between})"


def crossing_groups(ranks: NDArray[np.int64], codes: NDArray[np.int64], axis: int) -> int:
    """Return how many groups along a mesh axis have ranks on more than one host."""
    hosts = np.moveaxis(codes[ranks], axis, -1)
    return int((hosts != hosts[..., :1]).any(axis=-1).sum())


def arrange(
    shape: tuple[int, ...], names: tuple[str, ...], network: Network, traffic: Mapping[str, float]
) -> NDArray[np.int64]:
    """Return the rank layout in which the axes that talk most cross hosts least.

    traffic: bytes (or any measure) that a rank exchanges along each axis; axes left out count 0.
    All orders of filling hosts are compared; of equals, the later axis stays inside a host.
    """
    unknown = set(traffic) - set(names)
    if unknown:
        raise UsageError(
            f"DeviceMesh.arrange: argument 'traffic' names {sorted(unknown)}; axes are {names}"
        )
    codes = network.codes()
    size = math.prod(shape)
    if len(codes) != size:
        raise UsageError(
            f"DeviceMesh.arrange: the network has {len(codes)} ranks and the mesh {size} places; "
            "give one host per rank"
        )
    by_host = np.argsort(codes, kind="stable")
    weights = [float(traffic.get(name, 0.0)) for name in names]
    plain = tuple(range(len(shape)))
    orders = itertools.islice(itertools.permutations(plain), _MAX_ORDERS)
    best: tuple[float, NDArray[np.int64]] | None = None
    for order in orders:
        filled = by_host.reshape([shape[a] for a in order])
        ranks = filled.transpose(np.argsort(order))
        cost = sum(
            w * crossing_groups(ranks, codes, a) * shape[a] / size
            for a, w in enumerate(weights)
            if w
        )
        if best is None or cost < best[0] * (1 - 1e-12):
            best = (cost, ranks)
    assert best is not None
    return np.ascontiguousarray(best[1])
