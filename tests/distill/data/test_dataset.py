"""Samples of a set: token ids against transformers, derived fields, spans, lengths, and what is left out and why."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dfastllm.distill import KDDataset
from dfastllm.distill.data.collate import TOKEN_ALIGNED, collate_kd_batch, to_rows
from dfastllm.distill.data.encode import RowEncoder, token_mask
from dfastllm.errors import DataError, TokenizerError, ValidationError
from dfastllm.llm import SHIPPED
from dfastllm.tasks import draw
from dfastllm.text import Tokenizer
from tests.distill.data.conftest import Write
from tests.text.conftest import KINDS

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = '<tool_call>{"name": "get_weather", "arguments": {"city": "Oslo"}}</tool_call>'
ASKED = [{"role": "user", "content": "What is the weather in Oslo?"}]
ANSWERED = [
    *ASKED,
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": '{"degrees": 3}'},
]
CALLS = {"prompt": ASKED, "tools": [WEATHER], "teacher_text": CALL}
SAYS = {"prompt": "What is 2 + 2?", "teacher_text": "2 + 2 = 4\nAnswer: 4"}
TELLS = {"prompt": ANSWERED, "tools": [WEATHER], "teacher_text": "It is 3 degrees in Oslo."}


def dataset(tokenizer: Tokenizer, *rows: dict[str, Any], **options: Any) -> KDDataset:
    return KDDataset.of(rows, RowEncoder(tokenizer, **options))


def text_at(tokenizer: Tokenizer, sample: dict[str, Any], mask: str) -> str:
    return tokenizer.decode(sample["input_ids"][sample[mask]].tolist(), skip_special=False)


def test_prompts_are_those_of_transformers(tokenizer: Tokenizer) -> None:
    """The whole conversation, tools included, through transformers' template and tokenizer, and then the response."""
    transformers = pytest.importorskip("transformers")
    other = transformers.AutoTokenizer.from_pretrained(SHIPPED / "demo-ar")
    for row in (CALLS, SAYS, TELLS):
        [sample] = dataset(tokenizer, row)
        messages = row["prompt"] if isinstance(row["prompt"], list) else [{"role": "user", "content": row["prompt"]}]
        prompt = other.apply_chat_template(
            messages, tools=row.get("tools"), add_generation_prompt=True, return_dict=True
        )["input_ids"]
        response = [*other(row["teacher_text"], add_special_tokens=False)["input_ids"], other.eos_token_id]
        assert sample["input_ids"].tolist() == [*prompt, *response]
        assert sample["response_start"] == len(prompt)
        assert sample["labels"].tolist() == [-100] * len(prompt) + response
        assert sample["attention_mask"].tolist() == [1] * len(sample["input_ids"])


def test_what_a_row_does_not_have_is_derived(tokenizer: Tokenizer) -> None:
    calls, says, tells = dataset(tokenizer, CALLS, SAYS, TELLS, prefix_tokens=6)
    assert [one["tool_should_be_used"] for one in (calls, says, tells)] == [True, False, False]
    assert calls["required_fields_present"] is True
    assert "required_fields_present" not in says
    assert calls["teacher_prefix_ids"].tolist() == calls["input_ids"][calls["response_start"] :][:6].tolist()
    assert "teacher_prefix_ids" not in says
    for one in (calls, says, tells):
        length = len(one["input_ids"]) - one["response_start"]
        assert one["teacher_attention_mask"].tolist() == [1] * length
    lacking = {**CALLS, "teacher_text": CALL.replace("city", "town")}
    [sample] = dataset(tokenizer, lacking)
    assert sample["required_fields_present"] is False
    assert sample["tool_should_be_used"] is True


def test_what_a_row_has_is_kept(tokenizer: Tokenizer) -> None:
    given = {
        "tool_should_be_used": False,
        "required_fields_present": False,
        "teacher_prefix_ids": [7, 8, 9],
        "teacher_attention_mask": [1, 1, 0, 0],
    }
    for row in ({**CALLS, **given}, {**CALLS, "metadata": given}):
        [sample] = dataset(tokenizer, row, prefix_tokens=2)
        assert sample["tool_should_be_used"] is False
        assert sample["required_fields_present"] is False
        assert sample["teacher_prefix_ids"].tolist() == [7, 8]
        assert sample["teacher_attention_mask"].tolist() == [1, 1, 0, 0]
    [sample] = dataset(tokenizer, {**CALLS, "tool_should_be_used": False})
    assert "teacher_prefix_ids" not in sample


