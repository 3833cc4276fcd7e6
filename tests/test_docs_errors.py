"""docs/errors.md: the page is of these programs, and its messages still have their parts."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

import standin

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))
import make_errors  # noqa: E402

PAGE = make_errors.PAGE.read_text()
SECTIONS = dict(re.findall(r"^### (.*?)\n(.*?)(?=^##|\Z)", PAGE, re.M | re.S))


def test_the_page_has_these_programs() -> None:
    assert list(SECTIONS) == [case.title for case in make_errors.CASES]
    messages = {}
    for case in make_errors.CASES:
        program, message = re.findall(r"```\w*\n(.*?)```", SECTIONS[case.title], re.S)
        assert program == case.program
        messages[case.title] = message.rstrip("\n")
    assert make_errors.page(messages) == PAGE
    assert not re.search(r"/(tmp|home|root|work|usr)/", PAGE)


@pytest.mark.parametrize("case", make_errors.CASES, ids=lambda case: case.title)
def test_the_message_has_its_parts(case: make_errors.Case) -> None:
    if case.gpu is not None:
        pytest.importorskip("cupy", reason="pip install cupy-cuda12x")
        if standin.compiler() is None:
            pytest.skip(standin.SKIP)
    for message in (make_errors.run(case), SECTIONS[case.title]):
        assert f"meshring.errors.{case.kind}: " in message
        for part in case.parts:
            assert part in message, message
