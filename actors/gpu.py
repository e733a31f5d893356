"""What an actor says of its GPU."""

from __future__ import annotations

import importlib.util
import logging
from functools import cache
from typing import Any

logger = logging.getLogger(__name__)


def gpu_use(device: str) -> dict[str, Any] | None:
    """Of the device that this process uses; None if it is no GPU, or does not tell.

    `used_bytes` and `total_bytes` of the GPU, whoever uses it; `allocated_bytes` of them by tensors of this process.
    `busy_ratio`: share of the last second or less during which a kernel ran, None where `pynvml` is not installed.
    Never raises: what cannot be measured is no reason for an actor not to answer.
    """
    if not device.startswith("cuda"):
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    try:
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        return {
            "used_bytes": total_bytes - free_bytes,
            "total_bytes": total_bytes,
            "allocated_bytes": torch.cuda.memory_allocated(device),
            "busy_ratio": torch.cuda.utilization(device) / 100 if _has_nvml() else None,
        }
    except Exception as error:  # of the driver or of pynvml, which has classes of its own
        logger.info("the GPU does not tell its use: %s", error)
        return None


@cache
def _has_nvml() -> bool:
    """`nvidia-ml-py`; it is in no way required."""
    return importlib.util.find_spec("pynvml") is not None
