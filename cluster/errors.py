"""Control-plane branch of the exception tree. `cluster.service.errors` translates the whole tree to gRPC, once."""

from __future__ import annotations

from actors.errors import InvalidInput, MoeClusterError


class ConfigError(InvalidInput):
    """A config file or job spec that cannot be used; `field` is `FILE: path.to.key`."""


class NotFound(MoeClusterError):
    """No such job, model or actor."""


class AlreadyExists(MoeClusterError):
    """The request id was used before with different content."""


class FailedPrecondition(MoeClusterError):
    """The state does not allow it: cancel of a finished job, import while a job runs."""


class ResourceExhausted(MoeClusterError):
    """A stated limit is reached: queued jobs, concurrent streams, message size."""


class Unavailable(MoeClusterError):
    """The service cannot answer now; trying again later is right."""


class Unauthenticated(MoeClusterError):
    """The call carries no token, or one that the front does not know."""


class PermissionDenied(MoeClusterError):
    """The caller is known, and its role is not enough."""


class StorageFull(MoeClusterError):
    """No room for a checkpoint. Earlier ones are untouched; trying again when there is room is right."""


class PortInUse(MoeClusterError):
    """The address to listen on is taken by another process."""


class StartupError(MoeClusterError):
    """The cluster could not be started; everything started so far was ended again."""
