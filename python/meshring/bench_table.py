"""The table of `meshring bench`, as nccl-tests prints it, and the environment of its results."""

from __future__ import annotations

import json
import os
import platform
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from typing import TYPE_CHECKING

from meshring import _core, bench_report
from meshring.bench_report import PLACEMENTS, Record, time_text
from meshring.bench_worker import SAMPLE_NS, Settings
from meshring.doctor import cpu_model, others_running, usable_cores

if TYPE_CHECKING:
    from rich.progress import Progress


# What a run on GPUs says of them, beside what every run says.
DEVICE_KEYS = (
    *("gpus", "gpu_count", "nccl", "nccl_path", "cuda_driver", "cupy"),
    *("graph", "registered", "clock", "remarks"),
)


def environment(ranks: int, others: int | None, hello: Record) -> Record:
    """Return what a stored result needs to be understood later."""
    return {
        "meshring": version("meshring"),
        "numpy": hello["numpy"],
        "python": hello["python"],
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cpu_model": cpu_model(),
        "cores_usable": usable_cores(),
        "others_running_at_start": others,
        "ranks": ranks,
        "backend": hello["backend"],
        "transport": hello["transport"],
        **{key: hello[key] for key in DEVICE_KEYS if key in hello},
        "isa": list(_core.isas()),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command_line": ["meshring", *sys.argv[1:]],
    }


def header_lines(env: Record, hello: Record, settings: Settings) -> list[str]:
    """Return the lines above the table: who ran, with what, and what a number means."""
    lines = [
        f"# meshring {env['meshring']}  numpy {env['numpy']}  python {env['python']}  "
        f"kernel {env['kernel']}",
        f"# {env['cpu_model']}, {env['cores_usable']} usable cores, ISA {' '.join(env['isa'])}",
        f"# {env['ranks']} ranks, backend {env['backend']}, transport {env['transport']}",
    ]
    lines += device_lines(env)
    if env["ranks"] > env["cores_usable"]:
        lines.append("# more ranks than cores: ranks wait for a core as well as for each other")
    elif env["others_running_at_start"]:
        free = env["cores_usable"] - env["others_running_at_start"]
        if env["ranks"] > free:
            lines.append("# other programs keep the cores busy: times will be long and unsteady")
    for r in hello["ranks"]:
        where = f"GPU {r['gpu']}" if "gpu" in r else f"cores {r['cores']}"
        lines.append(f"#  Rank {r['rank']:>3}  Pid {r['pid']:>7} on {r['host']}  {where}")
    checks = "exact, on every rank" if settings.check else "off"
    iterations = str(settings.iters) if settings.iters else f"as many as fit {settings.budget_s} s"
    lines += [
        f"# warm-up calls: {settings.warmup}  samples per row: {iterations}  checks: {checks}",
        "# time: median of the samples. A sample starts at a barrier, is the slowest rank's and is",
        *sample_lines(env),
        "# size: bytes of the largest buffer. count: elements per rank. 1 GB = 1e9 bytes",
        "# busbw: as nccl-tests defines it. Arrays are reused, so that small sizes are in cache",
    ]
    return lines


def device_lines(env: Record) -> list[str]:
    """Return the lines on GPUs, drivers and NCCL; none for the host."""
    if "nccl" not in env:
        return []
    driver = f"{env['cuda_driver'] // 1000}.{env['cuda_driver'] % 1000 // 10}"
    return [
        f"# {env['gpu_count']} GPU(s): {', '.join(env['gpus'])}, driver for CUDA {driver}, "
        f"CuPy {env['cupy']}",
        f"# NCCL {env['nccl']} ({env['nccl_path']})",
        *(f"# {remark}" for remark in env["remarks"]),
    ]


def sample_lines(env: Record) -> list[str]:
    """Return the lines that say what one sample is."""
    if "nccl" not in env:
        least = f"{SAMPLE_NS // 1000} us"
        return [f"#   one call, or the mean of several where one takes less than {least}"]
    way = "replayed from one CUDA graph" if env["graph"] else "enqueued from Python one by one"
    buffers = f", buffers registered ({env['registered']})" if env["registered"] else ""
    return [f"#   the mean of several calls, {way}, by {env['clock']}{buffers}"]


def column_lines() -> list[str]:
    """Return the three lines that name the columns."""
    block = f"{'time':>9}{'algbw':>8}{'busbw':>8}{'#wrong':>8}{'p10':>9}{'p99':>9}"
    units = f"{'(us)':>9}{'(GB/s)':>8}{'(GB/s)':>8}{'':>8}{'(us)':>9}{'(us)':>9}"
    return [
        f"#{'':<51}{'out-of-place':^51}{'in-place':^51}".rstrip(),
        f"#{'size':>11}{'count':>12}{'type':>14}{'redop':>7}{'root':>6}  {block}{block}",
        f"#{'(B)':>11}{'(elements)':>12}{'':>14}{'':>7}{'':>6}  {units}{units}",
    ]