def test_a_row_that_expects_a_call_should_use_a_tool_whatever_its_teacher_said(tokenizer: Tokenizer) -> None:
    expected = {"name": "get_weather", "arguments": {"city": "Oslo"}}
    row = {**CALLS, "teacher_text": "I do not know.", "expected": expected, "grader": "tool_call"}
    [sample] = dataset(tokenizer, row)
    assert sample["tool_should_be_used"] is True
    assert "teacher_prefix_ids" not in sample  # there is no call to teach; the JSON prior is for such rows
    assert sample["ground_truth_labels"].tolist() == [-100] * len(sample["labels"])
    [right] = dataset(tokenizer, {**row, "teacher_text": CALL})
    assert torch.equal(right["ground_truth_labels"], right["labels"])
    [open_text] = dataset(tokenizer, CALLS)
    assert "ground_truth_labels" not in open_text


def test_spans_of_a_call_and_of_what_follows_a_result(tokenizer: Tokenizer) -> None:
    wordy = {**CALLS, "teacher_text": f"Let me look that up. {CALL}"}
    for row in (CALLS, wordy):
        [sample] = dataset(tokenizer, row)
        assert text_at(tokenizer, sample, "tool_name_mask") in ("get_weather", '"get_weather', '"get_weather"')
        arguments = text_at(tokenizer, sample, "json_args_mask")
        assert arguments.strip().startswith('{"city": "Oslo"}')
        assert len(arguments.strip()) <= len('{"city": "Oslo"}}')  # a token may hold the object's end and the call's
        assert "integration_mask" not in sample
    [sample] = dataset(tokenizer, TELLS)
    assert text_at(tokenizer, sample, "integration_mask") == TELLS["teacher_text"]
    assert not {"tool_name_mask", "json_args_mask"} & sample.keys()
    assert not sample["integration_mask"][-1]  # EOS is no text
    [both] = dataset(tokenizer, {**TELLS, "teacher_text": f"It is cold. {CALL}"})
    assert text_at(tokenizer, both, "integration_mask").strip() == "It is cold."
    assert "Oslo" in text_at(tokenizer, both, "json_args_mask")


def test_the_prefix_may_begin_with_the_call(tokenizer: Tokenizer) -> None:
    wordy = {**CALLS, "teacher_text": f"Let me look that up. {CALL}"}
    [response], [call] = dataset(tokenizer, wordy), dataset(tokenizer, wordy, prefix_from="call")
    assert tokenizer.decode(response["teacher_prefix_ids"].tolist(), skip_special=False).startswith("Let me")
    assert call["teacher_prefix_ids"][0] == tokenizer.token_to_id("<tool_call>")


@pytest.mark.parametrize(
    ("offsets", "spans", "wanted"),
    [
        ([0, 2, 5], [(0, 2)], [1, 0, 0]),
        ([0, 2, 5], [(1, 3)], [1, 1, 0]),
        ([0, 2, 2, 3], [(2, 3)], [0, 1, 1, 0]),  # two tokens of one character
        ([0, 2, 5], [(4, 9)], [0, 1, 1]),
        ([0, 2, 5], [(0, 1), (5, 6)], [1, 0, 1]),
        ([0, 2, 5], [(2, 2)], [0, 0, 0]),
        ([], [(0, 1)], []),
    ],
)
def test_tokens_that_hold_a_character_of_a_span(offsets: list[int], spans: Any, wanted: list[int]) -> None:
    assert token_mask(offsets, spans) == list(map(bool, wanted))


def test_characters_of_several_tokens_belong_to_their_span_whole(tokenizer: Tokenizer) -> None:
    row = {**CALLS, "teacher_text": CALL.replace("Oslo", "漢字 😀")}
    [sample] = dataset(tokenizer, row)
    assert '"漢字 😀"' in text_at(tokenizer, sample, "json_args_mask")


