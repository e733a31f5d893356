"""Where actors run, what they are told, who may ask."""

import os

# gRPC's fork handlers abort now and then the child of a process that has calls in flight, between fork and exec: a
# raylet that is started beside a running front never comes up. Nothing here uses gRPC in a forked child, so they go.
# gRPC reads this once, when it is first used.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")
# Otherwise gRPC writes a line to stderr for each TLS handshake that fails: whoever reaches the front could fill a disk.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
