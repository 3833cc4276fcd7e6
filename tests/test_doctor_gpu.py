"""`meshring doctor` on GPUs: on the stand-in, without a driver, and verdicts on other machines."""

from __future__ import annotations

import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import standin
from meshring import doctor_gpu, nccl
from meshring.doctor import FAIL, OK, WARN, Check, examine
from test_doctor import meshring_doctor

needs_standin = pytest.mark.skipif(standin.compiler() is None, reason=standin.SKIP)
USED = "/wheel/libnccl.so.2"
ONE = {"cupy-cuda12x": "14.2.0", "nvidia-nccl-cu12": "2.32.3", "cupyx": "1", "numpy": "2"}


def findings(**changes: Any) -> dict[str, Any]:
    """What looking gives on a good machine, but for `changes`."""
    return {
        "nccl": {"path": USED, "version": "2.32.3", "code": 23203, "found": "NVIDIA's wheel"},
        "mapped": [],
        "driver": {"path": "/lib/libcuda.so.1", "version": 12040, "devices": 2},
        "gpus": [{"index": i, "name": "A GPU", "uuid": f"{i}"} for i in range(2)],
        "kernels": {
            "built": True,
            "isa": "8.0",
            "target": "sm_70",
            "compiler": "nvrtc 12.0",
            "refused": {},
        },
        "why_off": "",
    } | changes


