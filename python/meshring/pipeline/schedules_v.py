"""Orders for ranks that hold two positions, folded like a V: ZB-V, V-Half, V-Min, DualPipeV.

Rank r holds positions r and 2p - 1 - r; rank 0 computes the loss.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from meshring.pipeline.action import OpKind
from meshring.pipeline.schedules_line import B, F, I, Order, W

OVERLAP = int(OpKind.OVERLAP_F_B)


def without(
    rows: NDArray[np.int32], keep: NDArray[np.bool_], keep_second: NDArray[np.bool_]
) -> NDArray[np.int32]:
    """The rows whose first half is kept; of an overlapped pair each half by itself."""
    rows = rows.copy()
    paired = rows[:, 0] == OVERLAP
    lone_f = paired & keep & ~keep_second
    lone_b = paired & ~keep & keep_second
    rows[lone_f, 0] = F
    rows[lone_b, 0] = B
    rows[lone_b, 1:3] = rows[lone_b, 3:5]
    rows[lone_f | lone_b, 3:] = -1
    kept: NDArray[np.int32] = rows[keep | lone_b]
    return kept


class _Rank:
    """Writes one rank's order; counts what was done of each kind and chunk."""

    def __init__(self, p: int, rank: int) -> None:
        self.positions = (rank, 2 * p - 1 - rank)
        self.done: dict[tuple[int, int], int] = {}
        self.rows: list[tuple[int, int, int, int, int]] = []
        self.weights: list[int] = []  # chunks whose weight gradients wait

    def count(self, kind: int, chunk: int) -> int:
        return self.done.get((kind, chunk), 0)

    def _next(self, kind: int, chunk: int) -> int:
        number = self.count(kind, chunk)
        self.done[kind, chunk] = number + 1
        return number

    def do(self, kind: int, chunk: int) -> None:
        self.rows.append((kind, self.positions[chunk], self._next(kind, chunk), -1, -1))

    def repeat(self, times: int, *ops: tuple[int, int]) -> None:
        for _ in range(times):
            for kind, chunk in ops:
                self.do(kind, chunk)

    def overlap(self, forward: int, backward: int) -> None:
        batch = self._next(F, forward)
        back = self._next(I, backward)
        self.done[W, backward] = self.count(W, backward) + 1
        self.rows.append((OVERLAP, self.positions[forward], batch, self.positions[backward], back))

    def whole(self, chunk: int) -> None:
        self.rows.append((B, self.positions[chunk], self._next(I, chunk), -1, -1))
        self._next(W, chunk)

    def order(self, m: int) -> NDArray[np.int32]:
        rows = np.array(self.rows, np.int32)
        return without(rows, rows[:, 2] < m, rows[:, 4] < m)


def zb_v(p: int, m: int) -> Order:
    """No rank waits between its first and last operation when F = I = W, at 1F1B's memory.

    Source: Qi et al., Pipeline Parallelism with Controllable Memory, 2024.
    """
    total = max(m, 2 * p - 1)
    order = []
    for rank in range(p):
        r = _Rank(p, rank)
        r.repeat(2 * (p - rank) - 1, (F, 0))
        r.repeat(rank, (F, 1), (F, 0))
        r.repeat(p - rank, (F, 1), (I, 1), (W, 1))
        while r.count(F, 1) < total:
            if r.count(F, 0) < total:
                r.do(F, 0)
            r.repeat(1, (I, 0), (W, 0), (F, 1), (I, 1), (W, 1))
        r.repeat(rank, (I, 0), (I, 1))
        r.repeat(p - rank, (I, 0), (W, 0))
        r.repeat(total - r.count(W, 1), (W, 1))
        r.repeat(total - r.count(W, 0), (W, 0))
        order.append(r.order(m))
    return order


def dualpipe_v(p: int, m: int) -> Order:
    """Forwards and backwards of the two halves of the V overlap each other.

    Source: DeepSeek, DualPipe (DeepSeek-V3 technical report, 2024) and its V form by Sea AI Lab.
    """
    total = max(m, 2 * p)
    order = []
    for rank in range(p):
        r = _Rank(p, rank)
        after = p - rank - 1
        r.repeat(2 * after, (F, 0))
        r.repeat(rank + 1, (F, 0), (F, 1))
        r.repeat(after, (I, 1), (W, 1), (F, 1))
        for i in range(total - 2 * p + rank + 1):
            if i == 0 and rank == p - 1:
                r.do(F, 0)
                r.whole(1)
            else:
                r.overlap(0, 1)
            r.overlap(1, 0)
        for _ in range(after):
            r.whole(1)
            r.overlap(1, 0)
        _drain(r, rank, after)
        order.append(r.order(m))
    return order


def _drain(r: _Rank, rank: int, after: int) -> None:
    """The end of DualPipeV: whole backwards, then input gradients first and weights late."""
    for i in range(2 * (rank + 1)):
        chunk = 1 - i % 2
        if i <= rank:
            r.whole(chunk)
        else:
            r.do(I, chunk)
            r.weights.append(chunk)
    for _ in range(after):
        r.do(W, r.weights.pop(0))
        r.do(I, 0)
        r.weights.append(0)
    for chunk in r.weights:
        r.do(W, chunk)


def dualpipe(p: int, m: int) -> Order:
    """Two copies of the model in opposite directions: a DualPipeV and its mirror image.

    Positions p to 2p - 1 are the second copy; position p + k is on rank p - 1 - k. The second
    copy takes the second half of the microbatches. Source: DeepSeek-V3 technical report, 2024.
    """
    half, first = (p + 1) // 2, (m + 1) // 2
    folded = dualpipe_v(half, first)
    order = []
    for rank in range(p):
        near = min(rank, p - 1 - rank)
        rows = folded[near].copy()
        middle = rank == p - 1 - rank
        for column in (1, 3):
            position, batch = rows[:, column], rows[:, column + 1]
            used, late = position >= 0, position >= half
            stage = np.where(late, p - 1 - near, near)
            second = late if middle or rank == near else ~late
            rows[:, column] = np.where(used, stage + p * second, -1)
            rows[:, column + 1] = np.where(used, batch + first * second, -1)
        order.append(without(rows, rows[:, 2] < m, rows[:, 4] < m))
    return order
