"""Prefix caching over a socket: what the usage and the metrics say of it, salts, and who refuses."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from openai import BadRequestError, OpenAI

from tests.kit.live import Live, serving
from tests.kit.served import random_engine

SYSTEM = "You are a careful assistant. Answer in one short sentence. "  # a token per byte
CHUNK = 16  # the torch backend shares whole chunks


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    engines = {
        "causal": random_engine("llama", seed=1, prefill_chunk=CHUNK),
        "blocks": random_engine("sdar", seed=2, prefill_chunk=CHUNK),
        "canvas": random_engine("llada", prefill_chunk=CHUNK),
        "off": random_engine("llama", seed=1, prefill_chunk=CHUNK, prefix_caching=False),
    }
    with serving(engines) as running:
        yield running


@pytest.fixture
def client(live: Live) -> OpenAI:
    for engine in live.worker.engines.values():
        engine.pages.forget()  # nothing runs between two tests
    return live.client()


def cached(answer: object) -> int:
    usage = answer.usage  # type: ignore[attr-defined]
    assert usage.prompt_tokens_details is not None
    return int(usage.prompt_tokens_details.cached_tokens)


@pytest.mark.parametrize("model", ["causal", "blocks"])
def test_cached_tokens_and_the_same_answer(live: Live, client: OpenAI, model: str) -> None:
    hits, queries = (live.metric(f"prefix_cache_{what}_total", model_name=model) for what in ("hits", "queries"))
    options = {"model": model, "max_tokens": 12, "temperature": 0.7, "seed": 4}
    first = client.completions.create(prompt=SYSTEM + "one", **options)
    second = client.completions.create(prompt=SYSTEM + "one", **options)
    third = client.completions.create(prompt=SYSTEM + "another question", **options)
    shared = len(SYSTEM) // CHUNK * CHUNK
    assert shared >= 48
    assert [cached(a) for a in (first, second, third)] == [0, shared, shared]
    assert first.choices[0].text == second.choices[0].text
    assert live.metric("prefix_cache_hits_total", model_name=model) - hits == 2 * shared
    prompts = sum(a.usage.prompt_tokens for a in (first, second, third) if a.usage)
    assert live.metric("prefix_cache_queries_total", model_name=model) - queries == prompts


def test_a_chat_finds_its_earlier_turns(client: OpenAI) -> None:
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "hello"}]
    found = []
    for _ in range(3):
        answer = client.chat.completions.create(model="causal", messages=messages, max_tokens=8, temperature=0)  # type: ignore[arg-type]
        found.append(cached(answer))
        assert answer.usage is not None
        assert found[-1] <= answer.usage.prompt_tokens
        messages += [{"role": "assistant", "content": "so it is"}, {"role": "user", "content": "and what then?"}]
    assert found[0] == 0 < found[1] < found[2]


def test_a_stream_reports_it_too(client: OpenAI) -> None:
    for wanted in (0, 48):
        chunks = list(
            client.completions.create(
                model="causal",
                prompt=SYSTEM,
                max_tokens=4,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        assert cached(chunks[-1]) == wanted


def test_choices_count_their_prompt_once(client: OpenAI) -> None:
    client.completions.create(model="causal", prompt=SYSTEM, max_tokens=2)
    both = client.completions.create(model="causal", prompt=[SYSTEM, SYSTEM + "x"], n=3, max_tokens=2)
    assert both.usage is not None
    assert both.usage.prompt_tokens == 2 * len(SYSTEM) + 1
    assert cached(both) == 2 * 48


def test_salts_share_only_among_themselves(client: OpenAI) -> None:
    def ask(model: str = "causal", **extra: str) -> int:
        return cached(client.completions.create(model=model, prompt=SYSTEM, max_tokens=2, extra_body=extra))

    assert [ask(), ask(cache_salt="a"), ask(cache_salt="b"), ask(cache_salt="a"), ask()] == [0, 0, 0, 48, 48]
    assert [ask("off", cache_salt="a"), ask("off", cache_salt="a")] == [0, 0]


@pytest.mark.parametrize("salt", ["", 7, "s" * 1025])
def test_a_bad_salt_is_named(client: OpenAI, salt: object) -> None:
    with pytest.raises(BadRequestError) as refused:
        client.completions.create(model="causal", prompt="x", extra_body={"cache_salt": salt})
    assert refused.value.param == "cache_salt"


def test_a_masked_diffusion_model_refuses(live: Live, client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match="its attention is full") as refused:
        client.completions.create(model="canvas", prompt=SYSTEM, extra_body={"cache_salt": "a"})
    assert refused.value.param == "cache_salt"
    assert refused.value.code == "unsupported"
    for _ in range(2):
        assert cached(client.completions.create(model="canvas", prompt=SYSTEM, max_tokens=8)) == 0
    assert live.metric("prefix_cache_queries_total", model_name="canvas") == 0
