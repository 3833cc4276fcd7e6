"""What a call costs before NCCL: all_reduce of two CuPy arrays of 4 floats, on a stub NCCL that
returns at once, in nanoseconds. Contenders: meshring, cupy.cuda.nccl, cupyx.distributed, nccl4py.

Each contender in a process of its own; rounds go A B C A B C; medians over the rounds. Needs CuPy
and g++, no GPU. Without a driver CuPy cannot name its current stream, so contenders that ask for it
are given stream 0. nccl4py is looked for in --nccl4py PYTHON, an environment with what it imports.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import timeit
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CALLS = 20_000
BATCHES = 11
# Names, and the statements that are timed with them.
Calls = tuple[dict[str, Any], dict[str, str]]


def arrays() -> tuple[Any, ...]:
    """Real cupy.ndarrays over host memory: two of one dimension, two of two."""
    import cupy
    import numpy as np

    def make(shape: tuple[int, ...]) -> Any:
        host = np.ones(shape, "f4")
        memory = cupy.cuda.UnownedMemory(host.ctypes.data, host.nbytes, host, device_id=0)
        return cupy.ndarray(shape, "f4", memptr=cupy.cuda.MemoryPointer(memory, 0))

    return make((4,)), make((4,)), make((2, 2)), make((2, 2))


class Stream:
    """The default stream, for those that want an object."""

    ptr = 0

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, 0


def meshring() -> Calls:
    """Ours, with all checks, the record on the board and the caller's line."""
    import meshring as mr

    comm = mr.init("nccl")
    a, b, c, d = arrays()
    names = {"call": comm.all_reduce, "a": a, "b": b, "c": c, "d": d, "stream": Stream()}
    return names, {
        "all_reduce(x)": "call(a)",
        "all_reduce(x, op=, stream=)": "call(a, op='sum', stream=stream)",
        "all_reduce(x, 'sum', out)": "call(a, 'sum', b)",
        "all_reduce(x, 'sum', out), 2-D": "call(c, 'sum', d)",
    }


def cupy_nccl() -> Calls:
    """CuPy's raw binding: addresses and counts are the caller's business."""
    from cupy.cuda import nccl

    comm = nccl.NcclCommunicator(1, nccl.get_unique_id(), 0)
    a, b, *_ = arrays()
    names = {"call": comm.allReduce, "a": a, "b": b, "p": a.data.ptr, "q": b.data.ptr}
    names |= {"kind": nccl.NCCL_FLOAT32, "op": nccl.NCCL_SUM}
    return names, {
        "allReduce(addresses)": "call(p, q, 4, kind, op, 0)",
        "allReduce(a.data.ptr, ...)": "call(a.data.ptr, b.data.ptr, a.size, kind, op, 0)",
    }


def cupyx_distributed() -> Calls:
    """CuPy's arrays in, checked; the object is made without its TCP store."""
    from cupy.cuda import nccl
    from cupyx.distributed._nccl_comm import NCCLBackend

    backend = NCCLBackend.__new__(NCCLBackend)
    backend._comm = nccl.NcclCommunicator(1, nccl.get_unique_id(), 0)
    backend._n_devices = 1
    a, b, *_ = arrays()
    names = {"call": backend.all_reduce, "a": a, "b": b, "stream": Stream()}
    return names, {"all_reduce(a, b, stream=)": "call(a, b, stream=stream)"}


def nccl4py() -> Calls:
    """NVIDIA's own binding."""
    import nccl.core as nccl

    comm = nccl.Communicator(1)  # the address of a communicator; the stub does not look at it
    a, b, *_ = arrays()
    names = {"call": comm.allreduce, "a": a, "b": b, "op": nccl.SUM}
    return names, {"allreduce(a, b, SUM, stream=)": "call(a, b, op, stream=0)"}


CONTENDERS = {f.__name__: f for f in (meshring, cupy_nccl, cupyx_distributed, nccl4py)}


def measure(name: str) -> dict[str, float]:
    """Nanoseconds of one call: the least of the batches, less an empty loop's."""
    names, calls = CONTENDERS[name]()

    def cost(statement: str) -> float:
        timer = timeit.Timer(statement, globals=names)
        return min(timer.repeat(BATCHES, CALLS)) / CALLS * 1e9

    empty = cost("pass")
    return {form: cost(statement) - empty for form, statement in calls.items()}


def build(folder: Path) -> Path:
    """Compile the stub; one file is NCCL and the driver."""
    sources = [str(p) for p in sorted((ROOT / "benchmarks" / "stub").glob("*.cpp"))]
    library = folder / "libnccl.so.2"
    flags = ["-shared", "-fPIC", "-O2", "-std=c++17", f"-I{ROOT / 'csrc'}"]
    command = ["g++", *flags, "-Wl,-soname,libnccl.so.2", "-o", str(library), *sources]
    subprocess.run(command, check=True)
    (folder / "libcuda.so.1").symlink_to(library)
    return library


def run(name: str, python: str, library: Path) -> dict[str, float] | str:
    """One contender in a fresh process; what it printed last where it failed."""
    env = os.environ | {
        "MESHRING_NCCL_LIBRARY": str(library),
        "MESHRING_CUDA_LIBRARY": str(library),
        "LD_LIBRARY_PATH": str(library.parent),
        "LD_PRELOAD": str(library),
        "CUPY_CUDA_ARRAY_INTERFACE_EXPORT_VERSION": "2",
    }
    command = [python, __file__, "--one", name]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    if done.returncode != 0:
        return (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Print the table and, with --json, write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--nccl4py", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one)))
        return
    rounds: dict[tuple[str, str], list[float]] = {}
    missing: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        library = build(Path(folder))
        for _ in range(args.rounds):
            for name in CONTENDERS:
                python = args.nccl4py if name == "nccl4py" else sys.executable
                found = run(name, python, library)
                if isinstance(found, str):
                    missing[name] = found
                    continue
                for form, ns in found.items():
                    rounds.setdefault((name, form), []).append(ns)
    table = {key: statistics.median(values) for key, values in rounds.items()}
    ours = table["meshring", "all_reduce(x, 'sum', out)"]
    print(f"{'contender':20}{'call':34}{'ns':>8}{'over ours':>12}")
    for (name, form), ns in table.items():
        print(f"{name:20}{form:34}{ns:8.0f}{ns / ours:12.2f}")
    for name, why in missing.items():
        print(f"{name}: not measured: {why}")
    if args.json:
        rows = [{"contender": n, "call": f, "ns": round(v, 1)} for (n, f), v in table.items()]
        args.json.write_text(json.dumps({"calls": rows, "missing": missing}, indent=2) + "\n")


if __name__ == "__main__":
    main()
