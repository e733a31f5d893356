"""`socket`: pyzmq between processes, over ipc:// on one host and tcp:// between hosts.

The expert actor binds one ROUTER socket at two addresses; every link is a DEALER. zmq keeps quiet about a dead peer, so
the link watches its socket's monitor: a DISCONNECTED event ends every wait with `PeerLost`, also in mid-message. With
keys tcp:// is encrypted and only for those who hold them; ipc:// lies in a directory of this user alone.
"""

from actors.transport.socket.link import SocketLink
from actors.transport.socket.server import SocketServer

__all__ = ["SocketLink", "SocketServer"]
