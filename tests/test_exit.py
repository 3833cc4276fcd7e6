"""How jobs end: kill -9, exceptions, Ctrl-C, deadlines, stopped ranks. Each error names the cause."""

from __future__ import annotations

import random
import signal

import pytest

from procs import MARK, launched, run_ranks, wait_gone

PREAMBLE = """
import os, signal, sys, threading, time
import numpy as np
import meshring as mr
"""


def test_kill_at_random_points_is_named_on_every_rank() -> None:
    """A rank killed anywhere in a mix of operations: all others raise PeerLostError naming it."""
    script = (
        PREAMBLE
        + """
victim, point = int(sys.argv[1]), int(sys.argv[2])
comm = mr.init(timeout=60)
me, n = comm.rank, comm.size
big = np.ones(300_000, "f4")
if me == victim:
    def killer():
        while len(done) < point:
            time.sleep(0)
        os.kill(os.getpid(), signal.SIGKILL)
    done = []
    threading.Thread(target=killer, daemon=True).start()
else:
    done = []
try:
    while True:
        for step in (
            lambda: comm.all_reduce(np.ones(4)),
            lambda: comm.all_reduce(big.copy()),
            lambda: comm.all_gather(np.ones((3, 4)), axis=1),
            lambda: comm.sendrecv(np.arange(9.0), (me + 1) % n, (me - 1) % n),
            lambda: comm.sendrecv(big, (me + 1) % n, (me - 1) % n),
            lambda: comm.scatter(big[:299_997] if me == 0 else None),
            lambda: comm.barrier(),
        ):
            step()
            done.append(0)
except mr.PeerLostError as error:
    print(f"rank {me} lost {error.ranks}: {str(error).splitlines()[0]}")
    assert comm.poisoned
    comm.close()
    sys.exit(7)
"""
    )
    rng = random.Random(20261122)
    for _ in range(6):
        victim, point = rng.randrange(3), rng.randrange(200)
        result = run_ranks(script, 3, str(victim), str(point), timeout=60)
        assert result.returncode == 128 + signal.SIGKILL, result.stderr
        for rank in range(3):
            if rank != victim:
                assert f"rank {rank} lost ({victim},)" in result.stdout, result.stdout
        assert result.stdout.count("SIGKILL") == 2, result.stdout
        assert result.left == []


@pytest.mark.parametrize("cma", ["auto", "off"])
def test_exception_on_one_rank_is_told_to_the_others(cma: str) -> None:
    script = (
        PREAMBLE
        + """
comm = mr.init(timeout=60)
comm.barrier()
if comm.rank == 1:
    raise ValueError("the model diverged")
comm.all_reduce(np.ones(100_000))
"""
    )
    result = run_ranks(script, 3, timeout=60, env={"MESHRING_CMA": cma})
    assert result.returncode == 1
    for rank in (0, 2):
        (line,) = [
            x
            for x in result.stderr.splitlines()
            if x.startswith(f"[{rank}] meshring.errors.PeerLostError")
        ]
        assert "rank 1" in line and "raised ValueError: the model diverged" in line
    # the launcher's last word is the cause, not a consequence
    assert "rank 1 (pid" in result.stderr.split("meshring run:")[1]


