"""Orders found for measured times and a memory limit."""

from __future__ import annotations

import numpy as np
import pytest

from meshring.pipeline import PipelineSchedule
from pipeline_published import PUBLISHED

SIZES = {8: (4096, 32), 16: (5120, 40), 32: (6144, 48)}  # hidden size and heads of the models


@pytest.mark.parametrize("limit", [1, 2])
@pytest.mark.parametrize(
    "row",
    [PUBLISHED[3], PUBLISHED[6], PUBLISHED[9]],
    ids=lambda row: f"p{row[0]}-m{row[1]}-{row[2]}",
)
def test_no_worse_than_the_published_searches(row: tuple[float, ...], limit: int) -> None:
    """ZB-1p and ZB-2p at their memory limits: what a layer keeps is 34h + 5as, for W 32h."""
    p, m, f, i, w, c = (int(n) for n in row[:6])
    hidden, heads = SIZES[p]
    costs = {"forward": f, "backward_input": i, "backward_weight": w, "comm": c}
    kept = 34 * hidden + 5 * heads * 1024
    bytes_kept = {"activation_bytes": kept, "weight_gradient_bytes": 32 * hidden}
    schedule = PipelineSchedule(
        p,
        m,
        "auto",
        costs={**costs, **bytes_kept},
        memory_limit=limit * p * kept,
        objective="span",
    )
    schedule.validate()
    line = schedule.simulate(**costs, **bytes_kept)
    assert line.peak_bytes is not None and line.peak_bytes.max() <= limit * p * kept
    assert round(line.bubble_rate_span, 4) <= row[8 + limit]


def test_never_worse_than_what_fits() -> None:
    for f, i, w, c in ((1.0, 1.0, 1.0, 0.0), (1.0, 1.3, 0.6, 0.1), (1.0, 0.7, 1.4, 0.3)):
        costs = {"forward": f, "backward_input": i, "backward_weight": w, "comm": c}
        for limit, kinds in ((4, ("1f1b", "zb-h1")), (7, ("1f1b", "zb-h1", "zb-h2"))):
            found = PipelineSchedule(4, 9, "auto", costs=costs, memory_limit=limit)
            line = found.simulate(**costs)
            assert line.peak_activations.max() <= limit
            for kind in kinds:
                other = PipelineSchedule(4, 9, kind).simulate(**costs)
                assert line.makespan <= other.makespan * (1 + 1e-9), (kind, limit)


def test_unequal_ranks_and_stages() -> None:
    costs = {
        "forward": [1, 2, 1, 1, 3],
        "backward_input": [1, 2, 1, 2, 3],
        "backward_weight": 1.0,
        "comm": 0.2,
    }
    schedule = PipelineSchedule(
        5, 7, "auto", num_ranks=3, costs=costs, memory_limit=[6, 5, 4], objective="makespan"
    )
    schedule.validate()
    line = schedule.simulate(**costs)
    assert (line.peak_activations <= [6, 5, 4]).all()


def test_less_memory_takes_longer_and_one_microbatch_is_enough() -> None:
    spans = []
    for limit in (1, 2, 4, 8):
        schedule = PipelineSchedule(4, 8, "auto", memory_limit=limit)
        schedule.validate()
        assert schedule.simulate().peak_activations.max() <= limit
        spans.append(schedule.simulate().makespan)
    assert spans == sorted(spans, reverse=True) and spans[0] > spans[-1]


def test_bytes_include_weights() -> None:
    costs = {"activation_bytes": 10, "weight_bytes": [100, 50]}
    schedule = PipelineSchedule(2, 6, "auto", costs=costs, memory_limit=[120, 80])
    peak = schedule.simulate(**costs).peak_bytes
    assert peak is not None and (peak <= [120, 80]).all()
    assert np.array_equal(peak >= [100, 50], [True, True])
