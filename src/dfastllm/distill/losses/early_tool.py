"""A tool call early in the answer: cross entropy with the teacher's first tokens where they are known, and where they
are not, a prior that the answer opens as a call does.

The prior counts the ids whose text opens a call: a JSON object or list, or the tag with which the model's chat template
opens calls. They are looked up once for a tokenizer.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import tokenizers
import torch
from torch import Tensor

from dfastllm.distill.losses.fused import RowTerms, Student, check_positive, lead_of, row_terms, vocabulary_of
from dfastllm.errors import ValidationError
from dfastllm.text.chat import ChatTemplates
from dfastllm.text.tokenizer import Tokenizer
from dfastllm.text.tools.taught import taught

__all__ = ["early_tool_call_loss", "early_tool_ramp", "envelope_ids", "warmup_steps"]

_ENVELOPES: WeakKeyDictionary[Any, Tensor] = WeakKeyDictionary()
_BRACKETS = ("{", "[")


def early_tool_call_loss(
    logits: Student,
    input_ids: Tensor,
    tool_should_be_used: Tensor,
    tokenizer: Tokenizer | Any,
    teacher_prefix_ids: Tensor | None = None,
    N: int = 25,
    ce_weight: float = 0.2,
    json_prior_weight: float = 0.02,
    ramp_t: float = 1.0,
    response_start: Tensor | None = None,
    *,
    ignore_index: int = -100,
    chunk: int | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """ramp_t * (ce_weight * CE + json_prior_weight * prior), a scalar that carries gradient, and its diagnostics.

    CE is the mean, over the first K tokens of the responses that should use a tool, of -log p(the teacher's token);
    K = min(N, P, rows from response_start on), of each response its own. The prior is the mean, over the responses that
    should use a tool and have no token of a teacher, of -log p(an id that opens a call) at their first token.

    logits               [B, T, V], or `Hidden` rows [B, T, H].
    input_ids            [B, T] int64, the tokens that the logits were computed from. Only its shape is read: it says
                         that row t belongs to token t.
    tool_should_be_used  [B] bool.
    tokenizer            ours, or a fast one of Hugging Face: see `envelope_ids`.
    teacher_prefix_ids   [B, P] int64, the first tokens of the teacher's answer, `ignore_index` where there are no more.
    N                    how many tokens count as early, at least 1.
    ramp_t               in [0, 1], see `early_tool_ramp`.
    response_start       [B] int64: the row that predicts the response's first token, one before its index; None: 0.

    Diagnostics: early_tool.frac_should_use, of the batch; early_tool.frac_target_available, of those that should use a
    tool; early_tool.mean_json_prior_nll0, the prior in nats, 0 where it was not used.

    Raises ValidationError for shapes that do not fit, values out of range, and a prior without ids.
    """
    lead = lead_of(logits)
    starts = _checked(lead, input_ids, tool_should_be_used, teacher_prefix_ids, response_start)
    _check_numbers(N, ce_weight, json_prior_weight, ramp_t)
    should = tool_should_be_used.bool()
    prefix = input_ids.new_full((lead[0], 1), ignore_index) if teacher_prefix_ids is None else teacher_prefix_ids[:, :N]
    place = starts[:, None] + torch.arange(prefix.shape[1], device=starts.device)  # [B, K]
    wanted = should[:, None] & (prefix != ignore_index) & (place < lead[1])
    has = wanted.any(-1)
    alone = should & ~has & (starts < lead[1])
    if json_prior_weight == 0:
        alone = torch.zeros_like(alone)
    flat = torch.arange(lead[0], device=starts.device) * lead[1]
    targets = prefix[wanted]
    ids = _envelope(tokenizer, vocabulary_of(logits), starts.device) if bool(alone.any()) else targets.new_zeros(1)
    # One pass: rows with a target pick that, over and over; rows with a prior pick all ids that open a call.
    picks = torch.cat((targets[:, None].expand(-1, len(ids)), ids.expand(int(alone.sum()), -1)))
    rows = torch.cat(((flat[:, None] + place)[wanted], (flat + starts)[alone]))
    ce, prior = _split(row_terms(logits, rows=rows, picks=picks, chunk=chunk), len(targets))
    loss = ramp_t * (ce_weight * ce + json_prior_weight * prior)
    users = int(should.sum())
    return loss, {
        "early_tool.frac_should_use": users / max(lead[0], 1),
        "early_tool.frac_target_available": int(has.sum()) / max(users, 1),
        "early_tool.mean_json_prior_nll0": float(prior.detach()),
    }


def early_tool_ramp(optimizer_step: int, warmup_steps: int) -> float:
    """`ramp_t` of a step: min(1, optimizer_step / warmup_steps), 1 where there is no warm-up. So early training is not
    pulled to calls that the student cannot write yet. Raises ValidationError for a negative step."""
    if optimizer_step < 0:
        raise ValidationError(f"optimizer_step must be at least 0, got {optimizer_step}.", param="optimizer_step")
    return min(1.0, optimizer_step / warmup_steps) if warmup_steps > 0 else 1.0


def warmup_steps(steps_per_epoch: float, epochs: float = 5.0) -> int:
    """Optimizer steps of the ramp: five epochs where nothing else is said."""
    return round(steps_per_epoch * epochs)


def envelope_ids(tokenizer: Tokenizer | Any) -> Tensor:
    """The ids that open a tool call [n] int64, ascending: those whose text, without white space around it, starts with
    { or [ or with the opening of the calls that the chat template teaches (`text.tools.taught`); where that opening is
    more than one token, its first. Computed once and kept as long as the tokenizer lives; do not write into it.

    tokenizer  ours, or one of Hugging Face with a `backend_tokenizer`, whose chat_template is read too.

    Raises ValidationError for anything else.
    """
    if tokenizer not in _ENVELOPES:
        _ENVELOPES[tokenizer] = _find_envelope(_ours(tokenizer))
    return _ENVELOPES[tokenizer]


def _find_envelope(tokenizer: Tokenizer) -> Tensor:
    forms = taught(tokenizer.templates).forms
    openings = [opening for form in forms for opening in form.openings]
    first: set[int] = set()
    for opening in openings:
        ids = tokenizer.encode(opening)
        # A template that teaches one form means its opening. Where every form is read nothing says which is meant, so
        # a piece of an opening opens nothing.
        if len(forms) == 1 or len(ids) == 1:
            first.update(_first_with_text(tokenizer, ids))
    starts = (*_BRACKETS, *openings)
    texts = tokenizer.backend.decode_batch([[id] for id in range(tokenizer.vocab_size)], skip_special_tokens=False)
    found = {id for id, text in enumerate(texts) if text.strip().startswith(starts)}
    return torch.tensor(sorted(found | first), dtype=torch.int64)


def _first_with_text(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """The first id that is not white space, if any: some tokenizers begin every text with a space of its own."""
    return [id for id in ids if tokenizer.decode([id], skip_special=False).strip()][:1]


def _ours(tokenizer: Any) -> Tokenizer:
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        raise ValidationError(
            f"The tokenizer must be a dfastllm.text.Tokenizer or a fast one of Hugging Face, got {type(tokenizer)}.",
            param="tokenizer",
            hint="Load it with dfastllm.text.Tokenizer.load(directory).",
        )
    template = getattr(tokenizer, "chat_template", None)
    named = {"default": template} if isinstance(template, str) else dict(template or {})
    copy = tokenizers.Tokenizer.from_str(backend.to_str())  # ours switches truncation off
    return Tokenizer(copy, templates=ChatTemplates(named))


def _envelope(tokenizer: Any, vocabulary: int, device: torch.device) -> Tensor:
    ids = envelope_ids(tokenizer)
    if not len(ids) or int(ids[-1]) >= vocabulary:
        least = "none opens a call" if not len(ids) else f"the last that opens a call is {int(ids[-1])}"
        raise ValidationError(
            f"Of the tokenizer's ids {least}, and the model has {vocabulary}.",
            param="tokenizer",
            hint="Give the model's own tokenizer, or set json_prior_weight to 0.",
        )
    return ids.to(device)


def _split(found: RowTerms, targets: int) -> tuple[Tensor, Tensor]:
    """CE and prior, means; 0 of none."""
    ce = found.logsumexp[:targets] - found.picked[:targets, 0]
    prior = found.logsumexp[targets:] - found.picked[targets:].logsumexp(-1)
    return ce.sum() / max(len(ce), 1), prior.sum() / max(len(prior), 1)


def _checked(
    lead: torch.Size, input_ids: Tensor, should: Tensor, prefix: Tensor | None, response_start: Tensor | None
) -> Tensor:
    """The rows of the first tokens [B] int64."""
    if len(lead) != 2:
        raise ValidationError(f"logits must be [B, T, V], got rows {tuple(lead)}.", param="logits")
    batch = lead[:1]
    shapes = {"input_ids": (input_ids, lead), "tool_should_be_used": (should, batch)}
    if response_start is not None:
        shapes["response_start"] = (response_start, batch)
    if prefix is not None:
        shapes["teacher_prefix_ids"] = (prefix, torch.Size((*batch, *prefix.shape[1:2])))
    for name, (one, shape) in shapes.items():
        if one.shape != shape:
            raise ValidationError(f"{name} must be {tuple(shape)}, got {tuple(one.shape)}.", param=name)
    if response_start is None:
        return input_ids.new_zeros(batch, dtype=torch.int64)
    if bool((response_start < 0).any()):
        raise ValidationError(
            "response_start must be at least 0.",
            param="response_start",
            hint="It is the row that predicts the first token of the response: one before that token's index.",
        )
    return response_start


def _check_numbers(N: int, ce_weight: float, json_prior_weight: float, ramp_t: float) -> None:
    if N < 1:
        raise ValidationError(f"N must be at least 1, got {N}.", param="N")
    check_positive("ce_weight", ce_weight, or_zero=True)
    check_positive("json_prior_weight", json_prior_weight, or_zero=True)
    if not 0 <= ramp_t <= 1:
        raise ValidationError(f"ramp_t must be in [0, 1], got {ramp_t}.", param="ramp_t")
