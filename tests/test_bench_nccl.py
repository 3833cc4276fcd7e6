"""`meshring bench --backend nccl`: what it refuses, and the whole of it on the stand-in NCCL."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import standin
from meshring import bench_data, bench_device, bench_report, bench_table, nccl
from meshring.bench_report import OPERATIONS

LIMIT_S = 90
HAVE_CUPY = importlib.util.find_spec("cupy") is not None
rehearsed = pytest.mark.skipif(
    not HAVE_CUPY or standin.compiler() is None,
    reason=standin.SKIP if HAVE_CUPY else "pip install cupy-cuda12x",
)


def bench(
    *args: str | Path, folder: Path | None = None, version: int = standin.DEFAULT_VERSION
) -> subprocess.CompletedProcess[str]:
    """Run the command; with a folder, on the stand-in."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("NCCL_", "MESHRING_"))}
    if folder is not None:
        env |= standin.environment(folder, version)
    return subprocess.run(
        [sys.executable, "-m", "meshring", "bench", "--backend", "nccl", *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        timeout=LIMIT_S,
        env=env,
    )


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("names", "dtype", "op", "ranks", "check", "sentence"),
    [
        (["all_reduce", "barrier"], "float32", "sum", 2, True, "--backend host"),
        (["broadcast"], "float8_e4m3fn", "sum", 2, True, "CuPy has no such type"),
        (["reduce"], "uint16", "sum", 2, True, "choose int32"),
        (["all_reduce"], "complex64", "prod", 2, True, "choose sum"),
        (["all_reduce"], "float32", "mean", 6, True, "add --no-check"),
    ],
)
def test_what_nccl_does_not_have(
    names: list[str], dtype: str, op: str, ranks: int, check: bool, sentence: str
) -> None:
    assert sentence in (bench_device.refusal(names, dtype, op, ranks, check) or "")


def test_what_nccl_has() -> None:
    every = [name for name in OPERATIONS if name != "barrier"]
    assert bench_device.refusal(every, "float32", "sum", 3, True) is None
    assert bench_device.refusal(every, "float32", "mean", 4, True) is None
    assert bench_device.refusal(every, "float32", "mean", 3, False) is None
    assert bench_device.refusal(["all_gather"], "int16", "sum", 3, True) is None


def test_without_a_driver_it_is_one_sentence(tmp_path: Path) -> None:
    env = os.environ | {"MESHRING_CUDA_LIBRARY": str(tmp_path / "libcuda.so.1")}
    argv = [sys.executable, "-m", "meshring", "bench", "--backend", "nccl", "-n", "2"]
    job = subprocess.run(
        argv, capture_output=True, text=True, check=False, timeout=LIMIT_S, env=env
    )
    assert job.returncode == 2
    assert job.stdout == ""
    assert len(job.stderr.splitlines()) == 1
    assert "--backend nccl cannot be used" in job.stderr
    assert ("CUDA driver" if HAVE_CUPY else "CuPy is not installed") in job.stderr


def test_the_host_has_no_graphs_and_no_registration() -> None:
    for option in ("--graph", "--registered"):
        argv = [sys.executable, "-m", "meshring", "bench", option]
        job = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=LIMIT_S)
        assert job.returncode == 2
        assert f"{option} is for --backend nccl" in job.stderr


# ---------------------------------------------------------------- rehearsed


