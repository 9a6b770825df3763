"""ModelRegistry: names, what they lead to, and who closes what."""

from __future__ import annotations

from pathlib import Path

import pytest

import dfastllm.llm
from dfastllm import LLM, ModelNotFoundError, ModelRegistry, ValidationError, models
from tests.compat.conftest import IDS
from tests.text.conftest import byte_level


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "mine"
    models.save(models.tiny("llada", vocab_size=330, ids=IDS), path)
    byte_level().save(str(path / "tokenizer.json"))
    return path


def test_register_list_resolve_open(directory: Path) -> None:
    with ModelRegistry() as registry:
        shipped = set(dfastllm.llm.shipped_models())
        registry.register("mine", directory)
        registry.register("alias", "mine")
        assert registry.list() == sorted({"mine", "alias", *shipped})
        assert registry.resolve("mine") == registry.resolve("alias") == registry.resolve(directory) == directory
        opened = registry.open("mine")
        assert registry.open("mine") is opened
        assert len(opened.generate([[5, 6]])[0].outputs[0].token_ids) <= 128
        registry.unregister("mine")
        assert not opened.worker.is_alive
        with pytest.raises(ModelNotFoundError, match="'mine'"):
            registry.resolve("mine")
        other = registry.open("alias")
    assert not other.worker.is_alive


def test_shipped_models_are_known() -> None:
    for name in dfastllm.llm.shipped_models():
        assert ModelRegistry().resolve(name) == dfastllm.llm.resolve(name)


def test_an_open_llm_is_lent_and_stays_open(llm: LLM) -> None:
    with ModelRegistry() as registry:
        registry.register("lent", llm)
        assert registry.resolve("lent") is registry.open("lent") is llm
    assert llm.worker.is_alive


def test_wrong_names(directory: Path, tmp_path: Path) -> None:
    registry = ModelRegistry()
    registry.register("mine", directory)
    with pytest.raises(ModelNotFoundError, match=r"no model 'yours': it is neither a name known here \(.*mine.*\)"):
        registry.resolve("yours")
    with pytest.raises(ModelNotFoundError):
        registry.register("gone", tmp_path / "gone")
    with pytest.raises(ModelNotFoundError, match="registered as 'yours'"):
        registry.unregister("yours")
    for taken in ["mine", *dfastllm.llm.shipped_models()]:
        with pytest.raises(ValidationError, match="is taken"):
            registry.register(taken, directory)
    for bad in ("", " padded "):
        with pytest.raises(ValidationError, match="must not be empty"):
            registry.register(bad, directory)
