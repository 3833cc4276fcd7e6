"""The stand-in NCCL and CUDA driver: building them, and using them from a rank."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "tests" / "standin_nccl"
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-pthread")
WARNINGS = ("-Wall", "-Wextra", "-Wswitch-enum", "-Werror")
DEFAULT_VERSION = 23203


def compiler() -> str | None:
    """The C++ compiler, or None: then a test skips with SKIP."""
    return os.environ.get("CXX") or shutil.which("g++")


SKIP = "the stand-in NCCL is built by the tests: install g++ (apt-get install g++)"


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _make(target: Path, *command: str) -> Path:
    """Run a compiler that writes `target`, unless it is there; another session may be faster."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        made = target.with_name(f"{os.getpid()}-{target.name}")
        subprocess.run([*command, "-o", str(made)], check=True, timeout=120)
        made.rename(target)
    return target


def library(version: int = DEFAULT_VERSION) -> Path:
    """The stand-in of that NCCL version; built on first use, then found by the sources' hash.

    One file is both libraries: symbols that NCCL had not yet in that version are absent.
    """
    cxx = compiler()
    if cxx is None:
        raise RuntimeError(SKIP)
    cache = ROOT / ".pytest_cache" / "standin"
    used = ("nccl/api.hpp", "device/driver_api.hpp", "device/layout.hpp", "device/emulate.hpp")
    paths = [*sorted(SOURCE.glob("*.hpp")), *(ROOT / "csrc" / name for name in used)]
    headers = [path.read_text() for path in paths]
    objects = []
    for source in sorted(SOURCE.glob("*.cpp")):
        text = source.read_text()
        versioned = [f"-DSTANDIN_VERSION={version}"] if "STANDIN_VERSION" in text else []
        command = [cxx, *FLAGS, *WARNINGS, *versioned, f"-I{ROOT / 'csrc'}", "-c", str(source)]
        key = _digest(command, text, headers)
        objects.append(str(_make(cache / f"{source.stem}-{key}.o", *command)))
    link = [cxx, "-pthread", "-shared", "-Wl,-soname,libnccl.so.2", "-Wl,-z,defs"]
    folder = cache / f"{version}-{_digest(link, objects)}"
    return _make(folder / "libnccl.so.2", *link, *objects)


def environment(folder: Path, version: int = DEFAULT_VERSION, **options: Any) -> dict[str, str]:
    """What ranks on the stand-in need; `folder` is the test's own, for the ranks' shared files.

    Options are written without their prefix: gpus=2, faults="...", in_progress=1, polls=3, null=1.
    """
    path = str(library(version))
    given = {f"STANDIN_{name.upper()}": str(value) for name, value in options.items()}
    return {
        "MESHRING_NCCL_LIBRARY": path,
        "MESHRING_CUDA_LIBRARY": path,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
        "STANDIN_DIR": str(folder),
        "STANDIN_STRICT": "1",
    } | given


