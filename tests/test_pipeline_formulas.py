"""Bubbles and live activations of every schedule against their formulas, by simulation.

F, I, W are a rank's times for a microbatch, B = I + W; p ranks, m microbatches, v chunks.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from meshring.pipeline import PipelineSchedule
from meshring.pipeline.timeline import Timeline

F, I, W = 1.3, 1.1, 0.7  # noqa: E741
RANKS = range(1, 9)
CHUNKS = range(1, 5)
BATCHES = range(1, 34)


def run(
    kind: str, p: int, m: int, v: int = 1, f: float = F, i: float = I, w: float = W
) -> Timeline:
    schedule = PipelineSchedule(p * v, m, kind, num_ranks=p)
    return schedule.simulate(forward=f / v, backward_input=i / v, backward_weight=w / v)


def cases(least=lambda p: 1) -> Iterator[tuple[int, int]]:  # type: ignore[no-untyped-def]
    return ((p, m) for p in RANKS for m in BATCHES if m >= least(p))


def close(a: float, b: float) -> bool:
    return abs(a - b) < 1e-9 * max(1.0, abs(a), abs(b))


@pytest.mark.parametrize("kind", ["gpipe", "sequential"])
def test_gpipe(kind: str) -> None:
    for p, m in cases():
        line = run(kind, p, m)
        assert close(line.bubble_makespan, (p - 1) * (F + I + W)), (p, m)
        assert line.peak_activations.tolist() == [m] * p


def test_1f1b() -> None:
    for p, m in cases():
        line = run("1f1b", p, m)
        assert close(line.bubble_makespan, (p - 1) * (F + I + W)), (p, m)
        assert line.peak_activations.tolist() == [min(p - s, m) for s in range(p)]


@pytest.mark.parametrize("v", CHUNKS)
def test_interleaved(v: int) -> None:
    for p, m in cases(lambda p: p):
        line = run("interleaved-1f1b", p, m, v)
        assert close(line.bubble_makespan, (p - 1) * (F + I + W) / v), (p, m)
        groups = m // p
        if m % groups == 0:
            g = m // groups
            expected = [min(v * m, 2 * (p - 1 - r) + (v - 1) * g + 1) for r in range(p)]
            assert line.peak_activations.tolist() == expected, (p, m)


@pytest.mark.parametrize("v", CHUNKS)
def test_looped_bfs(v: int) -> None:
    for p, m in cases(lambda p: p):
        line = run("looped-bfs", p, m, v)
        assert close(line.bubble_makespan, (p - 1) * (F + I + W) / v), (p, m)
        assert line.peak_activations.tolist() == [v * m] * p


@pytest.mark.parametrize("times", [(1.3, 1.1, 0.7), (1, 1, 1), (2.0, 0.5, 0.5), (1, 3, 1)])
def test_zb_h1(times: tuple[float, float, float]) -> None:
    f, i, w = times
    for p, m in cases(lambda p: p):
        line = run("zb-h1", p, m, 1, f, i, w)
        assert close(line.bubble_makespan, (p - 1) * (f + i - w)), (p, m)
        assert line.peak_activations.max() == p


@pytest.mark.parametrize("times", [(1.3, 1.1, 0.7), (1, 1, 1), (2.0, 0.5, 0.5), (1, 3, 1)])
def test_zb_h2(times: tuple[float, float, float]) -> None:
    f, i, w = times
    for p, m in cases(lambda p: 2 * p - 1):
        line = run("zb-h2", p, m, 1, f, i, w)
        assert close(line.bubble_span, (p - 1) * (f + i - 2 * w)), (p, m)
        assert line.peak_activations.max() == 2 * p - 1


def test_zb_v() -> None:
    for p, m in cases(lambda p: 2 * p - 1):
        line = run("zb-v", p, m, 2, 1, 1, 1)
        assert close(line.bubble_span, 0), (p, m)
        assert close(line.bubble_makespan, (p - 1) / 2)
        assert line.peak_activations.tolist() == [2 * p] * p  # chunks: p whole activations


def test_v_half_and_v_min() -> None:
    for kind, share, peak in (
        ("v-half", 1 / 2, lambda p: (p + 2) // 2),
        ("v-min", 2 / 3, lambda p: (p + 4) // 3),
    ):
        for p, m in cases():
            line = run(kind, p, m, 2, 1, 1, 1)
            assert line.peak_activations.max() <= 2 * peak(p), (kind, p, m)
            if m >= 2 * p:
                assert line.peak_activations.max() == 2 * peak(p), (kind, p, m)
                assert line.bubble_makespan <= (share + 0.1) * 3 * (p - 1)


@pytest.mark.parametrize("overlapped", [None, 2.4, 2.0])
def test_dualpipe_and_dualpipev(overlapped: float | None) -> None:
    """The bubble of the rank that overlaps most, as the formula's."""
    f, i, w = 1.0, 1.0, 1.0
    both = f + i + w if overlapped is None else overlapped
    costs = {"forward": f, "backward_input": i, "backward_weight": w, "overlapped": both}
    for p, m in cases(lambda p: 2 * p):
        line = PipelineSchedule(2 * p, m, "dualpipev").simulate(**costs)
        bubble = line.makespan - line.busy.min()
        assert close(bubble, (p - 1) * (both + i + w - 3 * w)), (p, m)
        assert line.peak_activations.max() == 2 * p + 1
    for p, m in ((q, 2 * n) for q in (2, 4, 6, 8) for n in range(q, 17)):
        line = PipelineSchedule(p, m, "dualpipe").simulate(**costs)
        bubble = line.makespan - line.busy.min()
        assert close(bubble, (p // 2 - 1) * (both + i + w - 3 * w)), (p, m)
        assert line.peak_activations.max() == p + 1


@pytest.mark.parametrize("scale", [(1, 3), (7, 2)])
def test_bubbles_scale_with_the_unit(scale: tuple[int, int]) -> None:
    small, large = (run("1f1b", 4, 9, 1, F * s, I * s, W * s) for s in scale)
    np.testing.assert_allclose(small.bubble_makespan * scale[1], large.bubble_makespan * scale[0])
