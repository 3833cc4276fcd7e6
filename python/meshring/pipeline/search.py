"""Beam search for a good order of blocking calls: when each rank meets which other."""

from __future__ import annotations

from dataclasses import dataclass

from meshring.pipeline.flow import Floats
from meshring.pipeline.linear import Line, Wiring
from meshring.pipeline.operations import Rows

Move = tuple[int, float, float]  # a transfer, or -1 - rank; its start and end


@dataclass(frozen=True, slots=True)
class _State:
    """How far each rank is; `began` is the start of its present group of transfers."""

    heads: tuple[int, ...]
    offered: frozenset[int]  # made, not yet moved
    began: tuple[float, ...]
    ended: tuple[float, ...]
    history: tuple[int, _State] | None


class BlockingSearch:
    """Searches orders for one queue per rank and rendezvous sends, transfers in groups.

    Source: active schedules of Giffler and Thompson, 1960, kept in a beam by their lower bound.
    """

    def __init__(self, wiring: Wiring, durations: list[Floats], times: Floats) -> None:
        self.wiring = wiring
        self.durations = [d.tolist() for d in durations]
        self.times = times.tolist()
        self.needed_by = {
            transfer: (rank, row)
            for rank, takes in enumerate(wiring.takes)
            for row, found in enumerate(takes)
            for transfer in found
        }
        self.tails = self._tails()
        self.size = sum(map(len, self.durations)) + len(self.needed_by)

    def _tails(self) -> list[list[float]]:
        """The least time from each operation's start to the end of everything."""
        tails = [[0.0] * (len(d) + 1) for d in self.durations]
        left = [len(d) for d in self.durations]
        moved = True
        while moved:
            moved = False
            for rank, durations in enumerate(self.durations):
                while left[rank]:
                    row = left[rank] - 1
                    feeds = self.wiring.feeds[rank][row]
                    if any(left[self.needed_by[t][0]] > self.needed_by[t][1] for t in feeds):
                        break
                    after = [tails[rank][row + 1]]
                    for t in feeds:
                        place = self.needed_by[t]
                        after.append(self._time(t) + tails[place[0]][place[1]])
                    tails[rank][row] = durations[row] + max(after)
                    left[rank] = row
                    moved = True
        return tails

    def _time(self, transfer: int) -> float:
        return float(self.times[transfer // self.wiring.m])

    def best(self, width: int) -> list[Rows]:
        """The best order that a beam of this width finds."""
        ranks = len(self.durations)
        zero = (0.0,) * ranks
        beam = [_State((0,) * ranks, frozenset(), zero, zero, None)]
        for _ in range(self.size):
            found: dict[tuple[object, ...], tuple[tuple[float, float], _State]] = {}
            for state in beam:
                for move in self._choices(state):
                    after = self._after(state, move)
                    name = (after.heads, after.offered, after.began, after.ended)
                    if name not in found:
                        found[name] = (self._value(after), after)
            ranked = sorted(found.values(), key=lambda item: item[0])
            beam = [state for _, state in ranked[:width]]
        return self._rows(beam[0])

    def _moves(self, state: _State) -> list[Move]:
        moves = []
        for rank, row in enumerate(state.heads):
            if row < len(self.durations[rank]) and self._has_all(state, rank, row):
                start = state.ended[rank]
                moves.append((-1 - rank, start, start + self.durations[rank][row]))
        for transfer in state.offered:
            a, b = self.wiring.channel(transfer)
            start = max(state.began[a], state.began[b])
            moves.append((transfer, start, start + self._time(transfer)))
        return moves

    def _has_all(self, state: _State, rank: int, row: int) -> bool:
        """Whether all that an operation needs was made and has been moved."""
        for transfer in self.wiring.takes[rank][row]:
            source, place = self.wiring.made_by[transfer]
            if state.heads[source] <= place or transfer in state.offered:
                return False
        return True

    def _choices(self, state: _State) -> list[Move]:
        """What can end first, and all that would have to wait for it on one of its ranks."""
        moves = self._moves(state)
        first = min(moves, key=lambda move: move[2])
        ranks = self._ranks(first[0])
        return [
            move
            for move in moves
            if (move[1] < first[2] or move is first) and ranks & self._ranks(move[0])
        ]

    def _ranks(self, what: int) -> set[int]:
        return {-1 - what} if what < 0 else set(self.wiring.channel(what))

    def _after(self, state: _State, move: Move) -> _State:
        what, _, end = move
        began, ended = list(state.began), list(state.ended)
        if what < 0:
            rank = -1 - what
            row = state.heads[rank]
            began[rank] = ended[rank] = end
            heads = (*state.heads[:rank], row + 1, *state.heads[rank + 1 :])
            offered = state.offered | frozenset(self.wiring.feeds[rank][row])
        else:
            for rank in self.wiring.channel(what):
                ended[rank] = max(ended[rank], end)
            heads, offered = state.heads, state.offered - {what}
        return _State(heads, offered, tuple(began), tuple(ended), (what, state))

    def _value(self, state: _State) -> tuple[float, float]:
        """A lower bound of the makespan, then how late the ranks are in all."""
        late = [
            end + self.tails[rank][row]
            for rank, (row, end) in enumerate(zip(state.heads, state.ended, strict=True))
        ]
        bound = max(late)
        for transfer in state.offered:
            a, b = self.wiring.channel(transfer)
            rank, row = self.needed_by[transfer]
            start = max(state.began[a], state.began[b])
            bound = max(bound, start + self._time(transfer) + self.tails[rank][row])
        return bound, sum(late)

    def _rows(self, state: _State) -> list[Rows]:
        moves = []
        while state.history is not None:
            what, state = state.history
            moves.append(what)
        line = Line(self.wiring)
        for what in reversed(moves):
            if what < 0:
                line.compute(-1 - what)
            else:
                line.send(what)
                line.receive(what)
        return line.rows()
