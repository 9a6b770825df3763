"""Lines of a set: every reason for leaving one out, fields at the top and in metadata, headers, writing."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfastllm.distill.data.rows import BadRow, RowFile, check_row, write_rows
from dfastllm.errors import DataError, StorageError
from tests.distill.data.conftest import Write
from tests.kit.source import ROOT, SRC

GOOD = {"prompt": "What is 2 + 2?", "teacher_text": "4"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}

# line -> the one reason for which it is left out
REASONS: list[tuple[Any, str]] = [
    ('{"prompt": "a", "teacher_text": "b"', "bad_json"),
    ("not json", "bad_json"),
    ('{"prompt": "a", "teacher_text": "b", "n": ' + "9" * 5000 + "}", "bad_json"),
    ("[" * 20_000 + "]" * 20_000, "bad_json"),
    (b'{"prompt": "\xff", "teacher_text": "b"}', "not_utf8"),
    ([1, 2], "not_an_object"),
    ("null", "not_an_object"),
    ({"teacher_text": "b"}, "no_prompt"),
    ({"prompt": None, "teacher_text": "b"}, "no_prompt"),
    ({"prompt": " \n", "teacher_text": "b"}, "empty_prompt"),
    ({"prompt": 7, "teacher_text": "b"}, "bad_prompt"),
    ({"prompt": [], "teacher_text": "b"}, "bad_prompt"),
    ({"prompt": [{"role": "robot", "content": "a"}], "teacher_text": "b"}, "bad_prompt"),
    ({"prompt": [{"role": "user", "contents": "a"}], "teacher_text": "b"}, "bad_prompt"),
    ({**GOOD, "prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "bad_prompt"),
    ({"prompt": "a"}, "no_teacher_text"),
    ({"prompt": "a", "teacher_text": ["b"]}, "bad_teacher_text"),
    ({"prompt": "a", "teacher_text": "  "}, "empty_teacher_text"),
    ({**GOOD, "metadata": "m"}, "bad_metadata"),
    ({**GOOD, "id": 1.5}, "bad_id"),
    ({**GOOD, "source": 3}, "bad_source"),
    ({**GOOD, "task": []}, "bad_task"),
    ({**GOOD, "grader": 1}, "bad_grader"),
    ({**GOOD, "tools": TOOL}, "bad_tools"),
    ({**GOOD, "tools": [{"type": "function"}]}, "bad_tools"),
    ({**GOOD, "tools": [{"function": {"name": ""}}]}, "bad_tools"),
    ({**GOOD, "tools": [{"function": {"name": "f", "parameters": [1]}}]}, "bad_tools"),
    ({**GOOD, "tool_should_be_used": 1}, "bad_tool_should_be_used"),
    ({**GOOD, "required_fields_present": "yes"}, "bad_required_fields_present"),
    ({**GOOD, "teacher_prefix_ids": "12"}, "bad_teacher_prefix_ids"),
    ({**GOOD, "teacher_prefix_ids": [1, -1]}, "bad_teacher_prefix_ids"),
    ({**GOOD, "teacher_prefix_ids": [1.0]}, "bad_teacher_prefix_ids"),
    ({**GOOD, "teacher_attention_mask": [0, 2]}, "bad_teacher_attention_mask"),
    ({**GOOD, "teacher_attention_mask": 1}, "bad_teacher_attention_mask"),
    ({**GOOD, "teacher_topk": [[1, -0.5]]}, "bad_teacher_topk"),
    ({**GOOD, "teacher_topk": [[[1, 0.5]]]}, "bad_teacher_topk"),
    ({**GOOD, "teacher_topk": [[["1", -0.5]]]}, "bad_teacher_topk"),
    ({**GOOD, "teacher_topk": [[[1, -0.5], [1, -2.0]]]}, "bad_teacher_topk"),
    ('{"prompt": "a", "teacher_text": "b", "teacher_topk": [[[1, NaN]]]}', "bad_teacher_topk"),
    ({"__header__": {}}, "late_header"),
]


@pytest.mark.parametrize(("line", "reason"), REASONS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_bad_line_is_left_out_by_its_reason(line: Any, reason: str, write: Write) -> None:
    file = RowFile(write(GOOD, line, GOOD))
    assert [row.line for row in file] == [1, 3]
    assert dict(file.skips.counts) == {reason: 1}
    assert file.skips.first[reason].startswith("set.jsonl:2: ")
    assert reason in str(file.skips)
    assert [row.line for row in file] == [1, 3]
    assert dict(file.skips.counts) == {reason: 1}  # of one reading, not of both


def test_a_huge_line_is_passed_over_and_never_held(write: Write) -> None:
    huge = {"prompt": "a", "teacher_text": "b" * 3_000_000}
    file = RowFile(write(GOOD, huge, GOOD, huge), longest_line=1000)
    assert [row.line for row in file] == [1, 3]
    assert dict(file.skips.counts) == {"line_too_long": 2}
    exact = json.dumps(GOOD).encode()
    assert [row.line for row in RowFile(write(exact, exact + b"\r"), longest_line=len(exact))] == [1, 2]
    assert [row.line for row in RowFile(write(exact, b" " + exact), longest_line=len(exact))] == [1]


def test_blank_lines_and_a_byte_order_mark_are_no_rows(write: Write) -> None:
    file = RowFile(write(b"\xef\xbb\xbf" + json.dumps({"__header__": {"seed": 3}}).encode(), "", "  ", GOOD, ""))
    assert [row.line for row in file] == [4]
    assert file.header == {"seed": 3}
    assert not file.skips.counts


def test_a_header_that_is_no_object_is_counted(write: Write) -> None:
    file = RowFile(write({"__header__": 3}, GOOD))
    assert len(list(file)) == 1
    assert file.header == {}
    assert dict(file.skips.counts) == {"bad_header": 1}


def test_a_missing_file_and_a_directory_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl is not there.*generate"):
        RowFile(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match="is a directory"):
        RowFile(tmp_path)


FIELDS = {
    "id": "x",
    "source": "s",
    "task": "t",
    "tools": [TOOL],
    "expected": {"a": 1},
    "grader": "json",
    "tool_should_be_used": False,
    "teacher_prefix_ids": [1, 2],
    "required_fields_present": True,
    "teacher_attention_mask": [1, 1, 0],
    "teacher_topk": [[[5, -0.5], [6, -1.0]], []],
}


def test_optional_fields_are_read_at_the_top_then_in_metadata() -> None:
    top, inner = check_row({**GOOD, **FIELDS}), check_row({**GOOD, "metadata": {**FIELDS, "more": 1}})
    for name, value in FIELDS.items():
        found = getattr(top, name)
        assert json.loads(json.dumps(found)) == value, name
        assert getattr(inner, name) == found, name
    assert inner.metadata == {"more": 1}
    both = check_row({**GOOD, "tool_should_be_used": True, "id": None, "metadata": FIELDS, "extra": 2})
    assert both.tool_should_be_used is True
    assert both.id == "x"  # null is absence
    assert both.metadata == {"extra": 2}
    assert check_row({**GOOD, "id": 12}).id == "12"
    assert check_row({**GOOD, "teacher_prefix_ids": []}).teacher_prefix_ids is None


def test_log_probabilities_a_little_above_zero_are_zero() -> None:
    row = check_row({**GOOD, "teacher_topk": [[[3, 1e-7], [4, -(10**400)]]]})
    assert row.teacher_topk == (((3, 0.0), (4, float("-inf"))),)


def test_prompts_for_a_teacher_need_no_text(write: Write) -> None:
    path = write({"prompt": "a"}, {"prompt": [{"role": "user", "content": "b"}], "teacher_text": "c"})
    rows = list(RowFile(path, needs_text=False))
    assert [row.messages for row in rows] == [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]]
    assert [row.teacher_text for row in rows] == ["", "c"]


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "set.jsonl"
    rows = [{"prompt": "ä\u2028b", "teacher_text": f"{i}"} for i in range(3)]
    assert write_rows(path, rows, {"seed": 1}) == 3
    file = RowFile(path)
    assert [(row.prompt, row.teacher_text) for row in file] == [("ä\u2028b", f"{i}") for i in range(3)]
    assert file.header == {"seed": 1}
    with pytest.raises(DataError, match="there already"):
        write_rows(path, [])
    assert write_rows(path, rows[:1], force=True) == 1
    assert len(list(RowFile(path))) == 1


@pytest.mark.parametrize("value", [float("nan"), "\ud800"])
def test_a_set_is_written_whole_or_not_at_all(value: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="JSON does not know"):
        write_rows(tmp_path / "set.jsonl", [GOOD, {"prompt": value}])
    assert os.listdir(tmp_path) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="cannot be written"):
        write_rows(tmp_path / "file" / "set.jsonl", [GOOD])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(["prompt", "teacher_text", "metadata", *FIELDS]), JSON) | JSON)
def test_any_value_is_a_row_or_has_a_reason(value: Any) -> None:
    try:
        row = check_row(value)
    except BadRow as error:
        row = None
        reason = error.reason
    assert (row.messages and row.teacher_text.strip()) if row else reason


def test_every_reason_is_in_the_document() -> None:
    source = "".join((SRC / "distill" / "data" / name).read_text(encoding="utf-8") for name in ("rows.py", "encode.py"))
    reasons = set(re.findall(r'BadRow\(\s*"(\w+)"', source))
    assert len(reasons) > 15
    page = (ROOT / "docs" / "distillation.md").read_text(encoding="utf-8")
    fields = {f"bad_{name}" for name in FIELDS} | {"bad_metadata"}  # one line, `bad_FIELD`
    assert {reason for reason in reasons - fields if f"`{reason}`" not in page} == set()