@rehearsed
def test_every_operation_and_its_files(tmp_path: Path) -> None:
    json_path, csv_path = tmp_path / "out.json", tmp_path / "out.csv"
    files = ("--json", json_path, "--csv", csv_path)
    job = bench("-n", "2", "--sizes", "8,48K", "--iters", "2", *files, folder=tmp_path)
    assert job.returncode == 0, job.stderr
    assert job.stderr == ""  # the stand-in saw no misuse
    lines = job.stdout.splitlines()
    assert lines.count("# STAND-IN: not a measurement") == 2  # above and below the table
    shared = "# 2 ranks share 1 GPU(s) (NCCL_HOSTID, sockets): not a bandwidth figure"
    assert lines.count(shared) == 2
    assert sum(line.startswith("#  Rank ") and line.endswith("GPU 0") for line in lines) == 2
    assert "# Out of bounds values : 0 OK" in lines

    document = json.loads(json_path.read_text())
    environment, results = document["environment"], document["results"]
    assert environment.keys() >= set(bench_table.DEVICE_KEYS)
    assert environment["backend"] == "nccl"
    assert environment["nccl"] == "2.32.3"
    assert environment["gpus"] == ["stand-in GPU 0"]
    assert environment["remarks"][0] == bench_device.STAND_IN
    assert {r["operation"] for r in results} == set(OPERATIONS) - {"barrier"}
    for record in results:
        operation = OPERATIONS[record["operation"]]
        assert (record["in_place"] is not None) == operation.in_place
        assert record["out_of_place"]["wrong"] == 0
    text = csv_path.read_text().splitlines()
    assert any(line.startswith("# remarks: ") and "STAND-IN" in line for line in text)
    table = list(csv.DictReader(line for line in text if not line.startswith("#")))
    assert len(table) == sum(bool(r[p]) for r in results for p in bench_report.PLACEMENTS)


@rehearsed
@pytest.mark.parametrize(
    ("version", "registered"), [(23203, "window"), (22304, "buffer"), (21801, None)]
)
def test_graphs_and_registered_buffers(
    version: int, registered: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "out.json"
    how = ("-n", "2", "--sizes", "16,20K", "--iters", "2", "--graph", "--registered")
    job = bench("all_reduce", "gather", *how, "--json", path, folder=tmp_path, version=version)
    if registered is None:
        assert job.returncode == 2
        assert "--registered needs NCCL 2.19.1 or newer; this is 2.18.1" in job.stderr
        return
    assert job.returncode == 0, job.stderr
    assert job.stderr == ""
    assert "replayed from one CUDA graph" in job.stdout
    assert f"buffers registered ({registered})" in job.stdout
    assert "# Out of bounds values : 0 OK" in job.stdout.splitlines()
    environment = json.loads(path.read_text())["environment"]
    assert (environment["graph"], environment["registered"]) == (True, registered)


@rehearsed
@pytest.mark.parametrize("dtype", ["bool", "uint8", "float16", "bfloat16", "complex128"])
def test_dtypes_are_exact(dtype: str, tmp_path: Path) -> None:
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes", reason="pip install ml_dtypes")
    how = ("-n", "1", "--dtype", dtype, "--sizes", "100K", "--iters", "1", "--warmup", "0")
    job = bench("all_reduce", "all_gather", *how, folder=tmp_path)
    assert job.returncode == 0, job.stderr
    assert "# Out of bounds values : 0 OK" in job.stdout.splitlines()


@rehearsed
def test_too_large_is_one_sentence(tmp_path: Path) -> None:
    job = bench("all_reduce", "-n", "1", "--sizes", "900T", folder=tmp_path)
    assert job.returncode == 2
    assert "of its memory is free; choose a smaller size" in job.stderr
    assert "Traceback" not in job.stderr


# ---------------------------------------------------------------- the GPU's part, step by step


class Recorder:
    """CuPy as far as bench_device.Gpu uses it: NumPy's arrays, and a stream that keeps a diary."""

    def __init__(self, free: int = 1 << 30) -> None:
        self.diary: list[str] = []
        self.capturing = False
        write = self.diary.append
        recorder = self

        class Event:
            def record(self, stream: Any) -> None:
                write("event")

            def synchronize(self) -> None:
                write("wait")

        class Stream:
            def __init__(self, non_blocking: bool) -> None:
                assert non_blocking

            def use(self) -> None:
                write("use")

            def synchronize(self) -> None:
                write("synchronize")

            def begin_capture(self) -> None:
                recorder.capturing = True

            def end_capture(self) -> Any:
                recorder.capturing = False
                return SimpleNamespace(launch=lambda stream: write("launch"))

        self.cuda = SimpleNamespace(
            Device=lambda index: SimpleNamespace(use=lambda: write(f"device {index}")),
            Stream=Stream,
            Event=Event,
            get_elapsed_time=lambda begin, end: 0.5,
            runtime=SimpleNamespace(memGetInfo=lambda: (free, 2 * free)),
            using_allocator=lambda allocator: nullcontext(write("NCCL's memory")),
        )
        self.__version__ = "of a test"
        self.empty, self.arange, self.asarray = np.empty, np.arange, np.asarray

    def call(self) -> None:
        self.diary.append("captured" if self.capturing else "call")


class Registered:
    """The part of a communicator that Gpu uses."""

    device, size = 1, 2

    def __init__(self, recorder: Recorder) -> None:
        self.write = recorder.diary.append

    def synchronize(self) -> None:
        self.write("comm")

    def register(self, x: Any, window: bool) -> Any:
        self.write(f"register {x.nbytes} {window}")
        return SimpleNamespace(close=lambda: self.write("deregister"))


def gpu(monkeypatch: pytest.MonkeyPatch, **options: bool) -> tuple[Recorder, bench_device.Gpu]:
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "cupy", recorder)
    monkeypatch.setattr(nccl, "library", lambda: SimpleNamespace(code=22803))
    monkeypatch.setattr(nccl, "allocator", lambda: None)
    how: Any = SimpleNamespace(**{"graph": False, "registered": False} | options)
    made = bench_device.Gpu(Registered(recorder), how)  # type: ignore[arg-type]
    assert recorder.diary == ["device 1", "use"]
    recorder.diary.clear()
    return recorder, made


