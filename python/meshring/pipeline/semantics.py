"""How a backend treats sends and receives: what a lowered schedule has to live with."""

from __future__ import annotations

from dataclasses import dataclass

from meshring.errors import UsageError


@dataclass(frozen=True, slots=True)
class Semantics:
    """Whether sends wait for their receives, and which operations wait for each other in a queue.

    sends: "buffered" (a send ends by itself) or "rendezvous" (it ends when it was received).
    queues: "pair", a queue of transfers for each ordered pair of ranks; "rank", one per rank;
    "one", a single queue for transfers and computing, as with blocking calls.
    """

    sends: str
    queues: str

    def __str__(self) -> str:
        return f"{self.sends}/{self.queues}"


ALL = tuple(
    Semantics(sends, queues)
    for sends in ("buffered", "rendezvous")
    for queues in ("pair", "rank", "one")
)


def semantics_of(value: str | Semantics) -> Semantics:
    """The semantics of this name, such as "rendezvous/pair". Errors: UsageError."""
    for known in ALL:
        if value in (known, str(known)):
            return known
    raise UsageError(
        f"pipeline schedule: argument 'semantics' is {value!r}; give one of "
        f"{', '.join(map(str, ALL))}"
    )
