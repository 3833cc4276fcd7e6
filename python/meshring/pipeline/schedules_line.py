"""Orders for ranks that hold one run of stages each: GPipe, 1F1B, ZB-H1, ZB-H2.

An order is, for each rank, an integer array with a row (kind, position, microbatch) per operation;
a position is a run of consecutive stages, numbered along the model.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from meshring.pipeline.action import OpKind

Order = list[NDArray[np.int32]]
Ints = NDArray[np.int64]
F, B = int(OpKind.FORWARD), int(OpKind.BACKWARD)
I, W = int(OpKind.BACKWARD_INPUT), int(OpKind.BACKWARD_WEIGHT)  # noqa: E741


def gpipe(p: int, m: int) -> Order:
    """All forwards, then all backwards. Source: Huang et al., GPipe, 2019."""
    kinds, batches = np.repeat([F, B], m), np.tile(np.arange(m), 2)
    return [_columns(kinds, rank, batches) for rank in range(p)]


def one_f_one_b(p: int, m: int) -> Order:
    """Warm-up forwards, then one forward, one backward. Source: PipeDream, 2019."""
    order = []
    for rank in range(p):
        warm = min(p - 1 - rank, m)
        steady = m - warm
        batches = np.concatenate(
            [
                np.arange(warm),
                np.stack([np.arange(warm, m), np.arange(steady)], 1).ravel(),
                np.arange(steady, m),
            ]
        )
        kinds = np.concatenate([np.full(warm, F), np.tile([F, B], steady), np.full(warm, B)])
        order.append(_columns(kinds, rank, batches))
    return order


def zb_h1(p: int, m: int) -> Order:
    """1F1B with weight gradients put off into the bubble, at 1F1B's memory.

    Source: Qi et al., Zero Bubble Pipeline Parallelism, 2023.
    """
    return [_split(rank, m, p - 1 - rank, rank) for rank in range(p)]


def zb_h2(p: int, m: int) -> Order:
    """More forwards first, so that no rank waits between its first and last operation.

    Source: Qi et al., Zero Bubble Pipeline Parallelism, 2023.
    """
    return [_split(rank, m, 2 * (p - 1 - rank), 2 * rank) for rank in range(p)]


def _split(rank: int, m: int, warm: int, lag: int) -> NDArray[np.int32]:
    """`warm` forwards, then forward and input gradient in turn; at most `lag` weights wait."""
    ops: list[tuple[int, int, int]] = [(F, rank, i) for i in range(min(warm, m))]
    weights = 0
    for i in range(m):
        if warm + i < m:
            ops.append((F, rank, warm + i))
        ops.append((I, rank, i))
        if i - weights >= lag or (warm + i >= m and weights <= i):
            ops.append((W, rank, weights))
            weights += 1
    ops += [(W, rank, i) for i in range(weights, m)]
    return np.array(ops, np.int32)


def _columns(kinds: Ints, position: int, batches: Ints) -> NDArray[np.int32]:
    return np.stack([kinds, np.full_like(kinds, position), batches], 1).astype(np.int32)