@pytest.mark.parametrize("kind", ["byte_level", "gemma", "llama2", "metaspace"])
def test_spans_of_tokenizers_of_every_kind(kind: str) -> None:
    """SentencePiece's prefix space, byte fallback and Metaspace: the marked tokens are the parts of the call, and no
    token more than holds a character of them."""
    one = Tokenizer(KINDS[kind](), special_tokens={"eos_token": "<|endoftext|>"})
    arguments = '{"a": 1, "b": 2}'
    text = f'The dog é. <tool_call>{{"name": "add", "arguments": {arguments}}}'  # characters that they all have
    [sample] = dataset(one, {"prompt": "add", "tools": [{"function": {"name": "add"}}], "teacher_text": text})
    ids = sample["input_ids"].tolist()
    for mask, wanted in (("tool_name_mask", "add"), ("json_args_mask", arguments)):
        places = sample[mask].nonzero().flatten().tolist()
        assert places == list(range(places[0], places[-1] + 1))
        assert wanted in one.decode(ids[places[0] : places[-1] + 1])
        for first, last in ((places[0] + 1, places[-1]), (places[0], places[-1] - 1)):
            assert wanted not in one.decode(ids[first : last + 1])
    assert one.decode(ids[sample["response_start"] : -1]) == text


def test_top_k_is_aligned_with_the_token_that_it_is_about(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(SAYS["teacher_text"])
    topk = [[[id, -0.25], [id + 1, -1.5]][: 1 + at % 2] for at, id in enumerate(ids)]
    [sample] = dataset(tokenizer, {**SAYS, "teacher_topk": topk})
    start, chosen, logs = sample["response_start"], sample["teacher_topk_ids"], sample["teacher_topk_logprobs"]
    assert chosen.shape == logs.shape == (len(sample["input_ids"]), 2)
    assert chosen[start:-1, 0].tolist() == sample["labels"][start:-1].tolist()
    assert logs[start:-1, 0].tolist() == [-0.25] * len(ids)
    assert torch.isneginf(logs[:start]).all()
    assert torch.isneginf(logs[-1]).all()  # nothing was said of EOS
    assert logs[start, 1] == -math.inf
    assert chosen[start, 1] == 0
    [ended] = dataset(tokenizer, {**SAYS, "teacher_topk": [*topk, [[tokenizer.eos_id, -0.1]]]})
    assert ended["teacher_topk_ids"][-1, 0] == tokenizer.eos_id


def test_top_k_of_another_tokenisation_is_dropped_and_counted(tokenizer: Tokenizer) -> None:
    found = dataset(tokenizer, {**SAYS, "teacher_topk": [[[5, -0.5]]] * 3}, SAYS)
    assert len(found) == 2
    assert found.dropped == {"teacher_topk": 1}
    assert "teacher_topk_ids" not in found[0]
    count = len(tokenizer.encode(SAYS["teacher_text"]))
    [padding] = dataset(tokenizer, {**SAYS, "teacher_topk": [[[tokenizer.vocab_size, -0.1], [3, -4.0]]] * count})
    assert padding["teacher_topk_ids"][padding["response_start"]].tolist() == [3]  # an id of the teacher's padding


def test_a_long_prompt_loses_its_beginning_and_a_long_response_is_left_out(tokenizer: Tokenizer) -> None:
    [whole] = dataset(tokenizer, CALLS)
    length, response = len(whole["input_ids"]), len(whole["input_ids"]) - whole["response_start"]
    for most in (length, length - 3, response + 1):
        found = dataset(tokenizer, CALLS, max_seq_length=most)
        assert found[0]["input_ids"].tolist() == whole["input_ids"][-most:].tolist()
        assert found[0]["response_start"] == most - response
        assert found.cut == (most < length)
    found = dataset(tokenizer, CALLS, {**SAYS, "teacher_text": "4"}, max_seq_length=response)
    assert found.skipped == {"response_too_long": 1}
    assert len(found) == 1
    with pytest.raises(DataError, match=r"no row that can be used.*1 x response_too_long"):
        dataset(tokenizer, CALLS, max_seq_length=response)


def test_control_tokens_that_a_text_spells_are_text_and_its_end_is_one(tokenizer: Tokenizer) -> None:
    [plain], [ended], [spelled] = (
        dataset(tokenizer, {**SAYS, "teacher_text": text}) for text in ("4", "4<|end|>", "4<|end|>4<|user|>")
    )
    assert ended["input_ids"].tolist() == plain["input_ids"].tolist()
    ids = spelled["input_ids"][spelled["response_start"] :].tolist()
    assert ids.count(tokenizer.eos_id) == 1
    assert tokenizer.decode(ids[:-1], skip_special=True) == "4<|end|>4<|user|>"
    [asked] = dataset(tokenizer, {**SAYS, "prompt": "<|end|><|assistant|>"})
    assert asked["input_ids"][: asked["response_start"]].tolist().count(tokenizer.eos_id) == 1  # the template's own


LEFT_OUT = [
    ({**SAYS, "teacher_text": "<|end|>"}, "empty_teacher_text"),
    ({**SAYS, "teacher_text": "\ud800"}, "bad_text"),
    ({**SAYS, "prompt": "\ud800"}, "bad_prompt"),
    ({**SAYS, "teacher_prefix_ids": [99_999]}, "bad_teacher_prefix_ids"),
    ({**SAYS, "expected": 3, "grader": "function"}, "bad_expected"),
    ({**CALLS, "teacher_text": '{"name": "get_weather", "parameters": {"city": "Oslo"}}'}, "foreign_call_form"),
]


@pytest.mark.parametrize(("row", "reason"), LEFT_OUT, ids=[reason for _, reason in LEFT_OUT])
def test_a_row_that_the_tokenizer_cannot_take_is_left_out(row: Any, reason: str, tokenizer: Tokenizer) -> None:
    found = dataset(tokenizer, row, SAYS)
    assert len(found) == 1
    assert found.skipped == {reason: 1}


def test_tools_that_a_template_does_not_show_are_left_out(tokenizer: Tokenizer) -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
    from dfastllm.text import ChatTemplates

    deaf = Tokenizer(
        tokenizer.backend, special_tokens=tokenizer.special_tokens, templates=ChatTemplates({"default": template})
    )
    found = dataset(deaf, CALLS, SAYS)
    assert found.skipped == {"tools_unsupported": 1}
    bare = Tokenizer(tokenizer.backend, special_tokens=tokenizer.special_tokens)
    found = dataset(bare, {**CALLS, "prompt": "Call get_weather(city) for Oslo."}, CALLS)
    assert found.skipped == {"bad_prompt": 1}  # messages need a template
    assert found[0]["tool_should_be_used"] is True
    prompt = found[0]["input_ids"][: found[0]["response_start"]].tolist()
    assert bare.decode(prompt) == "Call get_weather(city) for Oslo."


def test_prompts_may_be_taken_as_they_are(tokenizer: Tokenizer) -> None:
    [raw], [asked] = dataset(tokenizer, SAYS, raw_prompts=True), dataset(tokenizer, SAYS)
    assert tokenizer.decode(raw["input_ids"][: raw["response_start"]].tolist(), skip_special=False) == SAYS["prompt"]
    assert asked["response_start"] > raw["response_start"]


def test_options_that_make_no_sense_are_refused(tokenizer: Tokenizer, write: Write) -> None:
    path = write(SAYS)
    for options, says in (
        ({"max_seq_length": 1}, "at least 2"),
        ({"prefix_tokens": 0}, "at least 1"),
        ({"prefix_from": "end"}, "response or call"),
        ({"tokenizer_path": "demo-ar"}, "one of tokenizer and"),
    ):
        with pytest.raises(ValidationError, match=says):
            KDDataset(path, tokenizer, **options)  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="one of tokenizer and"):
        KDDataset(path)
    endless = Tokenizer(tokenizer.backend, templates=tokenizer.templates)
    with pytest.raises(TokenizerError, match="no end of text"):
        KDDataset(path, endless)


