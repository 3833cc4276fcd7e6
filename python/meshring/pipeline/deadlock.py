"""Finds the cycle of operations that wait for each other."""

from __future__ import annotations

import numpy as np

from meshring.errors import UsageError
from meshring.pipeline.engine import Outcome, Steps, run
from meshring.pipeline.flow import Edges, compute_steps
from meshring.pipeline.operations import op_of
from meshring.pipeline.program import Program
from meshring.pipeline.semantics import Semantics
from meshring.pipeline.transfers import lowered_queues

Step = tuple[int, int]  # queue and number of the step


def find_deadlock(program: Program, semantics: Semantics | None) -> str:
    """The cycle, an operation a line, or "" if all operations can run.

    Whether they can does not depend on how long they take. Without semantics, data travel by
    themselves.
    """
    durations = [np.zeros(len(rows)) for rows in program.rows]
    if semantics is None:
        edges = Edges(program)
        ranks = list(range(program.num_ranks))
        steps = [
            compute_steps(
                rows, np.arange(len(rows)), durations[rank], edges, np.zeros(len(edges.all) + 1)
            )
            for rank, rows in enumerate(program.rows)
        ]
        num_tokens = edges.num_tokens
    else:
        try:
            queues = lowered_queues(program, semantics, durations)
        except UsageError as error:
            return str(error)
        steps, ranks, num_tokens = queues.steps, queues.ranks, queues.num_tokens
    outcome = run(steps, num_tokens)
    if not outcome.stuck:
        return ""
    return _Explanation(program, steps, ranks, outcome).cycle()


class _Explanation:
    """Walks from a stuck operation to what it waits for, until it comes by again."""

    def __init__(
        self, program: Program, steps: list[Steps], ranks: list[int], outcome: Outcome
    ) -> None:
        self.program = program
        self.steps = steps
        self.ranks = ranks
        self.reached = [len(starts) for starts in outcome.starts]
        self.edges = Edges(program)
        self.giver: dict[int, Step] = {}
        for queue, rest in enumerate(steps):
            late = rest[self.reached[queue] :]
            for number in np.flatnonzero(late["give"] >= 0).tolist():
                self.giver[int(late["give"][number])] = (queue, self.reached[queue] + number)
        self.first = min(outcome.stuck.values())

    def cycle(self) -> str:
        """The lines of the cycle, or of the chain to an operation that nothing can wake."""
        queue = self.first
        seen: dict[int, int] = {}
        lines: list[str] = []
        while queue not in seen:
            seen[queue] = len(lines)
            waiting = (queue, self.reached[queue])
            token = int(self.steps[queue]["need"][waiting[1]])
            giver = self.giver.get(token)
            if giver is None:
                lines.append(f"  {self._name(waiting)} waits for {self._unsent(token)}")
                return "\n".join(lines)
            line = f"  {self._name(waiting)} waits for {self._name(giver)}"
            queue = giver[0]
            blocked = (queue, self.reached[queue])
            if self._place(giver) != self._place(blocked):
                line += f", which stands behind {self._name(blocked)}"
            lines.append(line)
        return "\n".join(lines[seen[queue] :])

    def _place(self, step: Step) -> tuple[int, int]:
        queue, number = step
        return self.ranks[queue], int(self.steps[queue]["row"][number])

    def _name(self, step: Step) -> str:
        rank, row = self._place(step)
        return f"rank {rank}: {op_of(self.program.rows[rank][row].tolist())}"

    def _unsent(self, token: int) -> str:
        """What a token stands for that no operation gives."""
        if token >= self.edges.num_tokens:
            return "the other end of this transfer, which is missing"
        edge, batch, arrived = self.edges.describe(token)
        what = "gradient" if edge.gradient else "activation"
        verb = "receives" if arrived else "makes"
        return (
            f"the {what} of microbatch {batch} from stage {edge.source} to stage {edge.target}, "
            f"which no operation {verb}"
        )
