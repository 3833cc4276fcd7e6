"""NCCL and the CUDA driver through ctypes, for the tests of the stand-in itself."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from procs import Result, run_ranks, script
from standin import Standin, environment

P, Z, N = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
DTYPES = "int8 uint8 int32 uint32 int64 uint64 float16 float32 float64 bfloat16 float8_e4m3fn float8_e5m2".split()
OPS = {"sum": 0, "prod": 1, "max": 2, "min": 3, "avg": 4}
PARAMETERS = {
    "AllReduce": (P, P, Z, N, N, P, P),
    "AllGather": (P, P, Z, N, P, P),
    "ReduceScatter": (P, P, Z, N, N, P, P),
    "Broadcast": (P, P, Z, N, N, P, P),
    "Reduce": (P, P, Z, N, N, N, P, P),
    "AlltoAll": (P, P, Z, N, P, P),
    "Gather": (P, P, Z, N, N, P, P),
    "Scatter": (P, P, Z, N, N, P, P),
    "Send": (P, Z, N, N, P, P),
    "Recv": (P, Z, N, N, P, P),
    "CommFinalize": (P,),
    "CommDestroy": (P,),
    "CommAbort": (P,),
    "CommRevoke": (P, N),
    "CommGetAsyncError": (P, P),
    "CommSplit": (P, N, N, P, P),
    "CommShrink": (P, P, N, P, P, N),
    "RedOpCreatePreMulSum": (P, P, N, N, P),
    "RedOpDestroy": (N, P),
    "MemAlloc": (P, Z),
    "MemFree": (P,),
    "CommRegister": (P, P, Z, P),
    "CommDeregister": (P, P),
    "CommWindowRegister": (P, P, Z, P, N),
    "CommWindowDeregister": (P, P),
    "GroupStart": (),
    "GroupEnd": (),
    "GetLastError": (P,),
    "GetVersion": (P,),
}
UNDEFINED = -(2**31)


class UniqueId(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_char * 128)]


class Config(ctypes.Structure):
    _fields_ = [
        ("size", Z),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        ("blocking", N),
        ("ctas", N * 3),
        ("net_name", ctypes.c_char_p),
        ("share", N * 2),
        ("comm_name", ctypes.c_char_p),
        ("rest", N * 4),
    ]

    def __init__(self, blocking: int = 1) -> None:
        super().__init__()
        self.size, self.magic, self.version = ctypes.sizeof(Config), 0xCAFEBEEF, 22703
        self.blocking = blocking
        self.ctas[:] = [UNDEFINED] * 3
        self.share[:] = [UNDEFINED] * 2
        self.rest[:] = [UNDEFINED] * 4


class Nccl:
    """A rank's communicator and its calls, which return result codes."""

    def __init__(self) -> None:
        self.standin = Standin()
        self.dll = self.standin.dll
        for name, parameters in PARAMETERS.items():
            if hasattr(self.dll, f"nccl{name}"):
                getattr(self.dll, f"nccl{name}").argtypes = parameters
        self.dll.ncclGetLastError.restype = ctypes.c_char_p
        self.dll.ncclCommInitRankConfig.argtypes = (P, N, UniqueId, N, P)
        self.comm, self.rank, self.size, self.stream = 0, 0, 0, 0
        self.kept: list[Any] = []

    def __getattr__(self, name: str) -> Callable[..., int]:
        return getattr(self.dll, f"nccl{name}")

    def unique_id(self, rank: int) -> UniqueId:
        """Rank 0's, through a file."""
        path = Path(os.environ["STANDIN_DIR"]) / "id"
        made = UniqueId()
        if rank == 0:
            assert self.dll.ncclGetUniqueId(ctypes.byref(made)) == 0
            path.with_suffix(".new").write_bytes(bytes(made))
            path.with_suffix(".new").rename(path)
        until(path.exists)
        return UniqueId.from_buffer_copy(path.read_bytes())

    def init(self, rank: int, size: int, blocking: int = 1) -> int:
        """ncclCommInitRankConfig, polled to its end."""
        handle, config = P(), Config(blocking)
        identifier = self.unique_id(rank)
        code = self.CommInitRankConfig(
            ctypes.byref(handle), size, identifier, rank, ctypes.byref(config)
        )
        self.comm, self.rank, self.size = handle.value or 0, rank, size
        self.stream = self.standin.stream()
        return self.settle(code)

    def error(self, comm: int = 0) -> int:
        """The asynchronous error."""
        out = N()
        assert self.CommGetAsyncError(comm or self.comm, ctypes.byref(out)) == 0
        return out.value

    def settle(self, code: int) -> int:
        """Poll a call that is in progress to its end."""
        if code == 7:
            until(lambda: self.error() != 7)
            return self.error()
        return code

    def device(self, array: np.ndarray[Any, Any]) -> int:
        """Device memory with the bytes of `array`."""
        pointer = self.standin.allocate(max(array.nbytes, 1), self.stream)
        source = np.ascontiguousarray(array)
        ctypes.memmove(pointer, source.ctypes.data, source.nbytes)
        return pointer

    def host(self, pointer: int, count: int, dtype: Any) -> np.ndarray[Any, Any]:
        """The first elements there, once the stream has come so far."""
        self.standin.synchronize(self.stream)
        made = np.empty(count, dtype)
        ctypes.memmove(made.ctypes.data, pointer, made.nbytes)
        return made

    def empty(self, count: int, dtype: Any) -> int:
        return self.standin.allocate(max(count * np.dtype(dtype).itemsize, 1), self.stream)


def until(predicate: Callable[[], object], timeout: float = 20.0) -> None:
    end = time.monotonic() + timeout
    while not predicate():
        assert time.monotonic() < end, f"not within {timeout} s"
        time.sleep(0.002)


def threads(function: Callable[[Nccl, int], None], size: int, **init: Any) -> None:
    """Run `function(nccl, rank)` on so many ranks of this process; the first failure is raised."""
    failures: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            nccl = Nccl()
            assert nccl.init(rank, size, **init) == 0
            function(nccl, rank)
        except BaseException as failure:  # reported by the thread that waits
            failures.append(failure)

    running = [threading.Thread(target=work, args=(r,), daemon=True) for r in range(size)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(30)
    if failures:
        raise failures[0]
    assert not any(thread.is_alive() for thread in running), "a rank hangs"


def process(function: Callable[[Nccl, int], None], **init: Any) -> None:
    """Run `function` as the rank that the launcher made this process."""
    nccl = Nccl()
    rank, size = int(os.environ["MESHRING_RANK"]), int(os.environ["MESHRING_SIZE"])
    assert nccl.init(rank, size, **init) == 0
    function(nccl, rank)


HEAD = """\
import ctypes, os, signal, threading
import numpy as np
from standin_raw import *
standin = Standin()
"""


def job(folder: Path, body: str, n: int = 1, **options: Any) -> Result:
    """Run `body` on n processes; each says "done" once, and nobody broke a rule."""
    env = environment(folder, **options)
    text = script(body, HEAD) + "\nassert standin.violations() == [], standin.violations()\n"
    result = run_ranks(text + 'print("done", flush=True)\n', n, env=env, timeout=40)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("done") == n
    assert result.left == []
    assert [p.name for p in folder.iterdir() if p.name != "id"] == []
    return result
