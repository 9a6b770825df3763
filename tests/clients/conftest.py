from __future__ import annotations

from collections.abc import Iterator

import pytest
from clients.golden.record import golden_server

from tests.kit.live import Live


@pytest.fixture(scope="session")
def golden() -> Iterator[Live]:
    """The server that golden transcripts come from."""
    with golden_server() as live:
        yield live
