"""The reduction kernels against a NumPy oracle, bit for bit, on every instruction set."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Iterator

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshring import _core

INTEGERS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
NARROW = ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
REALS = [*NARROW, "float32", "float64"]
COMPLEX = ["complex64", "complex128"]
DTYPES = ["bool", *INTEGERS, *REALS, *COMPLEX]
SIZES = [0, 1, 3, 15, 64, 1000]
ISAS = _core.isas()


def dtype_of(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))


def bits(a: np.ndarray) -> np.ndarray:
    """View real numbers as unsigned integers; complex ones as pairs."""
    part = a.dtype.itemsize // (2 if a.dtype.kind == "c" else 1)
    return a.view(f"u{part}")


def ops_of(name: str) -> list[str]:
    if name in COMPLEX:
        return ["sum", "prod", "mean"]
    return ["sum", "prod", "min", "max", *(["mean"] if name in REALS else [])]


CASES = [(name, op) for name in DTYPES for op in ops_of(name)]


def is_nan(a: np.ndarray) -> np.ndarray:
    return np.isnan(a.astype("f4") if a.dtype.name in NARROW else a)


def combine(op: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Apply one operator to floats; of two NaNs the first stays."""
    result = {"sum": a + b, "difference": a - b, "prod": a * b}[op]
    return np.where(np.isnan(a), a + a, result) if a.dtype.kind == "f" else result


