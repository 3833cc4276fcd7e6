"""What waits for what: edges between stages, and a program as queues of steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshring.pipeline.action import OpKind
from meshring.pipeline.engine import STEP, Steps
from meshring.pipeline.operations import Rows
from meshring.pipeline.program import Program

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
COMES_BACK = (OpKind.BACKWARD, OpKind.BACKWARD_INPUT)


@dataclass(frozen=True, slots=True)
class Edge:
    """Data that goes from one stage to another, for every microbatch."""

    number: int
    source: int
    target: int
    gradient: bool


class Edges:
    """The edges of a program; token edge * microbatches + microbatch says that its data are made.

    Tokens behind those of all edges say that they arrived on another rank.
    """

    def __init__(self, program: Program) -> None:
        self.num_microbatches = program.num_microbatches
        self.placement = np.array(program.placement)
        pairs = [(s, s + 1) for s in range(program.num_stages - 1)] + list(program.skips)
        shifts = [copy * program.num_stages for copy in range(program.replicas)]
        pairs = [(a + shift, b + shift) for shift in shifts for a, b in pairs]
        both = [(a, b, False) for a, b in pairs] + [(b, a, True) for a, b in pairs]
        self.all = [Edge(number, *edge) for number, edge in enumerate(both)]
        self.find = {(e.source, e.target, e.gradient): e.number for e in self.all}
        self.local = np.array(
            [program.placement[e.source] == program.placement[e.target] for e in self.all] + [True]
        )  # its last entry is for the edge -1 that is none
        stages = len(program.placement)
        self.into, self.out = (
            tuple(_by_stage(self.all, stages, into, gradient) for gradient in (False, True))
            for into in (True, False)
        )

    @property
    def num_tokens(self) -> int:
        """How many tokens the edges have, arrivals included."""
        return 2 * len(self.all) * self.num_microbatches

    def arrived(self, edge: Ints) -> Ints:
        """The edges whose tokens the receiving stage waits for, once there are sends."""
        return np.where((edge >= 0) & ~self.local[edge], edge + len(self.all), edge)

    def describe(self, token: int) -> tuple[Edge, int, bool]:
        """Edge, microbatch, and whether the token stands for the arrival."""
        number, batch = divmod(token, self.num_microbatches)
        return self.all[number % len(self.all)], batch, number >= len(self.all)


def _by_stage(edges: list[Edge], stages: int, into: bool, gradient: bool) -> Ints:
    """Edge numbers per stage, -1 where there are fewer; the neighbour's first."""
    lists: list[list[int]] = [[] for _ in range(stages)]
    for edge in edges:
        if edge.gradient == gradient:
            lists[edge.target if into else edge.source].append(edge.number)
    width = max(1, *map(len, lists))
    return np.array([found + [-1] * (width - len(found)) for found in lists], np.int64)


def needs_and_gives(rows: Rows, edges: Edges) -> tuple[Ints, Ints, Ints]:
    """Per row of compute operations: edges it takes, edges it feeds, and their microbatches.

    Shapes: (rows, k) each, -1 where there is none; the last one gives the microbatch of each
    column of the first and then of the second.
    """
    kinds = rows["kind"]
    forward = np.isin(kinds, (OpKind.FORWARD, OpKind.OVERLAP_F_B))[:, None]
    backward = np.isin(kinds, COMES_BACK)[:, None]
    stage, batch = rows["stage"], rows["microbatch"]
    parts = []
    for table in (edges.into, edges.out):
        f, b = table[0][stage], table[1][stage]
        width = max(f.shape[1], b.shape[1])
        f, b = _wide(f, width), _wide(b, width)
        parts.append(np.where(forward, f, np.where(backward, b, -1)))
    take, feed = parts
    batches = np.repeat(batch[:, None], take.shape[1] + feed.shape[1], 1).astype(np.int64)
    paired = kinds == OpKind.OVERLAP_F_B
    if not paired.any():
        return take, feed, batches
    second = np.where(paired, rows["peer"], 0)
    more = [np.where(paired[:, None], t[1][second], -1) for t in (edges.into, edges.out)]
    late = [np.repeat(rows["pair"][:, None], part.shape[1], 1) for part in more]
    cut = take.shape[1]
    batches = np.concatenate([batches[:, :cut], late[0], batches[:, cut:], late[1]], 1)
    return (
        np.concatenate([take, more[0]], 1),
        np.concatenate([feed, more[1]], 1),
        batches.astype(np.int64),
    )


def _wide(table: Ints, width: int) -> Ints:
    return np.pad(table, ((0, 0), (0, width - table.shape[1])), constant_values=-1)


def compute_steps(
    rows: Rows, chosen: Ints, duration: Floats, edges: Edges, delay: Floats | None
) -> Steps:
    """The steps of the chosen rows, which compute.

    With `delay`, each edge's time on the way, data arrive by themselves; without, receives bring
    what comes from another rank.
    """
    picked = rows[chosen]
    take, feed, batches = needs_and_gives(picked, edges)
    m, k = edges.num_microbatches, take.shape[1]
    source = take if delay is not None else edges.arrived(take)
    need = np.where(take >= 0, source * m + batches[:, :k], -1)
    give = np.where(feed >= 0, feed * m + batches[:, k:], -1)
    late = np.zeros(feed.shape) if delay is None else np.where(feed >= 0, delay[feed], 0.0)
    # columns: the further needs, the operation itself with its first need and give, further gives
    steps = np.zeros((len(chosen), k - 1 + feed.shape[1]), STEP)
    steps["need"][:] = steps["give"][:] = -1
    steps["need"][:, : k - 1] = need[:, 1:]
    steps["need"][:, k - 1] = need[:, 0]
    steps["give"][:, k - 1 :] = give
    steps["latency"][:, k - 1 :] = late
    steps["duration"][:, k - 1] = duration[chosen]
    steps["row"] = chosen[:, None]
    steps["main"][:, k - 1] = True
    kept: Steps = steps[steps["main"] | (steps["need"] >= 0) | (steps["give"] >= 0)]
    return kept
