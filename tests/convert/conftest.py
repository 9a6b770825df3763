from __future__ import annotations

from pathlib import Path

import pytest

from tests.kit.convert_models import write_tiny


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("source") / "llama")
