"""The launcher: starts a job's ranks on this host, passes their output on, ends them together.

One thread, one poll over the ranks' pipes and pidfds, a wake-up pipe for signals, and stdout and
stderr. Only the poll blocks, so limits and signals are obeyed while a reader of the output sleeps.
"""

from __future__ import annotations

import errno
import math
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from signal import SIGCONT, SIGHUP, SIGINT, SIGKILL, SIGSTOP, SIGTERM, SIGTSTP, SIGUSR1, SIGUSR2
from subprocess import DEVNULL, PIPE
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meshring import _core

CHUNK = 65536  # bytes of one read, of the longest line kept whole, of the stderr kept for a report
QUEUE = 262144  # bytes waiting for our reader above which the ranks' pipes are left alone
SIGNAL_GRACE = 2.0  # seconds from a forwarded signal to SIGTERM
KILL_AFTER = 2.5  # seconds from SIGTERM to SIGKILL
ENDING = (SIGINT, SIGTERM, SIGHUP)
HANDLED = (*ENDING, SIGUSR1, SIGUSR2, SIGTSTP, SIGCONT)
NAMES = {number.value: number.name for number in signal.Signals}
OWN = {f"MESHRING_{name}" for name in ("RANK", "SIZE", "SEGMENT_FD", "LAUNCHER_PID", "JOB")}
PIPES: dict[str, Any] = {"stdin": DEVNULL, "stdout": PIPE, "stderr": PIPE, "bufsize": 0}
FAULT = "PYTHONFAULTHANDLER=1 shows where"
HINTS = {
    "SIGKILL": "out of memory? `dmesg` would tell; or somebody ran kill -9",
    "SIGSEGV": f"a bad memory access in native code; {FAULT}",
    "SIGBUS": f"no space left for shared memory, or a mapped file was cut; {FAULT}",
}
ADVICE = {
    errno.EMFILE: "; every rank takes 3 of the launcher's files: raise `ulimit -n`",
    errno.EAGAIN: "; the limit of processes is reached (`ulimit -u`, or pids.max of a container)",
}
TRACEBACK = re.compile(rb"^(?:Traceback \(most recent call last\):|Fatal Python error: )", re.M)
CAUSED = b"The above exception was the direct cause of the following exception:"
DURING = b"During handling of the above exception, another exception occurred:"
CONSEQUENCE = re.compile(rb"^meshring\.errors\.(?:PeerLostError|DeadlineError)\b", re.M)


def last_traceback(stderr: bytes) -> bytes:
    """The last traceback, from the first exception of its chain to the end; empty without one."""
    starts = [match.start() for match in TRACEBACK.finditer(stderr)]
    while len(starts) > 1 and stderr[: starts[-1]].rstrip().endswith((CAUSED, DURING)):
        starts.pop()
    return stderr[starts[-1] :] if starts else b""


class _Sink:
    """Our stdout or stderr, with a queue that is written only where that does not block."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.queue = bytearray()
        self.unfinished: _Stream | None = None  # whose line is open at the end of the queue
        self.error: OSError | None = None  # after it everything is dropped
        self.colour = os.isatty(fd) and not os.environ.get("NO_COLOR")

    def put(self, stream: _Stream | None, data: bytes) -> None:
        """Queue prefixed lines of a stream; another one's unfinished line is ended first."""
        prefix = stream.prefix if stream else b""
        end = b"\n" if data.endswith(b"\n") else b""
        body = data[: len(data) - len(end)].replace(b"\n", b"\n" + prefix)
        if self.unfinished is None or self.unfinished is not stream:
            body = (b"\n" if self.unfinished else b"") + prefix + body
        self.unfinished = None if end else stream
        if self.error is None:
            self.queue += body + end

    def write(self) -> None:
        """Write while it is taken: PIPE_BUF bytes never block where poll says ready."""
        try:
            while self.queue and select.select([], [self.fd], [], 0)[1]:
                del self.queue[: os.write(self.fd, self.queue[: select.PIPE_BUF])]
        except BlockingIOError:
            pass
        except OSError as error:
            self.error = error
            self.queue.clear()


