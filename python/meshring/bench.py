"""The command `meshring bench`: checks its options, starts the ranks, prints nccl-tests' table.

The ranks run `meshring.bench_worker`; rank 0 sends one JSON object a line through a pipe, which
a thread of `meshring.bench_table` reads while the launcher runs in the main thread.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from meshring import bench_device, bench_report
from meshring.bench_data import DTYPES, ML_DTYPES, REDUCTIONS, dtype_of, supports
from meshring.bench_report import OPERATIONS, UNITS
from meshring.bench_table import footer_lines, run_ranks
from meshring.bench_worker import Row, Settings
from meshring.doctor import memory_available, usable_cores
from meshring.errors import MeshringError

BACKENDS = ("host", "nccl")
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


def ranks_of(backend: str, ranks: int | None, graph: bool, registered: bool) -> int:
    """Return the number of ranks; refuse what the backend does not have on this machine."""
    if backend == "host":
        for name, given in (("--graph", graph), ("--registered", registered)):
            if given:
                raise Refusal(f"{name} is for --backend nccl")
        return ranks or max(2, usable_cores())
    why_off = bench_device.missing()
    if why_off:
        raise Refusal(f"--backend nccl cannot be used: {why_off}")
    try:
        refused = bench_device.registration_refusal() if registered else None
        if refused:
            raise Refusal(refused)
        return ranks or bench_device.gpus()
    except MeshringError as error:
        raise Refusal(f"--backend nccl cannot be used: {error}") from error


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
@click.option("--backend", default="host", show_default=True, help="Backend: host or nccl (GPUs).")
@click.option("--graph", is_flag=True, help="nccl: time replays of a captured CUDA graph.")
@click.option("--registered", is_flag=True, help="nccl: buffers registered with NCCL.")
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
    graph: bool,
    registered: bool,
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
    one_of("--backend", backend, BACKENDS)
    everything = tuple(n for n in OPERATIONS if backend == "host" or n != "barrier")
    names = tuple(dict.fromkeys(ops)) or everything
    check_types(names, dtype, op)
    size = ranks_of(backend, ranks, graph, registered)
    if backend == "nccl":
        refused = bench_device.refusal(names, dtype, op, size, check)
        if refused:
            raise Refusal(refused)
    if root >= size:
        raise Refusal(f"--root {root} is no rank: with {size} ranks they are 0 to {size - 1}")
    if timeout is not None and not timeout > 0:
        raise Refusal(f"--timeout must be above 0 seconds, not {timeout:g}")
    step = factor or (2 if ops else 4)
    rows = plan(names, parse_sizes(sizes or "8:128M", step), dtype_of(dtype).itemsize, size)
    if backend == "host":
        check_memory(rows, size)
    check_output("--json", json_path)
    check_output("--csv", csv_path)
    check_plot(plot)

    budget = BUDGET_ONE_S if len(names) == 1 else BUDGET_MANY_S
    need = memory_needed(rows, size) // size
    how = (backend, graph, registered, need)
    settings = Settings(rows, dtype, op, root, warmup, iters, budget, check, *how)
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
    remarks = printer.environment.get("remarks", ())
    click.echo("\n".join(footer_lines(results, remarks)))
    if json_path:
        bench_report.write_json(json_path, printer.environment, results)
    if csv_path:
        bench_report.write_csv(csv_path, printer.environment, results)
    if plot:
        bench_report.plot(plot, printer.environment, results)
    if bench_report.total_wrong(results):
        sys.exit(1)
