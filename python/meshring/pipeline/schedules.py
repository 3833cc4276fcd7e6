"""Every kind of schedule by name: its order, its family of placements, its defaults."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from meshring.errors import UsageError
from meshring.pipeline.layout import Layout, even_layout, placed_layout, rows_for
from meshring.pipeline.operations import Rows
from meshring.pipeline.program import positive
from meshring.pipeline.schedules_block import v_half, v_min
from meshring.pipeline.schedules_line import Order, gpipe, one_f_one_b, zb_h1, zb_h2
from meshring.pipeline.schedules_loop import interleaved, looped_bfs
from meshring.pipeline.schedules_v import dualpipe, dualpipe_v, zb_v

LINE: dict[str, Callable[[int, int], Order]] = {
    "sequential": gpipe,
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "zb-h1": zb_h1,
    "zb-h2": zb_h2,
}
LOOP: dict[str, Callable[..., Order]] = {"interleaved-1f1b": interleaved, "looped-bfs": looped_bfs}
FOLD: dict[str, Callable[[int, int], Order]] = {
    "zb-v": zb_v,
    "v-half": v_half,
    "v-min": v_min,
    "dualpipev": dualpipe_v,
}
NAMES = (*LINE, *LOOP, *FOLD, "dualpipe")
USUAL_CHUNKS = {"line": 1, "loop": 2, "fold": 2}


def family_of(kind: str) -> str:
    """How this kind walks through the ranks: line, loop or fold."""
    return "loop" if kind in LOOP else "fold" if kind in FOLD else "line"


def make(
    kind: str,
    num_stages: int,
    num_microbatches: int,
    num_ranks: int | None = None,
    chunks: int | None = None,
    placement: Sequence[int] | None = None,
    group: int | None = None,
) -> tuple[tuple[int, ...], list[Rows], int]:
    """Placement, rows per rank and number of copies of the model. Errors: UsageError."""
    layout = find_layout(kind, num_stages, num_ranks, chunks, placement)
    width = len(layout.rank_of)
    if group is not None and kind != "interleaved-1f1b":
        raise UsageError(
            f"PipelineSchedule: argument 'group' is {group!r}, but {kind} has no groups; leave it"
        )
    if kind == "dualpipe":
        count = num_stages
        twice = tuple(tuple(stage + count for stage in block) for block in layout.blocks)
        mirrored = [layout.rank_of[width - 1 - k] for k, run in enumerate(twice) for _ in run]
        both = Layout(
            layout.num_ranks,
            1,
            layout.blocks + twice,
            layout.placement + tuple(mirrored),
            layout.rank_of,
        )
        return both.placement, rows_for(dualpipe(width, num_microbatches), both), 2
    if kind in LINE:
        order = LINE[kind](width, num_microbatches)
    elif kind in FOLD:
        order = FOLD[kind](width, num_microbatches)
    else:
        more: dict[str, Any] = {}
        if group is not None:
            more["group"] = positive("group", group, min(width, num_microbatches))
        order = LOOP[kind](width, layout.chunks, num_microbatches, **more)
    return layout.placement, rows_for(order, layout), 1


def find_layout(
    kind: str,
    num_stages: int,
    num_ranks: int | None,
    chunks: int | None,
    placement: Sequence[int] | None,
) -> Layout:
    """Where the stages go: as `placement` says, else evenly. Errors: UsageError."""
    family = family_of(kind)
    if placement is not None:
        return _placed(family, num_stages, num_ranks, chunks, placement)
    fixed = USUAL_CHUNKS[family]
    if chunks is not None and positive("chunks", chunks) != fixed and family != "loop":
        raise UsageError(
            f"PipelineSchedule: argument 'chunks' is {chunks!r}; {kind} has {fixed} per rank; "
            "leave it out, or take interleaved-1f1b or looped-bfs"
        )
    if num_ranks is None:
        num_ranks = -(-num_stages // (fixed if chunks is None else chunks))
    elif positive("num_ranks", num_ranks) > num_stages:
        raise UsageError(
            f"PipelineSchedule: argument 'num_ranks' is {num_ranks}, but there are {num_stages} "
            "stages; give each rank one at least"
        )
    if family != "loop":
        chunks = fixed
    elif chunks is None:
        chunks = -(-num_stages // num_ranks)
    elif chunks * num_ranks < num_stages:
        raise UsageError(
            f"PipelineSchedule: {num_stages} stages do not fit on {num_ranks} ranks with "
            f"'chunks' {chunks} each; give {-(-num_stages // num_ranks)}"
        )
    return even_layout(family, num_stages, num_ranks, chunks)


def _placed(
    family: str,
    num_stages: int,
    num_ranks: int | None,
    chunks: int | None,
    placement: Sequence[int],
) -> Layout:
    if not isinstance(placement, Iterable):
        raise UsageError(
            f"PipelineSchedule: argument 'placement' is {placement!r}; give the rank of each stage"
        )
    ranks = [positive("placement", rank, 0) for rank in placement]
    if len(ranks) != num_stages:
        raise UsageError(
            f"PipelineSchedule: argument 'placement' is {ranks}; give the rank of each of "
            f"{num_stages} stages"
        )
    if chunks is not None:
        raise UsageError("PipelineSchedule: 'chunks' follows from 'placement'; give one of them")
    needed = max(ranks) + 1
    if num_ranks is not None and positive("num_ranks", num_ranks) < needed:
        raise UsageError(
            f"PipelineSchedule: argument 'num_ranks' is {num_ranks}, but 'placement' has rank "
            f"{needed - 1}; give {needed} or leave it out"
        )
    return placed_layout(family, ranks, needed if num_ranks is None else num_ranks)
