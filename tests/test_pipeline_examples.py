"""The examples and the walkthrough of docs/pipeline.md run and say what they promise."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from meshring.pipeline.schedule import PipelineScheduleType
from procs import Result, run_ranks

ROOT = Path(__file__).parent.parent
PICTURES = ROOT / "docs" / "pictures"
SVG = "{http://www.w3.org/2000/svg}"


def run(name: str, ranks: int, *args: str) -> Result:
    done = run_ranks((ROOT / "examples" / name).read_text(), ranks, *args, timeout=100)
    assert done.returncode == 0 and not done.left, done.stdout + done.stderr
    worst = re.search(r"differs from one process by at most (\S+)", done.stdout)
    assert worst is not None and float(worst[1]) <= 1e-6
    first, last = re.search(r"loss (\S+) -> (\S+) in", done.stdout).groups()  # type: ignore[union-attr]
    assert float(last) < float(first) / 2
    return done


def test_pipeline_data_and_tensor_parallel_on_8_ranks() -> None:
    assert "zb-h1: 2 stages" in run("pipeline_mesh.py", 8, "--schedule", "zb-h1").stdout


def test_digits_with_checkpointing(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the example needs scikit-learn: pip install it")
    svg = tmp_path / "run.svg"
    args = ("--schedule", "zb-v", "--checkpoint", "--steps", "20", "--svg", str(svg))
    done = run("pipeline_digits.py", 4, *args)
    assert f"{2 * 8 * 8 * 20} forwards" in done.stdout
    texts = [node.text or "" for node in ET.parse(svg).iter(f"{SVG}text")]
    assert {"zb-v, measured", "zb-v, simulated", "recompute"} <= set(texts)


def test_digits_with_every_schedule() -> None:
    pytest.importorskip("sklearn", reason="the example needs scikit-learn: pip install it")
    kinds = [k.value for k in PipelineScheduleType]
    program = (ROOT / "examples" / "pipeline_digits.py").read_text()
    program = program.replace("    comm.close()\n", "").rpartition('if __name__ == "__main__":')[0]
    program += "import sys\n"
    program += f"for kind in {kinds}:\n    sys.argv[1:] = ['--schedule', kind, '--steps', '6']\n"
    program += "    main()\nmr.init().close()\n"
    done = run_ranks(program, 4, timeout=100)
    assert done.returncode == 0 and not done.left, done.stdout + done.stderr
    found = re.findall(r"differs from one process by at most (\S+)", done.stdout)
    assert len(found) == len(kinds) and all(float(worst) <= 1e-6 for worst in found)


def shape_of(path: Path) -> tuple[list[str], int]:
    """The words of a picture, and how many pieces its paths have."""
    root = ET.parse(path)
    words = [node.text or "" for node in root.iter(f"{SVG}text")]
    return words, sum(node.attrib["d"].count("h") for node in root.iter(f"{SVG}path"))


def test_the_walkthrough_draws_its_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "pipeline.md").read_text()
    (tmp_path / "pictures").mkdir()
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "walkthrough"}
    for block in re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        exec(compile(block, "docs/pipeline.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "PipelineSchedule.validate: rank 0 to rank 1" in printed and "loss " in printed
    drawn = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert drawn == {path.name for path in PICTURES.iterdir()}
    assert drawn == set(re.findall(r"\(pictures/(\S+)\)", page))
    for name in drawn - {"measured.svg"}:
        assert shape_of(tmp_path / "pictures" / name) == shape_of(PICTURES / name), name


def test_every_kind_is_in_the_walkthrough() -> None:
    page = (ROOT / "docs" / "pipeline.md").read_text()
    for kind in PipelineScheduleType:
        assert f"`{kind.value}`" in page, kind
