"""A server's tokens as a student's, against what is known of both: every form of telling a token, and what is lost."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, normalizers
from tokenizers.models import BPE

from dfastllm.distill.teacher.align import Student
from dfastllm.distill.teacher.answer import Answer, read_answer
from dfastllm.llm import resolve
from dfastllm.text import Tokenizer
from tests.distill.teacher.mock_teacher import completion

TOOLS = [
    {
        "type": "function",
        "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {}}}},
    }
]
YES, NO = "The", " of"  # each is one token of the demo models
ASK = [{"role": "user", "content": "What is the weather in Oslo?"}]


@pytest.fixture(scope="module")
def demo() -> Tokenizer:
    return Tokenizer.load(resolve("demo-ar"))


def entry(token: str, data: bytes | None, logprob: float, top: list[tuple[str, bytes | None, float]]) -> dict[str, Any]:
    def one(token: str, data: bytes | None, logprob: float) -> dict[str, Any]:
        return {"token": token, "logprob": logprob, "bytes": None if data is None else list(data)}

    return {**one(token, data, logprob), "top_logprobs": [one(*other) for other in top]}


def in_bytes(tokenizer: Tokenizer, ids: list[int], others: list[int]) -> list[dict[str, Any]]:
    """As OpenAI tells tokens: by text and bytes. Decoded one by one, which is right for tokens of whole characters."""
    rows = []
    for id in ids:
        texts = [tokenizer.decode([i], skip_special=False) for i in (id, *others)]
        top = [(text, text.encode(), math.log(0.5 / 2**at)) for at, text in enumerate(texts)]
        rows.append(entry(*top[0], top))
    return rows


def in_ids(ids: list[int], others: list[int], *, as_vllm: bool) -> list[dict[str, Any]]:
    """As vLLM and dfastllm tell tokens by ids; vLLM gives the bytes of that name."""
    rows = []
    for id in ids:
        names = [f"token_id:{i}" for i in (id, *others)]
        top = [(n, n.encode() if as_vllm else b"?", math.log(0.5 / 2**at)) for at, n in enumerate(names)]
        rows.append(entry(*top[0], top))
    return rows


def some_ids(tokenizer: Tokenizer, count: int) -> list[int]:
    """Ordinary tokens of whole characters."""
    plain = [i for i in range(tokenizer.vocab_size) if i not in tokenizer.special_ids]
    return [i for i in plain if "\ufffd" not in tokenizer.decode([i])][100 : 100 + count]


@pytest.mark.parametrize("form", ["bytes", "ids", "vllm ids"])
@pytest.mark.parametrize("with_end", [False, True])
def test_what_is_told_comes_back_by_the_students_ids(demo: Tokenizer, form: str, with_end: bool) -> None:
    text = "The answer is 42, I think."
    ids, others = demo.encode(text), some_ids(demo, 3)
    assert not set(ids) & set(others)
    told = [*ids, *demo.eos_ids[:1]] if with_end else ids
    logprobs = in_bytes(demo, told, others) if form == "bytes" else in_ids(told, others, as_vllm=form == "vllm ids")
    topk = Student(demo).topk(read_answer(completion(text, logprobs=logprobs)), text)
    wanted = [[(i, round(math.log(0.5 / 2**at), 6)) for at, i in enumerate([id, *others])] for id in told]
    assert topk == wanted


def test_an_end_without_bytes_is_the_end(demo: Tokenizer) -> None:
    logprobs = [*in_bytes(demo, demo.encode("Yes."), []), entry("", b"", -0.25, [])]
    topk = Student(demo).topk(read_answer(completion("Yes.", logprobs=logprobs)), "Yes.")
    assert topk[-1] == [(demo.eos_id, -0.25)]


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows[:-1],
        lambda rows: [*rows, rows[0]],
        lambda rows: [*rows, rows[0], rows[0]],
        lambda rows: [rows[1], rows[0], *rows[2:]],
        lambda rows: [entry("The a", b"The a", -1, []), *rows[2:]],
    ],
    ids=["one less", "one more that is no end", "two more", "another order", "cut elsewhere"],
)
def test_a_text_that_is_cut_otherwise_loses_its_logprobs(demo: Tokenizer, change: Any) -> None:
    text = "The answer is 42, I think."
    student = Student(demo)
    rows = change(in_bytes(demo, demo.encode(text), []))
    assert student.topk(read_answer(completion(text, logprobs=rows)), text) == "tokens_differ"


def test_ids_of_another_tokenizer_lose_them_too(demo: Tokenizer) -> None:
    text = "The answer is 42."
    ids = [id + 1 for id in demo.encode(text)]
    told = read_answer(completion(text, logprobs=in_ids(ids, [], as_vllm=True)))
    assert Student(demo).topk(told, text) == "tokens_differ"
    beside = read_answer(completion(text, logprobs=in_bytes(demo, demo.encode(text), []), token_ids=ids))
    assert Student(demo).topk(beside, text) == "tokens_differ"
    assert Student(demo).topk(read_answer(completion(text)), text) == "no_logprobs"


def test_an_answer_that_spells_control_tokens_loses_them(demo: Tokenizer) -> None:
    text = "Say <|user|> now."
    assert Student(demo).topk(read_answer(completion(text, logprobs=in_bytes(demo, demo.encode(text), []))), text) == (
        "tokens_differ"
    )


@pytest.mark.parametrize(
    "logprobs",
    [[0.5], [math.nan], [math.inf], [-0.1, -0.1], [math.log(0.6), math.log(0.5)], [None], ["-1"], [True]],
)
def test_numbers_that_are_no_log_probabilities_are_not_taken(demo: Tokenizer, logprobs: list[Any]) -> None:
    texts = [YES, NO]
    assert all(len(demo.encode(text)) == 1 for text in texts)
    top = [{"token": text, "logprob": p, "bytes": None} for text, p in zip(texts, logprobs, strict=False)]
    row = {**top[0], "top_logprobs": top}
    answer = read_answer(completion(YES, logprobs=[row]))
    assert Student(demo).topk(answer, YES) == "bad_logprobs"


def test_a_token_that_the_student_does_not_have_is_left_to_the_tail(demo: Tokenizer) -> None:
    top = [(YES, None, -0.5), (YES + " and more", None, -1.5), ("token_id:999999", None, -3.0), (NO, None, -4.0)]
    answer = read_answer(completion(YES, logprobs=[entry(YES, None, -0.5, top)]))
    (yes,), (no,) = demo.encode(YES), demo.encode(NO)
    assert Student(demo).topk(answer, YES) == [[(yes, -0.5), (no, -4.0)]]


def test_a_taken_token_that_is_not_among_the_best_is_there_and_nothing_is_twice(demo: Tokenizer) -> None:
    (yes,), (no,) = demo.encode(YES), demo.encode(NO)
    top = [(NO, None, -0.25), (NO, None, -2.0)]
    answer = read_answer(completion(YES, logprobs=[entry(YES, None, -5.0, top)]))
    assert Student(demo).topk(answer, YES) == [[(no, -0.25), (yes, -5.0)]]
    never = read_answer(completion(YES, logprobs=[entry(YES, None, -1.0, [(NO, None, -math.inf)])]))
    assert Student(demo).topk(never, YES) == [[(yes, -1.0)]]


def test_half_characters(bytes_tokenizer: Tokenizer) -> None:
    """A token may be a byte of a character. Servers that tell its text only as U+FFFD do not hide which it was, as long
    as it is taken: the text says."""
    text = "é!"
    ids = bytes_tokenizer.encode(text)
    assert len(ids) == 3
    exact = [entry("bytes:\\xc3", None, -1.0, []), entry("\ufffd", b"\xa9", -1.0, []), entry("!", None, -1.0, [])]
    vague = [entry("\ufffd", "\ufffd".encode(), -1.0, []), entry("\ufffd", None, -1.0, []), entry("!", None, -1.0, [])]
    for logprobs in (exact, vague):
        assert Student(bytes_tokenizer).topk(read_answer(completion(text, logprobs=logprobs)), text) == [
            [(id, -1.0)] for id in ids
        ]
    wrong = [*exact[:1], entry("\ufffd", b"\xaa", -1.0, []), exact[2]]
    assert Student(bytes_tokenizer).topk(read_answer(completion(text, logprobs=wrong)), text) == "tokens_differ"


def twins() -> Tokenizer:
    """A tokenizer of SentencePiece's kind in which several ids stand for the same bytes: byte tokens beside letters,
    and a token with a space beside the one that texts are cut into."""
    names = ["<unk>", "<0x41>", "<0x42>", "A", "B", "</s>", " B", "▁B", "▁"]
    vocabulary = {name: id for id, name in enumerate(names)}
    model = BPE(vocab=vocabulary, merges=[("▁", "B")], byte_fallback=True, unk_token="<unk>")
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken("</s>", special=True)])
    return Tokenizer(backend, special_tokens={"eos_token": "</s>"})


def test_of_ids_with_the_same_bytes_the_one_that_texts_are_cut_into() -> None:
    tokenizer = twins()
    assert tokenizer.encode("A B") == [3, 7]
    a = entry("A", b"A", -0.5, [("A", b"A", -0.5), ("B", b"B", -1.5)])
    b = entry(" B", b" B", -0.25, [(" B", b" B", -0.25), ("A", b"A", -2.0), ("</s>", b"</s>", -4.0)])
    topk = Student(tokenizer).topk(read_answer(completion("A B", logprobs=[a, b])), "A B")
    assert topk == [[(3, -0.5), (4, -1.5)], [(7, -0.25), (3, -2.0), (5, -4.0)]]


def called(arguments: str = '{"city": "Oslo"}', content: str = "", **rest: Any) -> Answer:
    return read_answer(completion(content, calls=[("get_weather", arguments)], reason="tool_calls", **rest))


def test_calls_are_written_in_the_students_form(demo: Tokenizer) -> None:
    """An OpenAI server gives calls and no text of them. The template of the demo models writes them as Hermes does."""
    text = Student(demo).text(called('{"city":"Oslo"}'), ASK, TOOLS)
    assert text is not None
    start, _, rest = text.partition("<tool_call>")
    assert start == ""
    assert json.loads(rest.removesuffix("</tool_call>")) == {"name": "get_weather", "arguments": {"city": "Oslo"}}
    both = Student(demo).text(called(content="Let me see."), ASK, TOOLS)
    assert both is not None
    assert both.startswith("Let me see.")
    assert "<tool_call>" in both


@pytest.mark.parametrize("by", ["ids", "bytes"])
def test_the_teachers_own_words_stay_where_they_are_the_students_form(demo: Tokenizer, by: str) -> None:
    """Its spacing is kept, and so its tokens are, and so its log-probabilities are."""
    text = '<tool_call>{"name":"get_weather",  "arguments": {"city": "Oslo"}}</tool_call>'
    ids = demo.encode(text)
    told = [*ids, demo.eos_id] if by == "ids" else ids
    assert demo.eos_id is not None
    rest: dict[str, Any] = {"token_ids": told} if by == "ids" else {}
    answer = called(logprobs=in_bytes(demo, [id for id in told if id is not None], []), **rest)
    student = Student(demo)
    assert student.text(answer, ASK, TOOLS) == text
    topk = student.topk(answer, text)
    assert [row[0][0] for row in topk] == told


def test_other_words_for_a_call_are_written_anew(demo: Tokenizer) -> None:
    """A teacher whose own form is another one: Llama's bare JSON with parameters."""
    raw = '{"name": "get_weather", "parameters": {"city": "Oslo"}}'
    answer = called(logprobs=in_bytes(demo, demo.encode(raw), []))
    text = Student(demo).text(answer, ASK, TOOLS)
    assert text is not None
    assert text.startswith("<tool_call>")
    assert Student(demo).topk(answer, text) == "tokens_differ"


