"""The command `meshring schedule`: pipeline schedules simulated, drawn, checked and compared."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from meshring.bench import Refusal, check_output, check_plot, one_of
from meshring.errors import UsageError
from meshring.pipeline.schedule import PipelineSchedule, PipelineScheduleType
from meshring.pipeline.schedules import USUAL_CHUNKS, family_of
from meshring.pipeline.semantics import ALL as SEMANTICS
from meshring.pipeline.timeline import Timeline, save_timelines
from meshring.pipeline.timeline_text import MOST_ROWS
from meshring.pipeline.transform import with_recomputation

KINDS = tuple(kind.value for kind in PipelineScheduleType)
COMPARED = tuple(kind for kind in KINDS if kind != "sequential")  # which has gpipe's order
SMALL = 100_000  # operations of a schedule that is drawn as text too


@dataclass(frozen=True)
class Options:
    """The sizes and costs of the command line; costs are those of a rank's part of the model."""

    ranks: int
    microbatches: int
    chunks: int | None
    forward: float
    backward_input: float
    backward_weight: float
    comm: float
    memory: float | None
    checkpoint: bool
    semantics: str | None
    validate: bool


@dataclass(frozen=True)
class Run:
    """A schedule and its simulation."""

    schedule: PipelineSchedule
    timeline: Timeline
    chunks: int

    @property
    def activations(self) -> float:
        """Peak live activations over all ranks, in those of one microbatch on one rank."""
        return float(self.timeline.peak_activations.max()) / self.chunks


def chunks_of(kind: str, options: Options) -> int:
    """How many stages each rank has; of interleaved kinds as many as -v says."""
    family = family_of(kind)
    if family == "loop" and options.chunks is not None:
        return options.chunks
    return USUAL_CHUNKS[family]


def costs_of(options: Options, chunks: int) -> dict[str, Any]:
    """The costs of one stage, where each rank's part of the model is cut into so many."""
    return {
        "forward": options.forward / chunks,
        "backward_input": options.backward_input / chunks,
        "backward_weight": options.backward_weight / chunks,
        "comm": options.comm,
    }


def simulated(kind: str, options: Options) -> Run:
    """Make a schedule and simulate it. Errors: UsageError where the sizes do not suit it."""
    chunks = chunks_of(kind, options)
    costs = costs_of(options, chunks)
    more: dict[str, Any] = {"num_ranks": options.ranks}
    if kind == "auto":
        limit = None if options.memory is None else options.memory * chunks
        more |= {"costs": costs, "memory_limit": limit}
    stages = options.ranks * chunks
    schedule = PipelineSchedule(stages, options.microbatches, kind, **more)
    return finished(schedule, options, chunks, costs)


def finished(
    schedule: PipelineSchedule, options: Options, chunks: int, costs: dict[str, Any]
) -> Run:
    """Check and simulate a schedule with what the options add to it."""
    if options.checkpoint:
        schedule = with_recomputation(schedule)
    if options.semantics is not None and not schedule.is_lowered:
        schedule = schedule.lower(options.semantics, **costs)
    if options.validate:
        report = str(schedule.validate(options.semantics))
        click.echo(f"# {schedule.schedule_type}: complete, in order and matched")
        click.echo("\n".join(f"#   {line}" for line in report.splitlines()))
    semantics = options.semantics if schedule.is_lowered else None
    return Run(schedule, schedule.simulate(semantics=semantics, **costs), chunks)


def loaded(path: Path) -> PipelineSchedule:
    """The schedule of a .json or .csv file. Errors: Refusal, UsageError."""
    if not path.is_file():
        raise Refusal(f"--load: there is no file {path}")
    if path.suffix.lower() == ".json":
        return PipelineSchedule.from_json(path)
    if path.suffix.lower() == ".csv":
        return PipelineSchedule.from_csv(path)
    raise Refusal(f"--load: {path} must end in .json or .csv")


# ---------------------------------------------------------------- what is printed


def heading(options: Options, part: str = "a rank's part of the model") -> str:
    """The line above all tables: the cost model."""
    return (
        f"# for {part}: forward {options.forward:g}, backward of input "
        f"{options.backward_input:g}, of weights {options.backward_weight:g}; transfer "
        f"{options.comm:g}"
    )


