"""What `meshring bench --backend nccl` needs beside the host's: arrays on GPUs, events, graphs."""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from itertools import repeat
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

import numpy as np

from meshring import _core, device, nccl
from meshring.bench_data import Array
from meshring.bench_report import Record
from meshring.doctor import memory_available
from meshring.environment import detect
from meshring.errors import UsageError

if TYPE_CHECKING:
    from meshring.bench_worker import Settings, Target
    from meshring.communicator import Communicator

ONE_GPU_BY_NCCL = "NCCL_MULTI_RANK_GPU_ENABLE"
WINDOWS_SINCE, REGISTRATION_SINCE = 22703, 21901
STAND_IN = "STAND-IN: not a measurement"
REDUCTION_DTYPES_NOT_IN_NCCL = ("int16", "uint16")


# ---------------------------------------------------------------- before any rank is started


def refusal(names: Sequence[str], dtype: str, op: str, ranks: int, check: bool) -> str | None:
    """Say in a sentence why NCCL has no such benchmark, or None where it has."""
    if "barrier" in names:
        return "barrier is the host engine's on every backend; measure it with --backend host"
    if dtype.startswith("float8"):
        return f"--dtype {dtype}: CuPy has no such type; measure uint8, which moves as many bytes"
    if not any(name in ("all_reduce", "reduce", "reduce_scatter") for name in names):
        return None
    if dtype in REDUCTION_DTYPES_NOT_IN_NCCL:
        return f"--dtype {dtype}: NCCL cannot reduce it; choose int32"
    if dtype.startswith("complex") and op == "prod":
        return f"--op prod of {dtype}: NCCL cannot; choose sum"
    if op == "mean" and check and ranks & (ranks - 1):
        return (
            f"--op mean on {ranks} ranks: NCCL multiplies by 1/{ranks} before it adds, which is "
            "not exact; add --no-check, or measure sum"
        )
    return None


def registration_refusal() -> str | None:
    """Say why buffers cannot be registered with this NCCL, or None."""
    library = nccl.library()
    if library.code >= REGISTRATION_SINCE:
        return None
    return f"--registered needs NCCL 2.19.1 or newer; this is {library.version} ({library.path})"


def missing() -> str | None:
    """Say what this machine lacks for NCCL, or None."""
    return str(device.readiness(0)["why_off"]) or None


def gpus() -> int:
    """Return how many GPUs are visible."""
    return len(_core.cuda_devices())


# ---------------------------------------------------------------- a rank


def share_a_gpu() -> None:
    """Where there are more ranks than GPUs, let NCCL take each rank for a host of its own."""
    here = detect()
    if here.size <= gpus() or os.environ.get(ONE_GPU_BY_NCCL) == "1":
        return
    os.environ["NCCL_HOSTID"] = f"meshring-bench-{here.rank}"
    os.environ.setdefault("NCCL_NET", "Socket")
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")


