"""The command `meshring bench`: checks its options, starts the ranks, prints nccl-tests' table.

The ranks run `meshring.bench_worker`; rank 0 sends one JSON object a line through a pipe, which
a thread reads here while the launcher runs in the main thread.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
import platform
import re
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import click

from meshring import _core, bench_report
from meshring.bench_report import OPERATIONS, PLACEMENTS, UNITS, Record, time_text
from meshring.bench_worker import (
    DTYPES,
    ML_DTYPES,
    REDUCTIONS,
    SAMPLE_NS,
    Row,
    Settings,
    dtype_of,
    supports,
)
from meshring.doctor import cpu_model, memory_available, others_running, usable_cores

if TYPE_CHECKING:
    from rich.progress import Progress

BUDGET_ONE_S, BUDGET_MANY_S = 0.25, 0.1  # timed seconds for each row and placement
WARMUP = 5
PICTURES = (".png", ".svg", ".pdf")


class Refusal(click.ClickException):
    """A wrong option, told in one sentence before any rank is started; exit code 2."""

    exit_code = 2


# ---------------------------------------------------------------- options


def parse_size(text: str) -> int:
    """Return the bytes of '8', '64K', '128M' (units of 2^10, as in nccl-tests)."""
    match = re.fullmatch(r"(\d+)([KMGT]?)", text.strip(), re.IGNORECASE)
    if not match:
        raise Refusal(f"--sizes: {text!r} is not a number of bytes such as 8, 64K, 1M or 2G")
    size = int(match[1]) * UNITS.get(match[2].upper(), 1)
    if size == 0:
        raise Refusal(f"--sizes: a size must be at least 1 byte, not {text!r}")
    return size


def parse_sizes(text: str, factor: int) -> list[int]:
    """Return the bytes of '8:128M' (each `factor` times the last) or '1K,1M', ascending."""
    sizes: set[int] = set()
    for part in text.split(","):
        first, colon, last = part.partition(":")
        size = parse_size(first)
        end = parse_size(last) if colon else size
        if end < size:
            raise Refusal(f"--sizes: the range {part} is reversed; write {last}:{first}")
        while size <= end:
            sizes.add(size)
            size *= factor
    return sorted(sizes)


def one_of(what: str, name: str, known: Sequence[str]) -> None:
    """Refuse a name that is not known, with the nearest one that is."""
    if name not in known:
        near = difflib.get_close_matches(name, known, 1, 0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise Refusal(f"{what} {name!r} is unknown: {hint}There are: {', '.join(known)}")


def check_types(names: Sequence[str], dtype: str, op: str) -> None:
    """Refuse an element type or reduction that is unknown, missing here or undefined."""
    one_of("--dtype", dtype, DTYPES)
    one_of("--op", op, REDUCTIONS)
    if dtype in ML_DTYPES and importlib.util.find_spec("ml_dtypes") is None:
        raise Refusal(f"--dtype {dtype} needs the package ml_dtypes: pip install ml_dtypes")
    reducing = [name for name in names if OPERATIONS[name].reduces]
    if reducing and not supports(dtype, op):
        able = [o for o in REDUCTIONS if supports(dtype, o)]
        raise Refusal(
            f"--op {op} is not defined for {dtype} (asked of {', '.join(reducing)}); "
            f"{dtype} has: {', '.join(able)}"
        )


def check_output(option: str, path: Path | None) -> None:
    """Refuse a file that could not be written after the run."""
    if path is None:
        return
    parent = path.absolute().parent
    if path.is_dir():
        raise Refusal(f"{option}: {path} is a directory; name a file")
    if not parent.is_dir():
        raise Refusal(f"{option}: the directory {parent} does not exist; create it first")
    if not os.access(path if path.exists() else parent, os.W_OK):
        raise Refusal(f"{option}: no permission to write {path}")


def check_plot(path: Path | None) -> None:
    """Refuse a picture that could not be drawn after the run."""
    check_output("--plot", path)
    if path is None:
        return
    if path.suffix.lower() not in PICTURES:
        raise Refusal(f"--plot: {path} must end in one of {', '.join(PICTURES)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise Refusal("--plot needs matplotlib: pip install 'meshring[plot]'")


def plan(names: Sequence[str], sizes: Sequence[int], itemsize: int, ranks: int) -> list[Row]:
    """Return the rows to run: (operation, bytes of the largest buffer, count), each once."""
    rows: dict[Row, None] = {}
    for name in names:
        operation = OPERATIONS[name]
        for size in sizes:
            count = bench_report.count_of(operation, size, itemsize, ranks)
            rows[name, count * itemsize * (ranks if operation.split else 1), count] = None
    return list(rows)


def memory_needed(rows: Sequence[Row], ranks: int) -> int:
    """Return the bytes of all ranks' arrays for the largest row (an upper bound)."""
    need = [0]
    for name, size, _ in rows:
        small = OPERATIONS[name].split and name != "all_to_all"
        need.append((size + size // ranks if small else 2 * size) * ranks)
    return max(need)


def check_memory(rows: Sequence[Row], ranks: int) -> None:
    """Refuse sizes whose arrays do not fit into the memory that is available now."""
    need, have = memory_needed(rows, ranks), memory_available()
    if have is not None and need > have:
        raise Refusal(
            f"--sizes: the largest size needs {need / 2**30:.1f} GiB for the arrays of {ranks} "
            f"ranks, and {have / 2**30:.1f} GiB of memory is available; choose a smaller size or "
            "fewer ranks"
        )


# ---------------------------------------------------------------- the table


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
    if env["ranks"] > env["cores_usable"]:
        lines.append("# more ranks than cores: ranks wait for a core as well as for each other")
    elif env["others_running_at_start"]:
        free = env["cores_usable"] - env["others_running_at_start"]
        if env["ranks"] > free:
            lines.append("# other programs keep the cores busy: times will be long and unsteady")
    lines += [
        f"#  Rank {r['rank']:>3}  Pid {r['pid']:>7} on {r['host']}  cores {r['cores']}"
        for r in hello["ranks"]
    ]
    checks = "exact, on every rank" if settings.check else "off"
    iterations = str(settings.iters) if settings.iters else f"as many as fit {settings.budget_s} s"
    lines += [
        f"# warm-up calls: {settings.warmup}  samples per row: {iterations}  checks: {checks}",
        "# time: median of the samples. A sample starts at a barrier, is the slowest rank's and is",
        f"#   one call, or the mean of several where one takes less than {SAMPLE_NS // 1000} us",
        "# size: bytes of the largest buffer. count: elements per rank. 1 GB = 1e9 bytes",
        "# busbw: as nccl-tests defines it. Arrays are reused, so that small sizes are in cache",
    ]
    return lines


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


def footer_lines(results: Sequence[Record]) -> list[str]:
    """Return nccl-tests' last lines: wrong elements and the mean bus bandwidth."""
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
    return lines


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


# ---------------------------------------------------------------- the command


@click.command("bench", short_help="Measure latency and bus bandwidth of the collectives.")
@click.argument("ops", nargs=-1)
@click.option(
    "-n", "--ranks", type=click.IntRange(min=1), help="Ranks. [default: usable cores, >= 2]"
)
@click.option("--sizes", help="Bytes of the largest buffer: 8:128M or 1K,1M. [default: 8:128M]")
@click.option(
    "--factor",
    type=click.IntRange(min=2),
    help="Step of a range of sizes. [default: 2; 4 when no operation is named]",
)
@click.option("--dtype", default="float32", show_default=True, help="Element type.")
@click.option("--op", default="sum", show_default=True, help="Reduction: sum prod min max mean.")
@click.option("--root", type=click.IntRange(min=0), default=0, show_default=True, help="Root rank.")
@click.option("--backend", default="host", show_default=True, help="Backend.")
@click.option(
    "--warmup", type=click.IntRange(min=0), default=WARMUP, show_default=True, help="Untimed calls."
)
@click.option(
    "--iters", type=click.IntRange(min=1), help="Timed samples per row. [default: by time]"
)
@click.option("--check/--no-check", default=True, show_default=True, help="Check results exactly.")
@click.option("--timeout", type=float, help="Limit for the whole run, in seconds. [default: none]")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write results as JSON.")
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), help="Write results as CSV.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw busbw and latency: F.png.")
@click.option(
    "--compare",
    nargs=2,
    type=click.Path(path_type=Path),
    metavar="A.json B.json",
    help="Compare two --json files instead of running.",
)
def command(
    ops: tuple[str, ...],
    ranks: int | None,
    sizes: str | None,
    factor: int | None,
    dtype: str,
    op: str,
    root: int,
    backend: str,
    warmup: int,
    iters: int | None,
    check: bool,
    timeout: float | None,
    json_path: Path | None,
    csv_path: Path | None,
    plot: Path | None,
    compare: tuple[Path, Path] | None,
) -> None:
    """Measure the collectives OPS between new ranks on this host (default: every operation).

    Prints nccl-tests' table with p10 and p99. Exits with 1 if a result was wrong, with 2 for a
    wrong option, else with the code of the ranks.
    """
    if compare:
        if ops:
            raise Refusal("--compare takes two files and no operations")
        try:
            click.echo("\n".join(bench_report.comparison_lines(*compare)))
        except bench_report.ReportError as error:
            raise Refusal(str(error)) from error
        return
    for name in ops:
        one_of("operation", name, tuple(OPERATIONS))
    names = tuple(dict.fromkeys(ops)) or tuple(OPERATIONS)
    check_types(names, dtype, op)
    one_of("--backend", backend, ("host",))
    size = ranks or max(2, usable_cores())
    if root >= size:
        raise Refusal(f"--root {root} is no rank: with {size} ranks they are 0 to {size - 1}")
    if timeout is not None and not timeout > 0:
        raise Refusal(f"--timeout must be above 0 seconds, not {timeout:g}")
    step = factor or (2 if ops else 4)
    rows = plan(names, parse_sizes(sizes or "8:128M", step), dtype_of(dtype).itemsize, size)
    check_memory(rows, size)
    check_output("--json", json_path)
    check_output("--csv", csv_path)
    check_plot(plot)

    budget = BUDGET_ONE_S if len(names) == 1 else BUDGET_MANY_S
    settings = Settings(rows, dtype, op, root, warmup, iters, budget, check)
    if not factor and not ops and (sizes is None or ":" in sizes):
        click.echo("# every operation: sizes grow by a factor of 4 (--factor 2 for more of them)")
    code, printer = run_ranks(settings, size, timeout)
    if printer.closed:
        sys.exit(128 + signal.SIGPIPE)
    if code == 0 and not printer.done:
        raise click.ClickException("the ranks ended without a complete result")
    if code:
        click.echo(f"# the ranks ended with exit code {code}: no results are written", err=True)
        sys.exit(code)
    results = printer.results
    click.echo("\n".join(footer_lines(results)))
    if json_path:
        bench_report.write_json(json_path, printer.environment, results)
    if csv_path:
        bench_report.write_csv(csv_path, printer.environment, results)
    if plot:
        bench_report.plot(plot, printer.environment, results)
    if bench_report.total_wrong(results):
        sys.exit(1)
