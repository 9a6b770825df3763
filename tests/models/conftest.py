from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tiny matrices: threads only cost, and one thread makes bitwise comparisons mean something."""
    torch.set_num_threads(1)
