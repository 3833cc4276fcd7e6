"""What meshring raises; a message names operation, rank, argument, given, needed, the fix."""

from __future__ import annotations


class MeshringError(Exception):
    """The root of all errors that meshring raises."""

    ranks: tuple[int, ...] = ()
    """The ranks to blame, in the numbering of the communicator; empty where none is."""


class UsageError(MeshringError, ValueError):
    """A bad argument or a call out of place. It had no effect; the communicator stays usable."""


class MismatchError(MeshringError):
    """The ranks called different things. No data moved; the communicator stays usable."""


class DeadlineError(MeshringError, TimeoutError):
    """Some ranks did not come in time; says which, and what every rank was doing."""


class PeerLostError(MeshringError, ConnectionError):
    """Some ranks died or left; says which and how."""


class BackendError(MeshringError, RuntimeError):
    """The operating system or a library under a backend failed."""


class StageError(MeshringError, RuntimeError):
    """An operation of a pipeline failed; says which, on which rank, and gives its traceback."""

    action: str = ""
    """The operation, such as 2F0: the forward of microbatch 0 on stage 2."""
