"""What running a schedule costs: time per action, and a measured bubble against the simulated one.

    python benchmarks/pipeline_execute.py [--rounds 5] [--sleep 0.05] [--json FILE]

Own cost: stages that do nothing, so that all time is the pipeline's. On one rank nothing is waited
for; on two ranks the time of the transfers and of waiting is in it too. Bubble: four ranks whose
stages sleep, which needs no core; the simulation gets the durations that were measured. Ratios of
one run carry over to other machines, times do not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

import meshring as mr
from meshring.doctor import cpu_model, usable_cores

MICROBATCHES = 256
SIZES = ((1, 1), (1, 4), (2, 2), (4, 4))  # ranks and stages of the own cost


class Idle:
    """A stage that does nothing."""

    def forward(self, x):
        """Return x itself."""
        return x, None

    def backward(self, saved, gy):
        """Return the gradient itself."""
        return gy


class Sleeper:
    """A stage that sleeps: once for a forward, twice for a backward."""

    def __init__(self, seconds):
        self.seconds = seconds

    def forward(self, x):
        """Sleep once."""
        time.sleep(self.seconds)
        return x, None

    def backward_input(self, saved, gy):
        """Sleep once."""
        time.sleep(self.seconds)
        return gy, None

    def backward_weight(self, rest):
        """Sleep once."""
        time.sleep(self.seconds)


def loss(y):
    """A loss of 0 whose gradient is y."""
    return 0.0, y


def own_cost(ranks: int, stages: int, rounds: int) -> dict[str, Any]:
    """Microseconds per action: wall time, and what remains without waiting for messages."""
    schedule = mr.PipelineSchedule(stages, MICROBATCHES, num_ranks=ranks).lower()
    actions = max(len(ops) for ops in schedule.ranks)
    x = [np.zeros(16)] * MICROBATCHES

    def program(comm: mr.Communicator) -> list[tuple[float, float]]:
        found = []
        with mr.Pipeline(schedule, lambda *_: Idle(), comm, loss=loss) as pipeline:
            pipeline.run(x)  # learns the shapes
            for _ in range(rounds):
                start = time.perf_counter()
                result = pipeline.run(x, record=True)
                wall = time.perf_counter() - start
                events = result.timeline.events
                mine = events[(events["rank"] == comm.rank) & (events["lane"] == 2)]
                waited = float((mine["end"] - mine["start"]).sum())
                found.append((wall, wall - waited))
        return found

    both = np.array(mr.run_local(program, ranks)).max(axis=0) / actions * 1e6
    wall, own = (float(statistics.median(column)) for column in both.T)
    return {"ranks": ranks, "actions": actions, "us_per_action": wall, "us_own": own}


def bubble(kind: str, sleep: float, rounds: int, microbatches: int = 8) -> dict[str, Any]:
    """Measured and simulated bubble of four ranks that sleep: the round of the median ratio."""
    chunks = 2 if kind in ("zb-v", "interleaved-1f1b") else 1
    schedule = mr.PipelineSchedule(4 * chunks, microbatches, kind, num_ranks=4).lower()
    x = [np.zeros(16)] * microbatches

    def program(comm: mr.Communicator) -> list[mr.Timeline]:
        stages = [Sleeper(sleep / chunks) for _ in schedule.stages_of(comm.rank)]
        with mr.Pipeline(schedule, stages, comm, loss=loss) as pipeline:
            pipeline.run(x)
            return [pipeline.run(x, record=True).timeline for _ in range(rounds)]

    found = []
    for measured in mr.run_local(program, 4)[0]:
        simulated = schedule.simulate(**measured.durations(schedule.num_stages))
        found.append(
            {
                "schedule": kind,
                "measured_s": measured.bubble_makespan,
                "simulated_s": simulated.bubble_makespan,
                "ratio": measured.bubble_makespan / simulated.bubble_makespan,
                "makespan_ratio": measured.makespan / simulated.makespan,
            }
        )
    return sorted(found, key=lambda row: row["ratio"])[rounds // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sleep", type=float, default=0.05, help="seconds of a forward")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    machine = {
        "cpu_model": cpu_model(),
        "cores_usable": usable_cores(),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "numpy": np.__version__,
        "meshring": mr.__version__,
    }
    print(json.dumps(machine))
    costs = [own_cost(ranks, stages, args.rounds) for ranks, stages in SIZES]
    print("ranks actions  us/action  of which own   (limit 50)")
    for row in costs:
        times = f"{row['us_per_action']:10.1f} {row['us_own']:13.1f}"
        print(f"{row['ranks']:5} {row['actions']:7} {times}")
    kinds = ("gpipe", "1f1b", "interleaved-1f1b", "zb-h1", "zb-v")
    bubbles = [bubble(kind, args.sleep, args.rounds) for kind in kinds]
    print(f"bubble of 4 ranks that sleep {args.sleep * 1e3:g} ms   (limit 1.10)")
    print("schedule            measured  simulated   ratio  makespan ratio")
    for row in bubbles:
        print(
            f"{row['schedule']:18}{row['measured_s']:9.4f} s{row['simulated_s']:9.4f} s"
            f"{row['ratio']:8.3f}{row['makespan_ratio']:14.3f}"
        )
    if args.json:
        found = {"machine": machine, "own_cost": costs, "bubble": bubbles}
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
