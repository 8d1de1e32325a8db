"""Exports by PyTorch's exporter, which builds its table of operators once."""

import pytest
from exporter import read_operators_once


@pytest.fixture(scope="session", autouse=True)
def _operators_read_once() -> None:
    read_operators_once()
