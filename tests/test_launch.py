"""The launcher: output, exit codes, failures, limits, signals, and that nothing is left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from procs import (
    HEAD,
    MARK,
    Job,
    default_signals,
    job_processes,
    launched,
    run_ranks,
    script,
    wait_gone,
    wait_until,
)

FOREVER = HEAD + 'say("ready")\nwhile True: signal.pause()\n'
LOST = HEAD + (
    "class PeerLostError(Exception): pass\nPeerLostError.__module__ = 'meshring.errors'\n"
)


def stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def pids_of(job: Job, count: int) -> list[int]:
    """The pids that ranks print as `pid R P`, by rank."""
    job.wait_for("pid ", count)
    found = dict(re.findall(r"pid (\d+) (\d+)\n", job.out()))
    return [int(found[str(rank)]) for rank in range(count)]


# Output


def test_environment_arguments_and_prefix() -> None:
    body = """
    own = [os.environ["MESHRING_" + k] for k in ("SIZE", "LAUNCHER_PID")]
    os.fstat(int(os.environ["MESHRING_SEGMENT_FD"]))
    assert own == ["3", str(os.getppid())] and len(os.environ["MESHRING_JOB"]) >= 16
    assert os.getpgrp() == os.getpid() and os.environ["PYTHONUNBUFFERED"] == "1"
    assert sys.stdin.read() == "" and int(os.environ["OMP_NUM_THREADS"]) >= 1
    say(rank, sys.argv[1:])
    """
    result = run_ranks(script(body), 3, "-n", "7", "--timeout", "-m", "ü")
    assert result.returncode == 0, result.stderr
    lines = [f"[{r}] {r} ['-n', '7', '--timeout', '-m', 'ü']" for r in range(3)]
    assert sorted(result.stdout.splitlines()) == lines
    assert result.stderr == "" and not result.left


def test_variables_that_are_set_stay() -> None:
    body = 'say(os.environ["OMP_NUM_THREADS"], os.environ["PYTHONUNBUFFERED"])'
    env = {"OMP_NUM_THREADS": "5", "PYTHONUNBUFFERED": "yes"}
    result = run_ranks(script(body), 2, env=env, launcher_args=["--no-prefix"])
    assert result.stdout == "5 yes\n" * 2


def test_prefix_has_the_width_of_the_largest_rank() -> None:
    result = run_ranks(script("say(rank)"), 11)
    assert sorted(result.stdout.splitlines()) == sorted(f"[{r:2}] {r}" for r in range(11))


def test_stderr_goes_to_stderr_and_a_partial_last_line_is_ended() -> None:
    result = run_ranks(script('sys.stderr.write("e"); sys.stdout.write("o")'), 1)
    assert (result.stdout, result.stderr) == ("[0] o\n", "[0] e\n")


def test_partial_last_line_does_not_wait_for_other_ranks() -> None:
    body = """
    if rank == 0:
        sys.stdout.write("half"); sys.exit()
    say("ready"); signal.pause()
    """
    with launched(script(body), 2) as job:
        job.wait_for("[0] half\n")
        assert job.process.poll() is None


def test_lines_stay_whole() -> None:
    body = """
    line = (b"%d" % rank) * 3000
    for _ in range(300):
        os.write(1, line[:1500]); os.write(1, line[1500:] + b"\\n")
    """
    result = run_ranks(script(body), 4)
    lines = result.stdout.splitlines()
    assert len(lines) == 1200
    assert set(lines) == {f"[{r}] " + str(r) * 3000 for r in range(4)}


def test_a_very_long_line_of_one_rank_is_not_cut() -> None:
    body = """
    if rank == 0:
        os.write(1, b"x" * 3_000_000 + b"\\n")
    """
    result = run_ranks(script(body), 2, launcher_args=["--no-prefix"])
    assert result.stdout == "x" * 3_000_000 + "\n"


def test_very_long_lines_of_two_ranks_are_passed_in_pieces() -> None:
    result = run_ranks(script('os.write(1, b"ab"[rank:rank + 1] * 1_000_000 + b"\\n")'), 2)
    texts = {"0": "", "1": ""}
    for line in result.stdout.splitlines():
        texts[line[1]] += line[4:]
    assert texts == {"0": "a" * 1_000_000, "1": "b" * 1_000_000}


def test_bytes_are_passed_through() -> None:
    with launched(script('os.write(1, "Grüße ☃".encode() + bytes(range(11, 256)))'), 1) as job:
        assert job.finish().returncode == 0
        out = (job.folder / "stdout").read_bytes()
    assert out == "[0] Grüße ☃".encode() + bytes(range(11, 256)) + b"\n"


def test_no_colour_in_a_file_and_colour_on_a_terminal() -> None:
    command = [sys.executable, "-m", "meshring", "run", "-n", "1", "-m", "this"]
    for no_colour, coloured in (("", True), ("1", False)):
        reader, writer = os.openpty()
        env = os.environ | {"NO_COLOR": no_colour, "TERM": "xterm"}
        process = subprocess.Popen(command, stdout=writer, stderr=writer, env=env)
        os.close(writer)
        text = b""
        while True:
            try:
                data = os.read(reader, 4096)
            except OSError:  # EIO: the terminal's other side is closed
                break
            text += data
        os.close(reader)
        assert process.wait(20) == 0
        assert (b"\x1b[" in text) == coloured and b"Beautiful" in text


def test_head_closes_the_pipe(tmp_path: Path) -> None:
    (tmp_path / "s.py").write_text(script('while True: print("x" * 100)'))
    mark = f"head-{os.getpid()}"
    command = f"{sys.executable} -m meshring run -n 2 s.py | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=tmp_path,
        env=os.environ | {MARK: mark},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert re.fullmatch(r"\[[01]\] x{100}\n141\n", done.stdout)
    assert "Traceback" not in done.stderr and not job_processes(mark, MARK)
    assert "cannot write to stdout" in done.stderr


def test_limits_hold_while_the_reader_sleeps(tmp_path: Path) -> None:
    (tmp_path / "s.py").write_text(script('while True: print("x" * 100)'))
    command = [sys.executable, "-m", "meshring", "run", "-n", "2", "--timeout", "0.5", "s.py"]
    mark = f"sleeping-{os.getpid()}"
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=os.environ | {MARK: mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        preexec_fn=default_signals,
    )
    assert process.stdout is not None
    process.stdout.read(1)
    wait_until(lambda: job_processes(mark, MARK) == [process.pid], 15, "ranks stopped")
    memory = Path(f"/proc/{process.pid}/status").read_text()
    assert int(re.findall(r"VmRSS:\s+(\d+)", memory)[0]) < 200_000  # kB: it does not hoard output
    assert len(process.stdout.read()) > 1000
    assert process.wait(10) == 124
    process.stdout.close()


def test_a_grandchild_that_keeps_the_pipe_does_not_hold_the_launcher() -> None:
    body = """
    subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    say("done")
    """
    result = run_ranks(script(body), 2, timeout=15)
    assert result.returncode == 0 and result.stdout.count("done") == 2


# Failures


def test_first_failure_is_printed_last_with_its_traceback() -> None:
    body = """
    if rank == 1:
        print("noise", file=sys.stderr)
        raise ValueError("first cause")
    say("ready"); signal.pause()
    """
    result = run_ranks(script(body), 4)
    assert result.returncode == 1 and not result.left
    head, _, block = result.stderr.partition("meshring run: ")
    assert "[1] ValueError: first cause" in head
    lines = block.splitlines()
    assert re.fullmatch(r"rank 1 \(pid \d+\) failed first: exit code 1", lines[0])
    assert lines[1] == "Traceback (most recent call last):"
    assert lines[-2] == "ValueError: first cause"
    assert lines[-1].startswith(
        "meshring run: rank 0: stopped by the launcher (SIGTERM), ranks 2-3:"
    )
    assert 1.9 < result.seconds < 6


def test_others_have_the_grace_to_print_their_own_errors() -> None:
    body = """
    if rank == 0:
        sys.exit(7)
    time.sleep(1); say("my own error"); sys.exit(3)
    """
    result = run_ranks(script(body), 2)
    assert result.returncode == 7 and "[1] my own error" in result.stdout
    assert "(nothing on its stderr)" in result.stderr and "rank 1: exit 3" in result.stderr


def test_a_chain_of_exceptions_is_printed_whole() -> None:
    body = """
    try:
        {}["root"]
    except KeyError as error:
        raise RuntimeError("on top") from error
    """
    block = run_ranks(script(body), 1).stderr.partition("meshring run: ")[2]
    assert "KeyError: 'root'" in block and block.endswith("RuntimeError: on top\n")


def test_without_a_traceback_the_last_lines_are_printed() -> None:
    body = 'sys.stderr.write("".join(f"line {i}\\n" for i in range(50))); os._exit(9)'
    result = run_ranks(script(body), 1)
    block = result.stderr.partition("meshring run: ")[2].splitlines()
    assert result.returncode == 9 and block[1:] == [f"line {i}" for i in range(30, 50)]


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSEGV", "SIGBUS", "SIGABRT"])
def test_killed_rank(name: str) -> None:
    number = signal.Signals[name].value
    body = f"""
    import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if rank == 2: os.kill(os.getpid(), {number})
    """
    result = run_ranks(script(body), 3)
    assert result.returncode == 128 + number
    assert f"failed first: killed by {name} (signal {number})" in result.stderr
    hint = {"SIGKILL": "dmesg", "SIGABRT": "rank 2"}.get(name, "PYTHONFAULTHANDLER")
    assert hint in result.stderr and "ranks 0-1: exit 0" in result.stderr


def test_a_killed_rank_explains_more_than_an_earlier_exit() -> None:
    body = """
    if rank == 0: sys.exit(5)
    time.sleep(0.5); os.kill(os.getpid(), 9)
    """
    result = run_ranks(script(body), 2)
    assert result.returncode == 137 and "rank 1 (pid" in result.stderr


def test_a_lost_peer_explains_less_than_another_exception() -> None:
    body = """
    if rank == 0: raise PeerLostError("operation\\nand a second line")
    time.sleep(0.5); raise OSError("disk full")
    """
    result = run_ranks(script(body, LOST), 2)
    assert re.search(r"rank 1 \(pid \d+\) failed first", result.stderr)
    assert "meshring.errors.PeerLostError: operation" in result.stderr


def test_only_lost_peers_then_the_first_of_them() -> None:
    result = run_ranks(script('time.sleep(rank); raise PeerLostError("x")', LOST), 2)
    assert re.search(r"rank 0 \(pid \d+\) failed first", result.stderr)


def test_stubborn_and_stopped_ranks_are_killed_within_5_s() -> None:
    body = """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if rank == 1: os.kill(os.getpid(), signal.SIGSTOP)
    if rank == 2: time.sleep(0.5); sys.exit(4)
    while True: signal.pause()
    """
    result = run_ranks(script(body), 3)
    assert result.returncode == 4 and not result.left and result.seconds < 7
    assert "ranks 0-1: stopped by the launcher (SIGKILL)" in result.stderr


def test_children_of_ranks_are_stopped_with_a_failed_job() -> None:
    body = """
    quiet = subprocess.DEVNULL
    wait = "import signal; signal.signal(15, signal.SIG_IGN); print(1, flush=True); signal.pause()"
    child = subprocess.Popen([sys.executable, "-c", wait], stdout=subprocess.PIPE, stderr=quiet)
    child.stdout.readline()
    sys.exit(1)
    """
    with launched(script(body), 2) as job:
        assert job.finish().returncode == 1
        wait_gone(job.mark, 5, MARK)


def test_timeout() -> None:
    body = 'say("x")\nif rank != 1: signal.pause()'
    result = run_ranks(script(body), 3, launcher_args=["--timeout", "1"])
    assert result.returncode == 124 and not result.left and 1 <= result.seconds < 4
    assert re.search(r"limit of 1 s .*running: rank 0 \(pid \d+\), rank 2 \(pid", result.stderr)
    assert "rank 1: exit 0" in result.stderr


def test_keep_going() -> None:
    body = """
    if rank == 1: sys.exit(6)
    if rank == 0:
        while not os.path.exists("go"): time.sleep(0.01)
    say("end")
    """
    with launched(script(body), 3, launcher_args=["--keep-going"]) as job:
        wait_until(lambda: "was lost" in job.err())
        line = (
            r"rank 1 \(pid \d+\) was lost: exit code 6; .*the others go on \(--keep-going\)|no rank"
        )
        assert re.search(line, job.err())
        (job.folder / "go").touch()
        result = job.finish()
    assert result.returncode == 6 and result.stdout.count("end") == 2
    assert "exit code 6, because no agreed shrink() excluded rank 1" in result.stderr


def test_keep_going_with_no_rank_left() -> None:
    result = run_ranks(script("sys.exit(3)"), 2, launcher_args=["--keep-going"])
    assert result.returncode == 3 and "no rank ended with exit code 0" in result.stderr


def test_keep_going_after_an_agreed_shrink(tmp_path: Path) -> None:
    (tmp_path / "f.py").write_text(
        textwrap.dedent("""
        import sys
        from meshring import _core
        from meshring.launch import launch
        real = _core.Segment
        class Shrunk:
            create = staticmethod(lambda n: Shrunk(real.create(n)))
            def __init__(self, segment): self.segment = segment
            def __getattr__(self, name): return getattr(self.segment, name)
            def excluded(self, rank): return rank == 1
        _core.Segment = Shrunk
        code = "import os, sys; sys.exit(os.environ['MESHRING_RANK'] == '1')"
        sys.exit(launch([sys.executable, "-c", code], 3, keep_going=True))
        """)
    )
    command = [sys.executable, "f.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "was lost: exit code 1" in done.stderr, done.stderr
    assert "failed first" not in done.stderr


def test_keep_going_without_a_failure() -> None:
    assert run_ranks(script(""), 2, launcher_args=["--keep-going"]).returncode == 0


# Signals


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_ending_signals_are_forwarded(name: str) -> None:
    body = f"""
    def handler(*_):
        say("got it"); sys.exit(0)
    signal.signal(signal.{name}, handler)
    say("ready")
    while True: signal.pause()
    """
    with launched(script(body), 3) as job:
        job.wait_for("ready", 3)
        job.process.send_signal(signal.Signals[name])
        result = job.finish(10)
    assert result.returncode == 128 + signal.Signals[name] and not result.left
    assert result.stdout.count("got it") == 3 and f"stopped by {name}" in result.stderr


def test_user_signals_are_forwarded_and_end_nothing() -> None:
    body = """
    seen = []
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda number, frame: seen.append(number))
    say("ready")
    while len(seen) < 2: time.sleep(0.005)
    say("both")
    """
    with launched(script(body), 2) as job:
        job.wait_for("ready", 2)
        job.process.send_signal(signal.SIGUSR1)
        job.process.send_signal(signal.SIGUSR2)
        result = job.finish(20)
    assert result.returncode == 0 and result.stdout.count("both") == 2


def test_ranks_that_ignore_a_signal_are_stopped() -> None:
    body = """
    for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, signal.SIG_IGN)
    say("ready")
    while True: signal.pause()
    """
    with launched(script(body), 2) as job:
        job.wait_for("ready", 2)
        start = time.monotonic()
        job.process.send_signal(signal.SIGINT)
        result = job.finish(20)
        assert 1.9 < time.monotonic() - start < 6
    assert result.returncode == 130 and not result.left and "(SIGKILL)" in result.stderr


def test_a_second_interrupt_kills_at_once() -> None:
    body = """
    signal.signal(signal.SIGINT, lambda *_: say("once"))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    say("ready")
    while True: signal.pause()
    """
    with launched(script(body), 2) as job:
        job.wait_for("ready", 2)
        job.process.send_signal(signal.SIGINT)
        job.wait_for("once", 2)
        start = time.monotonic()
        job.process.send_signal(signal.SIGINT)
        result = job.finish(20)
        assert time.monotonic() - start < 1.5
    assert result.returncode == 130 and not result.left


def test_stop_and_continue() -> None:
    body = 'say("pid", rank, os.getpid())\nwhile not os.path.exists("go"): time.sleep(0.01)'
    with launched(script(body), 2) as job:
        pids = [job.process.pid, *pids_of(job, 2)]
        job.process.send_signal(signal.SIGTSTP)
        wait_until(lambda: all(stopped(pid) for pid in pids))
        job.process.send_signal(signal.SIGCONT)
        wait_until(lambda: not any(stopped(pid) for pid in pids))
        (job.folder / "go").touch()
        assert job.finish(20).returncode == 0


def test_kill_9_of_the_launcher_leaves_nothing() -> None:
    body = (
        'say("job", os.environ["MESHRING_JOB"])\nsignal.signal(15, signal.SIG_IGN)\nsignal.pause()'
    )
    with launched(script(body), 3) as job:
        job.wait_for("job ", 3)
        found = re.findall(r"job (\w+)", job.out())
        assert len(set(found)) == 1 and len(job_processes(found[0])) == 3
        job.process.kill()
        wait_gone(found[0], 10)
        wait_gone(job.mark, 10, MARK)
