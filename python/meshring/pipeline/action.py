"""One operation of a pipeline schedule and its text form, such as `2F0`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from meshring.errors import UsageError


class OpKind(IntEnum):
    """What an operation does; `B` is `I` and `W` in one."""

    FORWARD = 0
    BACKWARD = 1
    BACKWARD_INPUT = 2
    BACKWARD_WEIGHT = 3
    SEND_ACTIVATION = 4
    RECV_ACTIVATION = 5
    SEND_GRADIENT = 6
    RECV_GRADIENT = 7
    RECOMPUTE = 8
    REDUCE_GRAD = 9
    UNSHARD = 10
    RESHARD = 11
    OVERLAP_F_B = 12
    GROUP = 13

    @property
    def code(self) -> str:
        """The letters of the text form, torch's where torch has the operation."""
        return _CODES[self]

    @property
    def is_communication(self) -> bool:
        """Whether it sends to or receives from another stage."""
        return OpKind.SEND_ACTIVATION <= self <= OpKind.RECV_GRADIENT

    @property
    def is_send(self) -> bool:
        """Whether it sends."""
        return self in (OpKind.SEND_ACTIVATION, OpKind.SEND_GRADIENT)

    @property
    def has_microbatch(self) -> bool:
        """Whether it belongs to one microbatch and not to its stage's parameters."""
        return self not in (OpKind.REDUCE_GRAD, OpKind.UNSHARD, OpKind.RESHARD)


_CODES = {
    OpKind.FORWARD: "F",
    OpKind.BACKWARD: "B",
    OpKind.BACKWARD_INPUT: "I",
    OpKind.BACKWARD_WEIGHT: "W",
    OpKind.SEND_ACTIVATION: "SEND_F",
    OpKind.RECV_ACTIVATION: "RECV_F",
    OpKind.SEND_GRADIENT: "SEND_B",
    OpKind.RECV_GRADIENT: "RECV_B",
    OpKind.RECOMPUTE: "R",
    OpKind.REDUCE_GRAD: "REDUCE_GRAD",
    OpKind.UNSHARD: "UNSHARD",
    OpKind.RESHARD: "RESHARD",
    OpKind.OVERLAP_F_B: "OVERLAP_F_B",
    OpKind.GROUP: "GROUP",
}
_KINDS = {code: kind for kind, code in _CODES.items()}
_COMPOUND = (OpKind.OVERLAP_F_B, OpKind.GROUP)
PEER_STEP = {
    OpKind.SEND_ACTIVATION: 1,
    OpKind.RECV_ACTIVATION: -1,
    OpKind.SEND_GRADIENT: -1,
    OpKind.RECV_GRADIENT: 1,
}
_NUMBER = "(?:0|[1-9][0-9]{0,8})"
_SIMPLE = re.compile(f"({_NUMBER})([A-Z_]+?)({_NUMBER})?(?::({_NUMBER}))?", re.ASCII)
_PARTS = re.compile(r"\(([^()]+)\)(OVERLAP_F_B|GROUP)", re.ASCII)