@contextmanager
def target(comm: Communicator, settings: Settings) -> Iterator[Target]:
    """Give the arrays and the clock of this rank's GPU.

    Errors: UsageError where CuPy cannot compute there, or its memory is too small.
    """
    library = os.environ.get("MESHRING_CUDA_LIBRARY")
    kind = StandIn if library and is_stand_in(library) else Gpu
    made = kind(comm, settings)
    sharing = -(-comm.size // gpus())
    if settings.need * sharing > made.free_bytes():
        raise UsageError(
            f"--sizes: the largest size needs {settings.need / 2**30:.1f} GiB for a rank's arrays, "
            f"{sharing} rank(s) use a GPU, and {made.free_bytes() / 2**30:.1f} GiB of its memory "
            "is free; choose a smaller size"
        )
    try:
        yield made
    finally:
        made.close()


def is_stand_in(library: str) -> bool:
    """Say whether that CUDA driver is the one of meshring's tests, which has no GPU."""
    try:
        return hasattr(ctypes.CDLL(library), "standin_calls")
    except OSError:
        return False


class _OnDevice:
    """What both kinds have in common."""

    def __init__(self, comm: Communicator, settings: Settings) -> None:
        self.comm = comm
        self.cupy: Any = import_module("cupy")
        self.graph = settings.graph
        self.registered = settings.registered
        self.windows = self.registered and nccl.library().code >= WINDOWS_SINCE

    @contextmanager
    def known(self, arrays: Sequence[Array], collective: bool) -> Iterator[None]:
        """Register the arrays: as windows where all ranks have as many, else each by itself."""
        window = self.windows and collective
        found = [self.comm.register(x, window=window) for x in arrays] if self.registered else []
        try:
            yield
        finally:
            self.comm.synchronize()
            for registration in reversed(found):
                registration.close()

    def facts(self) -> Record:
        """Return what the results' environment says of GPUs, drivers and NCCL."""
        library, devices = nccl.library(), _core.cuda_devices()
        used = {d["name"] for d in devices[: self.comm.size]}
        remarks = self.remarks()
        if self.comm.size > len(devices):
            way = ONE_GPU_BY_NCCL if "NCCL_HOSTID" not in os.environ else "NCCL_HOSTID, sockets"
            remarks.append(
                f"{self.comm.size} ranks share {len(devices)} GPU(s) ({way}): "
                "not a bandwidth figure"
            )
        return {
            "gpus": sorted(used),
            "gpu_count": len(devices),
            "nccl": library.version,
            "nccl_path": library.path,
            "cuda_driver": _core.cuda_driver()["version"],
            "cupy": self.cupy.__version__,
            "transport": "NCCL",
            "graph": self.graph,
            "registered": self.registered and ("window" if self.windows else "buffer"),
            "clock": self.clock,
            "remarks": remarks,
        }

    clock = ""

    def remarks(self) -> list[str]:
        """Return what must be said beside every figure."""
        return []


class Gpu(_OnDevice):
    """CuPy arrays on this rank's GPU; times are those between two CUDA events."""

    sample_ns = 1_000_000  # a sample has two events, and events tell half a microsecond
    clock = "CUDA events"

    def __init__(self, comm: Communicator, settings: Settings) -> None:
        super().__init__(comm, settings)
        cupy = self.cupy
        cupy.cuda.Device(comm.device).use()
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self.stream.use()
        self.begin, self.end = cupy.cuda.Event(), cupy.cuda.Event()
        try:
            int(cupy.arange(2).sum())
        except Exception as error:  # CuPy's own, of several kinds
            raise UsageError(
                f"--backend nccl: CuPy cannot compute on GPU {comm.device} ({error}); "
                "its kernels need NVRTC and CUDA's headers: pip install 'cupy-cuda12x[ctk]'"
            ) from error

    def free_bytes(self) -> int:
        """Return the free memory of the GPU."""
        return int(self.cupy.cuda.runtime.memGetInfo()[0])

    def empty(self, count: int, dtype: np.dtype[Any]) -> Array:
        """Return a new CuPy array; one to register begins an allocation of NCCL's."""
        made: Array
        if self.registered:
            with self.cupy.cuda.using_allocator(nccl.allocator()):
                made = self.cupy.empty(count, dtype)
        else:
            made = self.cupy.empty(count, dtype)
        return made

    def view(self, x: Array) -> Array:
        """Return x, bfloat16 as integers: CuPy's kernels compare those exactly."""
        return x.view("u2") if x.dtype.kind == "V" else x

    def sampler(self, call: Callable[[], object], calls: int) -> Callable[[], float]:
        """Return what enqueues that many calls and says how long the GPU took. Units: ns."""
        graph = self._captured(call, calls) if self.graph else None

        def sample() -> float:
            self.begin.record(self.stream)
            if graph is not None:
                graph.launch(self.stream)
            else:
                for _ in repeat(None, calls):
                    call()
            self.end.record(self.stream)
            self.end.synchronize()
            return float(self.cupy.cuda.get_elapsed_time(self.begin, self.end)) * 1e6

        return sample

    def _captured(self, call: Callable[[], object], calls: int) -> Any:
        call()  # NCCL connects at the first call, which a capture forbids
        self.comm.synchronize()
        self.stream.begin_capture()
        try:
            for _ in repeat(None, calls):
                call()
        finally:
            graph = self.stream.end_capture()
        graph.launch(self.stream)  # the first replay uploads it
        self.stream.synchronize()
        return graph

    def close(self) -> None:
        """Wait for the GPU."""
        self.stream.synchronize()


class StandIn(_OnDevice):
    """CuPy arrays over host memory, for the tests' stand-in, whose times mean nothing."""

    sample_ns = 20_000
    clock = "host clock"

    def __init__(self, comm: Communicator, settings: Settings) -> None:
        super().__init__(comm, settings)
        self.dll = ctypes.CDLL(os.environ["MESHRING_CUDA_LIBRARY"])
        pointer = ctypes.c_void_p
        self.dll.standin_allocate.restype = pointer
        self.dll.standin_allocate.argtypes = (ctypes.c_size_t, ctypes.c_int, pointer)
        self.dll.standin_free.argtypes = (pointer, pointer)
        self.dll.standin_capture.argtypes = (pointer, ctypes.c_int)

    def remarks(self) -> list[str]:
        """Return that nothing here is a measurement."""
        return [STAND_IN]

    def free_bytes(self) -> int:
        """Return the free memory of the host, which all its GPUs share."""
        return (memory_available() or 0) // self.comm.size

    def empty(self, count: int, dtype: np.dtype[Any]) -> Array:
        """Return a new CuPy array over the stand-in's memory."""
        nbytes = max(1, count * dtype.itemsize)
        if self.registered:
            address = _core.nccl_allocate(nbytes, 0)
        else:
            address = self.dll.standin_allocate(nbytes, 0, None)
        owner = _Owner()
        memory = self.cupy.cuda.UnownedMemory(address, nbytes, owner, device_id=self.comm.device)
        weakref.finalize(owner, self._free, address)
        pointer = self.cupy.cuda.MemoryPointer(memory, 0)
        made: Array = self.cupy.ndarray(count, dtype, memptr=pointer)
        return made

    def _free(self, pointer: int) -> None:
        if self.registered:
            _core.nccl_free(pointer)
        else:
            self.dll.standin_free(pointer, None)

    def view(self, x: Array) -> Array:
        """Return a NumPy array of the same memory, once the stream has come so far."""
        self._synchronize()
        raw: Any = (ctypes.c_char * x.nbytes).from_address(x.data.ptr)  # type: ignore[attr-defined]
        found: Array = np.ndarray(x.shape, x.dtype, raw)
        return found

    def sampler(self, call: Callable[[], object], calls: int) -> Callable[[], float]:
        """Return what makes that many calls and says how long they took. Units: nanoseconds."""
        if self.graph:
            call()
            self._synchronize()
            self._check(self.dll.standin_capture(None, 1))
            try:
                for _ in repeat(None, calls):
                    call()
            finally:
                self._check(self.dll.standin_capture(None, 0))

        def sample() -> float:
            begin = perf_counter_ns()
            if self.graph:
                self._check(self.dll.standin_replay(None))
            else:
                for _ in repeat(None, calls):
                    call()
            self._synchronize()
            return perf_counter_ns() - begin

        return sample

    def close(self) -> None:
        """Wait for the stream."""
        self._synchronize()

    def _synchronize(self) -> None:
        self._check(self.dll.standin_stream_synchronize(None))

    @staticmethod
    def _check(code: int) -> None:
        if code != 0:
            raise UsageError(f"the stand-in driver returned {code}")


class _Owner:
    """Keeps one block of the stand-in's memory."""
