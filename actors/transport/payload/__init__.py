"""Payload carriers: large tensors of a link that do not cross its socket."""