def test_early_exit_of_one_rank() -> None:
    script = (
        PREAMBLE
        + """
comm = mr.init(timeout=60)
comm.barrier()
if comm.rank == 1:
    sys.exit(0)
try:
    comm.barrier()
except mr.PeerLostError as error:
    print(error)
"""
    )
    result = run_ranks(script, 2, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "rank 1" in result.stdout
    assert "ended with exit code 0" in result.stdout or "ended normally" in result.stdout


def test_message_sent_before_exit_arrives() -> None:
    script = (
        PREAMBLE
        + """
comm = mr.init(timeout=60)
comm.barrier()
if comm.rank == 1:
    for i in range(4):
        comm.send(np.full(1000, i), 0)
    sys.exit(0)
wait_until = time.monotonic() + 60
while comm.trace(1)[-1]["operation"] != "send" and time.monotonic() < wait_until:
    time.sleep(0)
for i in range(4):
    assert (comm.recv(1000, 1, "i8") == i).all()
try:
    comm.recv(1000, 1, "i8")
except mr.PeerLostError as error:
    print("fifth:", error)
"""
    )
    result = run_ranks(script, 2, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "fifth: recv (rank 0/2): rank 1" in result.stdout


@pytest.mark.parametrize("ranks", [2, 4])
def test_deadline_names_who_is_missing_and_where_it_is(ranks: int) -> None:
    script = (
        PREAMBLE
        + """
comm = mr.init(timeout=1.5)
comm.barrier()
missing = comm.size - 1
if comm.rank == missing:
    signal.pause()
comm.all_reduce(np.ones(8, "f4"))
"""
    )
    result = run_ranks(script, ranks, timeout=60)
    assert result.returncode == 1
    missing = ranks - 1
    for rank in range(missing):
        lines = [x for x in result.stderr.splitlines() if x.startswith(f"[{rank}]")]
        text = "\n".join(lines)
        assert f"DeadlineError: all_reduce #2 (rank {rank}/{ranks}): rank {missing} did not" in text
        assert f"rank {missing} (pid" in text and "MISSING: last call was barrier #1" in text
        assert "script.py:" in text
    assert result.left == []


def test_stopped_rank_is_said_to_be_stopped() -> None:
    script = (
        PREAMBLE
        + """
comm = mr.init(timeout=1.5)
comm.barrier()
if comm.rank == 0:
    os.kill(os.getpid(), signal.SIGSTOP)
comm.barrier()
"""
    )
    result = run_ranks(script, 2, timeout=60)
    assert result.returncode == 1
    assert "rank 0 did not come within 1.5 s" in result.stderr
    assert "is stopped (SIGSTOP)" in result.stderr


def test_missing_rank_inside_another_communicator() -> None:
    script = (
        PREAMBLE
        + """
comm = mr.init(timeout=60)
half = comm.split(comm.rank // 2)
if comm.rank == 2:
    half.barrier(timeout=4)      # rank 3 never comes here
elif comm.rank == 3:
    signal.pause()
else:
    try:
        comm.barrier(timeout=1.5)
    except mr.DeadlineError as error:
        print(error, error.ranks)
"""
    )
    result = run_ranks(script, 4, timeout=60)
    assert "ranks 2 and 3 did not come" in result.stdout
    assert "is in barrier #1 of another communicator at" in result.stdout


def test_ctrl_c_inside_a_collective() -> None:
    script = (
        PREAMBLE
        + """
comm = mr.init(timeout=60)
comm.barrier()
if comm.rank == 1:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pause()
try:
    print("waiting", flush=True)
    comm.all_reduce(np.ones(8))
except KeyboardInterrupt:
    print("interrupted;", comm.poisoned, flush=True)
    try:
        comm.barrier()
    except mr.UsageError as error:
        print("refused:", error, flush=True)
    comm.close()
    raise
"""
    )
    with launched(script, 2) as job:
        job.wait_for("waiting")
        job.process.send_signal(signal.SIGINT)
        result = job.finish()
    assert result.returncode == 128 + signal.SIGINT
    assert "interrupted; all_reduce #2 (rank 0/2): interrupted by a signal" in result.stdout
    assert "refused: barrier (rank 0/2): this communicator cannot be used any more" in result.stdout
    assert result.left == []


def test_fork_is_refused_in_the_child_and_harmless_to_the_parent() -> None:
    script = (
        PREAMBLE
        + """
comm = mr.init(timeout=60)
pid = os.fork()
if pid == 0:
    try:
        comm.barrier()
    except mr.UsageError as error:
        print("child:", error, flush=True)
    sys.exit(0)
os.waitpid(pid, 0)
comm.all_reduce(np.ones(3))
comm.barrier()
comm.close()
print("parent is well", flush=True)
"""
    )
    result = run_ranks(script, 2, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("is a fork of a rank") == 2
    assert result.stdout.count("parent is well") == 2


def test_kill_of_the_launcher_leaves_nothing() -> None:
    script = (
        PREAMBLE
        + """
comm = mr.init(timeout=60)
comm.barrier()
print("up", flush=True)
while True:
    comm.all_reduce(np.ones(100_000))
"""
    )
    with launched(script, 3) as job:
        job.wait_for("up", count=3)
        job.process.kill()
        job.process.wait(20)
        wait_gone(job.mark, variable=MARK)


def test_what_is_left_open_is_named_at_exit() -> None:
    script = (
        PREAMBLE
        + """
comm = mr.init(timeout=60)
part = comm.split(0)
work = comm.irecv(5, 1 - comm.rank, "f4")
del work
"""
    )
    result = run_ranks(script, 2, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("meshring: left open at exit: <meshring.Communicator rank") == 2
    assert result.stderr.count("were still running at exit") == 2


def test_init_without_a_launcher_and_in_a_helper_process() -> None:
    script = (
        PREAMBLE
        + """
import subprocess
comm = mr.init(timeout=60)
assert mr.init() is comm
code = "import meshring; meshring.init()"
out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
assert out.returncode == 1, out
print(out.stderr.splitlines()[-1])
env = {k: v for k, v in os.environ.items() if not k.startswith("MESHRING_")}
code = "import meshring, numpy; c = meshring.init(); print(c.rank, c.size, c.all_gather(numpy.ones(2)))"
print(subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout)
comm.close()
try:
    mr.init()
except mr.UsageError as error:
    print(error)
"""
    )
    result = run_ranks(script, 2, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("only the process that the launcher started is a rank") == 2
    assert result.stdout.count("0 1 [1. 1.]") == 2
    assert result.stdout.count("a rank joins once") == 2


def test_foreign_launcher_is_refused_with_the_command_that_works() -> None:
    script = PREAMBLE + "mr.init()\n"
    result = run_ranks(
        "import os, subprocess, sys\n"
        "env = {k: v for k, v in os.environ.items() if not k.startswith('MESHRING_')}\n"
        "env |= {'RANK': '1', 'WORLD_SIZE': '4', 'LOCAL_RANK': '1'}\n"
        f"code = {script!r}\n"
        "out = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True)\n"
        "print(out.stderr)\n",
        1,
        timeout=60,
    )
    assert "torchrun started this process as rank 1 of 4" in result.stdout
    assert "meshring run -n 4" in result.stdout


def test_rank_that_never_calls_init_is_named() -> None:
    script = (
        PREAMBLE
        + """
if os.environ["MESHRING_RANK"] == "1":
    signal.pause()
mr.init(timeout=1.5)
"""
    )
    result = run_ranks(script, 2, timeout=60)
    assert result.returncode == 1
    assert "DeadlineError: init (rank 0/2): rank 1 did not come within" in result.stderr