@dataclass(frozen=True, slots=True, repr=False)
class PipelineOp:
    """One operation: what, on which stage, of which microbatch, with which other stage.

    OVERLAP_F_B holds a forward and a backward that run together, GROUP the sends and receives
    that are started together; both in `parts`. Text: `2F0` is the forward of microbatch 0 on stage
    2, `2SEND_F0` sends its result to stage 3, `2SEND_F0:5` to stage 5.
    """

    kind: OpKind
    stage: int | None = None
    microbatch: int | None = None
    peer: int | None = None
    parts: tuple[PipelineOp, ...] = ()

    @classmethod
    def Forward(cls, microbatch_id: int, stage: int | None = None) -> PipelineOp:
        """The forward pass of a microbatch."""
        return cls(OpKind.FORWARD, stage, microbatch_id)

    @classmethod
    def Backward(cls, microbatch_id: int, stage: int | None = None) -> PipelineOp:
        """The whole backward pass of a microbatch."""
        return cls(OpKind.BACKWARD, stage, microbatch_id)

    @classmethod
    def BackwardInput(cls, microbatch_id: int, stage: int | None = None) -> PipelineOp:
        """The gradient of a microbatch's input."""
        return cls(OpKind.BACKWARD_INPUT, stage, microbatch_id)

    @classmethod
    def BackwardWeight(cls, microbatch_id: int, stage: int | None = None) -> PipelineOp:
        """A microbatch's share of the weights' gradient."""
        return cls(OpKind.BACKWARD_WEIGHT, stage, microbatch_id)

    @classmethod
    def SendActivation(
        cls, to_stage: int, microbatch_id: int | None = None, stage: int | None = None
    ) -> PipelineOp:
        """A forward's result goes to a later stage."""
        return cls(OpKind.SEND_ACTIVATION, stage, microbatch_id, to_stage)

    @classmethod
    def RecvActivation(
        cls, from_stage: int, microbatch_id: int | None = None, stage: int | None = None
    ) -> PipelineOp:
        """A forward's input comes from an earlier stage."""
        return cls(OpKind.RECV_ACTIVATION, stage, microbatch_id, from_stage)

    @classmethod
    def SendGradient(
        cls, to_stage: int, microbatch_id: int | None = None, stage: int | None = None
    ) -> PipelineOp:
        """The gradient of the input goes to an earlier stage."""
        return cls(OpKind.SEND_GRADIENT, stage, microbatch_id, to_stage)

    @classmethod
    def RecvGradient(
        cls, from_stage: int, microbatch_id: int | None = None, stage: int | None = None
    ) -> PipelineOp:
        """The gradient of the result comes from a later stage."""
        return cls(OpKind.RECV_GRADIENT, stage, microbatch_id, from_stage)

    @classmethod
    def OverlapForwardBackward(cls, forward: PipelineOp, backward: PipelineOp) -> PipelineOp:
        """A forward and a whole backward of one rank that run together.

        Source: DualPipe (DeepSeek-V3 technical report, 2024).
        """
        return cls(OpKind.OVERLAP_F_B, parts=(forward, backward))

    @classmethod
    def Group(cls, parts: Sequence[PipelineOp]) -> PipelineOp:
        """Sends and receives that are started together and end together."""
        return cls(OpKind.GROUP, parts=tuple(parts))

    @property
    def microbatch_id(self) -> int | None:
        """The microbatch."""
        return self.microbatch

    @property
    def to_stage(self) -> int | None:
        """The stage that a send goes to; None for all else."""
        return self.peer if self.kind.is_send else None

    @property
    def from_stage(self) -> int | None:
        """The stage that a receive comes from; None for all else."""
        return self.peer if self.kind.is_communication and not self.kind.is_send else None

    @property
    def text(self) -> str:
        """The text form; `parse` is its exact inverse. Errors: UsageError if a part is missing."""
        text = str(self)
        if "?" in text or PipelineOp._read(text) != self:
            raise UsageError(
                f"PipelineOp.text: {self!r} has no text form; give stage, microbatch and peer "
                "where its kind has them, and parts only to GROUP and OVERLAP_F_B"
            )
        return text

    def __repr__(self) -> str:
        return f"PipelineOp('{self}')"

    def __str__(self) -> str:
        if self.parts or self.kind in _COMPOUND:
            return f"({';'.join(map(str, self.parts))}){self.kind.code}"
        microbatch = "" if not self.kind.has_microbatch else _or_unknown(self.microbatch)
        peer = ""
        if self.kind.is_communication and not self._has_usual_peer():
            peer = f":{_or_unknown(self.peer)}"
        return f"{_or_unknown(self.stage)}{self.kind.code}{microbatch}{peer}"

    def _has_usual_peer(self) -> bool:
        return self.stage is not None and self.peer == self.stage + PEER_STEP[self.kind]

    @classmethod
    def parse(cls, text: str) -> PipelineOp:
        """The operation whose `text` this is, exactly. Errors: UsageError for all else."""
        op = cls._read(text) if isinstance(text, str) else None
        if op is None or str(op) != text:
            raise UsageError(
                f"PipelineOp.parse: {text!r} is no operation; give stage, kind and microbatch, "
                "such as '2F0', '2SEND_F0', '2SEND_F0:5', '0REDUCE_GRAD', '(0F1;1B0)OVERLAP_F_B'"
            )
        return op

    @classmethod
    def _read(cls, text: str) -> PipelineOp | None:
        compound = _PARTS.fullmatch(text)
        if compound:
            parts = [cls._read(part) for part in compound[1].split(";")]
            kind = _KINDS[compound[2]]
            known = tuple(p for p in parts if p is not None and not p.parts)
            fits = len(known) == len(parts) and _parts_fit(kind, known)
            return cls(kind, parts=known) if fits else None
        match = _SIMPLE.fullmatch(text)
        kind_or_none = _KINDS.get(match[2]) if match else None
        if match is None or kind_or_none is None or kind_or_none in _COMPOUND:
            return None
        kind, stage = kind_or_none, int(match[1])
        if (match[3] is not None) != kind.has_microbatch:
            return None
        if match[4] is not None and not kind.is_communication:
            return None
        peer = None
        if kind.is_communication:
            peer = stage + PEER_STEP[kind] if match[4] is None else int(match[4])
            if peer < 0 or peer == stage:
                return None
        return cls(kind, stage, None if match[3] is None else int(match[3]), peer)


def _parts_fit(kind: OpKind, parts: tuple[PipelineOp, ...]) -> bool:
    if kind is OpKind.GROUP:
        return all(p.kind.is_communication for p in parts)
    return [p.kind for p in parts] == [OpKind.FORWARD, OpKind.BACKWARD]


def _or_unknown(number: int | None) -> str:
    return "?" if number is None else str(number)
