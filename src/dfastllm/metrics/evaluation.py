"""Answers of a model to samples whose right answer is known: how many are right, how it calls tools, how long its
answers are and how many forwards they took. All of it from one pass of the engine that serves the model.

Opens no model and chooses no samples: who calls does.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dfastllm.core import DecodeParams, SamplingParams, StepEvent
from dfastllm.errors import ValidationError
from dfastllm.llm import LLM, Completion
from dfastllm.metrics.timelines import FirstCall, record
from dfastllm.metrics.workload import call_tokens, complete
from dfastllm.tasks import CALL_GRADERS, GRADERS, Sample, grade
from dfastllm.text import ParsedMessage, Tokenizer, ToolCall, parse_tool_calls

__all__ = ["Evaluation", "Row", "Shape", "decode_words", "evaluate", "sample_ids"]

_NOTHING = object()  # what a text that is no JSON is parsed as
_JSON_GRADERS = ("json", "json_within")
_MIX_FORM = "<tool_call>"  # calls in this form are the grader's business; in others, the parser's


@dataclass(frozen=True, slots=True)
class Row:
    """One answer.

    id                  of the sample, by which evaluations of two models are paired.
    task                of the sample.
    right               the grader's word; of a call in a form that the grader does not know: it is the expected one and
                        stands alone.
    tokens              of the answer; the token that ended it is not counted.
    forwards            of the model, for this answer (nfe).
    reference_tokens    of the sample's own answer (the teacher's, where a teacher wrote it), counted as `tokens`.
    length              tokens of the prompt and of the sample's own answer.
    ttfa_tokens         tokens until the text so far held a complete call that fits its tool's schema; inf: never; None:
                        no call was wanted.
    ttfa_excess_tokens  of those, the ones that the call did not need (`timelines`).
    named               the first call has the right tool's name. None: no call was wanted.
    argued              it has the right arguments too.
    valid               the answer is what JSON it should be: a call that fits a schema, or JSON text. None: neither is
                        wanted.
    complete            every required field is there: of the right tool's schema, or of the expected object. None as
                        `valid`, or where nothing is required.
    false_call          a tool was called where none should be. None: a call was wanted, or no tool was offered.
    text                of the answer.
    """

    id: str
    task: str
    right: bool
    tokens: int
    forwards: int
    reference_tokens: int
    length: int
    ttfa_tokens: float | None
    ttfa_excess_tokens: float | None
    named: bool | None
    argued: bool | None
    valid: bool | None
    complete: bool | None
    false_call: bool | None
    text: str


@dataclass(frozen=True, slots=True)
class Shape:
    """The samples that fit an enumerated shape and no smaller one.

    drift  accuracy here less the accuracy over all samples.
    """

    samples: int
    accuracy: float
    median_tokens: float
    drift: float


@dataclass(frozen=True)
class Evaluation:
    """The rows of one model, in the order of the samples, and what follows from them. A share is None where no sample
    asks for it.

    model    its name.
    decode   how it decoded, in words.
    seconds  that the answers took, all in flight at once.
    """

    model: str
    decode: str
    seconds: float
    rows: tuple[Row, ...]

    @property
    def exact_match(self) -> float:
        """Share of right answers."""
        return statistics.fmean(row.right for row in self.rows)

    @property
    def by_task(self) -> dict[str, float]:
        """Share of right answers of each task, tasks in the order in which they first come."""
        tasks = dict.fromkeys(row.task for row in self.rows)
        return {task: statistics.fmean(row.right for row in self.rows if row.task == task) for task in tasks}

    @property
    def tokens_per_forward(self) -> float:
        """Tokens of the answers, end tokens not counted, over all forwards."""
        forwards = sum(row.forwards for row in self.rows)
        return sum(row.tokens for row in self.rows) / forwards if forwards else 0.0

    def summary(self) -> dict[str, float | None]:
        """The figures of the whole:

        exact_match, tool_name_accuracy, argument_exact_match, json_validity, completeness, false_call_rate and
        ttfa_hit_rate are shares (see `Row`); median_tokens and teacher_median_tokens of the answers and of the samples'
        own; length_ratio the first over the second; ttfa_tokens and ttfa_excess_tokens medians over the calls that
        came; forwards (nfe) and tokens_per_forward."""
        rows = self.rows
        median, teacher = _median(row.tokens for row in rows), _median(row.reference_tokens for row in rows)
        wanted = [row.ttfa_tokens for row in rows if row.ttfa_tokens is not None]
        came = [row for row in rows if row.ttfa_tokens is not None and row.ttfa_tokens < math.inf]
        return {
            "exact_match": self.exact_match,
            "tool_name_accuracy": _share(row.named for row in rows),
            "argument_exact_match": _share(row.argued for row in rows),
            "json_validity": _share(row.valid for row in rows),
            "completeness": _share(row.complete for row in rows),
            "false_call_rate": _share(row.false_call for row in rows),
            "median_tokens": median,
            "teacher_median_tokens": teacher,
            "length_ratio": median / teacher if median is not None and teacher else None,
            "ttfa_tokens": _median(row.ttfa_tokens for row in came),
            "ttfa_excess_tokens": _median(row.ttfa_excess_tokens for row in came),
            "ttfa_hit_rate": len(came) / len(wanted) if wanted else None,
            "forwards": statistics.fmean(row.forwards for row in rows),
            "tokens_per_forward": self.tokens_per_forward,
        }

    def by_shape(self, shapes: Sequence[int]) -> dict[int, Shape]:
        """The samples by the smallest of the shapes (lengths in tokens) that holds prompt and answer; those that are
        longer than all belong to the largest, which cuts them. Shapes without samples are left out. Raises
        ValidationError for no shapes or ones below 1."""
        if not shapes or min(shapes) < 1:
            raise ValidationError(f"shapes must be lengths of at least 1 token, got {list(shapes)}.", param="shapes")
        ordered = sorted(set(shapes))
        groups: dict[int, list[Row]] = {shape: [] for shape in ordered}
        for row in self.rows:
            groups[next((shape for shape in ordered if row.length <= shape), ordered[-1])].append(row)
        found = {}
        for shape, rows in groups.items():
            if rows:
                accuracy = statistics.fmean(row.right for row in rows)
                median = statistics.median(row.tokens for row in rows)
                found[shape] = Shape(len(rows), accuracy, median, accuracy - self.exact_match)
        return found

    def record(self) -> dict[str, Any]:
        """The evaluation as JSON: model, decode, n, seconds, summary, by_task and the rows; a call that never came has
        "Infinity"."""
        return {
            "model": self.model,
            "decode": self.decode,
            "n": len(self.rows),
            "seconds": round(self.seconds, 2),
            "summary": self.summary(),
            "by_task": self.by_task,
            "rows": [{k: "Infinity" if v == math.inf else v for k, v in asdict(row).items()} for row in self.rows],
        }


def sample_ids(samples: Sequence[Sample]) -> list[str]:
    """Ids of samples that have none of their own: task and place, so that two models asked the same list agree."""
    return [f"{sample.task}-{i}" for i, sample in enumerate(samples)]


def evaluate(
    llm: LLM,
    samples: Sequence[Sample],
    sampling: SamplingParams,
    decode: DecodeParams | None = None,
    *,
    ids: Sequence[str] | None = None,
    words: str = "",
) -> Evaluation:
    """Ask a loaded model all samples, together, and grade its answers. ids: see `Row.id`; None: `sample_ids`. words:
    how it decodes, for people. Raises ValidationError for no samples, ones without a grader, and ids that are not
    one a sample and each once."""
    ids = sample_ids(samples) if ids is None else ids
    if not samples or len(ids) != len(samples) or len(set(ids)) != len(ids):
        raise ValidationError(
            f"an evaluation needs samples with an id each, got {len(samples)} samples and {len(set(ids))} different"
            f" ids of {len(ids)}.",
            param="samples",
        )
    open_ended = next((sample.task for sample in samples if sample.grader is None), None)
    if open_ended is not None:
        raise ValidationError(f"samples of {open_ended!r} have no grader: their answers are open.", param="samples")
    done, seconds = complete(llm, samples, sampling, decode)
    shown = call_tokens(llm.tokenizer)
    rows = tuple(
        _row(llm.tokenizer, sample, completion, name, shown)
        for sample, completion, name in zip(samples, done, ids, strict=True)
    )
    return Evaluation(llm.info.name, words or decode_words(decode), seconds, rows)


def decode_words(decode: DecodeParams | None) -> str:
    """How a model decodes, for people: the options that were given."""
    given = sorted(decode.given) if decode is not None else []
    return ", ".join(f"{name} {getattr(decode, name)}" for name in given) or "greedy"


def _row(tokenizer: Tokenizer, sample: Sample, completion: Completion, name: str, shown: Sequence[int]) -> Row:
    text, usage = completion.text, completion.usage
    reference = len(tokenizer.encode(sample.response))
    wanted = sample.grader in CALL_GRADERS
    parsed = parse_tool_calls(text) if sample.tools else ParsedMessage(text)
    call = next((call for call in parsed.tool_calls if call.whole), None)
    argued = named = None
    if wanted:
        named = call is not None and call.name == sample.expected["name"]
        argued = named and call is not None and GRADERS["json"](call.arguments, sample.expected["arguments"])
    alone = bool(argued) and len(parsed.tool_calls) == 1 and (not parsed.content or sample.grader != "tool_call")
    first = None
    if wanted:
        events = [StepEvent(name, completion.token_ids)]
        timeline = record(events, sent=0.0, clock=lambda: 0.0, tokenizer=tokenizer, shown=shown)
        first = timeline.first_call(sample.tools)
    return Row(
        id=name,
        task=sample.task,
        right=grade(sample, text) or (alone and _MIX_FORM not in text),
        tokens=usage.completion_tokens,
        forwards=usage.forwards,
        reference_tokens=reference,
        length=usage.prompt_tokens + reference,
        ttfa_tokens=None if first is None else first.tokens,
        ttfa_excess_tokens=None if first is None else first.excess,
        named=named,
        argued=argued,
        valid=_valid(sample, text, first),
        complete=_complete(sample, text, call if named else None),
        false_call=call is not None if sample.tools and not wanted else None,
        text=text,
    )


def _valid(sample: Sample, text: str, first: FirstCall | None) -> bool | None:
    if first is not None:
        return first.tokens < math.inf
    return _parsed(_json_of(sample, text)) is not _NOTHING if sample.grader in _JSON_GRADERS else None


def _complete(sample: Sample, text: str, call: ToolCall | None) -> bool | None:
    """call: the first one, if it names the right tool."""
    if sample.grader in CALL_GRADERS:
        required, found = _required(sample), _parsed(call.arguments) if call is not None else _NOTHING
    elif sample.grader in _JSON_GRADERS and isinstance(sample.expected, Mapping):
        required, found = list(sample.expected), _parsed(_json_of(sample, text))
    else:
        return None
    return isinstance(found, Mapping) and set(required) <= found.keys()


def _json_of(sample: Sample, text: str) -> str:
    """The part of an answer that should be JSON: all of it, or what stands behind the last "Answer:"."""
    return text if sample.grader == "json" else text.rpartition("Answer:")[2]


def _required(sample: Sample) -> list[str]:
    """The arguments that the right tool's schema requires; all expected ones where it says nothing of that."""
    for tool in sample.tools:
        function = tool.get("function", tool)
        if function.get("name") == sample.expected["name"]:
            required = (function.get("parameters") or {}).get("required")
            if isinstance(required, Sequence):
                return list(required)
    return list(sample.expected["arguments"])


def _parsed(text: str) -> Any:
    """JSON text as a value, _NOTHING where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return _NOTHING


def _share(marks: Iterable[bool | None]) -> float | None:
    asked = [mark for mark in marks if mark is not None]
    return statistics.fmean(asked) if asked else None


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(statistics.median(known)) if known else None
