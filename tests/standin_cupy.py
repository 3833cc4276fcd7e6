"""Runs a program for GPUs on the stand-in: python standin_cupy.py program.py.

The functions of CuPy that the documentation's programs use, over the stand-in's memory; the arrays
are real cupy.ndarray objects. CuPy's own need a driver.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from standin import Standin

MAKERS = ("arange", "asarray", "eye", "full", "ones", "zeros")


def install() -> Standin:
    """Replace those functions."""
    import cupy

    fake = Standin()
    fake.install()

    class Device:
        def __init__(self, number: int) -> None:
            self.number = number

        def use(self) -> None:
            fake._place.value = (0, self.number)

    class Stream:
        def __init__(self, non_blocking: bool = False) -> None:
            self.ptr = fake.stream()

        def synchronize(self) -> None:
            fake.synchronize(self.ptr)

        def record(self) -> Event:
            return Event(self)

        def wait_event(self, event: Event) -> None:
            event.stream.synchronize()  # stricter in time than CuPy, the same in order

    class Event:
        def __init__(self, stream: Stream) -> None:
            self.stream = stream

    class Default(Stream):
        def __init__(self) -> None:
            self.ptr = 0

    def on_device(make: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **options: fake.to_device(make(*args, **options))

    for name in MAKERS:
        setattr(cupy, name, on_device(getattr(np, name)))
    cupy.asnumpy = fake.to_host
    cupy.cuda.Device = Device
    cupy.cuda.Stream = Stream
    cupy.cuda.get_current_stream = Default
    return fake


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    install()
    runpy.run_path(sys.argv[0], run_name="__main__")
