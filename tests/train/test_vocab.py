"""The demo tokenizer: any UTF-8 round-trips, numbers have one spelling, the chat template shows every role and tool."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from dfastllm.tasks import draw
from dfastllm.text.tokenizer import Tokenizer
from dfastllm.train.vocab import PLAIN, ROLES, SPECIAL, train_tokenizer

MARKS = (*SPECIAL.values(), *ROLES)


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=("Cs",))))
def test_any_text_round_trips(tokenizer: Tokenizer, text: str) -> None:
    if not any(mark in text for mark in MARKS):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_texts_of_the_mix_round_trip_and_never_hold_special_tokens(tokenizer: Tokenizer) -> None:
    for i in range(300):
        sample = draw("validation", 0, i)
        ids = tokenizer.encode(sample.response)
        assert tokenizer.decode(ids) == sample.response
        assert not tokenizer.special_ids & set(ids)


def test_every_digit_is_a_token_of_its_own(tokenizer: Tokenizer) -> None:
    alone = {digit: tokenizer.encode(digit) for digit in "0123456789"}
    assert all(len(ids) == 1 for ids in alone.values())
    assert tokenizer.encode("90210") == [alone[d][0] for d in "90210"]
    assert tokenizer.encode(" 7")[-1:] == alone["7"]


def test_special_tokens_are_declared(tokenizer: Tokenizer) -> None:
    ids = {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id}
    assert None not in ids
    assert len(ids) == 4
    assert ids <= tokenizer.special_ids
    calls = [tokenizer.token_to_id(token) for token in PLAIN]
    assert None not in calls
    assert not set(calls) & tokenizer.special_ids  # calls are shown to the caller, not skipped
    assert tokenizer.vocab_size == 500


def test_training_is_deterministic(runs: Path, tmp_path: Path) -> None:
    train_tokenizer(tmp_path, samples=300, vocab_size=500)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (runs / "tokenizer" / name).read_bytes()


def test_chat_template_renders_system_tools_calls_and_results(tokenizer: Tokenizer) -> None:
    tool = {
        "type": "function",
        "function": {
            "name": "set_light",
            "parameters": {
                "type": "object",
                "properties": {"room": {"type": "string"}, "level": {"type": "integer"}},
                "required": ["room"],
            },
        },
    }
    call = {"id": "1", "type": "function", "function": {"name": "set_light", "arguments": '{"room": "hall"}'}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Light!"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "ok"},
    ]
    assert tokenizer.apply_chat_template(messages, [tool]) == (
        "<|bos|><|system|>Be brief.\nTools:\nset_light(room: string, level?: integer)<|end|>"
        "<|user|>Light!<|end|>"
        '<|assistant|><tool_call>{"name": "set_light", "arguments": {"room": "hall"}}</tool_call><|end|>'
        "<|tool|>ok<|end|><|assistant|>"
    )
    call["function"]["arguments"] = {"room": "hall"}  # type: ignore[index]
    assert '"arguments": {"room": "hall"}}</tool_call>' in tokenizer.apply_chat_template(messages, [tool])
    bare = {"type": "function", "function": {"name": "now"}}
    assert "now()" in tokenizer.apply_chat_template(messages[:2], [bare])
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], add_generation_prompt=False) == (
        "<|bos|><|user|>a<|end|>"
    )
