"""Tool calls in generated text: every form and its near misses, however the text is cut."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfastllm.text import CallBegin, CallText, ParsedMessage, Piece, ToolCall, ToolCallParser, parse_tool_calls
from dfastllm.text.tools import FORMS

Calls = Sequence[tuple[str, Any]]
HERMES, MISTRAL, LLAMA = FORMS

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-99, 99)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.sampled_from(["</tool_call>", "[TOOL_CALLS]", "}", '\\"', "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.text("abz_09", min_size=1, max_size=8)
CALLS = st.tuples(NAMES, st.dictionaries(st.text(max_size=5), VALUES, max_size=3))
PROSE = st.text(st.characters(exclude_characters="<[{", exclude_categories=["Cs"]), max_size=10)
CUTS = st.lists(st.integers(1, 9), min_size=1, max_size=6)


def dumped(name: str, arguments: Any, key: str = "arguments") -> str:
    return json.dumps({"name": name, key: arguments}, ensure_ascii=False)


def hermes(calls: Calls) -> str:
    return "\n".join(f"<tool_call>\n{dumped(*call)}\n</tool_call>" for call in calls)


def mistral_list(calls: Calls) -> str:
    objects = [dumped(*call)[:-1] + f', "id": "abcdefgh{i}"}}' for i, call in enumerate(calls)]
    return f"[TOOL_CALLS] [{', '.join(objects)}]" if calls else ""


def mistral_names(calls: Calls) -> str:
    return "".join(f"[TOOL_CALLS]{name}[ARGS]{json.dumps(arguments)}" for name, arguments in calls)


def mistral_ids(calls: Calls) -> str:
    return "".join(f"[TOOL_CALLS]{name}[CALL_ID]abcDEF123[ARGS]{json.dumps(arguments)}" for name, arguments in calls)


def llama(calls: Calls) -> str:
    return "; ".join(dumped(*call, key="parameters") for call in calls)


def llama_python(calls: Calls) -> str:
    return "<|python_tag|>" + llama(calls) if calls else ""


WRITERS: dict[str, tuple[Any, Callable[[Calls], str]]] = {
    "hermes": (HERMES, hermes),
    "mistral_list": (MISTRAL, mistral_list),
    "mistral_names": (MISTRAL, mistral_names),
    "mistral_ids": (MISTRAL, mistral_ids),
    "llama": (LLAMA, llama),
    "llama_python": (LLAMA, llama_python),
}


def cut(text: str, sizes: Sequence[int]) -> Iterator[str]:
    at, turn = 0, 0
    while at < len(text):
        size = sizes[turn % len(sizes)]
        yield text[at : at + size]
        at, turn = at + size, turn + 1


def pushed(parser: ToolCallParser, parts: Iterator[str] | Sequence[str]) -> list[Piece]:
    out = [piece for part in parts for piece in parser.push(part)]
    return out + parser.flush()


def joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Neighbouring pieces of one kind as one."""
    out: list[Piece] = []
    for piece in pieces:
        if out and isinstance(piece, str) and isinstance(out[-1], str):
            out[-1] += piece
        elif out and isinstance(piece, CallText) and isinstance(out[-1], CallText):
            out[-1] = CallText(out[-1].text + piece.text)
        else:
            out.append(piece)
    return out


def checked(pieces: Sequence[Piece]) -> None:
    """The order of pieces that clients of a stream rely on."""
    begun: CallBegin | None = None
    arguments = ""
    for piece in pieces:
        if isinstance(piece, str):
            assert piece != ""
            assert begun is None
        elif isinstance(piece, CallBegin):
            assert piece.name != ""
            assert begun is None
            begun, arguments = piece, ""
        elif isinstance(piece, CallText):
            assert piece.text != ""
            assert begun is not None
            arguments += piece.text
        else:
            assert begun is not None
            assert (piece.name, piece.arguments) == (begun.name, arguments)
            begun = None
    assert begun is None


