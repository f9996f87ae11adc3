"""What a machine lacks for a test."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def lacking(reason: str) -> NoReturn:
    """Skip the test with the reason; where ``CI`` is set, fail it, so that nothing goes untested there."""
    if os.environ.get("CI"):
        pytest.fail(f"CI leaves nothing out: {reason}", pytrace=False)
    pytest.skip(reason)
