"""The GPU benchmarks' own working, on the stand-in NCCL: gpu_check.sh and collectives_gpu.py."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import standin

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="pip install cupy-cuda12x"),
    pytest.mark.skipif(standin.compiler() is None, reason=standin.SKIP),
]
BENCHMARKS = standin.ROOT / "benchmarks"
LIMIT_S = 100


def run(*command: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*map(str, command)],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        timeout=LIMIT_S,
        env=os.environ | env,
    )


def test_one_json_whatever_fails(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    script = BENCHMARKS / "gpu_check.sh"
    chosen = ("--rehearse", "--sections", "pack,bench_graph", path)
    job = run("bash", script, *chosen, PYTHON=sys.executable)
    assert job.returncode == 0, job.stderr
    document = json.loads(path.read_text())
    assert document["rehearsal"] is True
    assert "nothing in it is a measurement" in document["remark"]
    keys = {"gpus", "cuda_driver", "nccl", "cupy", "cpu", "cores", "date", "commit", "kernels"}
    assert document["machine"].keys() >= keys
    sections = document["sections"]
    assert list(sections) == ["pack", "bench_graph"]
    assert sections["pack"]["rc"] == 1
    assert "needs a GPU" in sections["pack"]["output"]
    assert sections["bench_graph"]["rc"] == 0
    results = sections["bench_graph"]["results"]
    assert "STAND-IN: not a measurement" in results["environment"]["remarks"]
    assert results["results"]
    assert str(tmp_path) not in json.dumps(sections)
    assert str(standin.ROOT) not in json.dumps(sections)


def test_a_section_out_of_time_is_recorded(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    script = BENCHMARKS / "gpu_check.sh"
    chosen = ("--rehearse", "--sections", "bench_nccl", path)
    job = run("bash", script, *chosen, PYTHON=sys.executable, TOTAL_S="0")
    assert job.returncode == 0, job.stderr
    section = json.loads(path.read_text())["sections"]["bench_nccl"]
    assert section["rc"] == 124
    assert "is over" in section["output"]


def test_contenders_in_turn(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    program = BENCHMARKS / "collectives_gpu.py"
    options = ("--ranks", "2", "--rounds", "2", "--sizes", "8,4096", "--json", path)
    job = run(
        sys.executable, program, *options, "--only", "meshring", **standin.environment(tmp_path)
    )
    assert job.returncode == 0, job.stdout + job.stderr
    assert "STAND-IN: not a measurement" in job.stdout
    assert "shared: not a bandwidth figure" in job.stdout
    document = json.loads(path.read_text())
    assert document["stand_in"] is True
    (found,) = document["runs"]
    assert found["shared"] is True
    assert found["failed"] == {}
    assert len(found["results"]) == 4 * 2
    assert all(row["device_us"] > 0 and row["host_us"] > 0 for row in found["results"])


def test_without_a_gpu_it_is_one_sentence(tmp_path: Path) -> None:
    missing = str(tmp_path / "libcuda.so.1")
    job = run(sys.executable, BENCHMARKS / "collectives_gpu.py", MESHRING_CUDA_LIBRARY=missing)
    assert job.returncode == 1
    assert job.stdout == ""
    assert job.stderr.startswith("collectives_gpu.py needs a GPU, CuPy and NCCL: ")
    assert len(job.stderr.splitlines()) == 1
