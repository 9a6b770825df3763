"""Keys hashed with argon2's least costs: some 0.06 s less for each key that a test makes or proves."""

from __future__ import annotations

import pytest
from argon2 import PasswordHasher

from dfastllm.tenants import keys


def cheap_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the test ends. What is hashed so is argon2id all the same."""
    keys._nobodys.cache_clear()
    monkeypatch.setattr(keys, "_HASHER", PasswordHasher(time_cost=1, memory_cost=8, parallelism=1))