def strictly(text: str) -> Any:
    def refuse(name: str) -> Any:
        raise ValueError(name)

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("form", WRITERS)
@given(calls=st.lists(CALLS, max_size=3), cuts=CUTS)
@settings(max_examples=60, deadline=None)
def test_what_was_written_is_read_back(form: str, calls: list[tuple[str, Any]], cuts: list[int]) -> None:
    only, write = WRITERS[form]
    names = {name for name, _ in calls}
    pieces = pushed(ToolCallParser((only,), names), cut(write(calls), cuts))
    checked(pieces)
    read = [piece for piece in pieces if isinstance(piece, ToolCall)]
    assert [(call.name, strictly(call.arguments), call.whole) for call in read] == [(*call, True) for call in calls]
    assert not any(isinstance(piece, str) for piece in pieces)
    assert parse_tool_calls(write(calls), names=names) == ParsedMessage("", tuple(read)), "among all forms too"


@given(prose=PROSE, calls=st.lists(CALLS, min_size=1, max_size=3), tail=PROSE, between=st.sampled_from(["", " ", "\n"]))
@settings(max_examples=60, deadline=None)
def test_text_around_calls_stays_as_it_was_written(
    prose: str, calls: list[tuple[str, Any]], tail: str, between: str
) -> None:
    tags = [f"<tool_call>{dumped(*call)}</tool_call>" for call in calls]
    parsed = parse_tool_calls(prose + between + between.join(tags) + between + tail)
    assert len(parsed.tool_calls) == len(calls)
    content = prose + between * (len(calls) + 1) + tail
    content = content if prose.strip() else content.lstrip()
    assert parsed.content == (content if tail.strip() else content.rstrip())


def test_content_before_and_after_a_call_is_not_glued() -> None:
    call = '<tool_call>\n{"name": "x", "arguments": {}}\n</tool_call>'
    assert parse_tool_calls(f"First.\n\n{call}\n\nSecond.").content == "First.\n\n\n\nSecond."
    assert parse_tool_calls(f"First. {call} ").content == "First."
    assert parse_tool_calls(f" {call}\n{call} Then.").content == "Then."
    assert parse_tool_calls(f"\n{call}\n").content == ""


NOISE = st.sampled_from(
    [
        "<tool_call>",
        "</tool_call>",
        '{"name": "f", "arguments": {}}',
        '{"name": "f", "parameters": {"α": [1, "β\n"]}}',
        '{"arguments": "{\\"γ\\": 1}", "name": "f"}',
        '{"name": "f", "arguments": {"δ": ',
        '{"name": 3}',
        "[TOOL_CALLS]",
        "[ARGS]",
        "[CALL_ID]",
        "<|python_tag|>",
        "f",
        "<tool",
        '"',
        "\\",
        "\\u00",
        " \n",
        "hi ε",
        "{",
        "}",
        "[",
        "]",
        ",",
        "ζ",
    ]
)


def letters(text: str) -> str:
    return "".join(character for character in text if "α" <= character <= "ω")


@given(parts=st.lists(NOISE, max_size=10), cuts=CUTS, strict=st.booleans())
@settings(max_examples=600, deadline=None)
def test_any_cutting_gives_the_same_and_loses_nothing(parts: list[str], cuts: list[int], strict: bool) -> None:
    text = "".join(parts)
    pieces = pushed(ToolCallParser(names={"f"}, strict=strict), cut(text, cuts))
    checked(pieces)
    assert joined(pieces) == joined(pushed(ToolCallParser(names={"f"}, strict=strict), [text]))
    told = [p if isinstance(p, str) else p.text for p in pieces if isinstance(p, str | CallText)]
    assert letters("".join(told)) == letters(text), "no letter is lost, doubled or out of its place"
    for call in pieces:
        if isinstance(call, ToolCall) and call.whole:
            assert isinstance(strictly(call.arguments), dict)
    if not any(isinstance(piece, ToolCall) for piece in pieces):
        assert "".join(told) == text, "nothing the model wrote is lost"


