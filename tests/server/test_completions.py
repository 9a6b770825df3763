"""/v1/completions over a socket with the official client."""

from __future__ import annotations

import math

import pytest
from openai import BadRequestError, OpenAI

from tests.kit.live import Live
from tests.kit.served import Parrot, byte_tokenizer

TOKENS = {"return_token_ids": True}


@pytest.fixture(scope="module")
def client(live: Live) -> OpenAI:
    return live.client()


def test_answer_usage_and_figures(client: OpenAI) -> None:
    answer = client.completions.create(model="causal", prompt="hello", max_tokens=7, temperature=0, extra_body=TOKENS)
    choice = answer.choices[0]
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len("hello")
    assert answer.usage.completion_tokens == 7
    assert answer.usage.total_tokens == 12
    figures = answer.model_extra["dfastllm"]
    assert figures["nfe"] == 7
    assert figures["tokens_per_forward"] == 1.0
    assert figures["exactness"] == "reference"
    assert 0 <= figures["queue_seconds"] <= figures["first_token_seconds"] <= figures["total_seconds"]
    ids = choice.model_extra["token_ids"]
    assert byte_tokenizer().decode(ids) == choice.text
    assert choice.model_extra["prompt_token_ids"] == byte_tokenizer().encode("hello")


def test_a_limit_that_was_not_sent_is_what_the_context_leaves(client: OpenAI) -> None:
    for text in ("hello", "x" * 505):
        answer = client.completions.create(model="causal", prompt=text, extra_body={"ignore_eos": True})
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 512 - len(text)


def test_defaults_of_a_diffusion_model_are_the_documents(client: OpenAI) -> None:
    body = {"ignore_eos": True, **TOKENS}
    plain = client.completions.create(model="canvas", prompt="hello", extra_body=body)
    spelled = client.completions.create(
        model="canvas",
        prompt="hello",
        max_tokens=128,
        temperature=0.0,
        extra_body={**body, "use_cache": True, "use_dual_cache": True, "steps": 128, "block_length": 32},
    )
    assert plain.usage is not None
    assert plain.usage.completion_tokens == 128
    assert plain.choices[0].model_extra["token_ids"] == spelled.choices[0].model_extra["token_ids"]
    assert plain.model_extra["dfastllm"]["nfe"] == spelled.model_extra["dfastllm"]["nfe"] == 128
    assert plain.model_extra["dfastllm"]["exactness"] == "approximate"


