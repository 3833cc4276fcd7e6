"""What the checks of `meshring doctor` have in common."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

OK, WARN, FAIL = "ok", "warn", "fail"


@dataclass(frozen=True)
class Check:
    """One line of the report: what was looked at, the verdict, why, and the bare facts."""

    name: str
    verdict: str
    sentence: str
    facts: dict[str, Any] = field(default_factory=dict)


def installed() -> dict[str, str]:
    """Return name and version of every installed distribution, names in canonical spelling."""
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"]
        if name:
            found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), distribution.version)
    return found
