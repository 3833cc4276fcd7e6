"""Messages between stages: what is sent, what is expected, and how shapes are learned."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from meshring.errors import UsageError
from meshring.pipeline.channels import Channels
from meshring.pipeline.stage import (
    HEADER_LENGTH,
    Value,
    ValueSpec,
    arrays_of,
    decode,
    encode,
    full_gradient,
    gradient_spec,
    spec_of,
)

Link = tuple[int, int, int]
"""Source stage, target stage, microbatch: of an activation; its gradient goes back the same way."""


class Message:
    """One value that is to come from another rank."""

    __slots__ = ("arrays", "gradient", "head", "link", "peer", "posted", "spec", "works")

    def __init__(self, link: Link, peer: int, gradient: bool) -> None:
        self.link, self.peer, self.gradient = link, peer, gradient
        self.head: Any = None
        self.posted = False
        self.spec: ValueSpec | None = None
        self.arrays: list[Any] = []
        self.works: list[Any] = []


class Links:
    """The transfers of one rank: sends never wait, receives are posted in the order of the peer.

    Between two ranks messages keep their order and have no tags, so receives are posted strictly in
    the order of the schedule. While the shapes of a message are unknown a header precedes it, and
    what comes behind it from that peer is posted when the header has come.
    """

    def __init__(
        self,
        channels: Channels,
        placement: tuple[int, ...],
        *,
        dynamic: bool,
        given: Callable[[int, int], ValueSpec | None],
    ) -> None:
        self.channels = channels
        self.placement = placement
        self.dynamic = dynamic
        self.given = given
        self.specs: dict[Link, ValueSpec] = {}
        self.timeout: float | None = None
        self._announced: set[Link] = set()
        self._sends: deque[Any] = deque()
        self._queues: dict[int, deque[Message]] = {}

    def learn(self, link: Link, value: Value) -> None:
        """Remember of what a value consists, and check it against what is known.

        Errors: UsageError where it changed.
        """
        spec = spec_of(value)
        if self.dynamic:
            self.specs[link] = spec
            return
        known = self.specs.setdefault(link, self.given(link[0], link[2]) or spec)
        if known != spec:
            raise UsageError(
                f"the result of stage {link[0]} for microbatch {link[2]} is {spec}, and was "
                f"{known} before or by 'shapes'; keep the shapes, or make the Pipeline with "
                "dynamic_shapes=True"
            )

    # ------------------------------------------------------------ sends

    def send_activation(self, link: Link, value: Value) -> None:
        """Start sending a learned result to a later stage, with a header where that is needed."""
        peer = self.placement[link[1]]
        if self.dynamic or (link not in self._announced and not self.given(link[0], link[2])):
            self._announced.add(link)
            for head in encode(self.specs[link]):
                self._sends.append(self.channels.send(head, peer))
        self._send(arrays_of(value), peer)

    def send_gradient(self, link: Link, arrays: Sequence[Any]) -> None:
        """Start sending the gradient of a value back to where it came from."""
        self._send(arrays, self.placement[link[0]])

    def _send(self, arrays: Sequence[Any], peer: int) -> None:
        for array in arrays:
            self._sends.append(self.channels.send(array, peer))
        self._forget_finished()

    def _forget_finished(self) -> None:
        while self._sends and self._sends[0].done():
            self._sends.popleft().wait()

    def finish(self) -> None:
        """Wait until everything was sent."""
        while self._sends:
            self._sends.popleft().wait(self.timeout)

    # ------------------------------------------------------------ receives

    def expect(self, link: Link, gradient: bool) -> Message:
        """Post a receive, at once if its shapes are known and nothing unknown is in front of it."""
        peer = self.placement[link[1] if gradient else link[0]]
        message = Message(link, peer, gradient)
        queue = self._queues.setdefault(peer, deque())
        queue.append(message)
        self._post(queue)
        return message

    def take(self, message: Message) -> Value:
        """Wait for a message and return its value."""
        queue = self._queues[message.peer]
        while not message.posted:
            self._await_header(queue[0])
            self._post(queue)
        for work in message.works:
            work.wait(self.timeout)
        assert message.spec is not None
        if message.gradient:
            return full_gradient(self.specs[message.link], message.arrays)
        return message.spec.value(message.arrays)

    def _post(self, queue: deque[Message]) -> None:
        while queue:
            message = queue[0]
            message.spec = self._known(message)
            if message.spec is None:
                if message.head is None and not message.gradient:
                    head = np.empty(HEADER_LENGTH, np.int64)
                    message.head = (self.channels.receive(head, message.peer), head)
                return
            for array in message.spec.arrays:
                buffer = array.empty()
                message.arrays.append(buffer)
                message.works.append(self.channels.receive(buffer, message.peer))
            message.posted = True
            queue.popleft()

    def _known(self, message: Message) -> ValueSpec | None:
        if message.gradient:
            spec = self.specs.get(message.link)
            return None if spec is None else gradient_spec(spec)
        if self.dynamic:
            return message.spec
        if message.link not in self.specs:
            given = self.given(message.link[0], message.link[2])
            if given is not None:
                self.specs[message.link] = given
        return self.specs.get(message.link)

    def _await_header(self, message: Message) -> None:
        if message.head is None:
            raise UsageError(
                f"the gradient of microbatch {message.link[2]} for stage {message.link[0]} is "
                "received before the forward that it belongs to; move the receive behind it"
            )
        work, head = message.head
        work.wait(self.timeout)
        count = int(head[0])
        if count < HEADER_LENGTH:
            numbers = head[1 : count + 1]
        else:
            rest = np.empty(count, np.int64)
            numbers = self.channels.receive(rest, message.peer).wait(self.timeout)
        message.spec = self.specs[message.link] = decode([int(n) for n in numbers])