class _Stream:
    """One pipe of one rank, cut into whole lines."""

    def __init__(self, pipe: IO[bytes], sink: _Sink, label: str, colour: int) -> None:
        self.pipe, self.sink = pipe, sink
        shown = f"\x1b[{31 + colour % 6}m{label}\x1b[0m" if label and sink.colour else label
        self.prefix, self.pending = shown.encode(), bytearray()
        self.tail = bytearray()  # of stderr, for the report
        os.set_blocking(pipe.fileno(), False)

    def read(self, times: int = 1) -> None:
        """Pass on what the pipe holds; bounded, because a writer may outlive its rank."""
        with suppress(BlockingIOError):
            for _ in range(times):
                data = b"" if self.pipe.closed else os.read(self.pipe.fileno(), CHUNK)
                if not data:
                    self.close()
                    return
                if self.sink.fd == 2:
                    self.tail += data
                    del self.tail[:-CHUNK]
                self.pending += data
                size = len(self.pending)
                if whole := self.pending.rfind(b"\n") + 1 or (size if size > CHUNK else 0):
                    self.sink.put(self, bytes(self.pending[:whole]))
                    del self.pending[:whole]

    def close(self) -> None:
        """End the last line and close the pipe."""
        if not self.pipe.closed:
            self.pipe.close()
            if self.pending or self.sink.unfinished is self:
                self.sink.put(self, bytes(self.pending) + b"\n")


class _Rank:
    """One started rank and how it ended."""

    def __init__(self, number: int, process: subprocess.Popen[bytes]) -> None:
        self.number, self.process, self.pid = number, process, process.pid
        self.name = f"rank {number} (pid {self.pid})"
        self.pidfd = -1
        self.streams: list[_Stream] = []  # stdout, stderr
        self.status: int | None = None  # os.waitpid's, once reaped
        self.ended = math.inf  # on the monotonic clock
        self.sent: int | None = None  # the last signal with which the launcher wanted to end it
        self.leftovers = False  # some of its process group outlived it

    def code(self) -> int:
        """Exit code, or 128 + signal."""
        code = os.waitstatus_to_exitcode(self.status or 0)
        return code if code >= 0 else 128 - code

    def fate(self, long: bool = False) -> str:
        """How it ended, in a few words."""
        if self.status is None:
            return "still running"
        if os.WIFSIGNALED(self.status):
            number = os.WTERMSIG(self.status)
            name = NAMES.get(number, f"signal {number}")
            if self.sent and number in (*ENDING, SIGKILL):
                return f"stopped by the launcher ({name})"
            return f"killed by {name}" + (f" (signal {number})" if long else "")
        text = f"exit {'code ' if long else ''}{self.code()}"
        return f"{text} after the launcher's {NAMES[self.sent]}" if self.sent else text

    def signal(self, number: int) -> None:
        """Signal its process group; the rank alone if it has left that group."""
        try:
            os.killpg(self.pid, number)
        except OSError:
            if self.status is None:
                with suppress(OSError):
                    os.kill(self.pid, number)


def _fates(ranks: Iterable[_Rank]) -> str:
    """How ranks ended, in one line, neighbours with the same fate together."""
    groups: list[tuple[int, int, str]] = []
    for rank in ranks:
        first, fate = rank.number, rank.fate()
        if groups and groups[-1][1:] == (first - 1, fate):
            first = groups.pop()[0]
        groups.append((first, rank.number, fate))
    return ", ".join(f"rank {a}: {x}" if a == b else f"ranks {a}-{b}: {x}" for a, b, x in groups)