def tag(body: str) -> str:
    return f"<tool_call>{body}</tool_call>"


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        (tag('{"name": "f", "parameters": {"k": 1}}'), [("f", '{"k": 1}')]),
        (tag('{"arguments": {"k": 1}, "name": "f"}'), [("f", '{"k": 1}')]),
        (tag('{"id": 7, "name": "f", "type": [{}], "arguments": {"k": 1}, "more": null}'), [("f", '{"k": 1}')]),
        (
            tag('\n {"name": "f", "arguments": "{\\"k\\": \\"\\\\u00e9\\ud83d\\ude00\\"}"}\n'),
            [("f", '{"k": "\\u00e9😀"}')],
        ),
        (tag('{"name": "f", "arguments": null}'), [("f", "{}")]),
        (tag('{"name": "f", "arguments": ""}'), [("f", "{}")]),
        (tag('{"name": "f"}'), [("f", "{}")]),
        (
            tag('[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {"k": 1}}]'),
            [("f", "{}"), ("g", '{"k": 1}')],
        ),
        (tag('{"name": "f", "arguments": {}}\n{"name": "g", "arguments": {}}'), [("f", "{}"), ("g", "{}")]),
        (tag('{"name": "f", "arguments": {}}, {"name": "g"}'), [("f", "{}"), ("g", "{}")]),
        ('<tool_call>\n{"name": "f", "arguments": {"k": 1}}', [("f", '{"k": 1}')]),
        ('<tool_call>{"name": "f", "arguments": {"k": 1}', [("f", '{"k": 1}')]),
        (tag('{"name": "f", "arguments": {"k": 1}'), [("f", '{"k": 1}')]),
        (tag('{"name": "f", "arguments": {"k": 1}}}'), [("f", '{"k": 1}')]),
        (tag('{"name": "f", "arguments": {"k": "a\nb\tc\x01"}}'), [("f", '{"k": "a\\nb\\tc\\u0001"}')]),
        (
            tag('{"name": "f", "arguments": {"x": 1e999, "y": 0.10, "y": 1.0E+2}}'),
            [("f", '{"x": 1e999, "y": 0.10, "y": 1.0E+2}')],
        ),
        (
            tag('{"name": "f", "arguments": {"x": NaN, "y": [-Infinity, Infinity]}}'),
            [("f", '{"x": null, "y": [null, null]}')],
        ),
        (tag('{"name": "f", "arguments": {"x": "</tool_call>"}}'), [("f", '{"x": "</tool_call>"}')]),
        (tag('{"name": "f", "arguments": {"s": "\\ud800é"}}'), [("f", '{"s": "\\ud800é"}')]),
        ('{"name": "f", "parameters": {"k": 1}}', [("f", '{"k": 1}')]),
        ('\n{"type": "function", "name": "f", "parameters": {"k": 1}}\n', [("f", '{"k": 1}')]),
        ('{"name": "f", "arguments": {}}\n{"name": "g", "parameters": {}}', [("f", "{}"), ("g", "{}")]),
        ('[{"name": "f", "arguments": {}}]', [("f", "{}")]),
        ('<|python_tag|>{"name": "f", "parameters": {"k": 1}}', [("f", '{"k": 1}')]),
        ('[TOOL_CALLS]{"name": "f", "arguments": {"k": 1}}', [("f", '{"k": 1}')]),
        ('[TOOL_CALLS]f{"k": 1}', [("f", '{"k": 1}')]),
        ('[TOOL_CALLS]f\n[ARGS] {"k": 1}[TOOL_CALLS]g[CALL_ID]abcdefghi[ARGS]{}', [("f", '{"k": 1}'), ("g", "{}")]),
        ('[TOOL_CALLS][{"name": "f", "arguments": "{\\"k\\": 1}"}]', [("f", '{"k": 1}')]),
    ],
)
def test_near_misses_are_calls(text: str, calls: list[tuple[str, str]]) -> None:
    expected = ParsedMessage("", tuple(ToolCall(*call) for call in calls))
    assert parse_tool_calls(text, names={"f", "g"}) == expected
    by_character = pushed(ToolCallParser(names={"f", "g"}), list(text))
    assert [piece for piece in by_character if isinstance(piece, ToolCall)] == list(expected.tool_calls)
    assert not any(isinstance(piece, str) for piece in by_character)


