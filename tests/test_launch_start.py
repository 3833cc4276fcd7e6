"""Starting jobs: the command line of `meshring run`, launch() as a function, bad usage."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

from procs import (
    MARK,
    job_processes,
    run_ranks,
    script,
)

# Starting


def run(
    *arguments: str, cwd: Path, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "meshring", *arguments],
        cwd=cwd,
        env=os.environ | (env or {}),
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_module_and_its_arguments(tmp_path: Path) -> None:
    (tmp_path / "tool.py").write_text("import sys; print(__name__, sys.argv[1:])")
    for arguments in (["-m", "tool"], ["-mtool"], ["--", "-m", "tool"]):
        done = run("run", "-n", "1", *arguments, "-n", "3", "--keep-going", cwd=tmp_path)
        assert done.stdout == "[0] __main__ ['-n', '3', '--keep-going']\n", done.stderr


def test_usage_errors_are_one_sentence_and_code_2(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\x7fELF\0\0")
    (tmp_path / "shell").write_text("#!/bin/sh\necho hi\n")
    (tmp_path / "ok.py").write_text("")
    cases = {
        ("missing.py",): "'missing.py' does not exist",
        ("binary",): "'binary' is not a Python file",
        ("shell",): "'shell' is not a Python file",
        (".",): "without a __main__.py",
        ("-",): "stdin",
        (): "Nothing to run",
        ("-m",): "needs the name of a module",
        ("-n", "0", "ok.py"): "at least 1",
        ("-n", "-3", "ok.py"): "at least 1",
        ("-n", "x", "ok.py"): "not a valid integer",
        ("--timeout", "nan", "ok.py"): "no duration",
        ("--timeout", "-1", "ok.py"): "no duration",
        ("--timeout=0", "ok.py"): "no duration",
        ("--bogus", "ok.py"): "--bogus",
    }
    for arguments, sentence in cases.items():
        done = run("run", *arguments, cwd=tmp_path)
        assert done.returncode == 2 and done.stdout == "", (arguments, done)
        assert sentence in done.stderr and "Traceback" not in done.stderr, (arguments, done.stderr)


def test_default_number_of_ranks_is_the_usable_cores(tmp_path: Path) -> None:
    (tmp_path / "s.py").write_text('import os; print(os.environ["MESHRING_SIZE"])')
    done = run("run", "--no-prefix", "s.py", cwd=tmp_path)
    cores = len(os.sched_getaffinity(0))
    assert done.stdout == f"{cores}\n" * cores


def test_too_many_files_is_said_and_the_started_ranks_are_stopped(tmp_path: Path) -> None:
    (tmp_path / "s.py").write_text("import signal; signal.pause()")
    mark = f"files-{os.getpid()}"
    command = f"ulimit -n 40; exec {sys.executable} -m meshring run -n 30 s.py"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=tmp_path,
        env=os.environ | {MARK: mark},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 2 and "raise `ulimit -n`" in done.stderr, done.stderr
    assert done.stderr.count("cannot start rank") == 1
    assert not job_processes(mark, MARK)


def test_launch_as_a_function(tmp_path: Path) -> None:
    (tmp_path / "f.py").write_text(
        textwrap.dedent("""
        import os, signal, sys, threading
        from meshring.launch import launch
        before = [signal.getsignal(n) for n in range(1, 32)]
        files = os.listdir("/proc/self/fd")
        show = "import os; print(os.environ['X'], os.fstat(int(os.environ['Y'])).st_size)"
        fd = os.memfd_create("x"); os.write(fd, b"123")
        print("start")
        code = launch([sys.executable, "-c", show], 2, env={"X": "1", "Y": str(fd)}, pass_fds=[fd])
        os.close(fd)
        assert code == 0
        assert launch([sys.executable, "-c", "1/0"], 1, quiet=True) == 1
        assert launch(["/no/such/program"], 2) == 2
        assert launch([], 2) == 2 and launch(["x"], 0) == 2 and launch(["x"], 1, timeout=-1) == 2
        assert launch([sys.executable, "-c", "while 1: pass"], 1, timeout=0.2, quiet=True) == 124
        codes = []
        thread = threading.Thread(target=lambda: codes.append(launch(["x"], 1)))
        thread.start(); thread.join()
        assert codes == [2]
        assert before == [signal.getsignal(n) for n in range(1, 32)]
        assert files == os.listdir("/proc/self/fd")
        print("end")
        """)
    )
    done = subprocess.run(
        [sys.executable, "f.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["[0] 1 3", "[1] 1 3", "end", "start"]
    assert "failed first" not in done.stderr
    assert "No such file or directory: '/no/such/program'" in done.stderr
    assert "only the main thread" in done.stderr and "at least 1" in done.stderr


def test_nested_job_starts_clean() -> None:
    inner = (
        'import os; print(sorted((k, v) for k, v in os.environ.items() if k == "MESHRING_RANK"))'
    )
    body = f"""
    if rank == 1:
        command = [sys.executable, "-m", "meshring", "run", "-n", "1", "inner.py"]
        open("inner.py", "w").write({inner!r})
        assert subprocess.run(command).returncode == 0
    """
    result = run_ranks(script(body), 2)
    assert result.returncode == 0 and result.stdout == "[1] [0] [('MESHRING_RANK', '0')]\n"


def test_start_is_quick_and_imports_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "s.py").write_text("")
    timings = []
    for _ in range(3):
        start = time.monotonic()
        assert run("run", "-n", "4", "s.py", cwd=tmp_path).returncode == 0
        timings.append(time.monotonic() - start)
    start = time.monotonic()
    subprocess.run([sys.executable, "s.py"], cwd=tmp_path, check=True)
    plain = time.monotonic() - start
    assert min(timings) < plain + 0.5
    check = (
        "import sys, meshring.cli, meshring.launch; print([m for m in HEAVY if m in sys.modules])"
    )
    check = check.replace("HEAVY", "('rich', 'asyncio', 'matplotlib', 'meshring.bench', 'cupy')")
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr


def test_help_lists_the_lazy_subcommands(tmp_path: Path) -> None:
    done = run("--help", cwd=tmp_path)
    names = re.findall(r"^  (\w+) ", done.stdout.partition("Commands:")[2], re.MULTILINE)
    assert done.returncode == 0 and {"bench", "doctor", "run"} <= set(names)


def test_version_is_the_package_s(tmp_path: Path) -> None:
    from importlib.metadata import version

    assert run("--version", cwd=tmp_path).stdout == f"meshring {version('meshring')}\n"
