"""A row to the token ids of one student: prompt, response, and for each token what the losses ask of it.

The prompt is what this tokenizer's chat template makes of the conversation and its tools, encoded as the server encodes
it. The response is encoded by itself, as it is generated, and always ends with EOS. Fields that a row does not have are
derived from its text.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from dfastllm.distill.data.calls import FoundCall, Span, any_call, find_calls, outside, required_present
from dfastllm.distill.data.rows import BadRow, Row
from dfastllm.errors import DFastLLMError, TokenizerError, UnsupportedError, ValidationError
from dfastllm.tasks.evaluator import Refused
from dfastllm.tasks.graders import CALL_GRADERS, GRADERS
from dfastllm.text import TextOffsets, Tokenizer, call_reading, chat_prompt, parse_tool_calls, taught
from dfastllm.text.tools import FORMS, ToolCallParser

__all__ = ["SPANS", "Example", "PrefixFrom", "RowEncoder", "token_mask"]

PrefixFrom = Literal["response", "call"]
SPANS = ("tool_name_mask", "json_args_mask", "integration_mask")


@dataclass(frozen=True)
class Example:
    """One row in tokens. Tensors are int32 where ids fit, to be small; `sample` gives them as a batch wants them.

    prompt        [P] ids, at least one.
    response      [R] ids, EOS last.
    teacher_mask  [Lt] 1 on the tokens of the teacher's answer.
    prefix        first ids of an early call; None: none is known.
    right         the row's grader finds the teacher's answer right; None: the row has no grader.
    topk          ([R, K] ids, [R, K] log-probabilities), 0 and -inf where there is none.
    spans         name of a batch's mask -> [R] bool, for those that the row has.
    metadata      what is no tensor: id, source, task, tools, expected, grader, prompt, teacher_text and the row's own.
    """

    prompt: torch.Tensor
    response: torch.Tensor
    teacher_mask: torch.Tensor
    tool_should_be_used: bool
    required_fields_present: bool | None = None
    prefix: torch.Tensor | None = None
    right: bool | None = None
    topk: tuple[torch.Tensor, torch.Tensor] | None = None
    spans: dict[str, torch.Tensor] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.response)

    def sample(self) -> dict[str, Any]:
        """What `KDDataset` gives: token-aligned tensors of one row, and its metadata. A key that it does not have is
        left out."""
        before = len(self.prompt)
        ids = torch.cat((self.prompt, self.response)).long()
        labels = ids.clone()
        labels[:before] = -100
        out: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": labels,
            "response_start": before,
            "tool_should_be_used": self.tool_should_be_used,
            "teacher_attention_mask": self.teacher_mask.long(),
        }
        if self.required_fields_present is not None:
            out["required_fields_present"] = self.required_fields_present
        if self.prefix is not None:
            out["teacher_prefix_ids"] = self.prefix.long()
        if self.right is not None:
            out["ground_truth_labels"] = labels.clone() if self.right else torch.full_like(labels, -100)
        if self.topk is not None:
            chosen, logs = self.topk
            out["teacher_topk_ids"] = torch.cat((chosen.new_zeros(before, chosen.shape[1]), chosen)).long()
            out["teacher_topk_logprobs"] = torch.cat((logs.new_full((before, logs.shape[1]), -math.inf), logs))
        for name, mask in self.spans.items():
            out[name] = torch.cat((mask.new_zeros(before), mask))
        out["metadata"] = self.metadata
        return out


class RowEncoder:
    """Rows to examples, one tokenizer's and one length's.

    dropped  fields that rows had and could not keep, by name.
    cut      rows whose prompt lost its beginning.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        max_seq_length: int = 2048,
        prefix_tokens: int = 25,
        prefix_from: PrefixFrom = "response",
        raw_prompts: bool = False,
    ) -> None:
        """max_seq_length: tokens of prompt and response together. prefix_tokens: ids of `teacher_prefix_ids` at most.
        prefix_from: derived ones begin with the response, or with its call, so that a student does not learn what its
        teacher says before it. raw_prompts: a prompt that is a text is taken as it is; otherwise, if the tokenizer has
        a chat template, it is a user's message. Raises ValidationError for numbers out of range, TokenizerError for a
        tokenizer without an end of text."""
        if max_seq_length < 2:
            raise ValidationError(
                f"max_seq_length must be at least 2, one token of prompt and one of response, got {max_seq_length!r}.",
                param="max_seq_length",
            )
        if prefix_tokens < 1:
            raise ValidationError(f"prefix_tokens must be at least 1, got {prefix_tokens!r}.", param="prefix_tokens")
        if prefix_from not in ("response", "call"):
            raise ValidationError(f"prefix_from must be response or call, got {prefix_from!r}.", param="prefix_from")
        if tokenizer.eos_id is None:
            raise TokenizerError(
                "The tokenizer names no end of text, so no response can be ended.",
                hint="Add eos_token to tokenizer_config.json.",
            )
        self.tokenizer = tokenizer
        self.max_seq_length = max_seq_length
        self.prefix_tokens = prefix_tokens
        self.prefix_from = prefix_from
        self._raw = raw_prompts or not tokenizer.has_chat_template
        self.dropped: Counter[str] = Counter()
        self.cut = 0
        self._eos: int = tokenizer.eos_id
        shown = taught(tokenizer.templates).shown_ids(tokenizer) if tokenizer.has_chat_template else ()
        self._markup = frozenset(shown)
        self._control = (tokenizer.special_ids | frozenset(tokenizer.eos_ids)) - self._markup

    def __call__(self, row: Row) -> Example:
        """Raises BadRow for a row that this student cannot be trained on."""
        try:
            return self._example(row)
        except BadRow:
            raise
        except (DFastLLMError, RecursionError) as error:
            raise BadRow("bad_text", f"the row cannot be encoded: {str(error) or type(error).__name__}") from error

    def _example(self, row: Row) -> Example:
        prompt, response = self._prompt(row), self._response(row)
        room = self.max_seq_length - len(response)
        if room < 1:
            raise BadRow(
                "response_too_long",
                f"the response has {len(response)} tokens and must leave one of {self.max_seq_length} to the prompt.",
            )
        text = self.tokenizer.decode(response[:-1], skip_special=False)
        calls = self._calls(row, text)
        offsets = self._offsets(response) if calls or _after_a_tool(row) else []
        self.cut += len(prompt) > room
        should, required = row.tool_should_be_used, row.required_fields_present
        if should is None:
            should = bool(calls) or row.grader in CALL_GRADERS
        if required is None:
            required = required_present(row.tools, [found.call for found in calls])
        return Example(
            prompt=_int32(prompt[-room:]),
            response=_int32(response),
            teacher_mask=torch.tensor(row.teacher_attention_mask or (1,) * len(response), dtype=torch.int8),
            tool_should_be_used=should,
            required_fields_present=required,
            prefix=self._prefix(row, response, calls, offsets),
            right=_graded(row),
            topk=self._topk(row, len(response)),
            spans=_spans(row, text, calls, offsets),
            metadata=_metadata(row),
        )

    def _prompt(self, row: Row) -> list[int]:
        tokenizer = self.tokenizer
        try:
            if isinstance(row.prompt, str) and self._raw:
                ids = tokenizer.encode(row.prompt, add_special=True)
            else:
                ids = tokenizer.encode(chat_prompt(tokenizer, row.messages, row.tools or None))
        except (DFastLLMError, RecursionError) as error:
            raise BadRow("bad_prompt", f"prompt: {str(error) or type(error).__name__}") from error
        if not ids:
            raise BadRow("empty_prompt", "the prompt has no tokens.")
        return ids

    def _response(self, row: Row) -> list[int]:
        """The answer's ids and EOS. An end of text that the row spells at its end is that one. Other control tokens
        that it spells are text; the markup of calls is tokens where it has some."""
        ids = self.tokenizer.encode(row.teacher_text)
        while ids and ids[-1] in self.tokenizer.eos_ids:
            ids.pop()
        if any(id in self._control for id in ids):
            if any(id in self._markup for id in ids):
                raise BadRow("control_tokens", "teacher_text spells control tokens beside the markup of a tool call.")
            ids = self.tokenizer.encode(row.teacher_text, parse_special=False)
        if not ids:
            raise BadRow("empty_teacher_text", "teacher_text has no tokens before its end.")
        return [*ids, self._eos]

    def _calls(self, row: Row, text: str) -> list[FoundCall]:
        """The complete calls of the answer to the row's tools."""
        if not row.tools:
            return find_calls(text, any_call())
        names = frozenset(tool.get("function", tool)["name"] for tool in row.tools)
        if isinstance(row.prompt, str) and self._raw:  # the text itself tells of tools, or nothing does
            return find_calls(text, ToolCallParser(FORMS, names, strict=True))
        try:
            reading = call_reading(self.tokenizer, names)
        except UnsupportedError as error:
            raise BadRow("tools_unsupported", f"tools: {error.message}") from error
        calls = find_calls(text, reading.parser())
        if not calls and any(one.whole for one in parse_tool_calls(text, FORMS, names, strict=True).tool_calls):
            known = ", ".join(form.example for form in reading.taught.forms)
            raise BadRow("foreign_call_form", f"teacher_text calls in another form than this template's, {known}.")
        return [found for found in calls if found.call.name in names]

    def _offsets(self, response: Sequence[int]) -> list[int]:
        return TextOffsets(self.tokenizer, skip_special=False).push(response)

    def _prefix(
        self, row: Row, response: Sequence[int], calls: Sequence[FoundCall], offsets: Sequence[int]
    ) -> torch.Tensor | None:
        """The row's own prefix, or the first ids of a response that calls. Without a call there is none to teach."""
        if row.teacher_prefix_ids is not None:
            highest = max(row.teacher_prefix_ids)
            if highest >= self.tokenizer.vocab_size:
                raise BadRow(
                    "bad_teacher_prefix_ids",
                    f"teacher_prefix_ids has {highest}, but ids end at {self.tokenizer.vocab_size - 1}.",
                )
            return _int32(row.teacher_prefix_ids[: self.prefix_tokens])
        if not calls or row.tool_should_be_used is False:
            return None
        start = 0
        if self.prefix_from == "call":
            start = next(at for at, inside in enumerate(token_mask(offsets, [calls[0].whole])) if inside)
        return _int32(response[start : start + self.prefix_tokens])

    def _topk(self, row: Row, count: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """[count, K] ids and log-probabilities. Distributions that are not as many as the response's tokens, with or
        without its end, are of another tokenisation, and dropped. Ids that this tokenizer does not have are left to the
        tail."""
        given = row.teacher_topk
        if given is None:
            return None
        if len(given) not in (count, count - 1):
            self.dropped["teacher_topk"] += 1
            return None
        known = [[pair for pair in token if pair[0] < self.tokenizer.vocab_size] for token in given]
        width = max(map(len, known))
        if not width:
            self.dropped["teacher_topk"] += 1
            return None
        ids = torch.zeros((count, width), dtype=torch.int32)
        logs = torch.full((count, width), -math.inf)
        for at, token in enumerate(known):
            if token:
                ids[at, : len(token)] = _int32([id for id, _ in token])
                logs[at, : len(token)] = torch.tensor([log for _, log in token])
        return ids, logs


def token_mask(offsets: Sequence[int], spans: Sequence[Span]) -> list[bool]:
    """Which tokens hold a character of one of the spans. offsets: where the text of each token begins; those of one
    character share its beginning. A token ends where the next one with text of its own begins; the last never."""
    ends: list[float] = [math.inf] * len(offsets)
    for at in range(len(offsets) - 2, -1, -1):
        ends[at] = offsets[at + 1] if offsets[at + 1] > offsets[at] else ends[at + 1]
    return [
        any(start < stop and begin < stop and end > start for start, stop in spans)
        for begin, end in zip(offsets, ends, strict=True)
    ]


def _spans(row: Row, text: str, calls: Sequence[FoundCall], offsets: Sequence[int]) -> dict[str, torch.Tensor]:
    """The masks over the response that the row has. What integrates is the answer to a tool's result, calls aside."""
    chosen: dict[str, list[Span]] = {
        "tool_name_mask": [found.name for found in calls if found.name],
        "json_args_mask": [found.arguments for found in calls if found.arguments],
        "integration_mask": outside(text, calls) if _after_a_tool(row) else [],
    }
    masks = {}
    for name, spans in chosen.items():
        if spans:
            masks[name] = torch.tensor(token_mask(offsets, spans))
    return masks


def _graded(row: Row) -> bool | None:
    """Whether the teacher's answer is right; None for a row that does not say what is."""
    grader = GRADERS.get(row.grader or "")
    if grader is None or row.expected is None:
        return None
    try:
        return grader(row.teacher_text, row.expected)
    except (TypeError, KeyError, AttributeError, ValueError, Refused) as error:
        raise BadRow("bad_expected", f"expected is not what grader {row.grader} reads: {error!r:.80}") from error


def _after_a_tool(row: Row) -> bool:
    return not isinstance(row.prompt, str) and row.prompt[-1].get("role") in ("tool", "function")


def _metadata(row: Row) -> dict[str, Any]:
    named = {name: getattr(row, name) for name in ("id", "source", "task", "expected", "grader")}
    kept = {name: value for name, value in named.items() if value is not None}
    if row.tools:
        kept["tools"] = list(row.tools)
    prompt = row.prompt if isinstance(row.prompt, str) else list(row.prompt)
    return {**row.metadata, **kept, "line": row.line, "prompt": prompt, "teacher_text": row.teacher_text}


def _int32(ids: Sequence[int]) -> torch.Tensor:
    return torch.tensor(list(ids), dtype=torch.int32)
