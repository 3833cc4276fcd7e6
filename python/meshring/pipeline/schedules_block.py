"""V-Half and V-Min: one block of operations, repeated every six slots for each microbatch.

A slot is the time of one operation. Forwards go down and up the V, then input gradients do; each
of the four ways has a number of slots from rank to rank and a wait before it begins, such that no
two operations of a rank, repeated, fall into one slot. Weight gradients take the slots left over.
Source: Qi et al., Pipeline Parallelism with Controllable Memory, 2024.
"""

from __future__ import annotations

import numpy as np

from meshring.pipeline.schedules_line import F, I, Order, W

PERIOD = 6  # forward, input gradient, weight gradient of two chunks
Ways = tuple[int, int, int, int]


def v_min(p: int, m: int) -> Order:
    """About a third of 1F1B's activations. Source: Qi et al., 2024."""
    return _repeat(p, m, (1, 1, 1, 1), (0, 3, 1, 3) if p % 3 == 0 else (0, 1, 1, 1))


def v_half(p: int, m: int) -> Order:
    """About half of 1F1B's activations. Source: Qi et al., 2024."""
    return _repeat(p, m, (1, 2, 1, 2), (0, 4, 1, 5) if p % 2 == 0 else (0, 2, 1, 1))


def _repeat(p: int, m: int, steps: Ways, waits: Ways) -> Order:
    order = []
    for rank in range(p):
        block = _block(p, rank, steps, waits)
        rows = [
            (slot + PERIOD * batch, kind, position, batch)
            for batch in range(m)
            for slot, kind, position in block
        ]
        order.append(np.array(sorted(rows), np.int32)[:, 1:])
    return order


def _block(p: int, rank: int, steps: Ways, waits: Ways) -> list[tuple[int, int, int]]:
    """Slot, kind and position of one microbatch's operations on a rank."""
    down, up = rank, 2 * p - 1 - rank
    block, start = [], 0
    for kind, position, step, wait in zip(
        (F, F, I, I), (down, up, up, down), steps, waits, strict=True
    ):
        ranks_before = rank if (kind, position) in ((F, down), (I, up)) else p - 1 - rank
        block.append((start + wait + step * ranks_before, kind, position))
        start += wait + step * (p - 1)
    used = {slot % PERIOD for slot, _, _ in block}
    for slot, _, position in block[2:]:
        late = next(s for s in range(slot + 1, slot + PERIOD + 1) if s % PERIOD not in used)
        used.add(late % PERIOD)
        block.append((late, W, position))
    return block
