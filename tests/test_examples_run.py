"""The examples: run as a user runs them, and compared with their single-process results."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import meshring as mr
from procs import run_ranks

EXAMPLES = Path(__file__).parent.parent / "examples"
LIMIT = 60.0


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module(name)


def run(name: str, ranks: int, *args: str) -> str:
    text = (EXAMPLES / name).read_text()
    env = {"PYTHONPATH": str(EXAMPLES), "OPENBLAS_NUM_THREADS": "1"}
    result = run_ranks(text, ranks, *args, "--check", timeout=90, env=env)
    assert (result.returncode, result.stderr) == (0, ""), result.stderr[-3000:]
    (line,) = [x for x in result.stdout.splitlines() if "difference to one process" in x]
    assert float(line.split()[-1]) < 1e-9
    return result.stdout


def needs_digits() -> None:
    pytest.importorskip("sklearn", reason="pip install scikit-learn, for its digits")


def test_digits_are_learnt_as_on_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    needs_digits()
    example = load("tensor_parallel_digits", monkeypatch)
    alone, losses = example.train_alone(epochs=2)

    def program(comm: mr.Communicator) -> float:
        for shape in ((1, 4), (2, 2)):
            mesh = mr.DeviceMesh(shape, ("dp", "tp"), comm)
            p, found, hits = example.train(mesh, np, epochs=2)
            assert found == pytest.approx(losses, rel=1e-9)
            assert p["w1"].placements == (mr.Replicate(), mr.Shard(1))
            for name, weight in p.items():
                np.testing.assert_allclose(weight.gather(), alone[name], rtol=1e-9, atol=1e-12)
        return float(hits)

    assert set(mr.run_local(program, 4, timeout=LIMIT)) != {0.0}


def test_digits_from_the_command_line() -> None:
    needs_digits()
    out = run("tensor_parallel_digits.py", 4, "--epochs", "12")
    (line,) = [x for x in out.splitlines() if "test digits are right" in x]
    assert float(line.split("%")[0].split()[-1]) > 90
    assert "rank 3 holds w1 (64, 32) and w2 (32, 10)" in out


def test_data_and_tensor_parallel_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    example = load("data_tensor_parallel", monkeypatch)
    alone, losses = example.train_alone(steps=8)

    def program(comm: mr.Communicator) -> None:
        for shape in ((2, 2), (4, 1), (1, 4)):
            p, found = example.train(mr.DeviceMesh(shape, ("dp", "tp"), comm), np, steps=8)
            assert found == pytest.approx(losses, rel=1e-9)
            for name, weight in p.items():
                np.testing.assert_allclose(weight.gather(), alone[name], rtol=1e-9, atol=1e-12)

    mr.run_local(program, 4, timeout=LIMIT)
    assert losses[-1] < losses[0]
    assert "dp=1     2     3" in run("data_tensor_parallel.py", 4, "--steps", "20")


@pytest.mark.parametrize("shape", [(16, 12), (7, 9), (1, 5)])
def test_fft2_is_numpy_s(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    example = load("fft2", monkeypatch)
    image = example.picture(shape)

    def program(comm: mr.Communicator) -> None:
        mesh = mr.DeviceMesh(comm.size, "x", comm)
        spectrum = example.fft2(mr.DistributedTensor.shard(image, mesh, 0))
        assert spectrum.placements == (mr.Shard(1),)
        want = np.fft.fft2(image)
        np.testing.assert_allclose(spectrum.gather(), want, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(example.ifft2(spectrum).gather(), image, atol=1e-12)
        frequencies = np.hypot(*np.meshgrid(*map(np.fft.fftfreq, shape), indexing="ij"))
        smooth = example.low_pass(spectrum, 0.2).gather()
        np.testing.assert_allclose(smooth, want * (frequencies <= 0.2), rtol=1e-9, atol=1e-9)

    mr.run_local(program, 3, timeout=LIMIT)


def test_fft2_from_the_command_line() -> None:
    assert "all_to_all along x" in run("fft2.py", 4, "--shape", "60", "50")


@pytest.mark.parametrize("blocks", [(2, 3), (1, 6), (3, 2)])
def test_heat_is_one_process(blocks: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    example = load("heat", monkeypatch)
    want = example.simulate_alone(17, 40)

    def program(comm: mr.Communicator) -> None:
        mesh = mr.DeviceMesh(blocks, ("rows", "cols"), comm)
        assert (example.simulate(mesh, 17, 40, np).gather() == want).all()

    mr.run_local(program, 6, timeout=LIMIT)
    assert 0 < want[8, 8] < want[0, 0] <= 1


def test_heat_from_the_command_line_with_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pip install matplotlib, for the picture")
    picture = tmp_path / "heat.png"
    run("heat.py", 4, "--size", "30", "--steps", "50", "--plot", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")
