"""`meshring bench --compare` and `--plot`, and the shape of the stored files."""

from __future__ import annotations

import copy
import csv
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meshring import bench_report
from meshring.bench_report import OPERATIONS, PLACEMENTS

LIMIT_S = 60
ENVIRONMENT = {
    "meshring": "0.1.0",
    "ranks": 2,
    "cpu_model": "A processor, with a comma",
    "cores_usable": 2,
    "backend": "host",
    "transport": "process_vm_readv",
    "date": "2026-11-22T12:00:00+00:00",
}


def results(scale: float = 1.0, sizes: tuple[int, ...] = (8, 1024, 1 << 20)) -> list[Any]:
    """A run of every operation whose times grow with the size."""
    found = []
    for operation in OPERATIONS.values():
        for size in sizes if operation.name != "barrier" else (0,):
            record: dict[str, Any] = {
                "operation": operation.name,
                "size_bytes": size,
                "count": size // 4,
                "dtype": "float32" if size else None,
                "op": "sum" if operation.reduces else None,
                "root": 0 if operation.rooted else None,
                "ranks": 2,
            }
            for placement in PLACEMENTS:
                times = np.linspace(1, 1.2, 11) * scale * (1 + size / 10_000)
                exists = placement == "out_of_place" or operation.in_place
                part = bench_report.statistics(times, 1, size, operation.factor(2), 0)
                record[placement] = part if exists else None
            found.append(record)
    return found


def compared(*paths: str | Path) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "meshring", "bench", "--compare", *map(str, paths)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=LIMIT_S, check=False)


def test_json_and_csv_keep_every_number(tmp_path: Path) -> None:
    run = results()
    bench_report.write_json(tmp_path / "a.json", ENVIRONMENT, run)
    assert bench_report.read_json(tmp_path / "a.json") == (ENVIRONMENT, run)
    bench_report.write_csv(tmp_path / "a.csv", ENVIRONMENT, run)
    lines = (tmp_path / "a.csv").read_text().splitlines()
    assert "# cpu_model: A processor, with a comma" in lines
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    parts = [r[p] for r in run for p in PLACEMENTS if r[p]]
    assert [float(row["time_us_p99"]) for row in rows] == [part["time_us_p99"] for part in parts]
    assert rows[-1]["operation"] == "barrier"
    assert rows[-1]["busbw_gb_per_s"] == ""


def test_summaries() -> None:
    run = results()
    values = [r[p]["busbw_gb_per_s"] for r in run for p in PLACEMENTS if r[p] and r["size_bytes"]]
    assert bench_report.average_busbw(run) == pytest.approx(sum(values) / len(values))
    assert bench_report.average_busbw(run[-1:]) is None
    assert bench_report.total_wrong(run) == 0
    run[0]["in_place"]["wrong"] = 3
    run[4]["out_of_place"]["wrong"] = None
    assert bench_report.total_wrong(run) == 3
    assert bench_report.geometric_mean([0.5, 2.0, 1.0]) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("size", "text"), [(8, "8"), (1024, "1K"), (1 << 20, "1M"), (3 << 30, "3G"), (1000, "1000")]
)
def test_size_text(size: int, text: str) -> None:
    assert bench_report.size_text(size) == text


def test_compare_marks_what_is_worse_by_over_ten_per_cent(tmp_path: Path) -> None:
    a, b = results(), results(1.05, sizes=(8, 1024, 4096))
    slow, fast = (next(r for r in b if r["operation"] == n) for n in ("broadcast", "gather"))
    slow["in_place"]["time_us_median"] *= 2
    fast["out_of_place"]["time_us_median"] /= 2
    bench_report.write_json(tmp_path / "a.json", ENVIRONMENT, a)
    bench_report.write_json(tmp_path / "b.json", ENVIRONMENT | {"ranks": 4}, b)
    job = compared(tmp_path / "a.json", tmp_path / "b.json")
    assert job.returncode == 0, job.stderr
    rows = [line.split() for line in job.stdout.splitlines() if not line.startswith("#")]
    verdicts = {(r[0], r[1], r[2]): r[6] for r in rows if len(r) > 6}
    assert verdicts == {
        ("broadcast", "8", "in-place"): "worse",
        ("gather", "8", "out-of-place"): "better",
    }
    pairs = bench_report.compare(a, b)
    assert len(rows) == len(pairs) == 2 * (7 * 2 + 2) + 1
    mean = bench_report.geometric_mean([pair.ratio for pair in pairs])
    assert mean == pytest.approx(1.05)
    assert job.stdout.splitlines()[-1] == f"# geometric mean of the ratios: {mean:.3f}"
    assert "# differs: ranks: 2 in A, 4 in B" in job.stdout


def test_compare_refuses_what_does_not_overlap(tmp_path: Path) -> None:
    bench_report.write_json(tmp_path / "a.json", ENVIRONMENT, results(sizes=(8, 16))[:2])
    bench_report.write_json(tmp_path / "b.json", ENVIRONMENT, results(sizes=(64,))[:1])
    job = compared(tmp_path / "a.json", tmp_path / "b.json")
    assert job.returncode == 2
    assert "a.json has all_reduce at 8 to 16 bytes, " in job.stderr
    assert "run both with the same operations and --sizes" in job.stderr


@pytest.mark.parametrize("damage", ["not json", "[]", "{}", "cut", "key", "time", "none"])
def test_compare_refuses_other_files(damage: str, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    run: Any = copy.deepcopy(results())
    bench_report.write_json(good, ENVIRONMENT, run)
    if damage == "key":
        del run[0]["in_place"]
    elif damage == "time":
        run[0]["in_place"]["time_us_median"] = 0
    elif damage == "none":
        run = [None]
    text = json.dumps({"environment": ENVIRONMENT, "results": run})
    text = text[:100] if damage == "cut" else text
    bad.write_text(text if damage in ("cut", "key", "time", "none") else damage)
    with pytest.raises(bench_report.ReportError, match=r"bad\.json is not a result file"):
        bench_report.comparison_lines(good, bad)


@pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="pip install 'meshring[plot]'"
)
@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_plot(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"picture{suffix}"
    for run in (results(), results()[:3], results()[-1:]):
        bench_report.plot(path, ENVIRONMENT, run)
        start = path.read_bytes()[:1000]
        assert start.startswith((b"\x89PNG", b"<?xml", b"%PDF"))


def test_plot_without_matplotlib_is_refused_before_the_run(tmp_path: Path) -> None:
    code = (
        "import importlib.util as u, sys; find = u.find_spec; "
        "u.find_spec = lambda name, *a: None if name == 'matplotlib' else find(name, *a); "
        "from meshring.cli import main; main(sys.argv[1:])"
    )
    argv = [sys.executable, "-c", code, "bench", "-n", "2", "--plot", str(tmp_path / "p.png")]
    job = subprocess.run(argv, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert job.returncode == 2
    assert job.stdout == ""
    assert "pip install 'meshring[plot]'" in job.stderr
