"""The README's page of Python runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

from procs import run_ranks

ROOT = Path(__file__).parent.parent


def test_the_page_of_python_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    shapes = "\nprint(wide.shape, part.shape, mine.shape, halo.shape, y.shape)\n"
    result = run_ranks(code + shapes, 4)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    for rank, part in enumerate((3, 3, 2, 2)):
        assert f"[{rank}] (2, 12) ({part},) (1, 4) (2,) (8,)" in result.stdout


def test_the_first_example_runs() -> None:
    result = run_ranks((ROOT / "examples" / "hello.py").read_text(), 4)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("hello from rank") == 4
