"""What the numbers of `meshring bench` mean, and their JSON, CSV, comparison and picture.

A record is one row of the table: an operation at a size with an `out_of_place` and an `in_place`
part (None where there is none), as the README of the JSON format in `document` says.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Record: TypeAlias = dict[str, Any]

PLACEMENTS = ("out_of_place", "in_place")
MEASURES = (
    "time_us_median",
    "time_us_p10",
    "time_us_p99",
    "algbw_gb_per_s",
    "busbw_gb_per_s",
    "wrong",
    "iterations",
    "calls_per_sample",
)
IDENTITY = ("operation", "size_bytes", "count", "dtype", "op", "root", "ranks")
WORSE = 1.10
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class ReportError(ValueError):
    """A result file that cannot be used; the message is a sentence for the user."""


@dataclass(frozen=True)
class Operation:
    """One benchmarked operation, in the terms of nccl-tests.

    `split`: the size column counts one block per rank. `factor(n)` is busbw / algbw on n ranks.
    """

    name: str
    factor: Callable[[int], float]
    split: bool = False
    reduces: bool = False
    rooted: bool = False
    in_place: bool = True


OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (
        Operation("all_reduce", lambda n: 2 * (n - 1) / n, reduces=True),
        Operation("all_gather", lambda n: (n - 1) / n, split=True),
        Operation("reduce_scatter", lambda n: (n - 1) / n, split=True, reduces=True),
        Operation("broadcast", lambda n: 1.0, rooted=True),
        Operation("reduce", lambda n: 1.0, reduces=True, rooted=True),
        Operation("gather", lambda n: (n - 1) / n, split=True, rooted=True),
        Operation("scatter", lambda n: (n - 1) / n, split=True, rooted=True),
        Operation("all_to_all", lambda n: (n - 1) / n, split=True, in_place=False),
        Operation("sendrecv", lambda n: 1.0, in_place=False),
        Operation("barrier", lambda n: 0.0, in_place=False),
    )
}


def count_of(operation: Operation, size: int, itemsize: int, ranks: int) -> int:
    """Return the elements per rank for a largest buffer of `size`. Units: bytes in, elements out.

    As nccl-tests: blocks are rounded down to 16 bytes; smaller blocks, which nccl-tests rounds
    to nothing, keep their elements, and no block is empty.
    """
    if operation.name == "barrier":
        return 0
    count = size // itemsize
    if operation.split:
        count //= ranks
        count = count // (16 // itemsize) * (16 // itemsize) or count
    return max(1, count)


def statistics(
    samples_us: NDArray[Any], batch: int, size: int, factor: float, wrong: int | None
) -> Record:
    """Return one placement's record. Units: microseconds a call, bytes, 1 GB = 1e9 bytes."""
    median, p10, p99 = (float(p) for p in np.percentile(samples_us, [50, 10, 99]))
    algbw = size / (median * 1e3) if size else None
    busbw = None if algbw is None else algbw * factor
    values = (median, p10, p99, algbw, busbw, wrong, len(samples_us) * batch, batch)
    return dict(zip(MEASURES, values, strict=True))


def size_text(size: float) -> str:
    """Write a number of bytes with the units of --sizes where that is exact: 1048576 -> '1M'."""
    for unit, factor in reversed(UNITS.items()):
        if size and size % factor == 0:
            return f"{size // factor:g}{unit}"
    return f"{size:g}"


def total_wrong(results: Iterable[Record]) -> int | None:
    """Return the number of wrong elements of a run; None where nothing was checked."""
    found = [r[p]["wrong"] for r in results for p in PLACEMENTS if r[p]]
    checked = [wrong for wrong in found if wrong is not None]
    return sum(checked) if checked else None


def average_busbw(results: Iterable[Record]) -> float | None:
    """Return nccl-tests' summary: the mean bus bandwidth over all rows and placements (GB/s)."""
    found = [r[p]["busbw_gb_per_s"] for r in results for p in PLACEMENTS if r[p]]
    values = [value for value in found if value is not None]
    return sum(values) / len(values) if values else None


# ---------------------------------------------------------------- files


def write_json(path: Path, environment: Record, results: Sequence[Record]) -> None:
    """Write a run as one JSON object: `environment` and `results`, units in the key names."""
    document = {"environment": environment, "results": list(results)}
    path.write_text(json.dumps(document, indent=1) + "\n")


