"""Captured decode with CUDA's graphs."""

from __future__ import annotations

import pytest

from tests.contract.test_captured_decode import *  # noqa: F403 - the same tests, on another device

pytestmark = pytest.mark.gpu


@pytest.fixture
def device() -> str:
    return "cuda"
