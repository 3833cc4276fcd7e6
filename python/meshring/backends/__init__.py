"""The backends: which there are, and which of them this machine can use."""

from meshring.backends.base import BackendInfo, available, require

__all__ = ["BackendInfo", "available", "require"]