class _Job:
    """The ranks of one launch and the loop that serves them."""

    def __init__(self, segment: _core.Segment, wakeup: int, quiet: bool) -> None:
        self.segment, self.wakeup, self.quiet = segment, wakeup, quiet
        self.keep_going, self.grace, self.timeout = False, 0.0, math.inf
        self.ranks: list[_Rank] = []
        self.live: list[_Rank] = []
        self.out, self.err = _Sink(1), _Sink(2)
        self.deadline = self.term_at = self.kill_at = math.inf
        self.code: int | None = None  # of a signal, the time limit, a lost stdout, a failed start
        self.reason = ""  # of that code
        self.failing = False  # a rank's failure ends the job
        self.interrupts = 0

    def say(self, text: str) -> None:
        """Print a message of the launcher's own."""
        if not self.quiet:
            self.err.put(None, f"meshring run: {text}\n".encode(errors="surrogateescape"))

    def start(self, spawn: Callable[[int], subprocess.Popen[bytes]], size: int, label: str) -> None:
        """Start the ranks; one that cannot be started ends the job."""
        for number in range(size):
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)  # a child has our wake-up pipe
            try:
                rank = _Rank(number, spawn(number))
                self.ranks.append(rank)
                rank.pidfd = os.pidfd_open(rank.pid)
                self.live.append(rank)
                self.segment.set_pid(number, rank.pid)
            except (OSError, ValueError, subprocess.SubprocessError) as error:
                self.quiet, advice = False, ADVICE.get(getattr(error, "errno", None) or 0, "")
                self.say(f"cannot start rank {number} of {size}: {error}{advice}")
                self.stop(0, 2, "not all ranks could be started")
                return
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            for pipe, sink in ((rank.process.stdout, self.out), (rank.process.stderr, self.err)):
                assert pipe is not None
                rank.streams.append(_Stream(pipe, sink, label % number if label else "", number))
            self.step(0)
            if self.code is not None or any(rank.sent for rank in self.ranks):
                return

    def step(self, wait: float | None = None) -> None:
        """One turn: wait for an event or the next point in time, and react."""
        due = min(self.deadline, self.term_at, self.kill_at) - time.monotonic()
        if wait is None and due < math.inf:
            wait = min(max(due, 0.0), 86400.0)
        reactions: dict[int, Callable[[], None]] = {self.wakeup: self.on_signals}
        poll = select.poll()
        for rank in self.ranks:
            for stream in rank.streams:
                if not stream.pipe.closed and len(stream.sink.queue) <= QUEUE:
                    reactions[stream.pipe.fileno()] = stream.read
        for rank in self.live:
            reactions[rank.pidfd] = partial(self.reap, rank)
        for fd in reactions:
            poll.register(fd, select.POLLIN)
        for sink in (self.out, self.err):
            if sink.queue:
                reactions[sink.fd] = sink.write
                poll.register(sink.fd, select.POLLOUT)
        for fd, _ in poll.poll(None if wait is None else math.ceil(wait * 1000)):
            reactions[fd]()
        self.on_time(time.monotonic())

    def on_time(self, now: float) -> None:
        """Do what is due."""
        if now >= self.deadline:
            self.deadline = math.inf
            if self.live and self.code is None and not self.failing:
                running = ", ".join(rank.name for rank in self.live)
                self.say(f"the time limit of {self.timeout:g} s is over; still running: {running}")
                self.stop(0, 124, "stopped at the time limit")
        if self.out.error and self.code is None and not self.failing:
            code = 128 + signal.SIGPIPE if self.out.error.errno == errno.EPIPE else 1
            self.stop(0, code, f"cannot write to stdout any more ({self.out.error.strerror})")
        if now >= self.term_at:
            self.term_at = math.inf
            self.end(SIGTERM)
        if now >= self.kill_at:
            self.kill_at = math.inf
            self.end(SIGKILL)

    def stop(self, after: float, code: int | None = None, reason: str = "") -> None:
        """End the ranks that are still there `after` seconds from now; the first cause counts."""
        if self.code is None and not self.failing:
            self.code, self.reason = code, reason
        self.term_at = min(self.term_at, time.monotonic() + after)
        self.kill_at = min(self.kill_at, self.term_at + KILL_AFTER)

    def end(self, number: int) -> None:
        """Signal the live ranks, stopped ones too, and what is left of the others' groups."""
        for rank in self.ranks:
            if rank in self.live or rank.leftovers:
                rank.sent = number if rank in self.live else rank.sent
                rank.signal(number)
                rank.signal(SIGCONT)

    def on_signals(self) -> None:
        """Forward the signals that arrived."""
        for number in os.read(self.wakeup, 256):
            if number in ENDING:
                self.interrupt(number)
            elif number in (SIGUSR1, SIGUSR2):
                for rank in self.live:
                    os.kill(rank.pid, number)
            elif number in (SIGTSTP, SIGCONT):
                for rank in self.live:
                    rank.signal(SIGSTOP if number == SIGTSTP else SIGCONT)
                self.deadline -= time.monotonic()  # it stands still while we are stopped
                if number == SIGTSTP:
                    os.kill(os.getpid(), SIGSTOP)  # until SIGCONT, which comes here too
                self.deadline += time.monotonic()

    def interrupt(self, number: int) -> None:
        """Forward a signal that ends the job; a second SIGINT kills."""
        self.interrupts += number == SIGINT
        for rank in self.live:
            rank.sent = number
            rank.signal(number)
        self.stop(SIGNAL_GRACE, 128 + number, f"stopped by {NAMES[number]}")
        self.kill_at = 0.0 if self.interrupts > 1 else self.kill_at
        if not self.live:  # only a slow reader of our output is left to wait for
            self.out.queue[:] = self.err.queue[:] = b""

    def reap(self, rank: _Rank) -> None:
        """Publish how a rank ended and decide what that means for the job."""
        _, status = os.waitpid(rank.pid, 0)
        self.segment.set_wait_status(rank.number, status)  # first: the other ranks wait for it
        rank.status, rank.ended = status, time.monotonic()
        rank.process.returncode = os.waitstatus_to_exitcode(status)
        self.live.remove(rank)
        os.close(rank.pidfd)
        with suppress(OSError):
            os.killpg(rank.pid, 0)
            rank.leftovers = True
        for stream in rank.streams:
            stream.read(16)
        if status == 0 or rank.sent or self.code is not None:
            return
        if self.keep_going:
            others = "the others go on (--keep-going)" if self.live else "no rank is left"
            self.say(f"{rank.name} was lost: {rank.fate(True)}; {others}")
        elif not self.failing:
            self.stop(self.grace)
            self.failing = True

    def run(self) -> int:
        """Serve the ranks until all have ended; say what went wrong; return the exit code."""
        while self.live:
            self.step()
        self.deadline = self.term_at = self.kill_at = math.inf
        for rank in self.ranks:
            for stream in rank.streams:
                stream.read(16)
                stream.close()
        while self.out.queue:  # so that the report is seen last
            self.step()
        code = self.report()
        while self.err.queue:
            self.step()
        if code:
            self.end(SIGKILL)  # what is left of the ranks' process groups
        return code

    def abandon(self) -> None:
        """Leave no rank behind, whatever happened."""
        for rank in self.ranks:
            if rank.status is None:
                rank.signal(SIGKILL)
                rank.process.returncode = -SIGKILL
                os.waitpid(rank.pid, 0)

    def first_failure(self) -> _Rank | None:
        """Of those that failed within the grace the one that was killed, raised, or lost a peer."""
        failed = [rank for rank in self.ranks if rank.status and not rank.sent]
        end = min((rank.ended for rank in failed), default=0.0) + self.grace

        def weight(rank: _Rank) -> tuple[int, float]:
            if os.WIFSIGNALED(rank.status or 0):
                return 0, rank.ended
            last = last_traceback(bytes(rank.streams[1].tail)).rpartition(DURING)[2]
            return 2 if CONSEQUENCE.search(last) else 1, rank.ended

        return min((rank for rank in failed if rank.ended <= end), key=weight, default=None)

    def report(self) -> int:
        """Print why the job failed, the failing rank's traceback last; return the exit code."""
        if self.code is not None:
            if any(rank.sent for rank in self.ranks):
                self.say(f"{self.reason}; {_fates(self.ranks)}")
            return self.code
        first = self.first_failure()
        if first is None:
            return 0
        why = ""
        if self.keep_going:
            dead = [rank for rank in self.ranks if rank.status]
            lost = [f"rank {x.number}" for x in dead if not self.segment.excluded(x.number)]
            why = f", because no agreed shrink() excluded {', '.join(lost)}"
            if len(dead) == len(self.ranks):
                why = ", because no rank ended with exit code 0"
            elif not lost:
                return 0
        hint = "".join(f" [{text}]" for name, text in HINTS.items() if name in first.fate())
        self.say(f"{first.name} failed first: {first.fate(True)}{hint}")
        if not self.quiet:
            stderr = bytes(first.streams[1].tail)
            text = last_traceback(stderr) or b"\n".join(stderr.splitlines()[-20:])
            self.err.put(None, (text.rstrip() or b"(nothing on its stderr)") + b"\n")
        if len(self.ranks) > 1:
            self.say(_fates(rank for rank in self.ranks if rank is not first))
        if why:
            self.say(f"exit code {first.code()}{why}")
        return first.code()


