"""Messages of `moecluster.v1` <-> plain values of `cluster.backend` and `cluster.config`, with validation.

`*_to_message` and `*_from_message` are inverse to one another. Whatever comes from a caller is checked before it is
used; an error is an `InvalidInput` that names the field as the message does, the value and what would be right.
"""
