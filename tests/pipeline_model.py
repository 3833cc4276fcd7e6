"""A small model in stages, and the same training without a pipeline: the oracle of the tests."""

from __future__ import annotations

from typing import Any

import numpy as np

WIDTH = 6


class Dense:
    """tanh(x w), with a backward in one part or in two."""

    def __init__(self, number: int) -> None:
        self.w = np.random.default_rng(number).standard_normal((WIDTH, WIDTH)) / WIDTH**0.5
        self.g = np.zeros_like(self.w)
        self.calls: list[str] = []

    def forward(self, x: Any) -> tuple[Any, Any]:
        self.calls.append("forward")
        y = np.tanh(x @ self.w)
        return y, (x, y)

    def backward_input(self, saved: Any, gy: Any) -> tuple[Any, Any]:
        self.calls.append("backward_input")
        x, y = saved
        gh = gy * (1 - y * y)
        return gh @ self.w.T, (x, gh)

    def backward_weight(self, rest: Any) -> None:
        self.calls.append("backward_weight")
        x, gh = rest
        self.g += x.T @ gh

    def gradients(self) -> list[Any]:
        return [self.g]


class Whole:
    """The same with a backward in one part only."""

    def __init__(self, number: int) -> None:
        self.parts = Dense(number)
        self.g, self.calls = self.parts.g, self.parts.calls
        self.forward, self.gradients = self.parts.forward, self.parts.gradients

    def backward(self, saved: Any, gy: Any) -> Any:
        gx, rest = self.parts.backward_input(saved, gy)
        self.parts.backward_weight(rest)
        self.calls[-2:] = ["backward"]
        return gx


def square_loss(y: Any, target: Any) -> tuple[float, Any]:
    """The sum of squared differences and its gradient."""
    difference = y - target
    return float((difference**2).sum()), 2 * difference


def data(rows: int) -> tuple[Any, Any]:
    """Inputs and targets."""
    random = np.random.default_rng(1000)
    return random.standard_normal((rows, WIDTH)), random.standard_normal((rows, WIDTH))


def without_pipeline(stages: int, rows: int) -> tuple[float, list[Any], Any]:
    """Loss, gradient of each stage and of the input, in one go."""
    model = [Dense(number) for number in range(stages)]
    x, target = data(rows)
    saved = []
    for stage in model:
        x, kept = stage.forward(x)
        saved.append(kept)
    value, gradient = square_loss(x, target)
    for stage, kept in zip(reversed(model), reversed(saved), strict=True):
        gradient, rest = stage.backward_input(kept, gradient)
        stage.backward_weight(rest)
    return value, [stage.g for stage in model], gradient
