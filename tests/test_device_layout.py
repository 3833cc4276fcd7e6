"""The kernels' index arithmetic, run on the CPU over the whole launch grid, against NumPy."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_kernels import DeviceKernels

FILL = 0xA5
ALL_GATHER, REDUCE_SCATTER, ALL_TO_ALL = 2, 3, 8  # CallKind


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> DeviceKernels:
    return DeviceKernels(tmp_path_factory.mktemp("device"))


def buffer(size: int, shift: int) -> np.ndarray:
    """Bytes of FILL, `shift` bytes behind an address that 16 divides, with room on both sides."""
    whole = np.full(size + 96, FILL, np.uint8)
    start = 32 + shift + -(whole.ctypes.data + 32) % 16
    return whole[start : start + size]


@dataclass
class Case:
    """Blocks of an array of bytes and where they lie when packed."""

    widths: Sequence[int]
    rows: int
    spacing: int = 0
    skip: int = -1
    shifts: tuple[int, int] = (0, 0)
    processors: int = 1

    def offsets(self) -> list[int]:
        if self.spacing:
            return [k * self.spacing for k in range(len(self.widths))]
        return [0, *itertools.accumulate(self.rows * w for w in self.widths)][:-1]

    def packed_size(self) -> int:
        ends = [o + self.rows * w for o, w in zip(self.offsets(), self.widths, strict=True)]
        return max(ends, default=0)

    def oracle(self, array: np.ndarray) -> np.ndarray:
        packed = np.full(self.packed_size(), FILL, np.uint8)
        starts = [0, *itertools.accumulate(self.widths)]
        for k, (offset, width) in enumerate(zip(self.offsets(), self.widths, strict=True)):
            if k != self.skip:
                block = array[:, starts[k] : starts[k] + width].reshape(-1)
                packed[offset : offset + block.size] = block
        return packed


def check(kernels: DeviceKernels, case: Case, compiled: bool = True) -> None:
    """Pack and unpack; no byte but those of the blocks may change, nor any beside the buffers."""
    pitch = sum(case.widths)
    array = buffer(case.rows * pitch, case.shifts[0])
    array[:] = np.random.default_rng(7).integers(0, 256, array.size, np.uint8)
    want = case.oracle(array.reshape(case.rows, pitch))
    options = {
        "spacing": case.spacing,
        "skip": case.skip,
        "compiled": compiled,
        "processors": case.processors,
    }
    packed = buffer(want.size, case.shifts[1])
    kernels.copy(case.widths, case.rows, array, packed, pack=True, **options)
    np.testing.assert_array_equal(packed, want)
    assert (packed.base[: 32 + case.shifts[1]] == FILL).all()
    assert (packed.base[-32:] == FILL).all()

    back = buffer(array.size, case.shifts[0])
    kernels.copy(case.widths, case.rows, back, packed, pack=False, **options)
    expected = array.reshape(case.rows, pitch).copy()
    if case.skip >= 0:
        start = sum(case.widths[: case.skip])
        expected[:, start : start + case.widths[case.skip]] = FILL
    np.testing.assert_array_equal(back, expected.reshape(-1))
    assert (back.base[: 32 + case.shifts[0]] == FILL).all()
    assert (back.base[-32:] == FILL).all()


@st.composite
def cases(draw: st.DrawFn) -> Case:
    n = draw(st.integers(1, 16))
    rows = draw(st.integers(0, 9))
    unit = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16, 32, 48]))
    if draw(st.booleans()):
        widths = [draw(st.integers(0, 12)) * unit] * n
    else:
        widths = [draw(st.integers(0, 12)) * unit for _ in range(n)]
    largest = max(widths) * rows
    spacing = draw(st.sampled_from([0, largest, largest + unit, largest + 5]))
    skip = draw(st.integers(-1, n - 1))
    aligned = draw(st.booleans())
    shift = st.just(0) if aligned else st.integers(0, 16)
    return Case(widths, rows, spacing, skip, (draw(shift), draw(shift)))


@settings(max_examples=400)
@given(case=cases(), compiled=st.booleans())
def test_any_layout(kernels: DeviceKernels, case: Case, compiled: bool) -> None:
    check(kernels, case, compiled)


@pytest.mark.parametrize("unit", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("widths", [[5] * 7, [0, 900, 3, 0, 41, 0]], ids=["equal", "uneven"])
@pytest.mark.parametrize("compiled", [True, False], ids=["kernels", "copies"])
def test_more_work_than_one_pass_of_the_grid(
    kernels: DeviceKernels, unit: int, widths: list[int], compiled: bool
) -> None:
    rows = 900 if len(widths) == 7 else 40
    check(kernels, Case([w * unit for w in widths], rows, skip=1), compiled)
    check(kernels, Case([w * unit for w in widths], rows, spacing=rows * 1000 * unit), compiled)


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["u1", "f2", "f4", "c16", "S3"])
@pytest.mark.parametrize("sizes", [[2, 2, 2], [3, 0, 1, 2], [6], [1] * 6])
def test_axes_of_an_array(kernels: DeviceKernels, axis: int, dtype: str, sizes: list[int]) -> None:
    """Packed blocks are numpy.split's pieces, one behind the other."""
    shape = [2, 3, 4, 5]
    shape[axis] = sum(sizes)
    flat = np.random.default_rng(3).integers(0, 256, np.prod(shape) * np.dtype(dtype).itemsize)
    x = flat.astype(np.uint8).view(dtype).reshape(shape)
    rows = int(np.prod(shape[:axis]))
    unit = x.itemsize * int(np.prod(shape[axis + 1 :]))
    packed = buffer(x.nbytes, 0)
    kernels.copy([s * unit for s in sizes], rows, x.reshape(-1).view(np.uint8), packed, pack=True)
    pieces = np.split(x, np.cumsum(sizes)[:-1], axis)
    assert packed.tobytes() == b"".join(p.tobytes() for p in pieces)
    back = np.empty_like(x)
    kernels.copy(
        [s * unit for s in sizes], rows, back.reshape(-1).view(np.uint8), packed, pack=False
    )
    assert back.tobytes() == x.tobytes()