def select(op: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pick whole elements, so that even the payload of a NaN is kept."""
    x, y = (v.astype("f4") if v.dtype.name in NARROW else v for v in (a, b))
    keep = (x < y if op == "min" else x > y) | (x != x)
    return np.where(keep, bits(a), bits(b)).view(a.dtype)


def complex_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Multiply by the plain formula."""
    ar, ai, br, bi = (np.ascontiguousarray(v) for v in (a.real, a.imag, b.real, b.imag))
    out = np.empty_like(a)
    out.real = combine("difference", combine("prod", ar, br), combine("prod", ai, bi))
    out.imag = combine("sum", combine("prod", ar, bi), combine("prod", ai, br))
    return out


def oracle(op: str, arrays: list[np.ndarray]) -> np.ndarray:
    """Reduce in rank order in the accumulate type."""
    first = arrays[0]
    if first.dtype == bool:
        fold = np.logical_or if op in ("sum", "max") else np.logical_and
        return fold.reduce([a.view("u1") != 0 for a in arrays])
    if len(arrays) == 1:
        return first.copy()
    if op in ("min", "max"):
        return functools.reduce(functools.partial(select, op), arrays)
    with np.errstate(all="ignore"):
        if first.dtype.kind == "c" and op == "prod":
            return functools.reduce(complex_product, arrays)
        narrow = first.dtype.name in NARROW
        values = [a.astype("f4") if narrow else a.view(a.real.dtype) for a in arrays]
        step = functools.partial(combine, "prod" if op == "prod" else "sum")
        acc = functools.reduce(step, values)
        if op == "mean":
            acc = acc / acc.dtype.type(len(arrays))
        return acc.astype(first.dtype) if narrow else acc.view(first.dtype)


def check(op: str, arrays: list[np.ndarray], isa: str, want: np.ndarray | None = None) -> None:
    """Compare one reduction with the oracle, bit for bit."""
    want = oracle(op, arrays) if want is None else want
    got = _core.reduce_arrays(op, arrays, isa)
    assert got.dtype == want.dtype == arrays[0].dtype
    assert got.shape == want.shape
    wrong = np.flatnonzero(bits(got) != bits(want))
    assert wrong.size == 0, (
        f"{op} of {len(arrays)} {got.dtype.name} on {isa}: {wrong.size} wrong, first at {wrong[0]}:"
        f" {bits(got)[wrong[0]]:#x} instead of {bits(want)[wrong[0]]:#x} from"
        f" {[hex(bits(a)[wrong[0]]) for a in arrays]}"
    )


def check_all(op: str, arrays: list[np.ndarray]) -> None:
    """Compare every instruction set with the oracle."""
    want = oracle(op, arrays)
    for isa in ISAS:
        check(op, arrays, isa, want)


def random_array(rng: np.random.Generator, name: str, size: int) -> np.ndarray:
    """Half ordinary numbers, half arbitrary bytes: NaN, inf, subnormals, huge and tiny values."""
    dtype = dtype_of(name)
    wild = rng.integers(0, 256, size * dtype.itemsize, np.uint8).view(dtype)
    if dtype.kind in "biu":
        wild.view(f"u{dtype.itemsize}")[rng.random(size) < 0.1] = 0
        return wild
    tame = rng.normal(size=size) * 2.0 ** rng.integers(-8, 8, size)
    if dtype.kind == "c":
        tame = tame + 1j * rng.normal(size=size)
    special = np.array([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan], "f4").astype(dtype)
    out = tame.astype(dtype)
    kind = rng.random(size)
    out[kind < 0.4] = wild[kind < 0.4]
    out[kind > 0.9] = rng.choice(special, size)[kind > 0.9]
    return out


def every(name: str) -> np.ndarray:
    """Every bit pattern of a type of 8 or 16 bits."""
    dtype = dtype_of(name)
    return np.arange(1 << (8 * dtype.itemsize), dtype=f"u{dtype.itemsize}").view(dtype)


def pieces(arrays: list[np.ndarray], size: int) -> Iterator[list[np.ndarray]]:
    for i in range(0, arrays[0].size, size):
        yield [a[i : i + size] for a in arrays]


@pytest.mark.parametrize(("name", "op"), CASES)
def test_against_oracle(name: str, op: str) -> None:
    rng = np.random.default_rng(1)
    for n in (1, 2, 3, 5):
        for size in SIZES:
            check_all(op, [random_array(rng, name, size) for _ in range(n)])


@pytest.mark.parametrize(("name", "op"), CASES)
def test_every_short_length(name: str, op: str) -> None:
    rng = np.random.default_rng(2)
    for size in range(300):
        check_all(op, [random_array(rng, name, size) for _ in range(2 + size % 3)])


@pytest.mark.parametrize(("name", "op"), CASES)
def test_result_may_be_a_source(name: str, op: str) -> None:
    rng = np.random.default_rng(3)
    for n in (1, 2, 4):
        for size in (1, 7, 33, 1001):
            arrays = [random_array(rng, name, size) for _ in range(n)]
            for isa in ISAS:
                want = _core.reduce_arrays(op, arrays, isa)
                for r in range(n):
                    copies = [a.copy() for a in arrays]
                    _core.reduce_arrays(op, copies, isa, out=copies[r])
                    np.testing.assert_array_equal(bits(copies[r]), bits(want))
                    for k in set(range(n)) - {r}:
                        np.testing.assert_array_equal(bits(copies[k]), bits(arrays[k]))


@pytest.mark.parametrize(("name", "op"), CASES)
def test_unaligned_and_no_byte_beyond(name: str, op: str) -> None:
    rng = np.random.default_rng(4)
    dtype = dtype_of(name)
    for size in (1, 5, 70, 257):
        arrays = [random_array(rng, name, size) for _ in range(2)]
        shifted = []
        for shift, a in enumerate(arrays, 1):
            buffer = bytearray(a.nbytes + 16)
            shifted.append(np.ndarray(size, dtype, buffer, shift))
            shifted[-1].view("u1")[...] = a.view("u1")
        for isa in ISAS:
            target = bytearray(b"\xa5" * (arrays[0].nbytes + 16))
            out = np.ndarray(size, dtype, target, 3)
            _core.reduce_arrays(op, shifted, isa, out=out)
            want = _core.reduce_arrays(op, arrays, isa).tobytes()
            assert bytes(target) == b"\xa5" * 3 + want + b"\xa5" * 13


@pytest.mark.parametrize("name", NARROW)
@pytest.mark.parametrize("piece", [1 << 16, 7], ids=["vector", "scalar"])
def test_every_pattern_widens_and_narrows(name: str, piece: int) -> None:
    x = every(name)
    minus_zero = np.full(x.shape, -0.0, x.dtype)
    for isa in ISAS:
        for a in pieces([x, minus_zero], piece):
            check("sum", a, isa)
        for a in pieces([x], piece):
            check("mean", a, isa)
    kept = ~is_nan(x)
    np.testing.assert_array_equal(
        bits(_core.reduce_arrays("sum", [x, minus_zero]))[kept], bits(x)[kept]
    )


@pytest.mark.parametrize("name", NARROW)
@pytest.mark.parametrize("piece", [1 << 16, 7], ids=["vector", "scalar"])
def test_ties_round_to_even(name: str, piece: int) -> None:
    x = every(name)
    neighbour = np.roll(x, -1)  # their mean is half-way between two numbers
    for isa in ISAS:
        for a in pieces([x, neighbour], piece):
            check("mean", a, isa)
        for a in pieces([x, x, neighbour], piece):
            check("mean", a, isa)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
@pytest.mark.parametrize("op", ["sum", "prod", "min", "max", "mean"])
def test_many_pairs_of_16_bits(name: str, op: str) -> None:
    x = every(name)
    for shift in (0, 1, 77, 1024, 0x3C00, 0x7FFF, 0x8000, 0xC3A5):
        check_all(op, [x, np.roll(x, shift)])


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("op", ["sum", "prod", "min", "max", "mean"])
def test_every_pair_of_8_bits(name: str, op: str) -> None:
    x = every(name)
    pairs = [np.repeat(x, 256), np.tile(x, 256)]
    check_all(op, pairs)
    for isa in ISAS:
        for a in pieces(pairs, 15):
            check(op, a, isa)


@pytest.mark.parametrize(
    ("name", "largest", "beyond"),
    [
        ("float16", 65504, np.inf),
        ("bfloat16", float(ml_dtypes.finfo("bfloat16").max), np.inf),
        ("float8_e4m3fn", 448, np.nan),
        ("float8_e5m2", 57344, np.inf),
    ],
)
def test_overflow(name: str, largest: float, beyond: float) -> None:
    for size in (1, 64):
        big = np.full(size, largest, dtype_of(name))
        for isa in ISAS:
            up = _core.reduce_arrays("sum", [big, big], isa).astype("f4")
            down = _core.reduce_arrays("sum", [-big, -big], isa).astype("f4")
            np.testing.assert_array_equal(up, np.full(size, beyond, "f4"))
            np.testing.assert_array_equal(down, np.full(size, -beyond, "f4"))
            if name != "bfloat16":  # the accumulator has room there: rounded once only
                back = _core.reduce_arrays("sum", [big, big, -big], isa).astype("f4")
                np.testing.assert_array_equal(back, np.full(size, largest, "f4"))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [1, 200])
