from __future__ import annotations

from collections.abc import Iterator

import pytest
from clients.golden.server import Platform, golden_server


@pytest.fixture(scope="session")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """The server that golden transcripts come from."""
    with golden_server(tmp_path_factory.mktemp("golden")) as platform:
        yield platform
