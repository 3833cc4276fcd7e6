"""meshring on GPUs beside cupy.cuda.nccl, cupyx.distributed and nccl4py.

    python benchmarks/collectives_gpu.py [--ranks 1,4] [--rounds 3] [--json out.json]

Every contender runs in fresh processes, its ranks started alike, and they take turns; those that
are not installed are named. Two times per call: that of the GPU, between two CUDA events around
several enqueues, the slowest rank's; and that of the host to enqueue one. Medians over all rounds;
ratios are within this run. Results are checked before anything is timed. More ranks than GPUs share
them, which is marked, since such times are no bandwidth.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

CONTENDERS = ("meshring", "cupy.cuda.nccl", "cupyx.distributed", "nccl4py")
OPERATIONS = ("all_reduce", "all_gather", "reduce_scatter", "broadcast")
SIZES = (8, 64 << 10, 1 << 20, 64 << 20)  # bytes of one rank's input
SHARED_SIZES = (8, 64 << 10)
LIMIT_S = 60
Call = Callable[[Any, Any], object]
Made = tuple[dict[str, Call], Any, Callable[[], None]]  # calls, NCCL version, how it ends


# ---- the contenders: operations on (x, out), float32, on CuPy's current stream


def by_file(name: str, rank: int, make: Callable[[], Any]) -> Any:
    """Give every rank what rank 0 makes."""
    path = Path(os.environ["COLLECTIVES_DIR"]) / name
    if rank == 0:
        made = make()
        path.with_suffix(".new").write_bytes(pickle.dumps(made))
        path.with_suffix(".new").rename(path)
        return made
    end = time.monotonic() + LIMIT_S
    while not path.exists():
        if time.monotonic() > end:
            sys.exit(f"rank 0 did not write {path}")
        time.sleep(0.01)
    return pickle.loads(path.read_bytes())


def nothing() -> None:
    """End a contender that leaves nothing behind."""


def of_meshring(stream: Any, rank: int, size: int) -> Made:
    import meshring as mr
    from meshring import nccl

    comm = mr.init("nccl", timeout=LIMIT_S)
    return (
        {
            "all_reduce": lambda x, out: comm.all_reduce(x, "sum", out),
            "all_gather": lambda x, out: comm.all_gather(x, 0, None, out),
            "reduce_scatter": lambda x, out: comm.reduce_scatter(x, "sum", 0, None, out),
            "broadcast": lambda x, out: comm.broadcast(x, 0),
        },
        nccl.library().code,
        nothing,
    )


def of_cupy(stream: Any, rank: int, size: int) -> Made:
    from cupy.cuda import nccl

    identifier = by_file("cupy", rank, nccl.get_unique_id)
    comm = nccl.NcclCommunicator(size, identifier, rank)
    f4, add = nccl.NCCL_FLOAT32, nccl.NCCL_SUM
    return (
        {
            "all_reduce": lambda x, out: comm.allReduce(
                x.data.ptr, out.data.ptr, x.size, f4, add, stream.ptr
            ),
            "all_gather": lambda x, out: comm.allGather(
                x.data.ptr, out.data.ptr, x.size, f4, stream.ptr
            ),
            "reduce_scatter": lambda x, out: comm.reduceScatter(
                x.data.ptr, out.data.ptr, out.size, f4, add, stream.ptr
            ),
            "broadcast": lambda x, out: comm.broadcast(
                x.data.ptr, x.data.ptr, x.size, f4, 0, stream.ptr
            ),
        },
        nccl.get_version(),
        nothing,
    )


def of_cupyx(stream: Any, rank: int, size: int) -> Made:
    sys.modules["mpi4py"] = None  # type: ignore[assignment]  # not what is compared
    from cupy.cuda import nccl
    from cupyx.distributed import init_process_group

    port = by_file("cupyx", rank, free_port)
    comm = init_process_group(size, rank, host="127.0.0.1", port=port)
    return (
        {
            "all_reduce": comm.all_reduce,
            "all_gather": lambda x, out: comm.all_gather(x, out, x.size),
            "reduce_scatter": lambda x, out: comm.reduce_scatter(x, out, out.size),
            "broadcast": lambda x, out: comm.broadcast(x, 0),
        },
        nccl.get_version(),
        comm.stop,
    )


def of_nccl4py(stream: Any, rank: int, size: int) -> Made:
    import nccl.core as nccl

    identifier = by_file("nccl4py", rank, nccl.get_unique_id)
    comm = nccl.Communicator.init(size, rank, identifier)
    return (
        {
            "all_reduce": lambda x, out: comm.allreduce(x, out, nccl.SUM, stream=stream),
            "all_gather": lambda x, out: comm.allgather(x, out, stream=stream),
            "reduce_scatter": lambda x, out: comm.reduce_scatter(x, out, nccl.SUM, stream=stream),
            "broadcast": lambda x, out: comm.broadcast(x, x, 0, stream=stream),
        },
        None,
        nothing,
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


MAKERS = dict(zip(CONTENDERS, (of_meshring, of_cupy, of_cupyx, of_nccl4py), strict=True))
PROBES = {
    "meshring": "import meshring",
    "cupy.cuda.nccl": "from cupy.cuda import nccl; assert nccl.available",
    "cupyx.distributed": "import sys; sys.modules['mpi4py'] = None; import cupyx.distributed",
    "nccl4py": "import nccl.core",
}


# ---- one rank of one contender


def child(kind: str, sizes: list[int]) -> None:
    """Check and time every operation; print a JSON line for each."""
    import cupy

    from meshring import _core, bench_device

    bench_device.share_a_gpu()
    rank, size = int(os.environ["MESHRING_RANK"]), int(os.environ["MESHRING_SIZE"])
    gpus = len(_core.cuda_devices())
    device, shared = rank % gpus, size > gpus  # ranks of one GPU take turns of 10 ms
    place = SimpleNamespace(device=device, size=size)
    how = SimpleNamespace(graph=False, registered=False)
    library = os.environ.get("MESHRING_CUDA_LIBRARY")
    real = not (library and bench_device.is_stand_in(library))
    target = (bench_device.Gpu if real else bench_device.StandIn)(place, how)
    stream = target.stream if real else cupy.cuda.Stream.null
    calls, version, end = MAKERS[kind](stream, rank, size)
    for name in OPERATIONS:
        for nbytes in sizes:
            times = 2 if shared else 20 if nbytes <= 1 << 20 else 5
            found = measure(target, calls[name], name, nbytes, rank, size, times)
            facts = {"kind": kind, "rank": rank, "operation": name, "bytes": nbytes}
            print(json.dumps(facts | found | {"nccl": version}), flush=True)
    for r in range(size):  # nobody leaves before the last has its data
        by_file(f"done{r}", abs(r - rank), lambda: True)
    end()
    os._exit(0)  # contenders differ in how they end, which is not compared


def measure(
    target: Any, call: Call, name: str, nbytes: int, rank: int, size: int, times: int
) -> dict[str, Any]:
    """Return the samples of the GPU's time and the host's, of one call. Units: microseconds."""
    from meshring.bench_data import PERIOD, count_wrong, fill

    dtype = np.dtype("f4")
    count = max(1, nbytes // 4)
    x = target.empty(count * (size if name == "reduce_scatter" else 1), dtype)
    out = target.empty(count * (size if name == "all_gather" else 1), dtype)

    def constant(value: float) -> Any:
        return np.full(PERIOD, value, dtype)

    fill(target.view(x), constant(rank + 1))
    fill(target.view(out), constant(-1))
    call(x, out)
    total = size * (size + 1) / 2
    if name == "broadcast":
        blocks = [(target.view(x), 1.0)]
    elif name == "all_gather":
        blocks = [(target.view(out)[r * count : (r + 1) * count], r + 1) for r in range(size)]
    else:
        blocks = [(target.view(out), total)]
    wrong = sum(count_wrong(block, constant(value)) for block, value in blocks)
    if wrong:
        sys.exit(f"{name} of {nbytes} bytes: {wrong} wrong elements")
    fill(target.view(x), constant(0))
    sample = target.sampler(lambda: call(x, out), times)
    sample()
    device = [sample() / times / 1e3 for _ in range(7)]
    host = []
    for _ in range(7):
        start = time.perf_counter_ns()
        for _ in range(times):
            call(x, out)
        host.append((time.perf_counter_ns() - start) / times / 1e3)
        sample()  # an empty queue before the next
    return {"device_us": device, "host_us": host}


# ---- the parent


def run(kind: str, ranks: int, sizes: list[int]) -> list[dict[str, Any]]:
    """Run a contender's ranks once; RuntimeError with its last lines where it fails."""
    launcher = [sys.executable, "-m", "meshring", "run", "--no-prefix", "--timeout", str(LIMIT_S)]
    program = [str(Path(__file__).resolve()), "--child", kind, "--sizes", ",".join(map(str, sizes))]
    with tempfile.TemporaryDirectory() as folder:
        job = subprocess.run(
            [*launcher, "-n", str(ranks), *program],
            env=os.environ | {"COLLECTIVES_DIR": folder},
            capture_output=True,
            text=True,
            timeout=LIMIT_S + 30,
            check=False,
        )
    rows = [json.loads(line) for line in job.stdout.splitlines() if line.startswith('{"kind"')]
    if len(rows) != ranks * len(sizes) * len(OPERATIONS):
        raise RuntimeError("\n".join((job.stdout + job.stderr).splitlines()[-8:]))
    return rows