def test_the_widest_vector_that_fits(kernels: DeviceKernels) -> None:
    def kernel(widths: list[int], shifts: tuple[int, int] = (0, 0), **options: int) -> str:
        array, packed = (buffer(9 * sum(widths), s) for s in shifts)
        rows = options.pop("rows", 3)
        return kernels.copy(widths, rows, array, packed, pack=True, **options).kernel

    assert kernel([512] * 4) == "meshring_copy_16_Equal_u32"
    assert kernel([512, 256]) == "meshring_copy_16_Uneven_u32"
    for vector in (1, 2, 4, 8):
        name = f"meshring_copy_{vector}_"
        assert kernel([512 + vector] * 4) == name + "Equal_u32"
        assert kernel([512, 512 + vector]) == name + "Uneven_u32"
        assert kernel([512] * 4, (vector, 0)) == name + "Equal_u32"
        assert kernel([512] * 4, (0, vector)) == name + "Equal_u32"
        assert kernel([512] * 4, spacing=1536 + vector) == name + "Equal_u32"
    # What is not moved does not matter: one block's spacing, one row's pitch.
    assert kernel([512], spacing=1537) == "meshring_copy_16_Equal_u32"
    assert kernel([64, 0, 64], rows=1) == "meshring_copy_16_Uneven_u32"


