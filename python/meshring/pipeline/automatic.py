"""The schedule type auto: from costs and a memory limit to an order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from meshring.errors import UsageError
from meshring.pipeline.action import OpKind
from meshring.pipeline.auto import Problem, find_order
from meshring.pipeline.costs import Costs
from meshring.pipeline.flow import Edges, Floats
from meshring.pipeline.layout import Layout, rows_for
from meshring.pipeline.operations import Rows
from meshring.pipeline.program import Program
from meshring.pipeline.schedules_line import one_f_one_b
from meshring.pipeline.transfers import edge_times

OBJECTIVES = ("makespan", "span")


def make_auto(
    num_stages: int,
    num_microbatches: int,
    layout: Layout,
    costs: Costs,
    memory_limit: float | Sequence[float] | None,
    objective: str,
) -> list[Rows]:
    """The rows of the best order found. Errors: UsageError."""
    if objective not in OBJECTIVES:
        raise UsageError(
            f"PipelineSchedule: argument 'objective' is {objective!r}; give one of "
            f"{', '.join(OBJECTIVES)}"
        )
    width = len(layout.rank_of)
    program = Program(
        num_stages,
        num_microbatches,
        layout.placement,
        rows_for(one_f_one_b(width, num_microbatches), layout),
    )
    grows, held = _memory(program, layout, costs)
    problem = Problem(
        num_microbatches,
        _times(program, layout, costs),
        *_links(program, layout, costs),
        grows,
        held,
        _limit(memory_limit, layout, grows, held),
        objective,
    )
    return rows_for(find_order(problem), layout)


def _sums(values: Floats, layout: Layout) -> list[float]:
    """For each rank in the order, the sum over its stages."""
    return [float(values[list(block)].sum()) for block in layout.blocks]


def _times(program: Program, layout: Layout, costs: Costs) -> dict[str, list[float]]:
    table = costs.table(program)
    factor = costs.factors(program)
    mine = np.array([factor[rank] for rank in layout.rank_of])
    kinds = {"F": OpKind.FORWARD, "I": OpKind.BACKWARD_INPUT, "W": OpKind.BACKWARD_WEIGHT}
    return {
        name: (np.array(_sums(table[kind].mean(1), layout)) * mine).tolist()
        for name, kind in kinds.items()
    }


def _links(program: Program, layout: Layout, costs: Costs) -> tuple[list[float], list[float]]:
    edges = Edges(program)
    times = np.add(*edge_times(program, edges, costs))
    pairs = [(a[-1], b[0]) for a, b in zip(layout.blocks, layout.blocks[1:], strict=False)]
    down = [float(times[edges.find[a, b, False]]) for a, b in pairs]
    up = [float(times[edges.find[b, a, True]]) for a, b in pairs]
    return down, up


def _memory(
    program: Program, layout: Layout, costs: Costs
) -> tuple[dict[str, list[float]], list[float]]:
    """What operations add to a rank's memory, and what it holds anyway: bytes, or activations."""
    if costs.activation_bytes is None:
        whole = late = np.ones(program.num_stages)
        held = [0.0] * len(layout.blocks)
    else:
        whole = late = costs.sizes(program, "activation_bytes")
        if costs.weight_gradient_bytes is not None:
            late = np.minimum(whole, costs.sizes(program, "weight_gradient_bytes"))
        held = _sums(costs.sizes(program, "weight_bytes"), layout)
    grows = {
        "F": _sums(whole, layout),
        "I": _sums(late - whole, layout),
        "W": _sums(-late, layout),
    }
    return grows, held


def _limit(
    given: float | Sequence[float] | None,
    layout: Layout,
    grows: dict[str, list[float]],
    held: list[float],
) -> list[float]:
    width = len(layout.rank_of)
    if given is None:
        return [h + width * g for h, g in zip(held, grows["F"], strict=True)]
    try:
        limits = np.asarray(given, np.float64)
    except (TypeError, ValueError):
        limits = np.array(np.nan)
    if np.isnan(limits).any() or limits.shape not in ((), (layout.num_ranks,)):
        raise UsageError(
            f"PipelineSchedule: argument 'memory_limit' is {given!r}; give one number, or one for "
            f"each of {layout.num_ranks} ranks"
        )
    everywhere = np.broadcast_to(limits, (layout.num_ranks,))
    return [float(everywhere[rank]) for rank in layout.rank_of]
