"""What all tests share: one thread per process, hypothesis without a clock, and the good chapter."""

from __future__ import annotations

import os

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))
os.environ.setdefault("MPLBACKEND", "Agg")

from pathlib import Path

import hypothesis
import pytest

hypothesis.settings.register_profile("book", deadline=None, database=None, print_blob=True)
hypothesis.settings.load_profile("book")

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture
def fixtures() -> Path:
    """The folder of notebooks for tests."""
    return FIXTURES