def row_line(record: Record) -> str:
    """Return one line of the table."""
    root = -1 if record["root"] is None else record["root"]
    line = f"{record['size_bytes']:>12}{record['count']:>12}{record['dtype'] or '-':>14}"
    line += f"{record['op'] or 'none':>7}{root:>6}  "
    for placement in PLACEMENTS:
        part = record[placement]
        if part is None:
            line += "".join(f"{'N/A':>{width}}" for width in (9, 8, 8, 8, 9, 9))
            continue
        line += f"{time_text(part['time_us_median']):>9}"
        for key in ("algbw_gb_per_s", "busbw_gb_per_s"):
            line += f"{'N/A' if part[key] is None else format(part[key], '.2f'):>8}"
        line += f"{'N/A' if part['wrong'] is None else part['wrong']:>8}"
        line += f"{time_text(part['time_us_p10']):>9}{time_text(part['time_us_p99']):>9}"
    return line


def footer_lines(results: Sequence[Record], remarks: Sequence[str] = ()) -> list[str]:
    """Return nccl-tests' last lines: wrong elements and the mean bus bandwidth, with remarks."""
    names = list(dict.fromkeys(r["operation"] for r in results))
    wrong = bench_report.total_wrong(results)
    verdict = "not checked" if wrong is None else f"{wrong} {'FAILED' if wrong else 'OK'}"
    lines = [f"# Out of bounds values : {verdict}"]
    for name in names if len(names) > 1 else ():
        mean = bench_report.average_busbw(r for r in results if r["operation"] == name)
        if mean is not None:
            lines.append(f"#   {name:<15} avg bus bandwidth : {mean:.4f}")
    mean = bench_report.average_busbw(results)
    lines.append(f"# Avg bus bandwidth    : {'N/A' if mean is None else f'{mean:.4f}'}")
    return lines + [f"# {remark}" for remark in remarks]


class Printer:
    """Takes rank 0's messages: prints the rows as they arrive and moves the progress bar."""

    def __init__(self, settings: Settings, ranks: int) -> None:
        self.settings, self.ranks = settings, ranks
        self.others = others_running()  # before our own ranks run
        self.environment: Record = {}
        self.results: list[Record] = []
        self.done = False
        self.closed = False  # the reader of our stdout has gone
        self.bar: Progress | None = None
        self.shown = ""

    def start_bar(self) -> None:
        """Show a bar on stderr if that is a terminal; it draws only when a row arrives."""
        if not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
        )

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        console = Console(stderr=True)
        self.bar = Progress(
            *columns,
            TimeElapsedColumn(),
            console=console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self.bar.add_task(self.settings.rows[0][0], total=len(self.settings.rows))
        self.bar.start()

    def write(self, line: str) -> None:
        """Print a line of the table, above the bar where both share a terminal."""
        if self.bar is not None and sys.stdout.isatty():
            self.bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, flush=True)

    def take(self, message: Record) -> None:
        """React to one message."""
        if message["kind"] == "hello":
            self.environment = environment(self.ranks, self.others, message)
            for line in header_lines(self.environment, message, self.settings):
                self.write(line)
            self.start_bar()
        elif message["kind"] == "row":
            self.take_row(message["result"])
        else:
            self.done = True

    def take_row(self, record: Record) -> None:
        """Print one row, with the names of the columns above the first of an operation."""
        if record["operation"] != self.shown:
            self.shown = record["operation"]
            for line in ("#", f"# {self.shown}", *column_lines()):
                self.write(line)
        self.write(row_line(record))
        self.results.append(record)
        if self.bar is not None:
            position = min(len(self.results), len(self.settings.rows) - 1)
            task = self.bar.task_ids[0]
            self.bar.update(task, advance=1, description=self.settings.rows[position][0])
            self.bar.refresh()

    def stop(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.stop()


def read_messages(fd: int, printer: Printer) -> None:
    """Feed `printer` until every writer has closed the pipe; stop the job if stdout is closed."""
    with open(fd, encoding="utf-8") as lines:
        for line in lines:
            try:
                printer.take(json.loads(line))
            except BrokenPipeError:  # as after `| head`: end the ranks
                printer.closed = True
                os.kill(os.getpid(), signal.SIGTERM)
                break
        for _ in lines:  # rank 0 must not meet a closed pipe
            pass


def run_ranks(settings: Settings, ranks: int, timeout: float | None) -> tuple[int, Printer]:
    """Run the benchmark on new ranks; return the launcher's exit code and what was printed."""
    from meshring.launch import launch

    printer = Printer(settings, ranks)
    read_fd, write_fd = os.pipe()
    reader = threading.Thread(target=read_messages, args=(read_fd, printer), daemon=True)
    reader.start()
    config = json.dumps(asdict(settings) | {"fd": write_fd})
    argv = [sys.executable, "-m", "meshring.bench_worker", config]
    try:
        code = launch(argv, ranks, timeout=timeout, pass_fds=(write_fd,))
    finally:
        os.close(write_fd)
        reader.join(timeout=10)
        printer.stop()
    return code, printer