@pytest.fixture
def diagnosis(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The checks by name, on a machine of that kind."""

    def of(have: dict[str, str] = ONE, **changes: Any) -> dict[str, Check]:
        monkeypatch.setattr(doctor_gpu, "installed", lambda: have)
        monkeypatch.setattr(doctor_gpu, "look_elsewhere", lambda: findings(**changes))
        monkeypatch.setattr(doctor_gpu, "find_nccl", lambda: [USED])
        return {check.name: check for check in doctor_gpu.check_gpu()}

    return of


def lines_of(env: dict[str, str]) -> dict[str, str]:
    job = meshring_doctor("--no-probe", **env)
    assert job.returncode == 0, job.stdout + job.stderr
    assert job.stderr == ""
    return {
        line[6:19].strip(): line[:6].strip() + " " + line[20:] for line in job.stdout.splitlines()
    }


@needs_standin
def test_two_gpus_of_the_standin(tmp_path: Path) -> None:
    env = standin.environment(tmp_path, gpus=2)
    path = env["MESHRING_NCCL_LIBRARY"]
    lines = lines_of(env)
    assert lines["cuda"].startswith(f"ok driver for CUDA 12.4, {path}; 1 x stand-in GPU 0")
    assert lines["libnccl"].startswith(f"ok NCCL 2.32.3, {path} (MESHRING_NCCL_LIBRARY)")
    if find_spec("cupy") is None:
        assert lines["cupy"].startswith("warn CuPy is not installed: pip install")
        assert lines["backend nccl"].startswith("warn off: CuPy is not installed; pip install")
    else:
        assert lines["cupy"].startswith("ok cupy")
        assert (
            lines["backend nccl"] == "ok on: NCCL 2.32.3 between up to 2 ranks, each with its GPU"
        )


@needs_standin
def test_what_the_standin_refuses(tmp_path: Path) -> None:
    from meshring import _core

    if not _core.kernels_info()["built"]:
        pytest.skip("built without kernels: pip install 'nvidia-cuda-nvrtc-cu12==12.0.*', build")
    env = standin.environment(tmp_path, 21801, faults="cuModuleLoadData=222")
    lines = lines_of(env)
    assert "on GPU 0 the driver (CUDA 12.4) refuses them (PTX ISA 8.0" in lines["kernels"]
    assert lines["kernels"].startswith("warn ")
    assert lines["libnccl"].startswith("ok NCCL 2.18.1")


def test_one_calm_line_without_a_driver(tmp_path: Path) -> None:
    missing = tmp_path / "libcuda.so.1"
    lines = lines_of({"MESHRING_CUDA_LIBRARY": str(missing)})
    line = lines["backend nccl"]
    assert line.startswith("ok off, arrays on the host work without it: there is no CUDA driver")
    assert str(missing) in line and "NCCL" in line and "kernels" in line
    assert not {"cuda", "cupy", "libnccl", "kernels"} & lines.keys()


def test_a_library_that_is_named_and_missing(tmp_path: Path) -> None:
    named = str(tmp_path / "libnccl.so.2")
    env = {"MESHRING_CUDA_LIBRARY": "/nowhere", "MESHRING_NCCL_LIBRARY": named}
    line = lines_of(env)["backend nccl"]
    assert f"NCCL was not found. MESHRING_NCCL_LIBRARY: NCCL cannot be opened: {named}" in line


def test_all_is_well(diagnosis: Any) -> None:
    checks = diagnosis()
    assert {check.verdict for check in checks.values()} == {OK}
    assert "2 x A GPU" in checks["cuda"].sentence
    assert checks["backend nccl"].facts["available"] is True
    assert checks["backend nccl"].facts["installed"] == {
        "cupy-cuda12x": "14.2.0",
        "nvidia-nccl-cu12": "2.32.3",
    }


def test_two_wheels_own_the_same_files(diagnosis: Any) -> None:
    check = diagnosis(ONE | {"nvidia-nccl-cu13": "2.32.3"})["NCCL wheels"]
    assert check.verdict == WARN
    assert "nvidia-nccl-cu12 and nvidia-nccl-cu13 own the same files" in check.sentence
    assert "uninstall both, install one" in check.sentence


def test_other_libraries_are_named_once(diagnosis: Any, tmp_path: Path) -> None:
    real = tmp_path / "libnccl.so.2.27.7"
    real.touch()
    link = tmp_path / "libnccl.so.2"
    link.symlink_to(real)
    check = diagnosis(mapped=[str(link), str(real), USED])["libnccl"]
    assert check.sentence.count(str(tmp_path)) == 1
    assert "not used" in check.sentence
    assert check.verdict == WARN  # two in one process
    assert diagnosis(mapped=[USED])["libnccl"].verdict == OK


@pytest.mark.parametrize(
    ("have", "words"),
    [
        ({}, ("CuPy is not installed", "pip install")),
        ({"cupy-cuda12x": "14", "cupy-cuda13x": "14"}, ("own the same files",)),
        ({"cupy-cuda13x": "14"}, ("cupy-cuda13x is made for CUDA 13", "driver is for CUDA 12")),
        (ONE | {"nvidia-nccl-cu12": "", "nvidia-nccl-cu13": "2"}, ("nvidia-nccl-cu13 is made for",)),
    ],
)  # fmt: skip
def test_packages_that_do_not_fit(
    have: dict[str, str], words: tuple[str, ...], diagnosis: Any
) -> None:
    check = diagnosis(have)["cupy"]
    assert check.verdict == WARN
    for word in words:
        assert word in check.sentence


def test_why_it_is_off(diagnosis: Any) -> None:
    checks = diagnosis(nccl={"error": "NCCL was not found. "}, why_off="NCCL was not found. ")
    assert checks["libnccl"].verdict == checks["backend nccl"].verdict == WARN
    assert checks["backend nccl"].sentence == "off: NCCL was not found. "
    built = findings()["kernels"] | {"built": False, "compiler": "no CUDA compiler"}
    assert "no CUDA compiler" in diagnosis(kernels=built)["kernels"].sentence


def test_a_gpu_that_the_driver_does_not_find(
    diagnosis: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor_gpu, "DEVICE_FILE", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    check = diagnosis(driver={"error": "finds no usable GPU"}, gpus=[])["backend nccl"]
    assert check.verdict == WARN
    assert "finds no usable GPU" in check.sentence
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # then it is meant
    assert diagnosis(driver={"error": "x"}, gpus=[])["backend nccl"].verdict == OK


@pytest.mark.parametrize("end", ["hangs", "crashes"])
def test_a_driver_that_does_not_answer(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(argv: list[str], **options: Any) -> Any:
        if end == "hangs":
            raise subprocess.TimeoutExpired(argv, options["timeout"])
        return subprocess.CompletedProcess(argv, -11, "", "")

    monkeypatch.setattr(doctor_gpu.subprocess, "run", run)
    (check,) = doctor_gpu.check_gpu()[-1:]
    assert check.verdict == FAIL
    assert "did not end in 30 s" in check.sentence or "exit code -11" in check.sentence
    monkeypatch.undo()
    assert any(found.name == "backend nccl" for found in examine(probe=False))


def test_the_library_is_found_without_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MESHRING_NCCL_LIBRARY", raising=False)
    if not nccl.wheels():
        pytest.skip("pip install nvidia-nccl-cu12")
    assert Path(nccl.wheels()[0]).name == "libnccl.so.2"
    assert ("NVIDIA's wheel", nccl.wheels()[0]) in list(nccl._candidates())
    assert ("the system", "libnccl.so.2") in list(nccl._candidates())
