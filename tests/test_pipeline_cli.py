"""The command `meshring schedule`."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import meshring as mr
from meshring.cli import main
from meshring.schedule_command import COMPARED


def run(*args: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["schedule", *map(str, args)])
    assert result.exit_code == code, result.output
    return result


def rows(output: str) -> dict[str, list[str]]:
    """The lines of a comparison by schedule."""
    lines = [line.split() for line in output.splitlines() if not line.startswith("#")]
    return {line[0]: line for line in lines}


def test_one_kind_prints_ranks_and_picture() -> None:
    lines = run("1f1b", "-s", 4, "-m", 8, "--forward", 2).output.splitlines()
    assert lines[0] == "# 1f1b: 4 stages on 4 ranks, 8 microbatches, 64 operations"
    assert "forward 2, backward of input 1, of weights 1; transfer 0" in lines[1]
    first = lines[3].split()
    assert first[:5] == ["0", "0", "32", "12", "27.3%"] and first[-1] == "4"
    assert lines[7].startswith("rank 0 F0") and "bubble by makespan 12" in lines[-1]


def test_pictures_traces_and_schedules_are_written(tmp_path: Path) -> None:
    names = {k: tmp_path / f"a.{k}" for k in ("svg", "trace", "csv")} | {
        "json": tmp_path / "a.json"
    }
    options = [part for name, path in names.items() for part in (f"--{name}", path)]
    run("interleaved-1f1b", "-s", 4, "-v", 2, "-m", 8, "--lower", "rendezvous/pair", *options)
    texts = [node.text for node in ET.parse(names["svg"]).iter("{http://www.w3.org/2000/svg}text")]
    assert "rank 3" in texts and "interleaved-1f1b" in texts
    assert json.loads(names["trace"].read_text())["traceEvents"]
    schedule = mr.PipelineSchedule.from_json(names["json"])
    assert schedule.is_lowered and schedule.num_stages == 8 and schedule.num_ranks == 4
    again = mr.PipelineSchedule.from_csv(names["csv"])
    assert again.ranks == schedule.ranks


def test_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="--png needs matplotlib: pip install 'meshring[plot]'")
    path = tmp_path / "a.png"
    run("1f1b", "gpipe", "--png", path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_compare_all_ranks_every_schedule_under_one_cost_model() -> None:
    costs = ["--forward", 29.7, "--backward-input", 29.4, "--backward-weight", 19.9, "--comm", 0.5]
    output = run("--compare", "all", "-s", 8, "-m", 24, *costs).output
    table = rows(output)
    assert set(table) == set(COMPARED)
    order = [float(line[2]) for line in table.values()]
    assert order == sorted(order)
    work = 24 * (29.7 + 29.4 + 19.9)
    for kind, line in table.items():
        makespan, bubble = float(line[2]), float(line[4])
        assert makespan >= work - 0.1, kind
        assert bubble == pytest.approx(makespan - work, abs=0.1), kind
    activations = {kind: float(line[-2]) for kind, line in table.items()}
    assert activations["gpipe"] == 24 and activations["1f1b"] == activations["zb-h1"] == 8
    assert activations["zb-v"] == 8 and table["dualpipe"][-1] == "2"
    assert float(table["zb-v"][2]) < float(table["zb-h1"][2]) < float(table["1f1b"][2])


def test_several_kinds_and_what_does_not_suit() -> None:
    output = run("1f1b", "--compare", "gpipe", "zb-h1", "-s", 3).output
    assert list(rows(output)) == ["zb-h1", *sorted(["1f1b", "gpipe"], key=output.index)]


def test_a_swapped_pair_of_receives_is_a_cycle(tmp_path: Path) -> None:
    path = tmp_path / "swapped.csv"
    lowered = mr.PipelineSchedule(2, 2, "gpipe").lower("rendezvous/one")
    lines = [line.split(",") for line in lowered.to_csv().splitlines()]
    first, second = (i for i, op in enumerate(lines[1]) if op in ("1RECV_F0", "1RECV_F1"))
    lines[1][first], lines[1][second] = lines[1][second], lines[1][first]
    path.write_text("\n".join(",".join(line) for line in lines))
    text = run("--load", path, code=2).output
    assert "1RECV_F1" in text and "waits for" in text


def test_a_good_file_is_checked_and_drawn(tmp_path: Path) -> None:
    path = tmp_path / "good.json"
    path.write_text(mr.PipelineSchedule(2, 3, "zb-h1").lower("rendezvous/one").to_json())
    output = run("--load", path, "--comm", 0.5).output
    assert "complete, in order and matched" in output and "runs under rendezvous/one" in output
    assert "for a stage: forward 1" in output


def test_checkpointing_costs_forwards() -> None:
    assert "R0" in run("gpipe", "-m", 2, "-s", 2, "--checkpoint").output
    assert float(rows(run("gpipe", "1f1b", "--checkpoint").output)["gpipe"][2]) == 41


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), "give a KIND, --compare, or --load"),
        (("1f1v",), "did you mean 1f1b"),
        (("--compare", "zbv"), "'zbv' is unknown"),
        (("1f1b", "-s", 0), "give 1 or more"),
        (("1f1b", "--comm", -1), "give 0 or more"),
        (("1f1b", "--forward", "nan"), "give 0 or more"),
        (("1f1b", "--svg", "a.png"), "must end in .svg"),
        (("1f1b", "--svg", "no/such/a.svg"), "does not exist"),
        (("1f1b", "gpipe", "--csv", "a.csv"), "leave out --compare"),
        (("1f1b", "--load", "a.csv"), "give a KIND, --compare, or --load"),
        (("--load", "a.csv"), "there is no file a.csv"),
        (("1f1b", "--lower", "maybe"), "rendezvous/pair"),
    ],
)
def test_bad_options(args: tuple[object, ...], words: str) -> None:
    assert words in " ".join(run(*args, code=2).output.split())


def test_files_that_are_no_schedules(tmp_path: Path) -> None:
    for name, text in (("a.json", "{}"), ("a.csv", "0F0,hello"), ("a.txt", "")):
        path = tmp_path / name
        path.write_text(text)
        output = run("--load", path, code=2).output
        assert "Error: " in output and "Traceback" not in output
