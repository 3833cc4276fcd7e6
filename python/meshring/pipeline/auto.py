"""Finds an order of forwards, input gradients and weight gradients for measured times and memory.

A rank's order is a string of F, I and W: microbatches of each kind follow each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from itertools import count, product

import numpy as np

from meshring.errors import UsageError
from meshring.pipeline.schedules_line import F as FORWARD
from meshring.pipeline.schedules_line import I as INPUT
from meshring.pipeline.schedules_line import Order, one_f_one_b, zb_h1, zb_h2
from meshring.pipeline.schedules_line import W as WEIGHT

KINDS = {"F": FORWARD, "I": INPUT, "W": WEIGHT}
CODES = {FORWARD: "F", INPUT: "I", WEIGHT: "W"}
SMALL = 256  # ranks times microbatches up to which the best orders are improved step by step
STARTS = 3
PREFERENCES = ("alternate", "input", "forward")
EVALUATED = 400_000  # operations that the improvement evaluates at most, in all
REACH = 12  # places by which an operation is moved at most
Figures = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Problem:
    """Times and sizes of each rank, in the order of the pipeline.

    down[r] is the time from rank r to r + 1, up[r] from r + 1 to r. An operation adds `grows` to
    what its rank holds, which starts at `held` and must not exceed `limit`.
    """

    num_microbatches: int
    times: Mapping[str, Sequence[float]]
    down: Sequence[float]
    up: Sequence[float]
    grows: Mapping[str, Sequence[float]]
    held: Sequence[float]
    limit: Sequence[float]
    objective: str

    @property
    def num_ranks(self) -> int:
        """How many ranks the pipeline has."""
        return len(self.limit)


@dataclass(frozen=True, slots=True)
class Policy:
    """How a list schedule chooses among what is ready.

    lead: forwards by which each rank may be ahead of its input gradients. prefer: what goes first
    when both are ready. patience: a weight gradient starts if the next input is at least this part
    of its time away. foresight: no forward starts if an input gradient comes within this part of
    the forward's time.
    """

    lead: tuple[int, ...]
    prefer: str
    patience: float
    foresight: float

    def with_lead(self, rank: int, change: int) -> Policy:
        """The same with another lead of one rank."""
        lead = list(self.lead)
        lead[rank] = max(lead[rank] + change, 1)
        return replace(self, lead=tuple(lead))


def find_order(problem: Problem) -> Order:
    """The best order found; no worse than any published one that fits.

    Candidates are 1F1B's split form, ZB-H1 and ZB-H2, and list schedules with several ways to
    choose among what is ready; small problems are then improved step by step.
    Errors: UsageError where not even one microbatch fits.
    """
    for rank, limit in enumerate(problem.limit):
        least = problem.held[rank] + problem.grows["F"][rank]
        if least > limit * (1 + 1e-9):
            raise UsageError(
                f"PipelineSchedule: argument 'memory_limit' gives rank {rank} {limit:g}, but one "
                f"microbatch needs {least:g}; give more, or more ranks"
            )
    found = [(evaluate(problem, ranks), ranks) for ranks in _published(problem)]
    small = problem.num_ranks * problem.num_microbatches <= SMALL
    trials = sorted(_Trial.made(problem, policy) for policy in _policies(problem, small))
    if small:
        trials += [trial.improved(problem) for trial in trials[:STARTS]]
    found += [(trial.figures, trial.ranks) for trial in sorted(trials)[:STARTS]]
    _, best = min(_improved(problem, *start) for start in sorted(found)[:STARTS])
    return [_rows(kinds, position) for position, kinds in enumerate(best)]


def _rows(kinds: str, position: int) -> np.ndarray[tuple[int, int], np.dtype[np.int32]]:
    seen = {"F": count(), "I": count(), "W": count()}
    rows = [(KINDS[kind], position, next(seen[kind])) for kind in kinds]
    return np.array(rows, np.int32)


def _published(problem: Problem) -> Iterator[list[str]]:
    """1F1B with both gradients in turn, ZB-H1 and ZB-H2, if they fit."""
    p, m = problem.num_ranks, problem.num_microbatches
    for order in (one_f_one_b(p, m), zb_h1(p, m), zb_h2(p, m)):
        ranks = ["".join(CODES.get(k, "IW") for k in rows[:, 0].tolist()) for rows in order]
        if all(_fits(problem, rank, kinds) for rank, kinds in enumerate(ranks)):
            yield ranks


def _policies(problem: Problem, small: bool) -> Iterator[Policy]:
    """The list schedules to try."""
    p, m = problem.num_ranks, problem.num_microbatches
    leads = [(m,) * p]
    for slope, more in product((1.0, 1.5, 1.75, 2.0, 2.5, 3.0), (1, 2, 3)):
        leads.append(tuple(int(slope * (p - 1 - rank)) + more for rank in range(p)))
    if small:
        for foresight in (0.0, 0.5, 1.0):
            for lead, prefer, patience in product(leads, PREFERENCES, (0.0, 0.5, 0.75, 1.0)):
                yield Policy(lead, prefer, patience, foresight)
        return
    double = [tuple(2 * (p - 1 - rank) + more for rank in range(p)) for more in (1, 2)]
    for lead, patience, foresight in product([leads[0], leads[1], *double], (0.0, 0.5), (0.0, 1.0)):
        yield Policy(lead, PREFERENCES[0], patience, foresight)


@dataclass(frozen=True, slots=True)
class _Trial:
    """A list schedule and what it was made with."""

    figures: Figures
    ranks: list[str]
    policy: Policy

    @classmethod
    def made(cls, problem: Problem, policy: Policy) -> _Trial:
        """Run a list schedule."""
        ranks = ListSchedule(problem, policy).run()
        return cls(evaluate(problem, ranks), ranks, policy)

    def __lt__(self, other: _Trial) -> bool:
        return self.figures < other.figures

    def improved(self, problem: Problem) -> _Trial:
        """Change the lead of single ranks as long as that helps."""
        best, moved = self, True
        while moved:
            moved = False
            for rank, change in product(range(problem.num_ranks), (-2, -1, 1, 2)):
                trial = _Trial.made(problem, best.policy.with_lead(rank, change))
                if trial < best:
                    best, moved = trial, True
        return best


def _fits(problem: Problem, rank: int, kinds: str) -> bool:
    held = problem.held[rank]
    for kind in kinds:
        held += problem.grows[kind][rank]
        if held > problem.limit[rank] * (1 + 1e-9):
            return False
    return True


def evaluate(
    problem: Problem, ranks: Sequence[str], waits: list[tuple[int, int]] | None = None
) -> Figures:
    """Makespan or longest span, then the sum of the ranks' ends or spans.

    With `waits`, lists rank and place of each operation that its rank waits for, the latest ranks'
    first.
    """
    p, m = problem.num_ranks, problem.num_microbatches
    came = [[-1.0] * m for _ in range(p)]
    back = [[-1.0] * m for _ in range(p)]
    came[0] = [0.0] * m
    place, clock = [0] * p, [0.0] * p
    begun = [-1.0] * p
    seen = [{"F": 0, "I": 0, "W": 0} for _ in range(p)]
    woken = list(range(p - 1, -1, -1))
    while woken:
        rank = woken.pop()
        now, counts = clock[rank], seen[rank]
        kinds, at = ranks[rank], place[rank]
        while at < len(kinds):
            kind = kinds[at]
            batch = counts[kind]
            if kind != "W":
                ready = (came if kind == "F" else back)[rank][batch]
                if ready < 0.0:
                    break
                if waits is not None and ready > now and at:
                    waits.append((rank, at))
                now = max(now, ready)
            if begun[rank] < 0.0:
                begun[rank] = now
            now += problem.times[kind][rank]
            counts[kind] = batch + 1
            at += 1
            if kind == "F" and rank + 1 < p:
                came[rank + 1][batch] = now + problem.down[rank]
                if place[rank + 1] < len(ranks[rank + 1]):
                    woken.append(rank + 1)
            elif kind == "F":
                back[rank][batch] = now
            elif kind == "I" and rank > 0:
                back[rank - 1][batch] = now + problem.up[rank - 1]
                woken.append(rank - 1)
        clock[rank], place[rank] = now, at
    if any(at < len(kinds) for at, kinds in zip(place, ranks, strict=True)):
        return (float("inf"), float("inf"))
    if problem.objective == "span":
        clock = [end - start for end, start in zip(clock, begun, strict=True)]
    if waits is not None:
        waits.sort(key=lambda place: (-clock[place[0]], place))
    return (max(clock), sum(clock))


@dataclass(slots=True)
class ListSchedule:
    """Gives each free rank what is ready, in simulated time; weights fill the gaps.

    Source: the heuristic of Qi et al., Zero Bubble Pipeline Parallelism, 2023.
    """

    problem: Problem
    policy: Policy
    ranks: list[str] = field(default_factory=list)
    came: list[dict[int, float]] = field(default_factory=list)
    back: list[dict[int, float]] = field(default_factory=list)
    done: list[dict[str, int]] = field(default_factory=list)
    held: list[float] = field(default_factory=list)
    awaited: list[bool] = field(default_factory=list)  # ranks that wait for a gradient
    heap: list[tuple[float, int, int]] = field(default_factory=list)
    tie: Iterator[int] = field(default_factory=count)

    def run(self) -> list[str]:
        """The order of each rank."""
        p, m = self.problem.num_ranks, self.problem.num_microbatches
        self.ranks = [""] * p
        self.came = [dict.fromkeys(range(m if rank == 0 else 0), 0.0) for rank in range(p)]
        self.back = [{} for _ in range(p)]
        self.done = [{"F": 0, "I": 0, "W": 0} for _ in range(p)]
        self.held = list(self.problem.held)
        self.awaited = [False] * p
        free = [0.0] * p
        for rank in range(p):
            self._wake(0.0, rank)
        while self.heap:
            now, _, rank = heappop(self.heap)
            if now < free[rank]:
                continue
            kind, later = self._choose(rank, now)
            if kind:
                free[rank] = now + self.problem.times[kind][rank]
                self._start(rank, kind, free[rank])
            elif later < float("inf"):
                self._wake(later, rank)
        return self.ranks

    def _wake(self, time: float, rank: int) -> None:
        heappush(self.heap, (time, next(self.tie), rank))

    def _choose(self, rank: int, now: float) -> tuple[str, float]:
        """What a free rank does now; else "" and when to look again, as far as is known."""
        done, never = self.done[rank], float("inf")
        grown = self.held[rank] + self.problem.grows["F"][rank]
        full = grown > self.problem.limit[rank] * (1 + 1e-9)
        forward = self.came[rank].get(done["F"], never)
        blocked = full and forward <= now
        if full or done["F"] - done["I"] >= self.policy.lead[rank]:
            forward = never
        back = self.back[rank].get(done["I"], never)
        if forward <= now and back <= now:
            if self.awaited[rank]:
                return "I", never
            if self.policy.prefer == "alternate":
                return ("I" if self.ranks[rank][-1:] == "F" else "F"), never
            return ("I" if self.policy.prefer == "input" else "F"), never
        soon = self.policy.foresight * self.problem.times["F"][rank]
        if rank and forward <= now < back < now + soon:
            forward = never
            self.awaited[rank] = True
        if forward <= now or back <= now:
            return ("F" if forward <= now else "I"), never
        later = min(forward, back)
        wait = self.policy.patience * self.problem.times["W"][rank]
        if done["W"] < done["I"] and (blocked or later - now >= wait):
            return "W", never
        return "", later

    def _start(self, rank: int, kind: str, end: float) -> None:
        batch = self.done[rank][kind]
        self.done[rank][kind] = batch + 1
        self.awaited[rank] = False
        self.ranks[rank] += kind
        self.held[rank] += self.problem.grows[kind][rank]
        self._wake(end, rank)
        if kind == "F" and rank + 1 < self.problem.num_ranks:
            there = self.came[rank + 1][batch] = end + self.problem.down[rank]
            self._wake(there, rank + 1)
        elif kind == "F":
            self.back[rank][batch] = end
        elif kind == "I" and rank > 0:
            there = self.back[rank - 1][batch] = end + self.problem.up[rank - 1]
            self._wake(there, rank - 1)


def _improved(problem: Problem, figures: Figures, ranks: list[str]) -> tuple[Figures, list[str]]:
    """Move single operations next to where a rank waits as long as that helps."""
    budget, before = EVALUATED // max(sum(map(len, ranks)), 1), None
    while figures != before and budget > 0:
        before = figures
        waits: list[tuple[int, int]] = []
        evaluate(problem, ranks, waits)
        for rank, at, to in _moves(waits, ranks):
            moved = _moved(ranks[rank], at, to)
            if moved == ranks[rank] or not _in_order(moved) or not _fits(problem, rank, moved):
                continue
            tried = [*ranks[:rank], moved, *ranks[rank + 1 :]]
            found = evaluate(problem, tried)
            budget -= 1
            if found[0] < figures[0] or (found[0] == figures[0] and found[1] < figures[1]):
                figures, ranks = found, tried
            if budget <= 0:
                break
    return figures, ranks


def _moves(waits: list[tuple[int, int]], ranks: list[str]) -> Iterator[tuple[int, int, int]]:
    """Rank, place and new place: into each wait from behind it, and out of what is before it."""
    for rank, place in waits:
        last = len(ranks[rank]) - 1
        for far in range(1, REACH + 1):
            if place + far <= last:
                yield rank, place + far, place
                yield rank, place, place + far
            if place >= far:
                yield rank, place - far, min(place + 1, last)
                yield rank, place, place - far


def _moved(kinds: str, at: int, to: int) -> str:
    rest = kinds[:at] + kinds[at + 1 :]
    return rest[:to] + kinds[at] + rest[to:]


def _in_order(kinds: str) -> bool:
    """Whether each I stands behind its F and each W behind its I."""
    forwards = inputs = weights = 0
    for kind in kinds:
        forwards += kind == "F"
        inputs += kind == "I"
        weights += kind == "W"
        if not forwards >= inputs >= weights:
            return False
    return True
