"""Which stages stand at which position of an order, and the rows of the order for these stages.

Positions lie along the model; a position holds a run of consecutive stages, perhaps none. Rank of
position k with p ranks: line k, loop k mod p, fold min(k, 2p - 1 - k).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshring.errors import UsageError
from meshring.pipeline.action import OpKind
from meshring.pipeline.operations import OP, Rows

RANK_AT: dict[str, Callable[[int, int], int]] = {
    "line": lambda position, ranks: position,
    "loop": lambda position, ranks: position % ranks,
    "fold": lambda position, ranks: min(position, 2 * ranks - 1 - position),
}


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the stages are."""

    num_ranks: int
    chunks: int
    blocks: tuple[tuple[int, ...], ...]  # the stages of each position
    placement: tuple[int, ...]  # the rank of each stage
    rank_of: tuple[int, ...]  # the rank that runs each of the order's lists


def even_layout(family: str, num_stages: int, num_ranks: int, chunks: int) -> Layout:
    """Stages in runs that are as equal as possible, the longer ones first."""
    runs = np.array_split(np.arange(num_stages), num_ranks * chunks)
    blocks = tuple(tuple(run.tolist()) for run in runs)
    placement = [RANK_AT[family](k, num_ranks) for k, run in enumerate(blocks) for _ in run]
    return Layout(num_ranks, chunks, blocks, tuple(placement), tuple(range(num_ranks)))


def placed_layout(family: str, placement: Sequence[int], num_ranks: int) -> Layout:
    """The positions at which these ranks come by in this order. Errors: UsageError if none."""
    runs: list[list[int]] = []
    for stage, rank in enumerate(placement):
        if stage and placement[stage - 1] == rank:
            runs[-1].append(stage)
        else:
            runs.append([stage])
    ranks = [placement[run[0]] for run in runs]
    if family == "line":
        if len(set(ranks)) < len(ranks):
            raise UsageError(
                f"pipeline schedule: argument 'placement' is {list(placement)}; this schedule "
                "needs the stages of a rank to follow each other; take an interleaved or V one"
            )
        blocks = tuple(tuple(run) for run in runs)
        return Layout(num_ranks, 1, blocks, tuple(placement), tuple(ranks))
    limit = 2 * num_ranks if family == "fold" else num_ranks * len(runs)
    found: list[tuple[int, ...]] = []
    for rank, run in zip(ranks, runs, strict=True):
        while len(found) < limit and RANK_AT[family](len(found), num_ranks) != rank:
            found.append(())
        found.append(tuple(run))
    if len(found) > limit:
        raise UsageError(
            f"pipeline schedule: argument 'placement' is {list(placement)}; this schedule goes "
            f"through the ranks 0 to {num_ranks - 1} and back again, once; take 'interleaved-1f1b'"
        )
    chunks = 2 if family == "fold" else -(-len(found) // num_ranks)
    found += [()] * (num_ranks * chunks - len(found))
    return Layout(num_ranks, chunks, tuple(found), tuple(placement), tuple(range(num_ranks)))


def rows_for(order: Sequence[NDArray[np.int32]], layout: Layout) -> list[Rows]:
    """The order with stages for positions: forwards up a run of stages, backwards down."""
    single = all(len(block) == 1 for block in layout.blocks)
    rows: list[Rows] = [np.empty(0, OP)] * layout.num_ranks
    for number, ops in enumerate(order):
        rows[layout.rank_of[number]] = _plain(ops) if single else _spread(ops, layout.blocks)
    return rows


def _plain(ops: NDArray[np.int32]) -> Rows:
    rows = np.zeros(len(ops), OP)
    rows["peer"] = rows["pair"] = -1
    for column, name in enumerate(("kind", "stage", "microbatch", "peer", "pair")[: ops.shape[1]]):
        rows[name] = ops[:, column]
    return rows


def _spread(ops: NDArray[np.int32], blocks: tuple[tuple[int, ...], ...]) -> Rows:
    rows: list[tuple[int, ...]] = []
    for kind, position, batch, *other in ops.tolist():
        run = blocks[position]
        if kind == OpKind.FORWARD:
            rows += [(kind, stage, batch, -1, -1) for stage in run]
        elif kind != OpKind.OVERLAP_F_B:
            rows += [(kind, stage, batch, -1, -1) for stage in reversed(run)]
        else:
            rows += _spread_pair(run, batch, blocks[other[0]], other[1])
    return np.array(rows, OP) if rows else np.empty(0, OP)


def _spread_pair(
    forwards: tuple[int, ...], batch: int, backwards: tuple[int, ...], back: int
) -> list[tuple[int, ...]]:
    both = min(len(forwards), len(backwards))
    down = backwards[::-1]
    rows: list[tuple[int, ...]] = [
        (int(OpKind.OVERLAP_F_B), f, batch, b, back)
        for f, b in zip(forwards[:both], down[:both], strict=True)
    ]
    rows += [(int(OpKind.FORWARD), stage, batch, -1, -1) for stage in forwards[both:]]
    rows += [(int(OpKind.BACKWARD), stage, back, -1, -1) for stage in down[both:]]
    return rows