def _check(argv: Sequence[str], ranks: int, timeout: float | None) -> None:
    """Refuse wrong arguments of `launch` with a sentence."""
    if not argv:
        raise ValueError("there is no command to run")
    if ranks < 1:
        raise ValueError(f"the number of ranks is {ranks}; it needs to be at least 1")
    if timeout is not None and not timeout > 0:
        raise ValueError(f"the time limit is {timeout:g} s; it needs to be more than 0")
    if threading.current_thread() is not threading.main_thread():
        raise ValueError("only the main thread can do it: the kernel ends ranks with their thread")


def _environment(size: int, fd: int, extra: Mapping[str, str] | None) -> dict[str, str]:
    """The ranks' environment, but for MESHRING_RANK: nothing of a job that we are a rank of."""
    env = {key: value for key, value in os.environ.items() if key not in OWN} | dict(extra or {})
    env.setdefault("PYTHONUNBUFFERED", "1")
    if size > 1:
        env.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // size)))
    job = {"LAUNCHER_PID": os.getpid(), "SIZE": size, "SEGMENT_FD": fd, "JOB": os.urandom(8).hex()}
    return env | {f"MESHRING_{name}": str(value) for name, value in job.items()}


def launch(
    argv: Sequence[str],
    ranks: int,
    *,
    timeout: float | None = None,
    keep_going: bool = False,
    env: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
    prefix: bool = True,
    grace: float = 2.0,
    quiet: bool = False,
) -> int:
    """Run the complete command `argv` once per rank on this host; return the job's exit code.

    The ranks get this process's environment with `env` added, the MESHRING_* variables of the
    job, PYTHONUNBUFFERED=1 unless set and, if there are several ranks and it is not set,
    OMP_NUM_THREADS = usable cores // ranks. `pass_fds` stay open in them; stdin is /dev/null.
    Output is passed on in whole lines, with the rank in front if `prefix`. `quiet` leaves out the
    launcher's own messages, except why a job could not be started. After the first failure the
    others have `grace` seconds, then SIGTERM, 2.5 s later SIGKILL; with `keep_going` they go on.

    Returns 0; the exit code, or 128 + signal, of the rank that explains the failure; 124 when the
    whole job took over `timeout` seconds; 128 + signal after SIGINT, SIGTERM or SIGHUP; 141 when
    the reader of stdout went away; 2 when the job could not be started.
    """
    from meshring import _core

    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.flush()
    while (low := os.open(os.devnull, os.O_RDWR)) < 3:  # a closed 0, 1 or 2: no file of ours there
        pass
    os.close(low)
    try:
        _check(argv, ranks, timeout)
        segment = _core.Segment.create(ranks)
    except (OSError, ValueError, RuntimeError, MemoryError) as error:
        os.write(2, f"meshring run: no rank was started: {error}\n".encode())
        return 2

    old = {number: signal.getsignal(number) for number in (*HANDLED, signal.SIGCHLD)}
    ours = [number for number in HANDLED if old[number] is not signal.SIG_IGN]  # nohup stays nohup
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    parent, fds = os.getpid(), (segment.fileno(), *pass_fds)
    common = _environment(ranks, fds[0], env)

    def become_rank() -> None:
        os.setpgid(0, 0)
        signal.set_wakeup_fd(-1)
        for number in ours:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        _core.die_with_parent(parent)

    def spawn(rank: int) -> subprocess.Popen[bytes]:
        own = common | {"MESHRING_RANK": str(rank)}
        return subprocess.Popen(argv, env=own, pass_fds=fds, preexec_fn=become_rank, **PIPES)

    job = _Job(segment, reader, quiet)
    job.keep_going, job.grace = keep_going, grace
    job.timeout = math.inf if timeout is None else timeout
    job.deadline = time.monotonic() + job.timeout
    for number in ours:
        signal.signal(number, lambda *_: None)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # if ignored, waitpid would find nothing
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        job.start(spawn, ranks, f"[%{len(str(ranks - 1))}d] " if prefix else "")
        return job.run()
    finally:
        job.abandon()
        signal.set_wakeup_fd(wakeup)
        for number, handler in old.items():
            signal.signal(number, handler or signal.SIG_DFL)
        os.close(reader)
        os.close(writer)
        segment.close()