def test_a_file_is_read_with_its_header_skips_and_summary(write: Write) -> None:
    path = write({"__header__": {"seed": 5}}, CALLS, "no json", TELLS, {"prompt": "x"}, SAYS)
    found = KDDataset(path, tokenizer_path="demo-ar", max_seq_length=64)
    assert found.header == {"seed": 5}
    assert len(found) == 3
    assert found.skipped == {"bad_json": 1, "no_teacher_text": 1}
    assert found[-1]["metadata"]["prompt"] == SAYS["prompt"]
    assert found[0]["metadata"]["line"] == 2
    assert found.lengths() == [len(sample["input_ids"]) for sample in found]  # type: ignore[attr-defined]
    summary = found.summary()
    assert json.loads(json.dumps(summary)) == summary
    assert summary["rows"] == 3
    assert summary["spans"] == {"tool_name_mask": 1, "json_args_mask": 1, "integration_mask": 1}
    assert summary["first_skipped"]["bad_json"].startswith("set.jsonl:3: ")
    assert summary["tool_should_be_used"] == summary["teacher_prefix_ids"] == 1
    assert len(KDDataset(path, tokenizer_path="demo-ar", limit=2)) == 2
    two = KDDataset([path, write(SAYS, [], name="more.jsonl")], tokenizer_path="demo-ar")
    assert len(two) == 4
    assert two.skipped == {"bad_json": 1, "no_teacher_text": 1, "not_an_object": 1}