@pytest.mark.parametrize("n", [1, 2, 16, 504, 1024])
def test_one_launch_whatever_the_number_of_ranks(kernels: DeviceKernels, n: int) -> None:
    equal = [4] * n
    array, packed = buffer(3 * 8 * n, 0), buffer(3 * 8 * n, 0)
    assert kernels.copy(equal, 3, array, packed, pack=True).enqueued == 1
    uneven = [4 + 4 * (k % 2) for k in range(n)]
    launches = kernels.copy(uneven, 3, array, packed, pack=True).enqueued
    assert launches == (3 if n == 1024 else 1)  # tables of 504 blocks fit a launch's parameters
    check(kernels, Case(uneven, 3, skip=n - 1))
    check(kernels, Case(uneven, 2, spacing=24, skip=n // 2))


@pytest.mark.parametrize("widths", [[], [0], [0, 0, 0], [8]])
@pytest.mark.parametrize("rows", [0, 1])
def test_nothing_to_move_is_no_launch(kernels: DeviceKernels, widths: list[int], rows: int) -> None:
    array, packed = buffer(8, 0), buffer(8, 0)
    for compiled in (True, False):
        moved = kernels.copy(widths, rows, array, packed, pack=True, compiled=compiled)
        assert moved.enqueued == (1 if rows and sum(widths) else 0)
        skipped = kernels.copy([8], rows, array, packed, pack=True, skip=0, compiled=compiled)
        assert skipped.enqueued == 0


def test_grid_fills_the_device_and_no_more(kernels: DeviceKernels) -> None:
    array, packed = buffer(1 << 20, 0), buffer(1 << 20, 0)
    widths = [512, 512]  # 1 MiB is 64 tiles of 256 threads x 4 vectors x 16 bytes
    assert kernels.copy(widths, 1024, array, packed, pack=True, processors=100).grid == 64
    assert kernels.copy(widths, 1024, array, packed, pack=True, processors=1).grid == 8
    assert kernels.copy(widths, 1, array, packed, pack=True, processors=1).grid == 1


# ---- addresses beyond 2^31 and 2^32, without such arrays -----------------------------------------


def addresses(case: Case, bases: tuple[int, int], column: int, row: int) -> tuple[int, int]:
    """Of the byte in that row and column, by integers without limits."""
    starts = [0, *itertools.accumulate(case.widths)]
    k = max(i for i, s in enumerate(starts[:-1]) if s <= column and case.widths[i] > 0)
    packed = case.offsets()[k] + row * case.widths[k] + column - starts[k]
    return bases[0] + row * starts[-1] + column, bases[1] + packed


def check_places(kernels: DeviceKernels, case: Case, vector: int, kernel: str) -> None:
    bases = (1 << 44) + vector, 3 << 44
    moved = sum(case.widths) - (case.widths[case.skip] if case.skip >= 0 else 0)
    before_skip = sum(case.widths[: case.skip]) if case.skip >= 0 else moved
    work = case.rows * moved // vector
    rng = random.Random(5)
    per_row = moved // vector
    edges = [0, work - 1, per_row - 1, per_row % work, work // 2]
    items = [*edges, *sorted(rng.randrange(work) for _ in range(300))]
    items += [rng.randrange(work) for _ in range(300)]
    got_work, got = kernels.places(
        case.widths, case.rows, items, bases=bases, spacing=case.spacing, skip=case.skip
    )
    assert kernels.lib.last_kernel().decode() == kernel
    assert got_work == work
    for item, pair in zip(items, got, strict=True):
        row, column = divmod(item * vector, moved)
        if column >= before_skip and case.skip >= 0:
            column += case.widths[case.skip]
        assert pair == addresses(case, bases, column, row), item


G = 1 << 30
LARGE = {
    "one row of bytes": (Case([3 * G + 1] * 3, 1), 1, "1_Equal_u64"),
    "many rows of bytes": (Case([1001] * 7, 12 * G // 7007), 1, "1_Equal_u64"),
    "uneven bytes": (Case([5 * G + 1, 0, 17, G], 3), 1, "1_Uneven_u64"),
    "64 GiB of 16 bytes": (Case([512, 1024, 0, 2560], 1 << 24), 16, "16_Uneven_u64"),
    "padding beyond 2^35": (Case([4096] * 1024, 8, spacing=1 << 26), 16, "16_Equal_u64"),
    "30 GiB in 32 bits": (Case([4096, 8192, 1024], 30 * G // 13312), 16, "16_Uneven_u32"),
    "2 GiB less 1 in 32 bits": (Case([2 * G - 1], 1), 1, "1_Equal_u32"),
    "2 GiB of bytes": (Case([1 * G + 1, 1 * G - 1], 1), 1, "1_Uneven_u64"),
    "without its own": (Case([G + 1, 3 * G + 3, G + 7], 2, skip=1), 1, "1_Uneven_u64"),
    "without its own, equal": (Case([8 * G] * 4, 2, skip=2), 16, "16_Equal_u64"),
}


@pytest.mark.parametrize("name", LARGE)
def test_large_arrays(kernels: DeviceKernels, name: str) -> None:
    case, vector, kernel = LARGE[name]
    check_places(kernels, case, vector, f"meshring_copy_{kernel}")


@pytest.mark.parametrize("wide", [False, True])
def test_division_by_multiplication(kernels: DeviceKernels, wide: bool) -> None:
    top = (1 << (63 if wide else 31)) - 1
    rng = random.Random(11)
    bits = 63 if wide else 31
    powers = [1 << b for b in range(bits)]
    divisors = {1, 2, 3, 5, 7, 641, top, top - 1, top // 2, top // 2 + 1}
    divisors |= {p + d for p in powers for d in (-1, 0, 1)} - {0}
    divisors |= {rng.getrandbits(rng.randint(1, bits)) | 1 for _ in range(200)}
    for d in sorted(divisors):
        near = [top // d * d + e for e in (-1, 0, 1)]
        for x in {0, 1, d - 1, d, d + 1, 2 * d - 1, 2 * d, top, rng.randrange(top), *near}:
            if 0 <= x <= top and d <= top:
                got = kernels.quotient(x, d, wide)
                assert got == x // d, (x, d)


# ---- from a call --------------------------------------------------------------------------------


def test_layout_of_a_call(kernels: DeviceKernels) -> None:
    """What a rank cuts out of its input and joins in its output, as call.hpp counts it."""
    sizes = [3, 0, 2, 1]
    for kind, joins in ((ALL_GATHER, True), (REDUCE_SCATTER, False)):
        head, blocks, equal = kernels.layout_of_call(kind, (5, 8, 0), sizes, 1, 4, 0, joins=joins)
        assert head == [5, 48, 240]
        assert blocks == [(24, 0), (0, 120), (16, 120), (8, 200)]
        assert not equal
        head, blocks, equal = kernels.layout_of_call(kind, (5, 8, 0), sizes, 1, 4, 128, joins=joins)
        assert head == [5, 48, 424]
        assert blocks == [(24, 0), (0, 128), (16, 256), (8, 384)]
        for lengths in ([], [2, 2, 2, 2]):
            head, blocks, equal = kernels.layout_of_call(
                kind, (5, 8, 2), lengths, 1, 4, 0, joins=joins
            )
            assert head == [5, 64, 320]
            assert blocks == [(16, 0), (16, 80), (16, 160), (16, 240)]
            assert equal


def test_layout_of_all_to_all(kernels: DeviceKernels) -> None:
    """Rank 1 of 3 cuts its row of the table of lengths out of its input, and joins its column."""
    sizes = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    cut = kernels.layout_of_call(ALL_TO_ALL, (2, 1, 0), sizes, 1, 3, 0, joins=False)
    assert cut == ([2, 15, 30], [(4, 0), (5, 8), (6, 18)], False)
    joined = kernels.layout_of_call(ALL_TO_ALL, (2, 1, 0), sizes, 1, 3, 0, joins=True)
    assert joined == ([2, 15, 30], [(2, 0), (5, 4), (8, 14)], False)


def test_the_driver_takes_the_kernels_or_the_reason_is_told(
    kernels: DeviceKernels, capfd: pytest.CaptureFixture[str]
) -> None:
    assert kernels.lib.why_not(0, 1) == b""
    assert capfd.readouterr().err == ""
    refused = kernels.lib.why_not(222, 1).decode()
    for part in ("CUDA 12.0", "ISA 8.0", "sm_70", "error 222", "newer driver"):
        assert part in refused
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert refused in said
    assert "found no compiler" in kernels.lib.why_not(0, 0).decode()
    assert capfd.readouterr().err == ""  # once a process


def test_a_failing_launch_is_an_error(kernels: DeviceKernels) -> None:
    assert kernels.lib.failed_launch() == b"cuLaunchKernel: error 700"
