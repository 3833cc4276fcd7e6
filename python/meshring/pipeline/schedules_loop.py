"""Orders for ranks that hold every p-th position: looped BFS and interleaved 1F1B."""

from __future__ import annotations

import numpy as np

from meshring.pipeline.schedules_line import B, F, Ints, Order


def looped_bfs(p: int, v: int, m: int) -> Order:
    """All microbatches through one chunk, then the next; backwards the other way round.

    Source: Lamy-Poirier, Breadth-First Pipeline Parallelism, 2023.
    """
    order = []
    for rank in range(p):
        chunks = np.arange(v) * p + rank
        positions = np.concatenate([np.repeat(chunks, m), np.repeat(chunks[::-1], m)])
        batches = np.tile(np.arange(m), 2 * v)
        kinds = np.repeat([F, B], v * m)
        order.append(np.stack([kinds, positions, batches], 1).astype(np.int32))
    return order


def interleaved(p: int, v: int, m: int, group: int | None = None) -> Order:
    """1F1B over v chunks per rank, microbatches in groups that go through all chunks in turn.

    `group` is the size of the groups; without it they are floor(m / p), as equal as possible.
    Source: Narayanan et al., Efficient Large-Scale Language Model Training on GPU Clusters, 2021.
    """
    total = max(m, p)
    groups = _groups(p, total, group)
    order = []
    for rank in range(p):
        forward = _visits(F, groups, np.arange(v) * p + rank)
        backward = _visits(B, groups, (np.arange(v) * p + rank)[::-1])
        warm = min(v * total, 2 * (p - 1 - rank) + (v - 1) * max(len(g) for g in groups))
        rows = np.empty((2 * v * total, 3), np.int32)
        steady = v * total - warm
        rows[:warm] = forward[:warm]
        rows[warm : warm + 2 * steady : 2] = forward[warm:]
        rows[warm + 1 : warm + 2 * steady : 2] = backward[:steady]
        rows[warm + 2 * steady :] = backward[steady:]
        order.append(rows[rows[:, 2] < m])
    return order


def _groups(p: int, m: int, group: int | None) -> list[Ints]:
    if group is None:
        return np.array_split(np.arange(m), max(m // p, 1))
    return np.split(np.arange(m), range(group, m, group))


def _visits(kind: int, groups: list[Ints], chunks: Ints) -> Ints:
    """For each group, chunk by chunk, its microbatches."""
    positions = np.concatenate([np.repeat(chunks, len(group)) for group in groups])
    batches = np.concatenate([np.tile(group, len(chunks)) for group in groups])
    return np.stack([np.full_like(batches, kind), positions, batches], 1)