@pytest.mark.parametrize(
    "text",
    [
        tag('{"name": "f", "arguments": {'),
        tag('{"name": "f", "arguments": []}'),
        tag('{"name": "f", "arguments": 1}'),
        tag('{"name": "f", "arguments": "hello"}'),
        tag('{"name": "f", "arguments": "[1]"}'),
        tag('{"name": "f", "arguments": {unquoted: 1}}'),
        tag('{"name": "", "arguments": {}}'),
        tag('{"name": null, "arguments": {}}'),
        tag('{"arguments": {}}'),
        tag('{"arguments": {"k": nope}, "name": "f"}'),
        tag("{'name': 'f'}"),
        tag(""),
        tag("[]"),
        tag("[1]") + " ",
        tag("[" * 20_000),
        tag('{"a":' * 20_000),
        '<tool_call>{"name": "f", ',
        "<tool_call>{",
        "[TOOL_CALLS] none",
        "[TOOL_CALLS]f",
        "[TOOL_CALLS]f[ARGS]",
        "[TOOL_CALLS]f[ARGS][1]",
        "[TOOL_CALLS][1]",
        "[TOOL_CALLS",
        "[ [TOOL_CALL",
        "<|python_tag|>print(1)",
        '{"name": "f"}',
        '{"name": "other", "parameters": {}}',
        '{"name": "f", "surname": "g", "parameters": {}}',
        'Look: {"name": "f", "parameters": {}}',
        '[{"title": 1}]',
        "[1, 2]",
        "[",
        "{}",
        '"f"',
        "  spaces stay  ",
        "<tool_",
        "",
    ],
)
def test_what_is_no_call_stays_text(text: str) -> None:
    assert parse_tool_calls(text, names={"f"}) == ParsedMessage(text)


@pytest.mark.parametrize(
    ("text", "arguments", "content"),
    [
        ('<tool_call>{"name": "f", "arguments": {"k": "a lo', '{"k": "a lo', ""),
        ('<tool_call>{"name": "f", "arguments": {"k": 1', '{"k": 1', ""),
        (tag('{"name": "f", "arguments": {"k": }}') + " Well.", '{"k": }}', "Well."),
        (tag('{"name": "f", "arguments": {"k": 1,}}'), '{"k": 1,}}', ""),
        (tag('{"name": "f", "arguments": {"k": "a\\qb"}}'), '{"k": "a\\qb"}}', ""),
        (tag('{"name": "f", "arguments": {"k": 0x10}}'), '{"k": 0x10}}', ""),
        (tag('{"name": "f", "arguments": "{\\"k\\": 1} and"}'), '{"k": 1} and}', ""),
        ('[TOOL_CALLS]f[ARGS]{"k": oh', '{"k": oh', ""),
        ('{"name": "f", "parameters": {"k": oh}', '{"k": oh}', ""),
    ],
)
def test_a_call_that_breaks_off_says_so(text: str, arguments: str, content: str) -> None:
    """A stream has shown it as a call: it stays one, with what was written, and is not whole."""
    parsed = parse_tool_calls(text, names={"f"})
    assert parsed == ParsedMessage(content, (ToolCall("f", arguments, whole=False),))


def test_a_good_call_after_a_bad_one() -> None:
    good = ToolCall("f", '{"a": 1}')
    assert parse_tool_calls("<tool_call>oops " + tag(dumped("f", {"a": 1}))) == ParsedMessage(
        "<tool_call>oops", (good,)
    )
    assert parse_tool_calls(tag(dumped("f", {"a": 1}) + '\n{"name": 3}')) == ParsedMessage(
        '{"name": 3}</tool_call>', (good,)
    )


