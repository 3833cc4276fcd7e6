"""NCCL as users meet it: which library, its settings, and memory that it can register."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from meshring import _core
from meshring.errors import UsageError


@dataclass(frozen=True)
class Config:
    """Settings of an NCCL communicator, for init(nccl=...); None leaves NCCL's own choice.

    Errors: UsageError by init() for a setting that the library at hand is too old for (NCCL itself
    ignores such fields silently). Source: ncclConfig_t.
    """

    cga_cluster_size: int | None = None
    """Thread block cluster size, 0 to 8 (2.18, Hopper and newer)."""
    min_ctas: int | None = None
    """Fewest thread blocks per call."""
    max_ctas: int | None = None
    """Most thread blocks per call; fewer leave the GPU to the program's own kernels."""
    net_name: str | None = None
    """Network module, for example "Socket" or "IB"."""
    split_share: int | None = None
    """1: communicators made by split() share resources with their parent."""
    traffic_class: int | None = None
    """Of the network (2.26)."""
    comm_name: str | None = None
    """Shown in NCCL's log (2.27.3)."""
    collnet_enable: int | None = None
    """In-network reductions (2.27)."""
    cta_policy: int | None = None
    """0 default, 1 efficiency, 2 no thread blocks where copy engines do (2.27)."""
    shrink_share: int | None = None
    """1: communicators made by shrinking share resources with their parent (2.27)."""
    nvls_ctas: int | None = None
    """Thread blocks of NVLink SHARP (2.27.3)."""

    def given(self) -> dict[str, Any]:
        """Return the settings that are not None."""
        return {k: v for k, v in asdict(self).items() if v is not None}


@dataclass(frozen=True)
class Library:
    """The NCCL of this process."""

    path: str
    version: str
    code: int
    """NCCL's own number, 10000 major + 100 minor + patch."""
    found: str
    """Where it was looked for, in words."""


_library: Library | None = None


def library() -> Library:
    """Open NCCL, once per process, and say which one it is.

    Looked for in this order: MESHRING_NCCL_LIBRARY; one that is mapped into the process already
    (CuPy's, torch's: two in one process would not know of each other); NVIDIA's wheel
    nvidia-nccl-cu12 or -cu13; the system's libnccl.so.2.
    Errors: UsageError when none can be opened, or it is older than 2.18.1.
    """
    global _library
    if _library is None:
        failures: list[str] = []
        for found, path in _candidates():
            try:
                facts = _core.nccl_open(path)
            except UsageError as error:
                failures.append(f"{found}: {error}")
                if found == _BY_VARIABLE:
                    break
                continue
            _library = Library(facts["path"], facts["version"], facts["code"], found)
            break
        else:
            failures.append("install it: pip install nvidia-nccl-cu12 (or -cu13, never both)")
        if _library is None:
            raise UsageError("NCCL was not found. " + "; ".join(failures))
    return _library


_BY_VARIABLE = "MESHRING_NCCL_LIBRARY"


def _candidates() -> Iterator[tuple[str, str]]:
    named = os.environ.get("MESHRING_NCCL_LIBRARY")
    if named:
        yield _BY_VARIABLE, named
        return
    for path in mapped():
        yield "mapped into this process already", path
    for path in wheels():
        yield "NVIDIA's wheel", path
    yield "the system", "libnccl.so.2"


def mapped() -> list[str]:
    """Return the paths of every libnccl.so that is mapped into this process."""
    lines = Path("/proc/self/maps").read_text(errors="surrogateescape").splitlines()
    paths = ["/" + line.partition("/")[2] for line in lines if "/libnccl.so" in line]
    return list(dict.fromkeys(paths))


def wheels() -> list[str]:
    """Return the paths of libnccl.so.2 in NVIDIA's wheels, along sys.path and without an import."""
    folders = dict.fromkeys(Path(entry or ".") / "nvidia/nccl/lib" for entry in sys.path)
    return [str(f / "libnccl.so.2") for f in folders if (f / "libnccl.so.2").exists()]


def allocator() -> Callable[[int], Any]:
    """Return an allocator for CuPy whose memory NCCL can register (also as a window).

    with cupy.cuda.using_allocator(meshring.nccl.allocator()): x = cupy.empty(...)
    Units: bytes. Errors: UsageError without CuPy, or with an NCCL older than 2.19.1.
    Source: ncclMemAlloc, ncclMemFree, behind a cupy.cuda.MemoryPool.
    """
    cupy = sys.modules.get("cupy")
    if cupy is None:
        raise UsageError("nccl.allocator: CuPy is not imported; import cupy first")
    library()

    def malloc(size: int, device: int) -> int:
        return _core.nccl_allocate(size, device)

    def free(pointer: int, device: int) -> None:
        _core.nccl_free(pointer)

    source = cupy.cuda.PythonFunctionAllocator(malloc, free)
    malloc_of_pool: Callable[[int], Any] = cupy.cuda.MemoryPool(source.malloc).malloc
    return malloc_of_pool


class Registration:
    """Memory known to NCCL on one communicator; ends with close(), `with`, or the communicator.

    Errors: none. Source: ncclCommRegister, ncclCommWindowRegister.
    """

    def __init__(self, comm: Any, x: Any, window: bool, handle: int) -> None:
        self._comm = comm
        self._array = x  # stays alive while NCCL knows its address
        self._window = window
        self._handle = handle

    def close(self) -> None:
        """Take the registration back; safe to call twice."""
        comm, self._comm = self._comm, None
        if comm is not None and not comm.closed:
            comm._deregister(self._handle, self._window)
            comm._registered.discard(self)
        self._array = None

    def __enter__(self) -> Registration:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
