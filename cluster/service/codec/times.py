"""Unix time in seconds <-> google.protobuf.Timestamp."""

from __future__ import annotations

import math

from google.protobuf.timestamp_pb2 import Timestamp


def to_message(time_s: float) -> Timestamp:
    seconds = math.floor(time_s)
    nanos = round((time_s - seconds) * 1e9)
    return Timestamp(seconds=seconds + nanos // 10**9, nanos=nanos % 10**9)


def from_message(timestamp: Timestamp) -> float:
    return (timestamp.seconds * 10**9 + timestamp.nanos) / 10**9  # one rounding, so that times come back equal
