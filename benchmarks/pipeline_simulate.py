"""How long it takes to make and simulate pipeline schedules, and what lowering costs.

    python benchmarks/pipeline_simulate.py             # the large cases, one process each
    python benchmarks/pipeline_simulate.py --lowering  # makespans over the bound: ours, torch's

Prints one JSON line per case. Limits: 60 s and 8 GiB for 1024 ranks x 4096 microbatches, 5 s for
64 ranks x 4 chunks x 512 microbatches; a case beyond its limit fails.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time

from meshring.pipeline import PipelineSchedule, PipelineScheduleType
from meshring.pipeline.linear import Wiring, in_rounds
from meshring.pipeline.semantics import ALL

CASES = {  # stages, microbatches, kind, ranks; seconds and GiB allowed
    "1f1b-1024x4096": (1024, 4096, "1f1b", 1024, 60.0, 8.0),
    "interleaved-64x4x512": (256, 512, "interleaved-1f1b", 64, 5.0, 8.0),
}


def measure(name: str) -> None:
    stages, microbatches, kind, ranks, seconds, gibibytes = CASES[name]
    begin = time.perf_counter()
    schedule = PipelineSchedule(stages, microbatches, kind, num_ranks=ranks)
    made = time.perf_counter()
    line = schedule.simulate(forward=1, backward=2)
    makespan = line.makespan
    peak = int(line.peak_activations.max())
    end = time.perf_counter()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    figures = {
        "case": name,
        "operations": schedule.num_operations,
        "generate_s": round(made - begin, 2),
        "simulate_s": round(end - made, 2),
        "max_rss_gib": round(memory, 2),
        "makespan": makespan,
        "peak_activations": peak,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
    }
    print(json.dumps(figures), flush=True)
    if end - begin > seconds or memory > gibibytes:
        sys.exit(f"{name}: over its limit of {seconds} s and {gibibytes} GiB")


def lowering(ranks: int, microbatches: int, comm: float) -> None:
    for kind in PipelineScheduleType:
        if kind is PipelineScheduleType.AUTO:
            continue
        chunks = 3 - PipelineSchedule(2, 1, kind).num_ranks
        schedule = PipelineSchedule(ranks * chunks, microbatches, kind, num_ranks=ranks)
        bound = schedule.simulate(comm=comm).makespan
        figures: dict[str, object] = {"kind": kind.value, "bound": bound}
        for how in ALL:
            rounds = schedule.replaced(in_rounds(Wiring(schedule)), semantics=str(how))
            ours = schedule.lower(how, comm=comm)
            figures[str(how)] = [
                round(s.simulate(comm=comm).makespan / bound, 4) for s in (ours, rounds)
            ]
        print(json.dumps(figures), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=CASES, help="one case, in this process")
    parser.add_argument("--lowering", action="store_true", help="[ours, one operation a round]")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--comm", type=float, default=0.2, help="latency; F = 1")
    given = parser.parse_args()
    if given.lowering:
        lowering(given.ranks, given.microbatches, given.comm)
    elif given.case:
        measure(given.case)
    else:
        codes = [subprocess.call([sys.executable, __file__, "--case", name]) for name in CASES]
        sys.exit(max(codes))


if __name__ == "__main__":
    main()