def test_a_template_without_calls_has_no_form_for_them() -> None:
    from tests.kit.served import byte_tokenizer

    plain = byte_tokenizer("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]")
    assert Student(plain).text(called(), ASK, TOOLS) is None
    assert not Student(plain).cut_call("<tool_call>{", TOOLS)


def test_a_call_that_is_cut_is_seen(demo: Tokenizer) -> None:
    student = Student(demo)
    whole = '<tool_call>{"name": "get_weather", "arguments": {"city": "Oslo"}}</tool_call>'
    assert [end for end in range(12, len(whole) + 1) if not student.cut_call(whole[:end], TOOLS)][-1] == len(whole)
    assert student.cut_call(whole[:11], TOOLS)
    assert student.cut_call(whole[:-14], TOOLS)
    assert student.cut_call("<tool_call>Oslo</tool_call>", TOOLS)
    assert not student.cut_call('<tool_call>{"name": "get_weather", "arguments": {}}</tool_call>', TOOLS)
    assert not student.cut_call("I have no tool for that.", TOOLS)


@pytest.mark.parametrize(
    "response",
    [
        {},
        {"choices": []},
        {"choices": [7]},
        {"choices": [{"text": "of another endpoint"}]},
        {"choices": [{"message": {"content": 7}}]},
        {"choices": [{"message": {"content": "", "tool_calls": [{"id": "x"}]}}]},
        {"choices": [{"message": {"content": "", "tool_calls": [{"function": {"name": "f", "arguments": 7}}]}}]},
        {"choices": [{"message": {"content": "x"}, "logprobs": {"content": [7]}}]},
        {"choices": [{"message": {"content": "x"}, "logprobs": {"content": [{"logprob": 1}]}}]},
    ],
)
def test_what_is_no_chat_completion_is_told(response: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"choices|logprobs|call"):
        read_answer(response)


def test_the_forms_of_content_calls_and_usage() -> None:
    for arguments, text in (({"a": "é"}, '{"a": "é"}'), ({}, "{}"), ("", "{}"), (None, "{}"), ('{"a":1}', '{"a":1}')):
        call = {"function": {"name": "f", "arguments": arguments}}
        response = {"choices": [{"message": {"content": None, "tool_calls": [call]}}]}
        assert [(c.arguments, c.whole) for c in read_answer(response).calls] == [(text, True)]
    parts = completion(None, usage=None)
    parts["choices"][0]["message"]["content"] = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    answer = read_answer(parts)
    assert (answer.content, answer.prompt_tokens, answer.completion_tokens) == ("ab", None, None)
    assert read_answer(completion("x", usage=(3, 4))).completion_tokens == 4
    assert read_answer(completion("x", token_ids=["1"])).token_ids is None