def test_other_names_than_the_tools() -> None:
    """Where markup leaves no doubt a call of an unknown tool is a call, as vLLM and llama.cpp have it."""
    known = {"f"}
    for text in (tag(dumped("g", {})), "[TOOL_CALLS]g[ARGS]{}", '<|python_tag|>{"name": "g", "parameters": {}}'):
        assert parse_tool_calls(text, names=known).tool_calls == (ToolCall("g", "{}"),)
        assert parse_tool_calls(text, names=known, strict=True) == ParsedMessage(text)
    bare = '{"name": "g", "parameters": {}}'
    assert parse_tool_calls(bare, names=known) == ParsedMessage(bare)
    assert parse_tool_calls(bare).tool_calls == (ToolCall("g", "{}"),)


def test_every_form_is_written_by_these_tests() -> None:
    assert {form.name for form, _ in WRITERS.values()} == {form.name for form in FORMS}


def test_forms_that_were_not_asked_for_stay_text() -> None:
    for form, (own, write) in WRITERS.items():
        text = write([("f", {"k": 1})])
        others = [other for other in FORMS if other is not own]
        assert parse_tool_calls(text, others, {"f"}) == ParsedMessage(text), form


def test_content_streams_before_a_call() -> None:
    parser = ToolCallParser()
    assert parser.push("Let me see. <to") == ["Let me see."]
    assert parser.push("p of the page> <tool_call") == [" <top of the page>"]
    assert parser.push('>{"name": "f"') == []
    assert parser.push(', "arguments": {') == []
    assert parser.push('"x": "</tool_call>') == [CallBegin("f"), CallText('{"x": "</tool_call>')]
    assert parser.push('", "y": 1') == [CallText('", "y": ')]
    assert parser.push("2}}</tool_") == [CallText("12}")]
    assert parser.push("call>\n") == [ToolCall("f", '{"x": "</tool_call>", "y": 12}')]
    assert parser.flush() == []


def test_a_call_that_breaks_streams_on() -> None:
    parser = ToolCallParser()
    assert parser.push('<tool_call>{"name": "f", "arguments": {"k": "a\\qb') == [
        CallBegin("f"),
        CallText('{"k": "a\\qb'),
    ]
    assert parser.push(' c"}}</tool') == [CallText(' c"}}')]
    assert parser.push("_call>") == [ToolCall("f", '{"k": "a\\qb c"}}', whole=False)]


def test_an_answer_in_json_streams_as_soon_as_it_is_no_call() -> None:
    parser = ToolCallParser(names={"f"})
    assert parser.push(' {"ti') == []
    assert parser.push('tle": "A lo') == [' {"title": "A lo']
    assert parser.push('ng story"} ') == ['ng story"}']


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>{" * 10_000,
        tag('{"arguments": {"k": "' + "x" * 120_000 + '"}, "name": "f"}'),
        tag('{"name": "f", "arguments": {"k": ' + "1" * 120_000 + "}}"),
        '{"name": "f", "arguments": "' + "\\n" * 60_000,
    ],
    ids=["openings", "arguments before the name", "a number", "white space in a string"],
)
def test_work_grows_with_the_text(text: str) -> None:
    """Each character is read once. Where each push copied what is held, these took minutes."""
    began = time.process_time()
    pieces = pushed(ToolCallParser(names={"f"}), cut(text, [2]))
    assert time.process_time() - began < 10
    checked(pieces)


@given(value=st.dictionaries(st.text(max_size=4), st.floats() | st.text(max_size=6), max_size=4))
@settings(max_examples=80, deadline=None)
def test_arguments_are_json_whatever_python_calls_json(value: dict[str, Any]) -> None:
    """Python's json writes NaN and Infinity, and reads raw control characters when told so."""
    text = json.dumps(value, ensure_ascii=False).replace("\\n", "\n").replace("\\t", "\t")
    (call,) = parse_tool_calls(tag(f'{{"name": "f", "arguments": {text}}}')).tool_calls
    expected = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in value.items()}
    assert call.whole
    assert strictly(call.arguments) == json.loads(text.replace("NaN", "null"), strict=False) or (
        strictly(call.arguments) == expected
    )
