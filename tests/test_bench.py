"""`meshring bench`: its pure parts, its checks against broken collectives, and the real command."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import pty
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest

from meshring import bench, bench_data, bench_report, bench_worker
from meshring.bench_data import DTYPES, ML_DTYPES, PERIOD, REDUCTIONS
from meshring.bench_report import OPERATIONS

LIMIT_S = 90
HAVE_ML_DTYPES = importlib.util.find_spec("ml_dtypes") is not None
PLACED = [
    pytest.param(name, in_place, id=f"{name}-{'in' if in_place else 'out-of'}-place")
    for name, operation in OPERATIONS.items()
    for in_place in ((False, True) if operation.in_place else (False,))
    if name != "barrier"
]
DEFINED = [(d, op) for d in DTYPES for op in REDUCTIONS if bench_data.supports(d, op)]


def needs(dtype: str) -> None:
    if dtype in ML_DTYPES and not HAVE_ML_DTYPES:
        pytest.skip("pip install ml_dtypes")


# ---------------------------------------------------------------- a communicator of threads


class Hub:
    def __init__(self, size: int) -> None:
        self.size = size
        self.slots: list[Any] = [None] * size
        self.door = threading.Barrier(size, timeout=LIMIT_S)


class ThreadCommunicator:
    """The collectives in NumPy between threads, one call after another; tests break it."""

    backend, transport = "host", "threads"

    def __init__(self, hub: Hub, rank: int) -> None:
        self.hub, self.rank, self.size = hub, rank, hub.size

    def exchange(self, value: Any) -> list[Any]:
        self.hub.slots[self.rank] = None if value is None else np.array(value)
        self.hub.door.wait()
        values = list(self.hub.slots)
        self.hub.door.wait()
        return values

    def deliver(self, result: Any, out: Any) -> Any:
        if out is None:
            return result
        out[...] = result
        return out

    def total(self, x: Any, op: str) -> Any:
        return bench_data.reduced(np.stack(self.exchange(x)), op)

    def blocks(self, x: Any) -> Any:
        return np.asarray(x).reshape(self.size, -1)

    def all_reduce(self, x: Any, op: str = "sum", out: Any = None) -> Any:
        return self.deliver(self.total(x, op), x if out is None else out)

    def broadcast(self, x: Any, root: int = 0, out: Any = None) -> Any:
        return self.deliver(self.exchange(x)[root], x if out is None else out)

    def reduce(self, x: Any, op: str = "sum", root: int = 0, out: Any = None) -> Any:
        total = self.total(x, op)
        return self.deliver(total, out) if self.rank == root else None

    def all_gather(self, x: Any, axis: int = 0, sizes: Any = None, out: Any = None) -> Any:
        return self.deliver(np.concatenate(self.exchange(x)), out)

    def gather(
        self, x: Any, root: int = 0, axis: int = 0, sizes: Any = None, out: Any = None
    ) -> Any:
        values = self.exchange(x)
        return self.deliver(np.concatenate(values), out) if self.rank == root else None

    def scatter(
        self, x: Any, root: int = 0, axis: int = 0, sizes: Any = None, out: Any = None
    ) -> Any:
        return self.deliver(self.blocks(self.exchange(x)[root])[self.rank], out)

    def reduce_scatter(
        self, x: Any, op: str = "sum", axis: int = 0, sizes: Any = None, out: Any = None
    ) -> Any:
        return self.deliver(self.blocks(self.total(x, op))[self.rank], out)

    def all_to_all(self, x: Any, axis: int = 0, sizes: Any = None, out: Any = None) -> Any:
        mine = [self.blocks(value)[self.rank] for value in self.exchange(x)]
        return self.deliver(np.concatenate(mine), out)

    def sendrecv(self, x: Any, dest: int, source: int, out: Any = None) -> Any:
        return self.deliver(self.exchange(x)[source], out)

    def barrier(self) -> None:
        self.hub.door.wait()


def settings_for(dtype: str, op: str, root: int = 0, **changes: Any) -> bench_worker.Settings:
    values: dict[str, Any] = {"rows": [], "warmup": 0, "iters": 1, "budget_s": 0.01, "check": True}
    return bench_worker.Settings(dtype=dtype, op=op, root=root, **values | changes)


def on_threads(make: type[ThreadCommunicator], ranks: int, body: Callable[[Any], Any]) -> list[Any]:
    """Run `body(communicator)` on every rank and return the results; an error ends them all."""
    hub, results = Hub(ranks), [None] * ranks
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = body(make(hub, rank))
        except BaseException as error:
            errors.append(error)
            hub.door.abort()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    if errors:
        raise errors[0]
    return results


def checked(
    make: type[ThreadCommunicator], name: str, dtype: str, op: str, in_place: bool, ranks: int = 3
) -> int:
    """Return the wrong elements of one operation on all ranks."""
    values = bench_data.craft(
        bench_data.dtype_of(dtype), op if OPERATIONS[name].reduces else None, ranks, 7
    )

    def body(comm: Any) -> int:
        case = bench_worker.build(comm, OPERATIONS[name], 20_000, values, op, 1, in_place)
        return bench_worker.check(case)

    return sum(on_threads(make, ranks, body))


# ---------------------------------------------------------------- sizes, counts, bandwidth


@pytest.mark.parametrize(
    ("text", "factor", "sizes"),
    [
        ("8:128", 2, [8, 16, 32, 64, 128]),
        ("8:100", 4, [8, 32]),
        ("1K,1M", 2, [1024, 1 << 20]),
        ("2g", 2, [2 << 30]),
        ("1M,8:16,8", 2, [8, 16, 1 << 20]),
        ("64:64", 2, [64]),
    ],
)
def test_sizes(text: str, factor: int, sizes: list[int]) -> None:
    assert bench.parse_sizes(text, factor) == sizes


@pytest.mark.parametrize("text", ["0", "0:8", "8:0", "16:8", "", "8:", "x", "-8", "1.5M", "8:9:10"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(click.ClickException) as error:
        bench.parse_sizes(text, 2)
    assert error.value.exit_code == 2
    assert "--sizes" in error.value.message


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("all_reduce", 2 * 3 / 4),
        *((name, 3 / 4) for name in ("all_gather", "reduce_scatter", "all_to_all")),
        *((name, 3 / 4) for name in ("gather", "scatter")),
        *((name, 1.0) for name in ("broadcast", "reduce", "sendrecv")),
    ],
)
def test_busbw_is_that_of_nccl_tests(name: str, factor: float) -> None:
    samples = np.array([900.0, 1000.0, 1100.0])
    part = bench_report.statistics(samples, 1, 4_000_000, OPERATIONS[name].factor(4), 0)
    assert part["time_us_median"] == 1000
    assert part["algbw_gb_per_s"] == pytest.approx(4.0)
    assert part["busbw_gb_per_s"] == pytest.approx(4.0 * factor)


def test_counts_are_those_of_nccl_tests() -> None:
    def rows(name: str, sizes: list[int], itemsize: int, ranks: int) -> list[tuple[int, int]]:
        return [row[1:] for row in bench.plan([name], sizes, itemsize, ranks)]

    assert rows("all_reduce", [8, 100, 1 << 20], 4, 3) == [(8, 2), (100, 25), (1 << 20, 1 << 18)]
    assert rows("all_gather", [1 << 20], 4, 3) == [(1048560, 87380)]
    assert rows("all_gather", [8, 16], 4, 2) == [(8, 1), (16, 2)]
    assert rows("all_gather", [8, 16], 8, 4) == [(32, 1)]  # no empty block, no row twice
    assert rows("scatter", [64], 16, 2) == [(64, 2)]
    assert rows("barrier", [8, 16], 4, 2) == [(0, 0)]


def test_memory_is_refused_with_a_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "memory_available", lambda: 1 << 30)
    rows = bench.plan(["all_reduce"], [256 << 20], 4, 2)
    assert bench.memory_needed(rows, 2) == 1 << 30
    bench.check_memory(rows, 2)
    with pytest.raises(click.ClickException, match=r"needs 1\.5 GiB .* 1\.0 GiB"):
        bench.check_memory(bench.plan(["all_reduce"], [256 << 20], 4, 3), 3)


# ---------------------------------------------------------------- the exact check


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
@pytest.mark.parametrize(("dtype", "op"), DEFINED)
def test_crafted_inputs_are_exact_in_any_order(dtype: str, op: str, ranks: int) -> None:
    needs(dtype)
    values = bench_data.craft(bench_data.dtype_of(dtype), op, ranks, 3)
    assert values.shape == (ranks, PERIOD)
    assert values.dtype.name == dtype
    result = bench_data.reduced(values, op)
    backwards = bench_data.reduced(values[::-1].copy(), op)
    assert np.array_equal(result, backwards)
    if dtype != "bool":
        wide = values.astype(np.complex128)
        exact: Any = {
            "sum": lambda: wide.sum(axis=0),
            "mean": lambda: wide.sum(axis=0) / ranks,
            "prod": lambda: wide.prod(axis=0),
            "min": lambda: wide.real.min(axis=0),
            "max": lambda: wide.real.max(axis=0),
        }[op]()
        assert np.array_equal(result.astype(np.complex128), exact)
    if ranks > 1:
        assert len({row.tobytes() for row in values}) == ranks
        op = "sum" if op == "mean" else op
        lost = bench_data.reduced(values[:-1], op)
        assert (lost != bench_data.reduced(values, op)).any()


def test_the_period_does_not_fit_any_block() -> None:
    assert all(PERIOD % n for n in range(2, 91))
    pattern = np.arange(PERIOD)
    array = np.empty(3 * PERIOD + 100, dtype=np.int64)
    bench_data.fill(array, pattern, 50)
    assert np.array_equal(array, (np.arange(array.size) + 50) % PERIOD)
    assert bench_data.count_wrong(array, pattern, 50) == 0
    assert bench_data.count_wrong(array, pattern, 49) == array.size
    array[[0, PERIOD, -1]] += 1
    assert bench_data.count_wrong(array, pattern, 50) == 3


@pytest.mark.parametrize(("name", "in_place"), PLACED)
def test_right_results_are_right(name: str, in_place: bool) -> None:
    dtypes = ("float32", "int8", "bool", "complex64", *(ML_DTYPES if HAVE_ML_DTYPES else ()))
    for dtype in dtypes:
        for op in REDUCTIONS if OPERATIONS[name].reduces else ("sum",):
            if bench_data.supports(dtype, op):
                assert checked(ThreadCommunicator, name, dtype, op, in_place) == 0, (dtype, op)


class OneElement(ThreadCommunicator):
    """Gets one element wrong on rank 1 (the root)."""

    def deliver(self, result: Any, out: Any) -> Any:
        result = np.array(result)
        if self.rank == 1 and result.size > 5:  # the benchmark's own messages are shorter
            result[5] = ~result[5] if result.dtype == bool else result[5] + result.dtype.type(1)
        return super().deliver(result, out)


class Nothing(ThreadCommunicator):
    """Leaves the output as it was."""

    def deliver(self, result: Any, out: Any) -> Any:
        return out


class Late(ThreadCommunicator):
    """Delivers everything one element too late."""

    def deliver(self, result: Any, out: Any) -> Any:
        return super().deliver(np.roll(result, 1), out)


class Clobbers(ThreadCommunicator):
    """Right results, but the input of an out-of-place call is changed on rank 1."""

    def exchange(self, value: Any) -> list[Any]:
        values = super().exchange(value)
        if self.rank == 1:
            value[3] = value[4] + value.dtype.type(1)
        return values


@pytest.mark.parametrize(("name", "in_place"), PLACED)
def test_wrong_results_are_counted(name: str, in_place: bool) -> None:
    for dtype in ("float32", "int8", "bool"):
        assert checked(OneElement, name, dtype, "sum", in_place) == 1, dtype
        assert checked(Nothing, name, dtype, "sum", in_place) > 1000, dtype
        assert checked(Late, name, dtype, "sum", in_place) > 1000, dtype
    if not in_place:
        assert checked(Clobbers, name, "float32", "sum", in_place) == 1


def test_wrong_results_reach_record_and_footer() -> None:
    def body(comm: Any) -> Any:
        row = ("broadcast", 4096, 1024)
        return bench_worker.run_row(comm, row, settings_for("float32", "sum", root=1), 0)

    right, *_ = on_threads(ThreadCommunicator, 2, body)
    wrong, *_ = on_threads(OneElement, 2, body)
    assert (right["out_of_place"]["wrong"], right["in_place"]["wrong"]) == (0, 0)
    assert (wrong["out_of_place"]["wrong"], wrong["in_place"]["wrong"]) == (1, 1)
    assert bench.footer_lines([right])[0] == "# Out of bounds values : 0 OK"
    assert bench.footer_lines([right, wrong])[0] == "# Out of bounds values : 2 FAILED"


def test_every_rank_makes_the_same_number_of_calls() -> None:
    counts: dict[int, int] = {}

    class Counting(ThreadCommunicator):
        def sendrecv(self, x: Any, dest: int, source: int, out: Any = None) -> Any:
            counts[self.rank] = counts.get(self.rank, 0) + 1
            return super().sendrecv(x, dest, source, out)

    settings = settings_for("int32", "sum", warmup=2, iters=None)
    row = ("sendrecv", 64, 16)
    record, *_ = on_threads(Counting, 2, lambda comm: bench_worker.run_row(comm, row, settings, 0))
    part = record["out_of_place"]
    assert counts[0] == counts[1] > part["iterations"] >= 5
    assert 0 < part["time_us_p10"] <= part["time_us_median"] <= part["time_us_p99"]
    assert record["in_place"] is None


# ---------------------------------------------------------------- the command


def meshring_bench(*args: str | Path, **more: Any) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "meshring", "bench", *map(str, args)]
    more = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": LIMIT_S} | more
    return subprocess.run(argv, text=True, check=False, stdin=subprocess.DEVNULL, **more)


def test_every_operation_and_its_files(tmp_path: Path) -> None:
    json_path, csv_path = tmp_path / "out.json", tmp_path / "out.csv"
    files = ("--json", json_path, "--csv", csv_path)
    job = meshring_bench("-n", "3", "--sizes", "8,48K", "--iters", "5", "--root", "1", *files)
    assert job.returncode == 0, job.stderr
    assert job.stderr == ""  # no progress bar in a pipe
    lines = job.stdout.splitlines()
    rows = [line.split() for line in lines if not line.startswith("#")]
    assert len(rows) == 2 * (len(OPERATIONS) - 1) + 1
    assert {len(row) for row in rows} == {17}
    assert all(row[8] in ("0", "N/A") and row[14] in ("0", "N/A") for row in rows)
    assert sum(line.startswith("#  Rank ") for line in lines) == 3
    assert "# Out of bounds values : 0 OK" in lines
    assert lines[-1].startswith("# Avg bus bandwidth    : ")

    document = json.loads(json_path.read_text())
    keys = {"meshring", "numpy", "python", "cpu_model", "cores_usable", "ranks", "date", "kernel"}
    assert document["environment"].keys() >= keys | {"transport", "isa", "command_line"}
    assert document["environment"]["ranks"] == 3
    assert document["environment"]["date"].endswith("+00:00")
    results = document["results"]
    assert len(results) == len(rows)
    assert {r["operation"] for r in results} == set(OPERATIONS)
    for record in results:
        operation = OPERATIONS[record["operation"]]
        assert (record["in_place"] is not None) == operation.in_place
        assert record["op"] == ("sum" if operation.reduces else None)
        assert record["root"] == (1 if operation.rooted else None)
        part = record["out_of_place"]
        assert set(part) == set(bench_report.MEASURES)
        assert part["iterations"] == 5 * part["calls_per_sample"]
        if record["operation"] != "barrier":
            assert part["wrong"] == 0
            factor = operation.factor(3)
            assert part["busbw_gb_per_s"] == pytest.approx(part["algbw_gb_per_s"] * factor)
            expected = record["size_bytes"] / part["time_us_median"] / 1e3
            assert part["algbw_gb_per_s"] == pytest.approx(expected)

    text = csv_path.read_text().splitlines()
    assert any(line.startswith("# cpu_model: ") for line in text)
    table = list(csv.DictReader(line for line in text if not line.startswith("#")))
    assert len(table) == sum(bool(r[p]) for r in results for p in bench_report.PLACEMENTS)
    first = results[0]["out_of_place"]
    assert float(table[0]["time_us_median"]) == first["time_us_median"]
    assert [row["placement"] for row in table[:2]] == ["out_of_place", "in_place"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_exact_on_real_ranks(dtype: str) -> None:
    needs(dtype)
    ops = ("all_reduce", "all_to_all", "reduce_scatter")
    op = "max" if dtype.startswith(("uint", "bfloat")) else "prod" if dtype == "int8" else "sum"
    options = ("--dtype", dtype, "--op", op, "--sizes", "16,100K", "--iters", "1", "--warmup", "0")
    job = meshring_bench(*ops, "-n", "2", *options)
    assert job.returncode == 0, job.stdout + job.stderr
    assert "# Out of bounds values : 0 OK" in job.stdout


def test_one_rank_and_no_check() -> None:
    options = ("-n", "1", "--sizes", "64", "--iters", "1", "--no-check")
    job = meshring_bench("all_reduce", "barrier", *options)
    assert job.returncode == 0, job.stderr
    assert "# Out of bounds values : not checked" in job.stdout


BAD = {
    "operation": (["all_reduc"], "did you mean all_reduce?"),
    "dtype": (["--dtype", "float23"], "did you mean float32?"),
    "op": (["--op", "plus"], "There are: sum, prod, min, max, mean"),
    "mean of integers": (["--dtype", "int32", "--op", "mean"], "int32 has: sum, prod, min, max"),
    "max of complex": (["--dtype", "complex64", "--op", "max"], "sum, prod, mean"),
    "size 0": (["--sizes", "0:8"], "at least 1 byte"),
    "reversed": (["--sizes", "1M:8"], "write 8:1M"),
    "too large": (["--sizes", "900T"], "GiB of memory is available"),
    "root": (["--root", "2"], "they are 0 to 1"),
    "backend": (["--backend", "mpi"], "There are: host, nccl"),
    "timeout": (["--timeout", "-1"], "above 0 seconds"),
    "directory": (["--json", "/nowhere/at/all/out.json"], "does not exist"),
    "a directory": (["--csv", "/tmp"], "is a directory"),
    "picture": (["--plot", "out.txt"], ".png"),
    "factor": (["--factor", "1"], "--factor"),
    "compare": (["--compare", "/nowhere/a.json", "/nowhere/b.json"], "No such file"),
}


@pytest.mark.parametrize(("options", "sentence"), BAD.values(), ids=BAD)
def test_bad_options_end_in_one_sentence(options: list[str], sentence: str) -> None:
    job = meshring_bench("-n", "2", *options)
    assert job.returncode == 2
    assert job.stdout == ""  # no rank was started
    assert sentence in job.stderr
    assert "Traceback" not in job.stderr


def test_a_time_limit_ends_the_run(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    job = meshring_bench("-n", "2", "--timeout", "0.5", "--iters", "100000", "--json", path)
    assert job.returncode == 124
    assert "no results are written" in job.stderr
    assert not path.exists()


def test_a_progress_bar_on_a_terminal_only() -> None:
    ours, theirs = pty.openpty()
    chunks: list[bytes] = []

    def read() -> None:
        try:
            while chunk := os.read(ours, 65536):
                chunks.append(chunk)
        except OSError:  # EIO: every writer has closed the terminal
            pass

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    env = os.environ | {"TERM": "xterm"}
    job = meshring_bench(
        "broadcast", "-n", "2", "--sizes", "8,64", "--iters", "1", stderr=theirs, env=env
    )
    os.close(theirs)
    reader.join(LIMIT_S)
    os.close(ours)
    assert job.returncode == 0
    assert b"1/2" in b"".join(chunks)
    assert len([line for line in job.stdout.splitlines() if not line.startswith("#")]) == 2


def test_a_closed_reader_ends_the_run_quietly() -> None:
    argv = [sys.executable, "-m", "meshring", "bench", "-n", "2", "--iters", "2000"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as job:
        assert job.stdout is not None
        assert job.stderr is not None
        while not job.stdout.readline().startswith(b"# all_reduce"):
            assert job.poll() is None
        job.stdout.close()
        errors = job.stderr.read().decode()
        assert job.wait(LIMIT_S) == 141
    assert "Traceback" not in errors
