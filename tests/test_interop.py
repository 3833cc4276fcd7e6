"""Arrays of other libraries. Skips where they are not installed."""

from __future__ import annotations

import array

import numpy as np
import pytest

import meshring as mr


def test_buffers_of_the_standard_library() -> None:
    def program(comm: mr.Communicator) -> None:
        a = array.array("d", [1.0, 2.0, 3.0])
        assert comm.all_reduce(a) is a
        assert list(a) == [2.0, 4.0, 6.0]
        b = bytearray(b"\x01\x02")
        comm.all_reduce(memoryview(b))
        assert b == b"\x02\x04"
        with pytest.raises(mr.UsageError, match="read-only"):
            comm.all_reduce(b"\x01")

    mr.run_local(program, 2)


def test_torch_cpu_tensors() -> None:
    torch = pytest.importorskip("torch", reason="pip install torch (any CPU build)")

    def program(comm: mr.Communicator) -> None:
        t = torch.full((3,), float(comm.rank + 1))
        assert comm.all_reduce(t) is t
        assert t.tolist() == [3.0, 3.0, 3.0]
        wide = comm.all_gather(torch.full((2, 1), comm.rank), axis=1)
        assert wide.tolist() == [[0, 1], [0, 1]]

    mr.run_local(program, 2)


def test_cupy_arrays_between_threads_are_refused() -> None:
    cupy = pytest.importorskip("cupy", reason="pip install cupy-cuda12x")
    host = np.ones(4, "f4")
    memory = cupy.cuda.UnownedMemory(host.ctypes.data, host.nbytes, host, device_id=0)
    x = cupy.ndarray((4,), "f4", memptr=cupy.cuda.MemoryPointer(memory, 0))

    def program(comm: mr.Communicator) -> None:
        with pytest.raises(
            mr.UsageError, match=r"on a GPU, and NCCL is off: ranks made by run_local\(\)"
        ):
            comm.all_reduce(x)
        assert comm.all_reduce(np.ones(2)).tolist() == [2.0, 2.0]

    mr.run_local(program, 2)


def test_mpi4py_sees_what_we_reduced() -> None:
    """A NumPy array that meshring filled is a message to mpi4py like any other."""
    pytest.importorskip("mpi4py", reason="pip install 'meshring[test-all]' (mpi4py and mpich)")
    code = (
        "import numpy as np, meshring as mr\n"
        "from mpi4py import MPI\n"
        "x = mr.init().all_reduce(np.arange(3.0))\n"
        "y = np.empty_like(x)\n"
        "MPI.COMM_SELF.Allreduce(x, y)\n"
        "print(y.tolist())\n"
    )
    from procs import run_ranks

    result = run_ranks(code, 2)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("[0.0, 2.0, 4.0]") == 2