def write_csv(path: Path, environment: Record, results: Sequence[Record]) -> None:
    """Write a run as CSV, one line per row and placement, the environment in `#` lines above."""
    with path.open("w", newline="") as file:
        for key, value in environment.items():
            file.write(f"# {key}: {' '.join(str(value).split())}\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*IDENTITY, "placement", *MEASURES])
        for record in results:
            for placement in PLACEMENTS:
                if record[placement]:
                    values = [record[placement][key] for key in MEASURES]
                    writer.writerow([*(record[key] for key in IDENTITY), placement, *values])


def read_json(path: Path) -> tuple[Record, list[Record]]:
    """Read what `write_json` wrote; ReportError where the file is something else."""
    try:
        document = json.loads(path.read_text())
        environment, results = document["environment"], document["results"]
        for record in results:
            for key in IDENTITY:
                record[key]
            for placement in PLACEMENTS:
                if record[placement] is not None and not record[placement]["time_us_median"] > 0:
                    raise ValueError("a time that is not above 0")
        environment.get("date")
    except OSError as error:
        raise ReportError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ReportError(
            f"{path} is not a result file of `meshring bench --json` "
            f"({type(error).__name__}: {error})"
        ) from error
    return environment, results


# ---------------------------------------------------------------- comparison


@dataclass(frozen=True)
class Comparison:
    """One operation, size and placement in two files. Units: microseconds; ratio = b / a."""

    operation: str
    size_bytes: int
    placement: str
    a_us: float
    b_us: float

    @property
    def ratio(self) -> float:
        """Median time of b over that of a; above 1, b is slower."""
        return self.b_us / self.a_us

    @property
    def verdict(self) -> str:
        """'worse' or 'better' beyond 10 %, else nothing."""
        if self.ratio > WORSE:
            return "worse"
        return "better" if self.ratio < 1 / WORSE else ""


def compare(a: Sequence[Record], b: Sequence[Record]) -> list[Comparison]:
    """Match two runs by operation, size and placement, in the order of `a`."""
    others = {(r["operation"], r["size_bytes"]): r for r in b}
    found = []
    for record in a:
        name, size = record["operation"], record["size_bytes"]
        other = others.get((name, size))
        for placement in PLACEMENTS:
            if other and record[placement] and other[placement]:
                times = (r[placement]["time_us_median"] for r in (record, other))
                found.append(Comparison(name, size, placement, *times))
    return found


def geometric_mean(values: Sequence[float]) -> float:
    """Return the geometric mean of positive numbers."""
    return math.exp(sum(math.log(value) for value in values) / len(values))


def _covered(results: Sequence[Record]) -> str:
    names = list(dict.fromkeys(r["operation"] for r in results))
    sizes = sorted({r["size_bytes"] for r in results})
    if not names:
        return "nothing"
    return f"{' '.join(names)} at {size_text(sizes[0])} to {size_text(sizes[-1])} bytes"


def _differences(a: tuple[Record, list[Record]], b: tuple[Record, list[Record]]) -> list[str]:
    keys = (
        *("ranks", "cpu_model", "cores_usable", "meshring", "numpy", "backend", "transport", "isa"),
        *("gpus", "nccl", "cupy", "graph", "registered", "remarks"),
    )
    lines = [
        f"# differs: {key}: {a[0].get(key)} in A, {b[0].get(key)} in B"
        for key in keys
        if a[0].get(key) != b[0].get(key)
    ]
    for key in ("dtype", "op", "root"):
        values = [sorted({str(r[key]) for r in run[1] if r[key] is not None}) for run in (a, b)]
        if values[0] != values[1] and all(values):
            lines.append(
                f"# differs: {key}: {', '.join(values[0])} in A, {', '.join(values[1])} in B"
            )
    return lines


def comparison_lines(path_a: Path, path_b: Path) -> list[str]:
    """Return the report of `--compare`; ReportError where the two files share no row."""
    a, b = read_json(path_a), read_json(path_b)
    rows = compare(a[1], b[1])
    if not rows:
        raise ReportError(
            f"nothing to compare: {path_a} has {_covered(a[1])}, {path_b} has {_covered(b[1])}; "
            "run both with the same operations and --sizes"
        )
    lines = [
        f"# {label}: {path}, {run[0].get('date')}, {run[0].get('ranks')} ranks, "
        f"{run[0].get('cpu_model')}"
        for label, path, run in (("A", path_a, a), ("B", path_b, b))
    ]
    lines += _differences(a, b)
    lines += [
        "# ratio = median time of B / median time of A; above 1, B is slower",
        f"# {'operation':<15}{'size(B)':>12}  {'placement':<13}"
        f"{'A(us)':>11}{'B(us)':>11}{'ratio':>8}",
    ]
    for row in rows:
        placement = row.placement.replace("_", "-")
        line = f"  {row.operation:<15}{row.size_bytes:>12}  {placement:<13}"
        line += (
            f"{time_text(row.a_us):>11}{time_text(row.b_us):>11}{row.ratio:>8.3f}  {row.verdict}"
        )
        lines.append(line.rstrip())
    worse = sum(row.verdict == "worse" for row in rows)
    better = sum(row.verdict == "better" for row in rows)
    unmatched = sum(bool(r[p]) for run in (a, b) for r in run[1] for p in PLACEMENTS)
    unmatched -= 2 * len(rows)
    lines.append(
        f"# {len(rows)} rows compared, {unmatched} in one file only; "
        f"{worse} worse and {better} better by over 10 %"
    )
    lines.append(f"# geometric mean of the ratios: {geometric_mean([r.ratio for r in rows]):.3f}")
    return lines


def time_text(value: float) -> str:
    """Write a time with about four digits, as nccl-tests does. Units: microseconds."""
    return f"{value:.{2 if value < 100 else 1 if value < 10_000 else 0}f}"


# ---------------------------------------------------------------- picture

# Okabe and Ito's colours, which colour-blind readers tell apart; the marks do it in grey.
COLOURS = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00"),
    *("#56b4e9", "#8c564b", "#7f7f7f", "#332288", "#bcbd22"),
)
MARKS = "osD^vP*XhH"
STYLES = {"out_of_place": "-", "in_place": (0, (4, 2))}


