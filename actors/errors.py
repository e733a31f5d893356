"""The one exception tree, root and data-plane branch. `cluster.errors` adds the control-plane branch.

Every class pickles with its fields (Ray carries them between actors) and says what to do about it.
"""

from __future__ import annotations


class MoeClusterError(Exception):
    """Root of every error this project raises on purpose."""


class InvalidInput(MoeClusterError, ValueError):
    """A value from outside that cannot be used. Names the field, the value and what would be right."""

    def __init__(self, message: str, *, field: str = "", value: object = None, remedy: str = "") -> None:
        parts = [f"{field}: " if field else "", message]
        if value is not None:
            parts.append(f" (got {_short(value)})")
        if remedy:
            parts.append(f"; {remedy}")
        super().__init__("".join(parts))
        self.message = message
        self.field = field
        self.remedy = remedy

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.args, dict(self.__dict__))


class CheckpointError(InvalidInput):
    """A model directory that is missing, incomplete or not a mixture of experts."""


class CacheFull(InvalidInput):
    """No room behind an expert actor's device for its groups; nothing was changed. `field` says what to give it."""


class LinkError(MoeClusterError):
    """A link between two actors did not deliver. `peer` names the other end."""

    def __init__(self, message: str, *, peer: str) -> None:
        super().__init__(f"{message} (peer {peer})")
        self.peer = peer

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.args, dict(self.__dict__))


class PeerLost(LinkError):
    """The peer died or closed the link, possibly in the middle of a message."""


class LinkTimeout(LinkError):
    """The peer did not answer within the deadline."""


class ProtocolError(LinkError):
    """The peer sent something that is not a message of this protocol; nothing was allocated for it."""


class RemoteError(LinkError):
    """The peer answered that it could not do what was asked. The link stays usable."""


class StepAborted(MoeClusterError):
    """A training step could not be completed; its gradients were dropped on every actor that lives."""


class NonFinite(MoeClusterError):
    """A loss or gradient norm that is not finite. The step was aborted: weights are those of `step` - 1."""

    def __init__(self, message: str, *, step: int) -> None:
        super().__init__(message)
        self.step = step

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.args, dict(self.__dict__))


def _rebuild(cls: type[MoeClusterError], args: tuple[object, ...], state: dict[str, object]) -> MoeClusterError:
    error = cls.__new__(cls)
    error.args = args
    error.__dict__.update(state)
    return error


def _short(value: object, limit: int = 120) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