def test_a_sample_is_calls_between_two_events(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, target = gpu(monkeypatch)
    sample = target.sampler(recorder.call, 3)
    assert recorder.diary == []
    assert sample() == 500_000  # half a millisecond
    assert recorder.diary == ["event", "call", "call", "call", "event", "wait"]
    assert target.free_bytes() == 1 << 30


def test_a_graph_is_captured_once_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, target = gpu(monkeypatch, graph=True)
    sample = target.sampler(recorder.call, 2)
    assert recorder.diary == ["call", "comm", "captured", "captured", "launch", "synchronize"]
    recorder.diary.clear()
    sample()
    assert recorder.diary == ["event", "launch", "event", "wait"]


def test_buffers_are_registered_as_long_as_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, target = gpu(monkeypatch, registered=True)
    arrays = [target.empty(count, np.dtype("f4")) for count in (2, 4)]
    for collective in (True, False):
        recorder.diary.append("--")
        with target.known(arrays, collective):
            recorder.diary.append("inside")
    registers = [
        f"register 8 {w} register 16 {w} inside comm deregister deregister" for w in (True, False)
    ]
    assert " ".join(recorder.diary) == "NCCL's memory NCCL's memory -- " + " -- ".join(registers)


class Bits:
    """What CuPy is asked for a pattern: takes arrays that are not NumPy's."""

    def __init__(self, dtype: str) -> None:
        self.dtype = np.dtype(dtype)


def test_bfloat16_is_compared_as_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="pip install ml_dtypes")
    pattern = np.arange(8).astype(ml_dtypes.bfloat16)
    monkeypatch.setitem(sys.modules, "cupy", np)  # its asarray keeps the dtype
    found = bench_data.rolled(pattern, 2, Bits("u2"))  # type: ignore[arg-type]
    assert found.dtype == np.uint16
    assert np.array_equal(found.view(ml_dtypes.bfloat16), np.roll(pattern, -2))


def test_the_picture_names_the_gpus(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pip install 'meshring[plot]'")
    part = bench_report.statistics(np.array([2.0, 3.0]), 1, 64, 1.0, 0)
    record = {"operation": "all_reduce", "size_bytes": 64, "count": 16, "dtype": "float32"}
    record |= {"op": "sum", "root": None, "ranks": 2, "out_of_place": part, "in_place": None}
    environment = {"meshring": "0", "ranks": 2, "backend": "nccl", "transport": "NCCL"}
    environment |= {"cpu_model": "x", "cores_usable": 2, "date": "today", "nccl": "2.28.3"}
    environment |= {"gpus": ["GPU of a test"], "remarks": [bench_device.STAND_IN]}
    path = tmp_path / "picture.svg"
    bench_report.plot(path, environment, [record])
    text = path.read_text()
    assert "<!-- STAND" in text and "<!-- GPU of a test, NCCL 2.28.3, today" in text
