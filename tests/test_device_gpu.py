"""The device kernels and the driver's copies on a GPU, against NumPy and CuPy."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from meshring import _core
from test_device_layout import Case

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def cupy() -> Any:
    cupy = pytest.importorskip("cupy", reason="pip install 'meshring[cu12]'")
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        pytest.skip(f"needs a GPU: {error}")
    if count == 0:
        pytest.skip("needs a GPU: none is visible")
    return cupy


@pytest.fixture(params=["kernels", "copies"])
def compiled(request: pytest.FixtureRequest, cupy: Any) -> bool:
    if request.param == "kernels" and not _core.kernels_info()["built"]:
        pytest.skip("built without kernels: pip install 'nvidia-cuda-nvrtc-cu12==12.0.*', build")
    return bool(request.param == "kernels")


def move(array: Any, packed: Any, case: Case, stream: Any, **options: bool) -> None:
    _core._copy_blocks(
        array.data.ptr,
        packed.data.ptr,
        case.rows,
        list(case.widths),
        spacing=case.spacing,
        skip=case.skip,
        stream=stream.ptr,
        **options,
    )


def buffer(cupy: Any, size: int, shift: int) -> Any:
    return cupy.full(size + 64, 0xA5, "u1")[shift : shift + size]


def check(cupy: Any, case: Case, compiled: bool) -> None:
    """Pack and unpack on a stream of its own; bytes outside the blocks stay."""
    pitch = sum(case.widths)
    host = np.random.default_rng(5).integers(0, 256, (case.rows, pitch), np.uint8)
    want = case.oracle(host)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        array = buffer(cupy, host.size, case.shifts[0])
        array[:] = cupy.asarray(host.reshape(-1))
        packed = buffer(cupy, want.size, case.shifts[1])
        move(array, packed, case, stream, pack=True, compiled=compiled)
        np.testing.assert_array_equal(packed.get(), want)
        assert (packed.base[case.shifts[1] + want.size :].get() == 0xA5).all()
        back = buffer(cupy, host.size, case.shifts[0])
        move(back, packed, case, stream, pack=False, compiled=compiled)
        if case.skip >= 0:
            start = sum(case.widths[: case.skip])
            host[:, start : start + case.widths[case.skip]] = 0xA5
        np.testing.assert_array_equal(back.get(), host.reshape(-1))
        assert (back.base[case.shifts[0] + host.size :].get() == 0xA5).all()


def test_the_driver_takes_the_kernels(cupy: Any) -> None:
    if not _core.kernels_info()["built"]:
        pytest.skip("built without kernels: pip install 'nvidia-cuda-nvrtc-cu12==12.0.*', build")
    assert _core.kernels_refused(0) == ""


def test_random_layouts(cupy: Any, compiled: bool) -> None:
    rng = random.Random(17)
    for _ in range(150):
        n = rng.randint(1, 16)
        unit = rng.choice([1, 2, 3, 4, 8, 16, 48])
        widths = [rng.randint(0, 40) * unit for _ in range(n)]
        if rng.random() < 0.5:
            widths = widths[:1] * n
        rows = rng.randint(0, 300)
        spacing = rng.choice([0, max(widths) * rows, max(widths) * rows + unit])
        shifts = rng.choice([(0, 0), (rng.randint(0, 16), rng.randint(0, 16))])
        check(cupy, Case(widths, rows, spacing, rng.randint(-1, n - 1), shifts), compiled)


@pytest.mark.parametrize("n", [8, 504, 505, 1024])
def test_many_ranks(cupy: Any, compiled: bool, n: int) -> None:
    check(cupy, Case([16] * n, 5), compiled)
    check(cupy, Case([4 * (k % 3) for k in range(n)], 5, skip=n // 2), compiled)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("dtype", ["f2", "f4", "c16"])
def test_pieces_are_those_of_cupy(cupy: Any, compiled: bool, axis: int, dtype: str) -> None:
    shape = [24, 40, 56]
    x = cupy.arange(np.prod(shape)).reshape(shape).astype(dtype)
    sizes = [shape[axis] // 2, 0, 3, shape[axis] - shape[axis] // 2 - 3]
    unit = x.itemsize * int(np.prod(shape[axis + 1 :]))
    case = Case([s * unit for s in sizes], int(np.prod(shape[:axis])))
    packed = cupy.empty(x.size, dtype)
    move(x, packed, case, cupy.cuda.get_current_stream(), pack=True, compiled=compiled)
    pieces = cupy.split(x, np.cumsum(sizes)[:-1].tolist(), axis)
    assert (packed == cupy.concatenate([p.reshape(-1) for p in pieces])).all()


def test_more_than_2_to_the_31_bytes(cupy: Any, compiled: bool) -> None:
    widths, rows = [1001, 2002, 0, 3003], 400_000
    need = 2 * sum(widths) * rows
    if cupy.cuda.runtime.memGetInfo()[0] < 2 * need:
        pytest.skip(f"needs {2 * need / 1e9:.0f} GB of free GPU memory")
    words = cupy.arange(rows * sum(widths) // 4, dtype="u4") * np.uint32(2654435761)
    x = words.view("u1").reshape(rows, sum(widths))
    packed = cupy.empty(x.size, "u1")
    case = Case(widths, rows)
    stream = cupy.cuda.get_current_stream()
    move(x, packed, case, stream, pack=True, compiled=compiled)
    start = offset = 0
    for width in widths:
        block = packed[offset : offset + rows * width].reshape(rows, width)
        assert (block == x[:, start : start + width]).all()
        start, offset = start + width, offset + rows * width
    back = cupy.zeros_like(x)
    move(back, packed, case, stream, pack=False, compiled=compiled)
    assert (back == x).all()


def test_captured_in_a_graph(cupy: Any, compiled: bool) -> None:
    case = Case([512, 256, 128], 64)
    _core.kernels_refused(0)  # loads the kernels, which a capture forbids
    with cupy.cuda.Stream(non_blocking=True) as stream:
        x = cupy.zeros((64, 896), "u1")
        packed = cupy.zeros(x.size, "u1")
        stream.synchronize()
        stream.begin_capture()
        move(x, packed, case, stream, pack=True, compiled=compiled)
        graph = stream.end_capture()
        for value in (1, 2):
            x[:] = cupy.arange(896, dtype="u2").astype("u1") + value
            graph.launch(stream)
            np.testing.assert_array_equal(packed.get(), case.oracle(x.get()))
