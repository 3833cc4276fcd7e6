"""The programs in docs/mesh.md and docs/tensors.md run, and print what the pages say."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

from procs import run_ranks

DOCS = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"```python\n(.*?)```(?:\n```\n(.*?)```)?", re.S)


@pytest.mark.parametrize("page", ["mesh.md", "tensors.md"])
def test_what_needs_no_ranks_prints_what_the_page_says(page: str) -> None:
    shown = [(code, out) for code, out in BLOCK.findall((DOCS / page).read_text()) if out]
    assert shown
    for code, out in shown:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec("import meshring as mr\n" + code, {})
        assert printed.getvalue() == out


def test_what_needs_ranks_runs() -> None:
    found = [code for code, out in BLOCK.findall((DOCS / "tensors.md").read_text()) if not out]
    first, context = found
    ready = "weights, gradient = np.ones((9, 4)), np.ones(3)\n"
    result = run_ranks(first + ready + context + "\nprint(whole.shape, gradient)\n", 4)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.count("(9, 4) [4. 4. 4.]") == 4
