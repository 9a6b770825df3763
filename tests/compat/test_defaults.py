"""Every default of compat's values, written out: what code that was written for the documents' names relies on."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from dfastllm import DiffusionConfig, GenerationMode, Request, RequestState, SchedulerConfig, SchedulerStats
from dfastllm.compat import apd, config, generator, queueing, registry, scheduler
from dfastllm.compat.apd import APDConfig
from dfastllm.compat.config import StreamChunk

STANDARD: dict[str, Any] = {
    "mode": GenerationMode.STANDARD,
    "min_steps": 1,
    "max_steps": None,
    "confidence_threshold": None,
    "factor": None,
    "early_stop_confidence": 0.0,
    "max_parallel_tokens": 0,
    "stream_interval": 4,
    "block_length": None,
    "cache": None,
    "provisional": False,
    "temperature": None,
}
CHUNK: dict[str, Any] = {
    "text": "a", "new_text": "a", "tokens": (1,), "unmasked_count": 1, "total_tokens": 2, "progress": 0.5,
    "finished": False, "preview": "a",
}  # fmt: skip
# (class, the fields that have no default, what the others are without being said)
TABLE: tuple[tuple[type[Any], dict[str, Any], dict[str, Any]], ...] = (
    (DiffusionConfig, {}, STANDARD),
    (
        APDConfig,
        {},
        STANDARD | {"enabled": True, "max_parallel_tokens": 8, "mixture_weight": 0.7, "max_lookahead": 100},
    ),
    (
        SchedulerConfig,
        {},
        {
            "max_batch_size": 32,
            "max_tokens_per_batch": 2048,
            "max_wait_time_ms": 0.0,
            "scheduling_policy": "priority",
            "enable_speculative": False,
            "speculative_depth": None,
            "max_kv_tokens": 65536,
            "max_queue_size": 1024,
        },
    ),
    (
        SchedulerStats,
        {},
        {
            "total_requests": 0,
            "completed_requests": 0,
            "cancelled_requests": 0,
            "failed_requests": 0,
            "total_batches": 0,
            "total_tokens": 0,
            "total_sequences": 0,
            "largest_batch": 0,
            "total_time_ms": 0.0,
            "preemptions": 0,
        },
    ),
    (
        Request,
        {"request_id": "a", "prompt_tokens": (1,), "arrival_time": 0.0},
        {
            "max_tokens": None,
            "temperature": None,
            "priority": 0,
            "state": RequestState.PENDING,
            "sampling": None,
            "decode": None,
            "timeout": None,
            "raw": False,
        },
    ),
    (StreamChunk, CHUNK, {"finish_reason": None}),
)


@pytest.mark.parametrize(("kind", "given", "defaults"), TABLE, ids=lambda part: getattr(part, "__name__", ""))
def test_what_is_not_said_has_the_documents_value(
    kind: type[Any], given: dict[str, Any], defaults: dict[str, Any]
) -> None:
    """The table names every field, so that a new one must be written down here too. Types count: 0 is not False."""
    made = kind(**given)
    found = {f.name: getattr(made, f.name) for f in dataclasses.fields(made) if f.name not in given}
    assert found == defaults
    assert {name: type(value) for name, value in found.items()} == {n: type(v) for n, v in defaults.items()}


def test_the_table_names_every_class_with_a_default() -> None:
    written = {
        kind
        for module in (apd, config, generator, queueing, registry, scheduler)
        for name, kind in vars(module).items()
        if isinstance(kind, type)
        and dataclasses.is_dataclass(kind)
        and kind.__module__ == module.__name__
        and not name.startswith("_")
        and any(f.default is not dataclasses.MISSING for f in dataclasses.fields(kind))
    }
    assert written == {kind for kind, _, _ in TABLE}


def test_each_request_has_an_identifier_and_a_moment_of_its_own() -> None:
    first, second = Request(prompt_tokens=(1,)), Request(prompt_tokens=(1,))
    assert first.request_id != second.request_id
    assert 0 < first.arrival_time <= second.arrival_time


@pytest.mark.parametrize(
    ("mode", "other"),
    [
        ("fast", {"confidence_threshold": 0.9}),
        ("streaming", {"confidence_threshold": 0.9, "stream_interval": 2, "provisional": True}),
        ("turbo", {"factor": 1.0, "early_stop_confidence": 0.9, "max_parallel_tokens": 64}),
    ],
)
def test_a_mode_sets_what_the_table_of_modes_says(mode: str, other: dict[str, Any]) -> None:
    assert dataclasses.asdict(DiffusionConfig(mode=mode)) == {**STANDARD, "mode": GenerationMode(mode), **other}
