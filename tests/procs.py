"""Helpers of the tests that start ranks in subprocesses: deadlines, no fixed sleeps."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

MARK = "MESHRING_TEST_MARK"  # in the environment of every process that a test starts


# The first lines of a script that knows its rank and needs no meshring.
HEAD = """\
import os, signal, subprocess, sys, time
rank = int(os.environ["MESHRING_RANK"])
def say(*words):
    print(*words, flush=True)
"""


@dataclass
class Result:
    """How a job ended; `left` are the processes of the test that were still there after it."""

    returncode: int
    stdout: str
    stderr: str
    seconds: float
    left: list[int] = field(default_factory=list)


def wait_until(predicate: Callable[[], object], timeout: float = 20.0, what: str = "") -> None:
    """Return when `predicate()` is true; fail after `timeout` seconds."""
    end = time.monotonic() + timeout
    while not predicate():
        if time.monotonic() > end:
            raise AssertionError(f"not within {timeout} s: {what or predicate}")
        time.sleep(0.005)


def job_processes(job_id: str, variable: str = "MESHRING_JOB") -> list[int]:
    """The processes whose environment holds that job (zombies have none)."""
    found = []
    wanted = f"{variable}={job_id}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def wait_gone(job_id: str, timeout: float = 20.0, variable: str = "MESHRING_JOB") -> None:
    """Return when no process of the job is left."""
    wait_until(lambda: not job_processes(job_id, variable), timeout, f"processes of {job_id} gone")


def default_signals() -> None:
    """In a child: signals as a shell gives them, whatever the test runner ignores."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


class Job:
    """A running launcher with its output in files."""

    def __init__(self, folder: Path, command: Sequence[str], env: dict[str, str] | None) -> None:
        self.mark = uuid.uuid4().hex
        self.folder = folder
        self.start = time.monotonic()
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MESHRING_")}
        with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=folder,
                env=environment | (env or {}) | {MARK: self.mark},
                preexec_fn=default_signals,
            )

    def out(self) -> str:
        return (self.folder / "stdout").read_bytes().decode(errors="surrogateescape")

    def err(self) -> str:
        return (self.folder / "stderr").read_bytes().decode(errors="surrogateescape")

    def wait_for(self, text: str, count: int = 1, timeout: float = 20.0) -> None:
        """Return when stdout holds `text` so many times."""

        def there() -> bool:
            assert self.process.poll() is None or self.out().count(text) >= count, self.err()
            return self.out().count(text) >= count

        wait_until(there, timeout, f"{count} x {text!r} on stdout")

    def finish(self, timeout: float = 30.0) -> Result:
        """Wait for the launcher's end."""
        code = self.process.wait(timeout)
        seconds = time.monotonic() - self.start
        left = job_processes(self.mark, MARK)
        return Result(code, self.out(), self.err(), seconds, left)


@contextmanager
def launched(
    script_text: str | bytes,
    n: int,
    *args: str,
    launcher_args: Sequence[str] = (),
    env: dict[str, str] | None = None,
) -> Iterator[Job]:
    """A job that runs `script_text` on n ranks; everything of it is killed at the end."""
    with tempfile.TemporaryDirectory() as name:
        script = Path(name) / "script.py"
        text = script_text.encode() if isinstance(script_text, str) else script_text
        script.write_bytes(text)
        run = [sys.executable, "-m", "meshring", "run", "-n", str(n), *launcher_args]
        job = Job(Path(name), [*run, "script.py", *args], env)
        try:
            yield job
        finally:
            if job.process.poll() is None:
                job.process.kill()
                job.process.wait()
            for pid in job_processes(job.mark, MARK):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue


def run_ranks(
    script_text: str | bytes,
    n: int,
    *args: str,
    timeout: float = 60.0,
    launcher_args: Sequence[str] = (),
    env: dict[str, str] | None = None,
) -> Result:
    """Run `script_text` on n ranks to its end; more than `timeout` seconds is a failure."""
    with launched(script_text, n, *args, launcher_args=launcher_args, env=env) as job:
        return job.finish(timeout)


def script(body: str, head: str = HEAD) -> str:
    return head + textwrap.dedent(body)