def _series(
    results: Sequence[Record], name: str, placement: str, key: str
) -> tuple[list[int], list[float]]:
    rows = [r for r in results if r["operation"] == name and r[placement] and r["size_bytes"]]
    rows = [r for r in rows if r[placement][key]]
    return [r["size_bytes"] for r in rows], [r[placement][key] for r in rows]


def _draw(axes: Axes, results: Sequence[Record], names: Sequence[str], key: str) -> None:
    for i, name in enumerate(names):
        look: dict[str, Any] = {"color": COLOURS[i], "marker": MARKS[i], "markersize": 4}
        for placement in PLACEMENTS:
            sizes, values = _series(results, name, placement, key)
            face = COLOURS[i] if placement == "out_of_place" else "white"
            style = STYLES[placement]
            axes.plot(sizes, values, linestyle=style, lw=1.4, markerfacecolor=face, **look)
            if key == "time_us_median" and len(names) == 1 and sizes:
                low = _series(results, name, placement, "time_us_p10")[1]
                high = _series(results, name, placement, "time_us_p99")[1]
                axes.fill_between(sizes, low, high, color=COLOURS[i], alpha=0.12, lw=0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.grid(True, which="major", color="#d8d8d8", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("size of the largest buffer (bytes)")


def plot(path: Path, environment: Record, results: Sequence[Record]) -> None:
    """Draw bus bandwidth and latency over size, log-log, one line per operation and placement."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    names = [n for n in OPERATIONS if any(r["operation"] == n and r["size_bytes"] for r in results)]
    figure = Figure(figsize=(12, 5.6), layout="constrained", dpi=150)
    left, right = figure.subplots(1, 2)
    _draw(left, results, names, "busbw_gb_per_s")
    left.set_ylabel("bus bandwidth (GB/s, 1 GB = 1e9 bytes)")
    left.set_title("Bus bandwidth (higher is better)", fontsize=11)
    _draw(right, results, names, "time_us_median")
    right.set_ylabel("time of a call (µs, slowest rank)")
    only = ", band p10 to p99" if len(names) == 1 else ""
    right.set_title(f"Latency (lower is better; median{only})", fontsize=11)

    barrier = [r["out_of_place"] for r in results if r["operation"] == "barrier"]
    if barrier:
        time = barrier[0]["time_us_median"]
        right.axhline(time, color="#444444", lw=1, ls=":")
        right.annotate(
            f"barrier {time_text(time)} µs",
            (0.99, time),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
        )
    number = FuncFormatter(lambda value, _: f"{value:g}")
    for axes in (left, right):
        axes.xaxis.set_major_locator(LogLocator(base=2, numticks=10))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: size_text(value)))
        axes.xaxis.set_minor_locator(LogLocator(base=2, numticks=100))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(number)
        low, high = axes.get_ylim()
        narrow = high < 30 * low  # too few powers of ten to read the axis by
        axes.yaxis.set_minor_formatter(number if narrow else NullFormatter())
        if narrow:
            axes.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5, 7)))
    handles = [
        Line2D([], [], color=COLOURS[i], marker=MARKS[i], ms=5, label=n)
        for i, n in enumerate(names)
    ]
    for placement in PLACEMENTS:
        if any(r[placement] for r in results if r["size_bytes"]):
            face = "black" if placement == "out_of_place" else "white"
            look: dict[str, Any] = {
                "color": "black",
                "marker": "o",
                "mfc": face,
                "ms": 4,
                "lw": 1.2,
            }
            handles.append(
                Line2D([], [], ls=STYLES[placement], label=placement.replace("_", "-"), **look)
            )
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9)
    dtypes = sorted({str(r["dtype"]) for r in results if r["dtype"]})
    ops = sorted({str(r["op"]) for r in results if r["op"]})
    what = ", ".join([*dtypes, *ops])
    where = f"{environment['cpu_model']}, {environment['cores_usable']} cores"
    if "gpus" in environment:
        where = f"{', '.join(environment['gpus'])}, NCCL {environment['nccl']}"
    title = (
        f"meshring {environment['meshring']} bench: {environment['ranks']} ranks, {what}, "
        f"{environment['backend']} backend ({environment['transport']})\n"
        f"{where}, {environment['date']}"
    )
    for remark in environment.get("remarks", ()):
        title += f"\n{remark}"
    figure.suptitle(title, fontsize=11)
    figure.savefig(path)
