"""Arrays on a GPU go through channels: a communicator and a stream for each direction of a pair."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from meshring.communicator import Communicator

Pair = tuple[int, int]
"""The rank that sends, and the one that receives."""


class Channels:
    """Transfers of one rank, in the order of each pair; those of different pairs pass one another.

    NCCL runs the calls of one communicator one after another, and a stream waits for each: so on
    one of either a receive that is posted early would hold up what its sender waits for. Arrays in
    memory need no channel. Made by all ranks together, with the same pairs.
    Source: ncclCommSplit, ncclSend, ncclRecv.
    """

    def __init__(self, comm: Communicator, pairs: Iterable[Pair]) -> None:
        self.comm = comm
        self._parts: dict[Pair, Communicator] = {}
        self._streams: dict[Pair, Any] = {}
        if not comm._device_open:  # arrays on a GPU are refused then, with the reason
            return
        for pair in sorted(set(pairs)):
            mine = comm.rank in pair
            part = comm.split(0 if mine else None, pair.index(comm.rank) if mine else 0)
            if part is not None:
                self._parts[pair] = part

    def send(self, array: Any, peer: int) -> Any:
        """Start sending an array to a rank. Returns a Work."""
        pair = (self.comm.rank, peer)
        if not is_on_gpu(array) or pair not in self._parts:
            return self.comm.isend(array, peer)
        return self._parts[pair].isend(array, 1, stream=self._behind_current(pair))

    def receive(self, buffer: Any, peer: int) -> Any:
        """Start receiving from a rank into an array. Returns a Work."""
        pair = (peer, self.comm.rank)
        if not is_on_gpu(buffer) or pair not in self._parts:
            return self.comm.irecv(buffer, peer)
        return self._parts[pair].irecv(buffer, 0, stream=self._behind_current(pair))

    def _behind_current(self, pair: Pair) -> Any:
        """The pair's stream, made to wait for what CuPy's current one has now."""
        cuda = sys.modules["cupy"].cuda
        if pair not in self._streams:
            self._streams[pair] = cuda.Stream(non_blocking=True)
        stream = self._streams[pair]
        stream.wait_event(cuda.get_current_stream().record())
        return stream

    def close(self, abort: bool) -> None:
        """Close the communicators, in the order in which they were made.

        abort: this rank has failed; what others expect of it will not come.
        """
        for part in self._parts.values():
            if abort and not part.closed and part.poisoned is None:
                part.abort()
            part.close()


def is_on_gpu(array: Any) -> bool:
    """Whether an array lives on a GPU; CuPy itself may need a driver to say so."""
    return type(array).__module__.split(".")[0] == "cupy"
