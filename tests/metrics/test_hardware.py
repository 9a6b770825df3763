"""The hardware profile and its key."""

from __future__ import annotations

import re
import uuid
from typing import Any

import pytest

from dfastllm.metrics.hardware import fingerprints, hardware, hardware_profile_key

KNOWN: dict[str, Any] = {
    "system": "Linux",
    "machine": "x86_64",
    "cpu": "Acme(R) 9000 6 85 7",
    "flags": ["avx2"],
    "cores": 8,
    "memory_gib": 32,
    "gpus": [],
}


def test_this_machine_has_a_stable_key() -> None:
    assert hardware() == hardware()
    assert hardware_profile_key() == hardware_profile_key(hardware())
    assert re.fullmatch(r"[a-z0-9-]+", hardware_profile_key())


def test_a_key_is_readable_and_ends_in_a_hash() -> None:
    assert re.fullmatch(r"x86-64-acme-r-9000-6-85-7-8c-32g-[0-9a-f]{8}", hardware_profile_key(KNOWN))
    gpus = {**KNOWN, "gpus": [{"name": "Gee 1", "memory_gib": 80}] * 2}
    assert "-32g-2xgee-1-" in hardware_profile_key(gpus)


@pytest.mark.parametrize(
    "change",
    [
        {"cpu": "Acme(R) 9000 6 85 8"},
        {"flags": ["avx2", "avx512f"]},
        {"cores": 4},
        {"memory_gib": 64},
        {"system": "Windows"},
        {"gpus": [{"name": "Gee 1", "memory_gib": 80}]},
    ],
)
def test_another_kind_of_machine_has_another_key(change: dict[str, Any]) -> None:
    assert hardware_profile_key({**KNOWN, **change}) != hardware_profile_key(KNOWN)


@pytest.mark.parametrize("missing", ["cpu", "cores", "memory_gib"])
def test_unknown_hardware_gets_a_key_of_its_own(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = {**KNOWN, missing: None}
    monkeypatch.setattr(uuid, "getnode", lambda: 1)
    one = hardware_profile_key(profile)
    assert one.startswith("unknown-")
    assert one == hardware_profile_key(profile)
    monkeypatch.setattr(uuid, "getnode", lambda: 2)  # another machine of which as little is known
    assert hardware_profile_key(profile) != one
    assert hardware_profile_key({}).startswith("unknown-")


def test_fingerprints_name_versions_and_what_the_caller_adds() -> None:
    got = fingerprints(model="demo-ar")
    assert got["model"] == "demo-ar"
    assert {"dfastllm", "commit", "python", "torch", "kernels", "threads"} <= set(got)