def slowest(rows: list[dict[str, Any]]) -> Iterator[tuple[tuple[str, int], dict[str, list[float]]]]:
    """Give for each operation and size the samples of the slowest rank in each."""
    keys = dict.fromkeys((row["operation"], row["bytes"]) for row in rows)
    for key in keys:
        mine = [row for row in rows if (row["operation"], row["bytes"]) == key]
        yield (
            key,
            {
                what: [max(each) for each in zip(*(row[what] for row in mine), strict=True)]
                for what in ("device_us", "host_us")
            },
        )


def compare(ranks: int, rounds: int, sizes: list[int], kinds: list[str]) -> dict[str, Any]:
    """Run all contenders in turn and return their medians, and what failed."""
    samples: dict[str, dict[tuple[str, int], dict[str, list[float]]]] = {k: {} for k in kinds}
    versions: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for _ in range(rounds):
        for kind in kinds:
            if kind in failed:
                continue
            try:
                rows = run(kind, ranks, sizes)
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                failed[kind] = str(error)
                continue
            versions[kind] = rows[0]["nccl"]
            for key, found in slowest(rows):
                kept = samples[kind].setdefault(key, {"device_us": [], "host_us": []})
                for what, values in found.items():
                    kept[what] += values
    results = [
        {"contender": kind, "operation": name, "bytes": nbytes}
        | {what: statistics.median(values) for what, values in found.items()}
        for kind in kinds
        if kind not in failed
        for (name, nbytes), found in samples[kind].items()
    ]
    return {"ranks": ranks, "results": results, "failed": failed, "nccl": versions}


