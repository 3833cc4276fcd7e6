"""The command line: `meshring run`, and what other modules add when it is asked for."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import click

LAZY = {  # each exports `command`
    "bench": "meshring.bench",
    "doctor": "meshring.doctor",
    "schedule": "meshring.schedule_command",
}
PYTHON_FILES = (".py", ".pyc", ".pyz", ".zip")


def _missing(error: ImportError) -> Callable[[], None]:
    """What a subcommand does that could not be imported: say why."""
    reason = str(error)

    def refuse() -> None:
        raise click.ClickException(f"this subcommand cannot be imported: {reason}")

    return refuse


class LazyGroup(click.Group):
    """A group that imports a subcommand's module only when it is invoked or its help is listed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of all subcommands."""
        return sorted({*super().list_commands(ctx), *LAZY})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The subcommand of that name; None where there is none."""
        if cmd_name not in LAZY:
            return super().get_command(ctx, cmd_name)
        try:
            command = import_module(LAZY[cmd_name]).command
        except ImportError as error:  # the help and the other subcommands still work
            return click.Command(cmd_name, callback=_missing(error), short_help=f"({error})")
        assert isinstance(command, click.Command)
        return command


def duration(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
    """A time limit in seconds: above 0, infinite means none."""
    if value is not None and not value > 0:
        raise click.BadParameter(f"{value:g} is no duration; give seconds above 0, such as 90.")
    return None if value == math.inf else value


class RunCommand(click.Command):
    """A command whose own options end at the script or at `-m module`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put `--` in front of what belongs to the script."""
        options = [p for p in self.get_params(ctx) if isinstance(p, click.Option)]
        valued = {name for p in options if not (p.is_flag or p.count) for name in p.opts}
        at = 0
        while at < len(args) and args[at].startswith("-") and args[at] not in ("-", "--"):
            if args[at].startswith("-m"):
                break
            at += 2 if args[at] in valued else 1
        if args[at : at + 1] != ["--"]:
            args = [*args[:at], "--", *args[at:]]
        return super().parse_args(ctx, args)


def usable_cores() -> int:
    """The number of cores that this process may use."""
    return max(1, len(os.sched_getaffinity(0)))


def python_command(command: tuple[str, ...]) -> list[str]:
    """The complete command of `SCRIPT args` or `-m MODULE args`; a UsageError if it cannot run."""
    if not command:
        raise click.UsageError("Nothing to run: give a script or -m and a module.")
    first, *rest = command
    if first.startswith("-m"):
        module = [first[2:], *rest] if len(first) > 2 else rest
        if not module:
            raise click.UsageError("-m needs the name of a module.")
        return [sys.executable, "-m", *module]
    if first == "-":
        raise click.UsageError("A script on stdin cannot be run by several ranks: give a file.")
    path = Path(first)
    if not path.exists():
        raise click.UsageError(f"The script {first!r} does not exist.")
    if path.is_dir():
        if not (path / "__main__.py").exists():
            raise click.UsageError(f"{first!r} is a directory without a __main__.py.")
    elif path.suffix not in PYTHON_FILES:
        try:
            with path.open("rb") as file:
                start = file.read(4096)
        except OSError as error:
            raise click.UsageError(
                f"The script {first!r} cannot be read: {error.strerror}."
            ) from None
        line = start.split(b"\n", 1)[0]
        if b"\0" in start or (line.startswith(b"#!") and b"python" not in line):
            raise click.UsageError(
                f"{first!r} is not a Python file; meshring run starts Python scripts and modules."
            )
    return [sys.executable, *command]


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="meshring", message="meshring %(version)s")
def main() -> None:
    """Collectives on NumPy and CuPy arrays between processes."""


@main.command(cls=RunCommand)
@click.option(
    "-n",
    "--ranks",
    type=int,
    default=usable_cores,
    metavar="N",
    show_default="usable cores",
    help="How many ranks (processes) to start.",
)
@click.option(
    "--timeout",
    type=float,
    callback=duration,
    metavar="SECONDS",
    help="Stop the whole job after this time, with exit code 124.",
)
@click.option(
    "--keep-going",
    is_flag=True,
    help="Let the others go on when a rank is lost. Exit code 0 if a rank ends with 0 and an "
    "agreed shrink() excluded every lost one.",
)
@click.option("--no-prefix", is_flag=True, help="Do not put the rank in front of each line.")
@click.argument(
    "command", nargs=-1, type=click.UNPROCESSED, metavar="(SCRIPT.py | -m MODULE) [ARGS]..."
)
def run(
    ranks: int,
    timeout: float | None,
    keep_going: bool,
    no_prefix: bool,
    command: tuple[str, ...],
) -> None:
    """Run a Python script or module once per rank on this host.

    Options after the script or module belong to it. When a rank fails, the others have 2 s to end
    by themselves and are stopped within 5 s; its traceback is printed last and its exit code is
    the job's (128 + signal if it was killed).
    """
    if ranks < 1:
        raise click.BadParameter(f"{ranks} ranks cannot run; give at least 1.", param_hint="'-n'")
    from meshring.launch import launch

    sys.exit(
        launch(
            python_command(command),
            ranks,
            timeout=timeout,
            keep_going=keep_going,
            prefix=not no_prefix,
        )
    )