def test_signed_zeros_nan_and_mean(isa: str, size: int) -> None:
    def one(op: str, *values: float) -> np.ndarray:
        return _core.reduce_arrays(op, [np.full(size, v, "f4") for v in values], isa)

    assert np.signbit(one("sum", -0.0, -0.0)).all()
    assert not np.signbit(one("sum", -0.0, 0.0)).any()
    assert not np.signbit(one("min", -0.0, 0.0)).any()  # equal: the later one stays
    assert np.signbit(one("max", 0.0, -0.0)).all()
    for op in ("sum", "prod", "min", "max", "mean"):
        assert np.isnan(one(op, np.nan, 1.0)).all()
        assert np.isnan(one(op, 1.0, np.nan, 2.0)).all()
    tiny = np.float32(1e-45)
    assert (one("sum", tiny, tiny) == tiny + tiny).all()
    assert (one("mean", 1.0, 2.0, 4.0) == np.float32(7) / np.float32(3)).all()


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_wrap(name: str) -> None:
    limits = np.iinfo(name)
    for size in (1, 100):
        top, two = np.full(size, limits.max, name), np.full(size, 2, name)
        for isa in ISAS:
            assert (_core.reduce_arrays("sum", [top, two], isa) == limits.min + 1).all()
            want = -2 if limits.min else limits.max - 1
            assert (_core.reduce_arrays("prod", [top, two], isa) == want).all()


