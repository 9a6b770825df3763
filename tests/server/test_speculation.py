"""speculative_config over HTTP: what a request asks for is done, changes no token, is told, and is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from dfastllm.core import SpeculativeConfig
from dfastllm.errors import DFastLLMError, UnsupportedError
from dfastllm.llm import LLM, load_engine, resolve
from tests.kit.live import Live, serving

CONFIG = json.dumps(
    [
        {"model": "demo-draft", "num_speculative_tokens": 3, "adaptive": False},
        {"method": "diffusion", "model": "demo-diffusion"},
    ]
)
ASK = [{"role": "user", "content": "What is 12 + 30?"}]
FIGURES = {"drafts", "draft_tokens", "accepted_tokens", "accepted_per_position", "acceptance_length"}


@pytest.fixture(scope="module")
def shipped() -> Iterator[Live]:
    """demo-ar with a draft model as its default, and demo-diffusion."""
    engines = {name: load_engine(name, speculative=CONFIG) for name in ("demo-ar", "demo-diffusion")}
    with serving(engines) as running:
        yield running


def chat(live: Live, **body: Any) -> httpx.Response:
    body = {"model": "demo-ar", "messages": ASK, "max_tokens": 32, "return_token_ids": True, "temperature": 0.0, **body}
    return live.post("/v1/chat/completions", body)


@pytest.mark.parametrize("temperature", [0.0, 1.2])
@pytest.mark.parametrize("method", ["ngram", "suffix", "draft_model", "diffusion"])
def test_every_method_gives_the_tokens_of_none(shipped: Live, method: str, temperature: float) -> None:
    def answer(config: dict[str, Any]) -> tuple[list[int], dict[str, Any]]:
        body = chat(shipped, temperature=temperature, seed=5, speculative_config=config).json()
        return body["choices"][0]["token_ids"], body["dfastllm"]

    plain, reference = answer({"method": "none"})
    tokens, figures = answer({"method": method, "adaptive": False, "prompt_lookup_min": 1})
    assert tokens == plain
    assert (reference["exactness"], figures["exactness"]) == ("reference", "exact-fast")
    assert not FIGURES & reference.keys()
    if method in ("draft_model", "diffusion"):
        assert figures.keys() >= FIGURES
        assert figures["draft_tokens"] >= figures["accepted_tokens"] == sum(figures["accepted_per_position"])
        assert figures["acceptance_length"] == pytest.approx(1 + figures["accepted_tokens"] / figures["drafts"])


def test_the_default_drafts_and_a_request_may_change_a_part(shipped: Live) -> None:
    by_default = chat(shipped).json()["dfastllm"]
    assert by_default["drafts"] > 0
    one = chat(shipped, speculative_config={"num_speculative_tokens": 1, "adaptive": False}).json()["dfastllm"]
    assert one["draft_tokens"] == one["drafts"] > 0


def test_rejection_sampling_says_what_it_keeps(shipped: Live) -> None:
    config = {"method": "draft_model", "acceptance": "rejection"}
    assert chat(shipped, temperature=1.0, speculative_config=config).json()["dfastllm"]["exactness"] == (
        "exact-distribution"
    )
    assert chat(shipped, speculative_config=config).json()["dfastllm"]["exactness"] == "exact-fast"


def test_metrics_count_drafts(shipped: Live) -> None:
    def counted(name: str) -> float:
        return shipped.metric(f"{name}_total", model_name="demo-ar")

    names = ("spec_decode_num_drafts", "spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens")
    before = [counted(name) for name in names]
    figures = chat(shipped).json()["dfastllm"]
    made = [counted(name) - was for name, was in zip(names, before, strict=True)]
    assert made == [figures["drafts"], figures["draft_tokens"], figures["accepted_tokens"]]


@pytest.mark.parametrize(
    ("model", "config", "param"),
    [
        ("demo-ar", {"method": "magic"}, "speculative_config.method"),
        ("demo-ar", {"method": "ngram", "model": "demo-draft"}, "speculative_config.model"),
        ("demo-ar", {"method": "ngram", "num_speculative_tokens": 0}, "speculative_config.num_speculative_tokens"),
        ("demo-ar", {"method": "ngram", "num_speculative_tokens": 65}, "speculative_config.num_speculative_tokens"),
        ("demo-ar", {"method": "ngram", "num_speculative_tokens": "5"}, "speculative_config.num_speculative_tokens"),
        (
            "demo-ar",
            {"method": "ngram", "prompt_lookup_min": 6, "prompt_lookup_max": 5},
            "speculative_config.prompt_lookup_max",
        ),
        ("demo-ar", {"method": "ngram", "num_spec_tokens": 3}, "speculative_config.num_spec_tokens"),
        ("demo-diffusion", {}, "speculative_config"),
        ("demo-ar", {"method": "self"}, "speculative_config"),
        ("demo-diffusion", {"method": "ngram"}, "speculative_config"),
        ("demo-diffusion", {"num_speculative_tokens": 3}, "speculative_config"),
    ],
)
def test_what_cannot_be_done_is_refused(shipped: Live, model: str, config: dict[str, Any], param: str) -> None:
    answer = chat(shipped, model=model, speculative_config=config)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize(
    "text",
    [
        "ngram",
        "[]",
        "3",
        '{"method": "ngram", "k": 3}',
        '{"method": "draft_model"}',
        '{"model": "demo-nothing"}',
        '{"model": "demo-diffusion"}',
        '{"method": "diffusion", "model": "demo-draft"}',
        '[{"model": "demo-draft"}, {"model": "demo-ar"}]',
    ],
)
def test_a_configuration_that_cannot_be_is_refused_on_loading(text: str) -> None:
    with pytest.raises(DFastLLMError) as caught:
        load_engine("demo-ar", speculative=text)
    assert str(caught.value)


def test_a_draft_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(resolve("demo-draft"), other)
    body = json.loads((other / "tokenizer.json").read_text())
    vocab = body["model"]["vocab"]
    plain = [token for token in vocab if token.isalpha()][:2]
    vocab[plain[0]], vocab[plain[1]] = vocab[plain[1]], vocab[plain[0]]
    (other / "tokenizer.json").write_text(json.dumps(body))
    with pytest.raises(UnsupportedError, match="2 ids mean other tokens"):
        load_engine("demo-ar", speculative=json.dumps({"model": str(other)}))


def test_the_facade_takes_configurations_too() -> None:
    (config, _) = SpeculativeConfig.parse(CONFIG)
    with LLM("demo-ar", speculative=config) as llm:
        assert llm.chat(ASK)[0].outputs[0].usage.drafts > 0