def show(run: dict[str, Any], remark: str) -> None:
    print(f"\n{run['ranks']} rank(s){remark}; us a call: GPU / host; NCCL {run['nccl']}")
    kinds = list(dict.fromkeys(row["contender"] for row in run["results"]))
    print(f"{'operation':<15}{'bytes':>10}" + "".join(f"{kind:>24}" for kind in kinds))
    rows = {(r["operation"], r["bytes"], r["contender"]): r for r in run["results"]}
    for name, nbytes in dict.fromkeys((r["operation"], r["bytes"]) for r in run["results"]):
        line = f"{name:<15}{nbytes:>10}"
        for kind in kinds:
            row = rows[name, nbytes, kind]
            cell = f"{row['device_us']:.2f} / {row['host_us']:.2f}"
            line += f"{cell:>24}"
        print(line)
    for kind, why in run["failed"].items():
        print(f"{kind} FAILED:\n{why}")


def probe() -> tuple[list[str], dict[str, str]]:
    """Return the contenders that can be imported, each tried in a fresh process, and the others."""
    found, absent = [], {}
    for kind, code in PROBES.items():
        job = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
        )
        if job.returncode == 0:
            found.append(kind)
        else:
            absent[kind] = (job.stderr.strip().splitlines() or ["no message"])[-1]
    return found, absent


def main() -> int:
    """Print the tables; exit with 1 where meshring itself failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", default="1,2", help="numbers of ranks (default 1,2)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", help=f"bytes of one rank's input (default {SIZES})")
    parser.add_argument("--only", choices=CONTENDERS, help="measure this contender alone")
    parser.add_argument("--json", type=Path, help="write the results there too")
    parser.add_argument("--child", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = [int(s) for s in args.sizes.split(",")] if args.sizes else None
    if args.child:
        child(args.child, sizes or [])
        return 0
    from meshring import bench_device

    why = bench_device.missing()
    if why:
        sys.exit(f"collectives_gpu.py needs a GPU, CuPy and NCCL: {why}")
    gpus = bench_device.gpus()
    library = os.environ.get("MESHRING_CUDA_LIBRARY")
    stand_in = bool(library and bench_device.is_stand_in(library))
    kinds, absent = probe()
    kinds = [kind for kind in kinds if args.only in (None, kind)]
    for kind, reason in absent.items():
        print(f"not measured: {kind}: {reason}")
    if stand_in:
        print(bench_device.STAND_IN)
    runs = []
    for ranks in map(int, args.ranks.split(",")):
        shared = ranks > gpus
        remark = f" on {gpus} GPU(s), shared: not a bandwidth figure" if shared else ""
        own = sizes or list(SHARED_SIZES if shared else SIZES)
        runs.append(compare(ranks, args.rounds, own, kinds) | {"shared": shared})
        show(runs[-1], remark)
    document = {"gpus": gpus, "stand_in": stand_in, "absent": absent, "runs": runs}
    if args.json:
        args.json.write_text(json.dumps(document, indent=2) + "\n")
    return 1 if any("meshring" in run["failed"] for run in runs) else 0


if __name__ == "__main__":
    sys.exit(main())