def rank_table(run: Run) -> list[str]:
    """One line per rank: what it holds, how long it computes, and why it waits."""
    timeline = run.timeline
    causes = {name: times for name, times in timeline.idle_causes.items() if times.any()}
    names = "".join(f"{name:>12}" for name in causes)
    lines = [
        f"#{'rank':>5}  {'stages':<14}{'busy':>10}{'idle':>10}{'idle %':>8}{names}"
        f"{'live activations':>18}"
    ]
    step = -(-timeline.num_ranks // MOST_ROWS)
    for rank in range(0, timeline.num_ranks, step):
        stages = ",".join(map(str, run.schedule.stages_of(rank)))
        part = timeline.idle[rank] / timeline.makespan if timeline.makespan else 0.0
        waits = "".join(f"{times[rank]:>12.4g}" for times in causes.values())
        lines.append(
            f"{rank:>6}  {stages:<14}{timeline.busy[rank]:>10.5g}{timeline.idle[rank]:>10.4g}"
            f"{part:>8.1%}{waits}{timeline.peak_activations[rank]:>18}"
        )
    return lines if step == 1 else [*lines, f"# every {step}th of {timeline.num_ranks} ranks"]


def compare_table(runs: Sequence[Run], refused: dict[str, str]) -> list[str]:
    """One line per schedule, the shortest makespan first."""
    best = min((run.timeline.makespan for run in runs), default=0.0)
    lines = [
        f"#{'schedule':<18}{'stages':>7}{'makespan':>12}{'of best':>9}{'bubble by makespan':>22}"
        f"{'bubble by span':>20}{'activations':>13}{'weights':>9}"
    ]
    for run in sorted(runs, key=lambda run: (run.timeline.makespan, run.activations)):
        t = run.timeline
        by_makespan = f"{t.bubble_makespan:.5g} ({t.bubble_rate_makespan:.1%})"
        by_span = f"{t.bubble_span:.5g} ({t.bubble_rate_span:.1%})"
        ratio = t.makespan / best if best else 1.0
        lines.append(
            f" {run.schedule.schedule_type:<18}{run.schedule.num_stages:>7}{t.makespan:>12.6g}"
            f"{ratio:>9.3f}{by_makespan:>22}{by_span:>20}{run.activations:>13.4g}"
            f"{run.schedule.replicas:>9}"
        )
    lines += [f" {kind:<18}  {' '.join(text.split())}" for kind, text in refused.items()]
    lines += [
        "# bubble: makespan, or longest time from a rank's first start to its last end, minus work",
        "# activations: most that are live on a rank, in those of one microbatch on one rank;",
        "#   each lives until its backward, or backward of weights, ends. weights: copies",
    ]
    return lines


def show(run: Run, head: str) -> None:
    """Print the table and the picture of one schedule."""
    schedule = run.schedule
    click.echo(
        f"# {schedule.schedule_type}: {schedule.num_stages} stages on {schedule.num_ranks} ranks, "
        f"{schedule.num_microbatches} microbatches, {schedule.num_operations} operations"
    )
    click.echo(head)
    for line in rank_table(run):
        click.echo(line)
    if run.timeline.events.size <= SMALL:
        width = shutil.get_terminal_size((100, 24)).columns
        colour = sys.stdout.isatty()
        click.echo(run.timeline.text(max(width, 60), colour=colour), color=colour)


# ---------------------------------------------------------------- the command


def chosen_kinds(kinds: Sequence[str], compare: Sequence[str]) -> list[str]:
    """The kinds to simulate, each once. Errors: Refusal for one that there is not."""
    named = [name for text in (*kinds, *compare) for name in text.split(",") if name]
    if "all" in named:
        return list(dict.fromkeys([*(n for n in named if n != "all"), *COMPARED]))
    for name in named:
        one_of("the schedule", name, KINDS)
    return list(dict.fromkeys(named))


def write_files(runs: Sequence[Run], **paths: Path | None) -> None:
    """Write what --svg, --png, --trace, --json and --csv ask for."""
    timelines = [run.timeline for run in runs]
    for option in ("svg", "png", "trace"):
        path = paths[option]
        if path is not None:
            save_timelines(timelines, path)
    for option, text in (("json", PipelineSchedule.to_json), ("csv", PipelineSchedule.to_csv)):
        path = paths[option]
        if path is not None:
            path.write_text(text(runs[0].schedule), encoding="utf-8")


def check_files(count: int, **paths: Path | None) -> None:
    """Refuse files that could not be written, before anything is computed."""
    suffixes = {"svg": (".svg",), "png": (".png", ".pdf"), "trace": (".json", ".trace")}
    for option, path in paths.items():
        check_output(f"--{option}", path)
        if path is not None and path.suffix.lower() not in suffixes.get(option, (path.suffix,)):
            raise Refusal(f"--{option}: {path} must end in {' or '.join(suffixes[option])}")
        if path is not None and option in ("json", "csv") and count > 1:
            raise Refusal(f"--{option} writes one schedule; leave out --compare")
    if paths["png"] is not None:
        check_plot(paths["png"].with_suffix(".png"))


def number(least: float) -> Callable[[click.Context, click.Parameter, Any], Any]:
    """An option's check: a finite number that is at least so large."""

    def check(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
        if value is not None and not least <= value < float("inf"):
            raise click.BadParameter(
                f"{value:g} is too small or no number; give {least:g} or more."
            )
        return value

    return check


FILE = click.Path(path_type=Path)


@click.command(
    name="schedule",
    help=f"""Simulate, draw, check and compare pipeline schedules.

    With one KIND: a table of the ranks and the picture. With several, or --compare: one line for
    each, the shortest first. Times are in any unit.

    Kinds: {", ".join(KINDS)}.
    """,
    short_help="Simulate, draw, check and compare pipeline schedules.",
)
@click.argument("kinds", nargs=-1, metavar="[KIND]...")
@click.option("-s", "--stages", type=int, default=4, show_default=True, callback=number(1),
              help="How many ranks the model is cut over.")  # fmt: skip
@click.option("-m", "--microbatches", type=int, default=8, show_default=True, callback=number(1))
@click.option("-v", "--chunks", type=int, callback=number(1),
              help="Stages per rank of the interleaved kinds (2).")  # fmt: skip
@click.option("--forward", type=float, default=1.0, show_default=True, callback=number(0),
              help="Time of a rank's forward of a microbatch.")  # fmt: skip
@click.option("--backward-input", type=float, default=1.0, show_default=True, callback=number(0),
              help="Time of the gradient of its input.")  # fmt: skip
@click.option("--backward-weight", type=float, default=1.0, show_default=True, callback=number(0),
              help="Time of the gradient of its weights.")  # fmt: skip
@click.option("--comm", type=float, default=0.0, show_default=True, callback=number(0),
              help="Time of a transfer to another rank.")  # fmt: skip
@click.option("--memory", type=float, callback=number(1), metavar="ACTIVATIONS",
              help="Limit of auto: a rank's live activations, in microbatches.")  # fmt: skip
@click.option("--checkpoint", is_flag=True, help="Recompute each forward before its backward.")
@click.option("--lower", "semantics", type=click.Choice([str(s) for s in SEMANTICS]),
              help="Add sends and receives, for these semantics.")  # fmt: skip
@click.option("--compare", multiple=True, metavar="KIND|all",
              help="Rank these schedules under one cost model.")  # fmt: skip
@click.option("--load", type=FILE, help="A schedule of a .json or .csv file instead of a KIND.")
@click.option(
    "--validate", is_flag=True, help="Check it, as --load does; print the cycle of a deadlock."
)
@click.option("--svg", type=FILE, help="Write the picture.")
@click.option("--png", type=FILE, help="The same through matplotlib (meshring[plot]).")
@click.option("--trace", type=FILE, help="Write trace events for ui.perfetto.dev.")
@click.option("--json", type=FILE, help="Write the schedule.")
@click.option("--csv", type=FILE, help="Write the schedule in torch's form.")
def command(
    kinds: tuple[str, ...],
    stages: int,
    microbatches: int,
    compare: tuple[str, ...],
    load: Path | None,
    svg: Path | None,
    png: Path | None,
    trace: Path | None,
    json: Path | None,
    csv: Path | None,
    **rest: Any,
) -> None:
    """Simulate, draw, check and compare pipeline schedules."""
    options = Options(ranks=stages, microbatches=microbatches, **rest)
    if load is not None:
        options = replace(options, validate=True)
    names = chosen_kinds(kinds, compare)
    paths = {"svg": svg, "png": png, "trace": trace, "json": json, "csv": csv}
    if bool(names) == (load is not None):
        raise Refusal(f"give a KIND, --compare, or --load: one of {', '.join(KINDS)}, or a file")
    check_files(len(names), **paths)
    try:
        runs = compared(names, options) if len(names) > 1 else [single(names, load, options)]
        if len(names) <= 1:
            show(runs[0], heading(options) if names else heading(options, "a stage"))
    except UsageError as error:
        raise Refusal(str(error)) from None
    write_files(runs, **paths)


def single(names: Sequence[str], load: Path | None, options: Options) -> Run:
    """The one schedule that was named or is in the file."""
    if load is None:
        return simulated(names[0], options)
    schedule = loaded(load)
    chunks = max(len(schedule.stages_of(rank)) for rank in range(schedule.num_ranks))
    return finished(schedule, options, chunks, costs_of(options, 1))


def compared(names: Sequence[str], options: Options) -> list[Run]:
    """Simulate all, print the table; what the sizes do not suit is told in its line."""
    runs, refused = [], {}
    for name in names:
        try:
            runs.append(simulated(name, options))
        except UsageError as error:
            refused[name] = str(error)
    click.echo(f"# {options.ranks} ranks, {options.microbatches} microbatches")
    click.echo(heading(options))
    click.echo("\n".join(compare_table(runs, refused)))
    if not runs:
        raise Refusal("none of these schedules suits these sizes")
    return runs
