"""scale=: the premultiplied sum, on the host and on the stand-in NCCL."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import meshring as mr
import oracle
import standin
from procs import run_ranks

DTYPES = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")


@pytest.mark.parametrize("dtype", DTYPES)
def test_on_the_host(dtype: str) -> None:
    t = oracle.dtype_of(dtype)

    def program(comm: mr.Communicator) -> None:
        x = np.array([1, 2, -4]).astype(t)
        want = np.array([0.75, 1.5, -3]).astype(t)  # (0.25 + 0.5) x
        scale = [0.25, 0.5][comm.rank]
        out = np.zeros_like(x)
        assert comm.all_reduce(x, out=out, scale=scale) is out
        assert oracle.difference(out, want) is None
        assert oracle.difference(x, np.array([1, 2, -4]).astype(t)) is None
        result = comm.reduce(x, root=1, scale=scale)
        assert comm.rank == 0 or oracle.difference(result, want) is None
        both = np.concatenate([x, x])
        assert oracle.difference(comm.reduce_scatter(both, scale=scale), want) is None
        assert comm.all_reduce(x, scale=scale) is x
        assert oracle.difference(x, want) is None
        zero = np.array(2).astype(t)
        assert comm.all_reduce(zero, scale=scale) is zero
        assert complex(zero) == 1.5

    mr.run_local(program, 2)


def test_what_is_refused() -> None:
    def program(comm: mr.Communicator) -> None:
        for x, op, scale, words in (
            (np.ones(2), "max", 2, "'scale' goes with op='sum', and op is 'max'"),
            (np.ones(2, "i4"), "sum", 2, "floating-point and complex arrays, and x is int32"),
            (np.ones(2), "sum", "two", "argument 'scale' is 'two'; give a number"),
        ):
            with pytest.raises(mr.UsageError, match=words):
                comm.all_reduce(x, op, scale=scale)  # type: ignore[arg-type]

    mr.run_local(program, 1)


JOB = """
import numpy as np, meshring as mr, oracle
from standin import Standin
standin = Standin()
standin.install()
comm = mr.init("nccl", timeout=30)
scale = [0.25, 0.5][comm.rank]
for name in ("float16", "bfloat16", "float32", "float64", "complex64", "complex128"):
    t = oracle.dtype_of(name)
    want = np.array([0.75, 1.5, -3]).astype(t)
    x = standin.to_device(np.array([1, 2, -4]).astype(t))
    out = comm.all_reduce(x, out=standin.to_device(np.zeros(3, t)), scale=scale)
    assert oracle.difference(standin.to_host(out), want) is None
    both = standin.to_device(np.array([1, 2, -4] * 2).astype(t))
    part = comm.reduce_scatter(both, scale=scale)
    assert oracle.difference(standin.to_host(part), want) is None
    comm.all_reduce(x, scale=scale)
    assert oracle.difference(standin.to_host(x), want) is None
made = len(standin.calls("ncclRedOpCreatePreMulSum"))
assert made == len(standin.calls("ncclRedOpDestroy")) == 18, made
assert not standin.violations()
"""


def test_on_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("cupy", reason="pip install cupy-cuda12x")
    if standin.compiler() is None:
        pytest.skip(standin.SKIP)
    env = standin.environment(tmp_path) | {"NCCL_HOSTID": "standin"}
    result = run_ranks(JOB, 2, env=env)
    assert result.returncode == 0, result.stderr