class Standin:
    """The library of this process's MESHRING_NCCL_LIBRARY, and what a test does with it."""

    def __init__(self) -> None:
        self.dll = ctypes.CDLL(os.environ["MESHRING_NCCL_LIBRARY"])
        for name in ("standin_calls", "standin_violations"):
            getattr(self.dll, name).restype = ctypes.c_char_p
        pointer = ctypes.c_void_p
        for name in ("standin_stream_create", "standin_allocate"):
            getattr(self.dll, name).restype = pointer
        self.dll.standin_allocate.argtypes = (ctypes.c_size_t, ctypes.c_int, pointer)
        self.dll.standin_free.argtypes = (pointer, pointer)
        self.dll.standin_capture.argtypes = (pointer, ctypes.c_int)
        for name in ("destroy", "synchronize"):
            getattr(self.dll, f"standin_stream_{name}").argtypes = (pointer,)
        self.dll.standin_replay.argtypes = (pointer,)
        self._lock = threading.Lock()
        self._place = threading.local()

    def faults(self, rules: str) -> None:
        """Add faults: "FUNCTION[/RANK]=WHAT[@AFTER][xTIMES]" separated by semicolons.

        WHAT: a result code, in_progress[:POLLS], hang, async:CODE, lose:RANK or stall.
        """
        if self.dll.standin_fault(rules.encode()) != 0:
            raise ValueError(f"no such fault: {rules}")

    def clear(self) -> None:
        """Forget faults, records and violations."""
        self.dll.standin_clear()

    def release(self) -> None:
        """Let calls that hang go on."""
        self.dll.standin_release()

    def hanging(self) -> int:
        """How many calls hang now."""
        return int(self.dll.standin_hanging())

    def calls(self, function: str = "") -> list[dict[str, Any]]:
        """The recorded calls of this process, or those of one function."""
        with self._lock:
            found: list[dict[str, Any]] = json.loads(self.dll.standin_calls())
        return [call for call in found if function in ("", call["function"])]

    def violations(self) -> list[str]:
        """What was used as its documentation forbids."""
        with self._lock:
            found: list[str] = json.loads(self.dll.standin_violations())
        return found

    def stream(self) -> int:
        """A new stream, as an address."""
        return int(self.dll.standin_stream_create())

    def destroy(self, stream: int) -> None:
        """Wait for a stream and end it."""
        self._check(self.dll.standin_stream_destroy(stream))

    def synchronize(self, stream: int = 0) -> None:
        """Wait for what is on a stream."""
        self._check(self.dll.standin_stream_synchronize(stream))

    @contextmanager
    def capture(self, stream: int) -> Iterator[None]:
        """Within it, what is enqueued on that stream becomes its graph."""
        self._check(self.dll.standin_capture(stream, 1))
        try:
            yield
        finally:
            self._check(self.dll.standin_capture(stream, 0))

    def replay(self, stream: int) -> None:
        """Enqueue the graph that was captured last on that stream."""
        self._check(self.dll.standin_replay(stream))

    def allocate(self, nbytes: int, stream: int = 0, device: int = 0) -> int:
        """Device memory; its end is enqueued on `stream`."""
        return int(self.dll.standin_allocate(nbytes, device, stream))

    def free(self, pointer: int, stream: int = 0) -> None:
        """Free device memory once `stream` has come so far; later use is a violation."""
        self._check(self.dll.standin_free(pointer, stream))

    @contextmanager
    def memory_of(self, stream: int, device: int = 0) -> Iterator[None]:
        """Within it, CuPy arrays of this thread are on that device, freed in that stream's order."""
        before = self._current()
        self._place.value = (stream, device)
        try:
            yield
        finally:
            self._place.value = before

    def install(self) -> None:
        """Give CuPy an allocator over the stand-in's memory; CuPy itself needs no driver then."""
        import cupy

        def allocate(nbytes: int) -> Any:
            stream, device = self._current()
            owner = _Owner(self, nbytes, stream, device)
            memory = cupy.cuda.UnownedMemory(owner.pointer, max(nbytes, 1), owner, device)
            return cupy.cuda.MemoryPointer(memory, 0)

        cupy.cuda.set_allocator(allocate)

    def to_device(self, array: Any) -> Any:
        """A C-contiguous cupy.ndarray with the bytes of `array`; after install().

        Errors: CuPy 14.2 takes bfloat16 of ml_dtypes, but no float8: ValueError.
        """
        import cupy

        source = np.ascontiguousarray(array).reshape(np.shape(array))
        made = cupy.ndarray(source.shape, source.dtype)
        ctypes.memmove(made.data.ptr, source.ctypes.data, source.nbytes)
        return made

    def to_host(self, array: Any, stream: int = 0) -> np.ndarray[Any, Any]:
        """The bytes of a cupy.ndarray, strided or not, once `stream` has come so far."""
        self.synchronize(stream)
        made = np.empty(array.shape, array.dtype)
        if array.size == 0:
            return made
        reach = [(n - 1) * step for n, step in zip(array.shape, array.strides, strict=True)]
        low = sum(r for r in reach if r < 0)
        span = sum(abs(r) for r in reach) + array.itemsize
        raw = (ctypes.c_char * span).from_address(array.data.ptr + low)
        view: np.ndarray[Any, Any] = np.ndarray(
            array.shape, array.dtype, raw, offset=-low, strides=array.strides
        )
        made[...] = view
        return made

    def _current(self) -> tuple[int, int]:
        found: tuple[int, int] = getattr(self._place, "value", (0, 0))
        return found

    @staticmethod
    def _check(code: int) -> None:
        if code != 0:
            raise ValueError(f"the stand-in driver returned {code}")


class _Owner:
    """One block of device memory, freed in the order of its stream."""

    def __init__(self, standin: Standin, nbytes: int, stream: int, device: int) -> None:
        self.standin = standin
        self.stream = stream
        self.pointer = standin.allocate(nbytes, stream, device)

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self.standin.free(self.pointer, self.stream)