@pytest.mark.parametrize("op", ["sum", "prod", "min", "max"])
def test_bool_takes_any_non_zero_byte(op: str) -> None:
    x, y = (a.reshape(-1) for a in np.meshgrid(*[np.arange(256, dtype="u1")] * 2))
    want = (x != 0) | (y != 0) if op in ("sum", "max") else (x != 0) & (y != 0)
    for isa in ISAS:
        got = _core.reduce_arrays(op, [x.view(bool), y.view(bool)], isa)
        np.testing.assert_array_equal(got.view("u1"), want.astype("u1"))
        alone = _core.reduce_arrays(op, [x.view(bool)], isa)
        np.testing.assert_array_equal(alone.view("u1"), (x != 0).astype("u1"))


@pytest.mark.parametrize("name", [*REALS, *COMPLEX])
def test_the_first_of_two_nans_stays(name: str) -> None:
    rng = np.random.default_rng(6)
    size = 301
    for n in (2, 3):
        for length in (1, 2, 17, size):
            arrays = []
            for _ in range(n):
                a = np.full(size, np.nan, dtype_of(name))
                # Both signs, and payloads where the type has room for them.
                unsigned = bits(a)
                kind = unsigned.dtype.type
                unsigned |= rng.integers(0, 2, unsigned.size).astype(kind) << kind(
                    8 * kind().itemsize - 1
                )
                if name not in NARROW:
                    unsigned |= rng.integers(0, 99, unsigned.size).astype(kind)
                arrays.append(a[:length])
            for op in ops_of(name):
                check_all(op, arrays)


@pytest.mark.parametrize("name", COMPLEX)
def test_complex_product_is_the_plain_formula(name: str) -> None:
    values = [0.0, -0.0, 1.0, -2.5, np.inf, -np.inf, np.nan, 1e30]
    grid = np.empty((len(values),) * 2, name)
    grid.real, grid.imag = np.meshgrid(values, values)
    x, y = np.repeat(grid, grid.size), np.tile(grid.reshape(-1), grid.size)
    check_all("prod", [x, y])
    for isa in ISAS:
        for a in pieces([x, y], 1):
            check("prod", a, isa)
        # Annex G of C would give an infinity here.
        infinite = _core.reduce_arrays("prod", [np.array([complex(np.inf, np.inf)], name)] * 2, isa)
        assert np.isnan(infinite.real).all()


def test_complex_product_does_not_contract() -> None:
    a = np.full(32, 1 + 2.0**-23, "f4").astype("c8")
    a.imag = a.real  # the real part is exactly 0 unless one product was not rounded
    for isa in ISAS:
        assert (_core.reduce_arrays("prod", [a, a], isa).real == 0).all()


@settings(max_examples=150, deadline=None)
@given(
    case=st.sampled_from(CASES),
    n=st.integers(1, 9),
    size=st.integers(0, 700),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_case(case: tuple[str, str], n: int, size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    check_all(case[1], [random_array(rng, case[0], size) for _ in range(n)])


@pytest.mark.parametrize("name", ["float32", "float64", "bfloat16", "float16", "complex64"])
def test_instruction_sets_agree_on_finite_numbers(name: str) -> None:
    rng = np.random.default_rng(5)
    arrays = [rng.normal(size=4099).astype(dtype_of(name)) for _ in range(7)]
    for op in ops_of(name):
        results = {_core.reduce_arrays(op, arrays, isa).tobytes() for isa in ISAS}
        assert len(results) == 1


@pytest.mark.parametrize("wish", ["portable", "avx2", "avx512", "nonsense"])
def test_environment_lowers_the_instruction_set(wish: str) -> None:
    def isas(**extra: str) -> list[str]:
        clean = {k: v for k, v in os.environ.items() if k != "MESHRING_ISA"}
        code = "from meshring import _core; print(*_core.isas())"
        run = [sys.executable, "-c", code]
        return subprocess.check_output(run, env=clean | extra, text=True).split()

    all_isas = isas()
    limit = all_isas.index(wish) + 1 if wish in all_isas else len(all_isas)
    assert isas(MESHRING_ISA=wish) == all_isas[:limit]
