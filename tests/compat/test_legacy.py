"""The old names: each warns, names its replacement, and is its replacement."""

from __future__ import annotations

import importlib
import sys
import warnings
from typing import Any

import pytest

from dfastllm import (
    LLM,
    DiffusionConfig,
    DiffusionGenerator,
    GenerationMode,
    Request,
    Scheduler,
    SchedulerConfig,
    SchedulerStats,
)
from dfastllm.compat import legacy
from dfastllm.text import Tokenizer
from tests.compat.conftest import Writer, llm, model, tokenizer  # noqa: F401  (fixtures)

# module -> class -> (what it is, mode)
NAMES: dict[str, dict[str, tuple[type, str | None]]] = {
    "turbo_decoder": {"TurboConfig": (DiffusionConfig, "turbo"), "TurboDecoder": (DiffusionGenerator, "turbo")},
    "fast_diffusion": {
        "FastDiffusionConfig": (DiffusionConfig, "fast"),
        "FastDiffusionGenerator": (DiffusionGenerator, "fast"),
    },
    "streaming_diffusion": {
        "StreamingDiffusionConfig": (DiffusionConfig, "streaming"),
        "StreamingDiffusionGenerator": (DiffusionGenerator, "streaming"),
    },
    "ultra_fast_streaming": {
        "UltraFastConfig": (DiffusionConfig, "streaming"),
        "UltraFastStreamer": (DiffusionGenerator, "streaming"),
    },
    "batcher": {"BatchStats": (SchedulerStats, None), "ContinuousBatcher": (Scheduler, None)},
    "advanced_batcher": {"AdvancedBatcher": (Scheduler, None), "AdvancedBatcherConfig": (SchedulerConfig, None)},
    "speculative": {"SpeculativeConfig": (SchedulerConfig, None), "SpeculativeDecoder": (Scheduler, None)},
    "enhanced_speculative": {
        "EnhancedSpeculativeConfig": (SchedulerConfig, None),
        "EnhancedSpeculativeDecoder": (Scheduler, None),
    },
}
CLASSES = [(module, name) for module, names in NAMES.items() for name in names]


def load(module: str, name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return getattr(importlib.import_module(f"dfastllm.compat.legacy.{module}"), name)


def test_all_modules_are_listed() -> None:
    assert sorted(NAMES) == legacy.__all__
    for module, names in NAMES.items():
        assert load(module, "__all__") == sorted(names)
        assert load(module, "__name__") == getattr(legacy, module).__name__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = legacy.nothing


@pytest.mark.parametrize("module", sorted(NAMES))
def test_importing_a_module_warns(module: str) -> None:
    sys.modules.pop(f"dfastllm.compat.legacy.{module}", None)
    with pytest.warns(DeprecationWarning, match=rf"legacy\.{module} is deprecated .* dfastllm 2\.0; use dfastllm\."):
        importlib.import_module(f"dfastllm.compat.legacy.{module}")


@pytest.mark.parametrize(("module", "name"), CLASSES)
def test_a_name_is_its_replacement(module: str, name: str) -> None:
    kind, mode = NAMES[module][name]
    found = load(module, name)
    assert issubclass(found, kind)
    assert found.__name__ == name
    if kind is DiffusionGenerator:
        assert found.default_config == DiffusionConfig(mode=mode)


@pytest.mark.parametrize(("module", "name"), [c for c in CLASSES if NAMES[c[0]][c[1]][0] is DiffusionConfig])
def test_configurations_warn_and_carry_their_mode(module: str, name: str) -> None:
    with pytest.warns(DeprecationWarning, match=rf"{name} is deprecated .* 2\.0; use DiffusionConfig\(mode="):
        config = load(module, name)(max_steps=9)
    mode = NAMES[module][name][1]
    wanted = DiffusionConfig(mode=GenerationMode(mode), max_steps=9)
    assert config.mode == mode
    assert config.decode_params(8, _info()) == wanted.decode_params(8, _info())


def _info() -> Any:
    return Writer(mask_id=3).info


@pytest.mark.parametrize(("module", "name"), [c for c in CLASSES if NAMES[c[0]][c[1]][0] is DiffusionGenerator])
def test_generators_generate(module: str, name: str, llm: LLM) -> None:  # noqa: F811
    with pytest.warns(DeprecationWarning, match=f"{name} is deprecated"):
        old = load(module, name)(llm)
    new = DiffusionGenerator(llm, config=DiffusionConfig(mode=NAMES[module][name][1]))
    assert old.generate("The dog", 32).tokens == new.generate("The dog", 32).tokens
    assert [c.preview for c in old.generate_stream("The dog", 32)] == [
        c.preview for c in new.generate_stream("The dog", 32)
    ]


@pytest.mark.parametrize("name", ["ContinuousBatcher", "AdvancedBatcher"])
def test_batchers_batch(name: str, model: Writer, tokenizer: Tokenizer) -> None:  # noqa: F811
    module = "batcher" if name == "ContinuousBatcher" else "advanced_batcher"
    with pytest.warns(DeprecationWarning, match=f"{name} is deprecated .* use Scheduler"):
        batcher = load(module, name)(SchedulerConfig(max_batch_size=2), model, tokenizer)
    with batcher:
        futures = batcher.submit_batch([Request(prompt_tokens="The dog", max_tokens=8) for _ in range(4)])
        assert len({future.result(10).token_ids for future in futures}) == 1
    assert batcher.get_stats().completed_requests == 4


def test_batch_stats_and_batcher_config() -> None:
    with pytest.warns(DeprecationWarning, match="BatchStats is deprecated .* use SchedulerStats"):
        stats = load("batcher", "BatchStats")()
    stats.record_batch(2, 10, 5.0)
    assert stats.average_batch_size == 2.0
    with pytest.warns(DeprecationWarning, match="AdvancedBatcherConfig is deprecated .* use SchedulerConfig"):
        assert load("advanced_batcher", "AdvancedBatcherConfig")(max_batch_size=3).max_batch_size == 3


@pytest.mark.parametrize("prefix", ["", "Enhanced"])
def test_speculative_names_speculate(prefix: str) -> None:
    module = "enhanced_speculative" if prefix else "speculative"
    with pytest.warns(DeprecationWarning, match=f"{prefix}SpeculativeConfig"):
        config = load(module, f"{prefix}SpeculativeConfig")(speculative_depth=2)
    with pytest.warns(DeprecationWarning, match=f"{prefix}SpeculativeDecoder"):
        decoder = load(module, f"{prefix}SpeculativeDecoder")(config, "demo-ar")
    assert decoder.config.speculative("ar").num_speculative_tokens == 2
    with pytest.warns(DeprecationWarning, match=f"{prefix}SpeculativeDecoder"):
        assert load(module, f"{prefix}SpeculativeDecoder")(None, "demo-ar").config.enable_speculative
