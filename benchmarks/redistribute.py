"""Redistributions beside a bare all_to_all of the same bytes, and the time to make a plan.

    python benchmarks/redistribute.py [--ranks 2 4] [--mib 4 16 64] [--rounds 15] [--json out.json]

Each case runs between processes. Beside it, in turn, run two calls of comm.all_to_all that bring
each rank as many bytes from the others and as many from itself: of contiguous blocks (axis 0), and
of columns of a matrix (axis 1), which is what a change of the sharded axis has to read or write.
Figures are medians over the rounds, of the slowest rank; ratios are within one run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import meshring as mr

CASES: dict[str, tuple[Any, Any]] = {
    "Shard(0) to Shard(1)": ({"b": 0}, {"b": 1}),
    "Shard(1) to Shard(0)": ({"b": 1}, {"b": 0}),
    "Shard(0) to Replicate": ({"b": 0}, {}),
    "Shard(1) to Replicate": ({"b": 1}, {}),
    "balanced to ceil": ({"b": 0}, {"b": mr.Shard(0, "ceil")}),
    "2-D: swap the axes": ({"a": 0, "b": 1}, {"a": 1, "b": 0}),
    "2-D: Shard(0) moves over": ({"a": 0}, {"b": 0}),
    "2-D: blocks to rows": ({"a": 0, "b": 1}, {"a": 0, "b": 0}),
}


def timed(
    calls: dict[str, Callable[[], Any]], comm: mr.Communicator, rounds: int
) -> dict[str, Any]:
    """Median seconds of each call, of the slowest rank; the calls take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 3):
        for name, call in calls.items():
            comm.barrier()
            start = time.perf_counter()
            call()
            seconds = comm.all_reduce(np.array([time.perf_counter() - start]), "max")[0]
            if i >= 3:
                times[name].append(float(seconds))
    return {name: statistics.median(values) for name, values in times.items()}


def measure(comm: mr.Communicator, mib: int, rounds: int) -> list[dict[str, Any]]:
    """All cases with a tensor of so many MiB."""
    found = []
    side = int((mib << 18) ** 0.5) + 1  # float32; odd lengths, so that parts differ
    whole = np.random.default_rng(0).random((side, side), dtype="f4")
    for name, (source, target) in CASES.items():
        first = 2 if name.startswith("2-D") else 1
        if comm.size % first or (first == 2 and comm.size < 4):
            continue
        mesh = mr.DeviceMesh((first, comm.size // first), ("a", "b"), comm)
        t = mr.DistributedTensor.shard(whole, mesh, source)
        plan = t.plan(target)
        received = max(plan.received_bytes)
        if not np.array_equal(t.redistribute(target).gather(), whole):
            raise SystemExit(f"{name}: wrong result")
        if not received:
            continue
        n = comm.size
        there = int(
            comm.all_reduce(np.array([t.redistribute(target).local_shard.nbytes]), "max")[0]
        )
        sizes = np.full(n, received // 4 // (n - 1))
        sizes[comm.rank] = (there - received) // 4  # what stays is copied too
        flat = np.ones(int(sizes.sum()), "f4")
        width = side // n * n
        tall = np.ones((max(1, flat.size // width), width), "f4")
        widths = np.diff(np.cumsum([0, *sizes]) * width // flat.size)
        calls = {
            "case": lambda t=t, target=target: t.redistribute(target),
            "axis 0": lambda flat=flat, sizes=sizes: comm.all_to_all(flat, 0, sizes.tolist()),
            "axis 1": lambda tall=tall, w=widths: comm.all_to_all(tall, 1, w.tolist()),
        }
        seconds = timed(calls, comm, rounds)
        found.append(
            {
                "case": name,
                "ranks": n,
                "tensor_mib": mib,
                "received_bytes": received,
                "steps": [s.kind for s in plan.steps],
                "us": seconds["case"] * 1e6,
                "all_to_all_us": seconds["axis 0"] * 1e6,
                "ratio": seconds["case"] / seconds["axis 0"],
                "ratio_to_strided": seconds["case"] / seconds["axis 1"],
            }
        )
        mesh.close()
    return found


def plan_times(count: int = 150) -> dict[str, float]:
    """Milliseconds to make plans for 1024 ranks on a 3-D mesh, with all ranks' bytes."""
    mesh = mr.DeviceMesh((8, 8, 16), ("pp", "dp", "tp"))
    kinds = [mr.Replicate(), mr.Shard(0), mr.Shard(1), mr.Shard(2), mr.Shard(0, "ceil")]
    triples = list(itertools.product(kinds, repeat=3))
    choose = random.Random(0)
    pairs = [(choose.choice(triples), choose.choice(triples)) for _ in range(count)]
    pairs.append((triples[31], triples[-1]))  # all axes cut one tensor axis, by two rules
    times = []
    for source, target in pairs:
        start = time.perf_counter()
        mr.plan(mesh, (1003, 1024, 777), source, target).to_json()
        times.append((time.perf_counter() - start) * 1e3)
    return {"median_ms": statistics.median(times), "max_ms": max(times), "plans": len(times)}


def child(options: argparse.Namespace) -> None:
    comm = mr.init()
    found = [row for mib in options.mib for row in measure(comm, mib, options.rounds)]
    if comm.rank == 0:
        print("RESULT " + json.dumps(found), flush=True)
    comm.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--mib", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--child", action="store_true")
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    before = os.getloadavg()
    plans = plan_times()
    median, slowest = plans["median_ms"], plans["max_ms"]
    print(f"plans for 1024 ranks: median {median:.1f} ms, slowest {slowest:.1f} ms")
    print(f"{'case':28}{'ranks':>6}{'MiB':>5}{'us':>9}{'to axis 0':>11}{'to axis 1':>11}  steps")
    rows: list[dict[str, Any]] = []
    for n in options.ranks:
        command = [sys.executable, "-m", "meshring", "run", "-n", str(n), os.path.abspath(__file__)]
        command += ["--child", "--rounds", str(options.rounds), "--mib", *map(str, options.mib)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
        line = next(x for x in done.stdout.splitlines() if "RESULT " in x)
        for row in json.loads(line.split("RESULT ")[1]):
            rows.append(row)
            print(
                f"{row['case']:28}{n:6}{row['tensor_mib']:5}{row['us']:9.0f}{row['ratio']:11.2f}"
                f"{row['ratio_to_strided']:11.2f}  {', '.join(row['steps'])}"
            )
    if options.json:
        environment = {
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "cores": len(os.sched_getaffinity(0)),
            "load_average_before": before,
            "rounds": options.rounds,
        }
        report = {"environment": environment, "plans": plans, "runs": rows}
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