def test_a_set_without_a_usable_row_says_why(tokenizer: Tokenizer, write: Write) -> None:
    with pytest.raises(DataError, match=r"2 x no_prompt \(set.jsonl:2: .*1 x bad_json"):
        KDDataset(write("no json", {"teacher_text": "x"}, {"teacher_text": "x"}), tokenizer)
    with pytest.raises(DataError, match="left out: none"):
        KDDataset(write(""), tokenizer)


def test_the_task_mix_is_read_without_a_loss(tokenizer: Tokenizer) -> None:
    """Every sample of the demo models' mix is a row, its reference answer is right, and it is derived as it is made."""
    from dfastllm.distill.data.generate import row_of

    samples = [draw("validation", 1, index) for index in range(300)]
    found = dataset(tokenizer, *(row_of(sample, str(index)) for index, sample in enumerate(samples)))
    assert found.skipped == {}
    assert found.summary()["teacher_right"] == 1.0
    for sample, one in zip(found, samples, strict=True):  # type: ignore[call-overload]
        assert sample["tool_should_be_used"] == (one.grader == "tool_call")
        assert ("integration_mask" in sample) == (one.messages[-1]["role"] == "tool")
        if one.grader == "tool_call":
            assert sample["required_fields_present"]
            assert one.expected["name"] in text_at(tokenizer, sample, "tool_name_mask")
            given = json.loads(text_at(tokenizer, sample, "json_args_mask").strip().removesuffix("}") + "}")
            assert given == one.expected["arguments"]


WORDS = st.text(st.sampled_from('ab 1{}[]":,<>|_\n') | st.characters(), max_size=20)
PIECES = st.sampled_from(
    ['<tool_call>{"name": "get_weather", "arguments": {"city": "Oslo"}}</tool_call>', "<|end|>", "{", ""]
)
TEXT = st.builds(lambda parts: "".join(parts), st.lists(WORDS | PIECES, max_size=4))
ROWS = st.lists(
    st.fixed_dictionaries(
        {"prompt": TEXT | st.just(ASKED) | st.just(ANSWERED), "teacher_text": TEXT},
        optional={
            "tools": st.just([WEATHER]),
            "tool_should_be_used": st.booleans() | st.none(),
            "teacher_prefix_ids": st.lists(st.integers(0, 2000), max_size=4),
            "teacher_attention_mask": st.lists(st.integers(0, 1), max_size=6),
            "teacher_topk": st.lists(
                st.lists(st.tuples(st.integers(0, 1500), st.floats(-9, 0)), max_size=3), max_size=6
            ),
            "metadata": st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
        },
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ROWS, st.integers(3, 60))
def test_random_rows_never_stop_a_set_and_stay_aligned(tokenizer: Tokenizer, rows: Any, longest: int) -> None:
    """Each row is a sample or is counted; in a batch every key has its rows and tokens; and after `to_rows` what stands
    at t is about the token at t + 1."""
    found = dataset(tokenizer, *rows, {"prompt": "a", "teacher_text": "b"}, max_seq_length=longest)
    assert len(found) + sum(found.skipped.values()) == len(rows) + 1
    samples = [found[i] for i in range(len(found))]
    batch = collate_kd_batch(samples, found.pad_id)
    rowwise = to_rows(batch)
    count, width = batch["input_ids"].shape
    assert width == max(found.lengths()) <= longest
    for at, sample in enumerate(samples):
        length, start = len(sample["input_ids"]), sample["response_start"]
        assert 1 <= start < length
        assert sample["labels"][-1] == tokenizer.eos_id
        assert batch["input_ids"][at, :length].tolist() == sample["input_ids"].tolist()
        assert batch["attention_mask"][at].tolist() == [1] * length + [0] * (width - length)
        targets = rowwise["labels"][at]
        assert targets[: start - 1].tolist() == [-100] * (start - 1)
        assert targets[start - 1 : length - 1].tolist() == sample["input_ids"][start:].tolist()
        assert targets[length - 1 :].tolist() == [-100] * (width - length + 1)
    for name, fill in TOKEN_ALIGNED.items():
        if name in batch:
            assert batch[name].shape[:2] == (count, width)
            assert torch.equal(rowwise[name][:, :-1], batch[name][:, 1:])
            assert (rowwise[name][:, -1] == fill).all()
