"""`meshring doctor`: the real command, and its verdicts on machines that are not this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from meshring import doctor
from meshring.doctor import FAIL, OK, WARN, Check

LIMIT_S = 60
LAUNCHERS = ("MESHRING_", "OMPI_", "PMI", "SLURM_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")
HEAVY = ("cupy", "torch", "mpi4py")


def meshring_doctor(*args: str, **variables: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "meshring", "doctor", *args]
    env = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHERS)}
    return subprocess.run(
        argv,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
        stdin=subprocess.DEVNULL,
        env=env | variables,
    )


def test_a_line_with_a_verdict_for_every_check() -> None:
    job = meshring_doctor()
    assert job.returncode == 0, job.stdout + job.stderr
    assert job.stderr == ""
    lines = job.stdout.splitlines()
    assert {line.split()[0] for line in lines} <= {OK, WARN}
    probe = next(line for line in lines if line[6:].startswith("probe"))
    assert "2 ranks summed exactly; transport " in probe
    assert any(line.startswith("ok    backend host") for line in lines)
    assert "\x1b" not in job.stdout  # no colours in a pipe


def test_json_says_the_same() -> None:
    job = meshring_doctor("--json", "--no-probe")
    assert job.returncode == 0, job.stdout + job.stderr
    report = json.loads(job.stdout)
    checks = {check["name"]: check for check in report["checks"]}
    assert report["verdict"] in (OK, WARN)
    assert "probe" not in checks
    assert checks["versions"]["facts"].keys() >= {"meshring", "python", "numpy", "build"}
    assert checks["cores"]["facts"]["usable"] == len(os.sched_getaffinity(0))
    assert checks["memory"]["facts"]["available_bytes"] > 0
    assert checks["isa"]["facts"]["isas"]
    for name in ("mpi", "gloo"):
        backend = checks[f"backend {name}"]
        assert backend["facts"]["available"] is False
        assert "not in this version of meshring" in backend["sentence"]
    for check in report["checks"]:
        assert check.keys() == {"name", "verdict", "sentence", "facts"}
        assert check["sentence"]


def test_the_launchers_variables_are_reported() -> None:
    variables = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    job = meshring_doctor("--json", "--no-probe", **variables)
    report = json.loads(job.stdout)
    (check,) = (check for check in report["checks"] if check["name"] == "launcher")
    assert check["facts"]["believed"].keys() | check["facts"]["ignored"].keys() >= {"WORLD_SIZE"}
    assert "WORLD_SIZE=4" in check["sentence"]


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; from meshring import doctor; doctor.examine(probe=False); "
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    argv = [sys.executable, "-c", code]
    job = subprocess.run(argv, capture_output=True, text=True, timeout=LIMIT_S, check=True)
    assert job.stdout.strip() == "[]"


def test_exit_code_is_one_for_a_fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> Check:
        raise OSError("no such thing")

    broken.__name__ = "check_memory"
    monkeypatch.setattr(doctor, "check_memory", broken)
    with pytest.raises(SystemExit) as end:
        doctor.command.main(["--no-probe"], standalone_mode=False)
    assert end.value.code == 1
    assert "fail  memory        the check broke: OSError: no such thing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("end", "sentence"),
    [
        ({"returncode": 1, "stderr": "Traceback\nBackendError: memfd_create is not permitted\n"},
         "ended with exit code 1: BackendError: memfd_create is not permitted"),
        ({"returncode": 0, "stderr": ""}, "ended with exit code 0: no message"),
    ],
)  # fmt: skip
def test_a_probe_that_fails(
    end: dict[str, Any], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(argv: list[str], **_: Any) -> Any:
        return subprocess.CompletedProcess(argv, stdout="", **end)

    monkeypatch.setattr(doctor.subprocess, "run", run)
    check = doctor.check_probe()
    assert check.verdict == FAIL
    assert sentence in check.sentence


def test_a_probe_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(argv: list[str], **options: Any) -> Any:
        raise subprocess.TimeoutExpired(argv, options["timeout"])

    monkeypatch.setattr(doctor.subprocess, "run", run)
    assert doctor.check_probe().verdict == FAIL


@pytest.mark.parametrize(
    ("facts", "verdict"),
    [
        ({"transport": "process_vm_readv", "right": True, "ranks": 2}, OK),
        ({"transport": "shared slots", "right": True, "ranks": 2}, WARN),
        ({"transport": "process_vm_readv", "right": False, "ranks": 2}, FAIL),
        ({"transport": "process_vm_readv", "right": True, "ranks": 1}, FAIL),
    ],
)
def test_verdicts_of_the_probe(
    facts: dict[str, Any], verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(argv: list[str], **_: Any) -> Any:
        Path(argv[-1]).write_text(json.dumps(facts))
        return subprocess.CompletedProcess(argv, 0, "", "")

    monkeypatch.setattr(doctor.subprocess, "run", run)
    assert doctor.check_probe().verdict == verdict


FILES = {
    "/proc/self/cgroup": "0::/job/inner",
    "/sys/fs/cgroup/job/inner/cpu.max": "max 100000",
    "/sys/fs/cgroup/job/cpu.max": "150000 100000",
    "/sys/fs/cgroup/job/memory.max": str(3 << 30),
    "/sys/fs/cgroup/job/memory.current": str(1 << 30),
    "/proc/meminfo": "MemTotal: 99999999 kB\nMemAvailable:   16777216 kB",
    "/proc/sys/kernel/yama/ptrace_scope": "1",
}


def test_limits_of_a_container_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_read", FILES.get)
    monkeypatch.setattr(doctor, "usable_cores", lambda: 8)
    assert doctor.cpu_quota() == 1.5
    assert doctor.memory_available() == 2 << 30
    check = doctor.check_cores()
    assert (check.verdict, check.facts["cgroup_quota"]) == (WARN, 1.5)
    assert doctor.check_kernel().verdict == WARN
    monkeypatch.setattr(doctor, "_read", lambda path: None)
    assert doctor.cpu_quota() is None
    assert doctor.memory_available() is None
    assert doctor.check_memory().verdict == WARN
    assert doctor.check_kernel().verdict == OK