@pytest.mark.parametrize("model", ["causal", "canvas", "blocks"])
def test_a_stream_gives_what_the_whole_answer_gives(client: OpenAI, model: str) -> None:
    options = {"model": model, "prompt": "once upon", "max_tokens": 24, "temperature": 0.8, "seed": 5}
    whole = client.completions.create(**options, extra_body=TOKENS)
    chunks = list(
        client.completions.create(**options, stream=True, stream_options={"include_usage": True}, extra_body={**TOKENS})
    )
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    ids = [i for c in chunks if c.choices for i in c.choices[0].model_extra.get("token_ids", [])]
    assert ids == whole.choices[0].model_extra["token_ids"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert chunks[-1].model_extra["dfastllm"]["nfe"] == whole.model_extra["dfastllm"]["nfe"]
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert reasons[-1] == whole.choices[0].finish_reason
    assert set(reasons[:-1]) == {None}
    assert len(chunks) > 3


def test_usage_in_a_stream_only_when_asked(client: OpenAI) -> None:
    chunks = list(client.completions.create(model="causal", prompt="x", max_tokens=3, stream=True))
    assert all(c.choices and c.usage is None for c in chunks)


def test_prompts_in_every_form(client: OpenAI) -> None:
    texts = ["alpha", "be", "gamma ray"]
    ids = [byte_tokenizer().encode(text) for text in texts]
    options = {"model": "causal", "max_tokens": 5, "temperature": 0}
    alone = [client.completions.create(prompt=text, **options).choices[0].text for text in texts]
    for prompt in (texts, ids):
        many = client.completions.create(prompt=prompt, **options)
        assert [choice.text for choice in many.choices] == alone
        assert [choice.index for choice in many.choices] == [0, 1, 2]
        assert many.usage is not None
        assert many.usage.prompt_tokens == sum(map(len, ids))
    assert client.completions.create(prompt=ids[0], **options).choices[0].text == alone[0]


def test_choices_of_a_seeded_call(client: OpenAI) -> None:
    options = {"model": "causal", "prompt": "hello", "max_tokens": 12, "temperature": 1.0, "seed": 40}
    three = client.completions.create(n=3, **options)
    assert len({choice.text for choice in three.choices}) == 3
    assert three.choices[0].text == client.completions.create(**options).choices[0].text
    assert three.choices[2].text == client.completions.create(**{**options, "seed": 42}).choices[0].text
    assert three.usage is not None
    assert three.usage.prompt_tokens == 5  # one prompt, however many choices


def test_many_prompts_and_choices_streamed(client: OpenAI) -> None:
    options = {"model": "canvas", "prompt": ["ab", "cde"], "n": 2, "max_tokens": 8, "temperature": 1.0, "seed": 1}
    extra = {"block_length": 4}
    whole = client.completions.create(**options, extra_body=extra)
    texts = [""] * 4
    for chunk in client.completions.create(
        **options, stream=True, stream_options={"include_usage": True}, extra_body=extra
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]
    assert chunk.usage == whole.usage
    assert chunk.usage is not None
    assert chunk.usage.prompt_tokens == 5


def test_echo(client: OpenAI) -> None:
    plain = client.completions.create(model="causal", prompt="say ", max_tokens=4, temperature=0)
    echoed = client.completions.create(model="causal", prompt="say ", max_tokens=4, temperature=0, echo=True)
    assert echoed.choices[0].text == "say " + plain.choices[0].text
    ids = byte_tokenizer().encode("say ")
    stream = client.completions.create(model="causal", prompt=ids, max_tokens=4, temperature=0, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == echoed.choices[0].text


def test_stop_strings_and_their_reason(client: OpenAI, live: Live, parrot: Parrot) -> None:
    parrot.teach(1, "one two three four")
    options = {"model": "parrot", "prompt": "x", "max_tokens": 40}
    free = client.completions.create(**options)
    assert free.choices[0].text == "one two three four"
    assert free.choices[0].finish_reason == "stop"
    assert free.choices[0].model_extra["stop_reason"] == byte_tokenizer().eos_id
    cut = client.completions.create(stop=["three", "zero"], **options)
    assert cut.choices[0].text == "one two "
    assert cut.choices[0].finish_reason == "stop"
    assert cut.choices[0].model_extra["stop_reason"] == "three"
    kept = client.completions.create(stop="three", **options, extra_body={"include_stop_str_in_output": True})
    assert kept.choices[0].text == "one two three"
    streamed = client.completions.create(stop="three", stream=True, **options)
    assert "".join(chunk.choices[0].text for chunk in streamed) == "one two "


def test_vllm_extras_reach_the_sampler(client: OpenAI) -> None:
    tokenizer = byte_tokenizer()
    a, b = tokenizer.encode("ab")

    def text(**extra: object) -> str:
        return (
            client.completions.create(
                model="causal", prompt="q", max_tokens=40, temperature=1.0, seed=3, extra_body=extra
            )
            .choices[0]
            .text
        )

    assert set(text(allowed_token_ids=[a, b])) == {"a", "b"}
    assert set(text(logit_bias={str(a): 100})) == {"a"}
    assert text(top_k=1) == text(top_k=1, top_p=0.5) == text(min_p=1.0)  # greedy, three ways
    assert text(stop_token_ids=[a], allowed_token_ids=[a]) == ""
    assert text(stop_token_ids=[a], allowed_token_ids=[a, b], min_tokens=4)[:4] == "bbbb"
    few = {"allowed_token_ids": list(range(60, 90))}
    for penalty in ({"repetition_penalty": 9.0}, {"frequency_penalty": 2.0}, {"presence_penalty": -2.0}):
        assert text(**few, **penalty) != text(**few), penalty


def test_logprobs_of_completions(client: OpenAI) -> None:
    answer = client.completions.create(
        model="causal", prompt="hello", max_tokens=6, temperature=0, logprobs=3, extra_body=TOKENS
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.top_logprobs is not None
    assert len(logprobs.tokens) == len(logprobs.token_logprobs or []) == len(logprobs.text_offset or []) == 6
    for token, value, top in zip(logprobs.tokens, logprobs.token_logprobs or [], logprobs.top_logprobs, strict=True):
        assert 3 <= len(top) <= 4
        assert top[token] == value == max(top.values())
        assert list(top.values()) == sorted(top.values(), reverse=True)
        assert value < 0 < math.exp(value)
    ids, text = answer.choices[0].model_extra["token_ids"], answer.choices[0].text
    offsets = logprobs.text_offset or []
    for i, offset in enumerate(offsets):  # where its text begins: special tokens are not shown, half a character waits
        before = byte_tokenizer().decode(ids[:i])
        assert text[:offset] == before[:offset]
        assert len(before) - (before[-1:] == "\ufffd") <= offset <= len(before)
    none = client.completions.create(model="causal", prompt="hello", max_tokens=6, temperature=0)
    assert none.choices[0].logprobs is None
    chunks = client.completions.create(
        model="causal", prompt="hello", max_tokens=6, temperature=0, logprobs=3, stream=True
    )
    pieces = [c.choices[0].logprobs for c in chunks if c.choices[0].logprobs]
    assert [t for p in pieces for t in p.tokens or []] == logprobs.tokens
    assert [o for p in pieces for o in p.text_offset or []] == offsets


def test_infilling_fixes_the_suffix(client: OpenAI) -> None:
    options = {"model": "canvas", "prompt": "def f(x):", "max_tokens": 16, "extra_body": {**TOKENS, "ignore_eos": True}}
    filled = client.completions.create(suffix="return y", **options)
    assert filled.usage is not None
    assert filled.usage.prompt_tokens == len("def f(x):return y")
    assert filled.usage.completion_tokens == 16
    other = client.completions.create(suffix="completely different", **options)
    assert other.choices[0].text != filled.choices[0].text  # the canvas sees what follows it
    with pytest.raises(BadRequestError) as refused:
        client.completions.create(model="causal", prompt="a", suffix="b")
    assert refused.value.param == "suffix"


def test_a_canvas_is_rounded_up_and_the_text_is_not(client: OpenAI) -> None:
    answer = client.completions.create(
        model="canvas",
        prompt="x",
        max_tokens=10,
        stream=True,
        stream_options={"canvas_events": True, "include_usage": True},
        extra_body={"block_length": 8, "ignore_eos": True},
    )
    chunks = list(answer)
    lengths = {
        e["length"] for c in chunks for e in (c.model_extra.get("canvas") or {}).get("events", []) if "length" in e
    }
    assert lengths == {16}
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 10
