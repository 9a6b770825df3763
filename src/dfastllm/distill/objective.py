"""The loss of a micro-batch of distillation, with everything that a configuration switches on: divergence and cross
entropies, intermediate layers, length, early tool call.

Joins the pure losses of `distill.losses`: here rows meet tokens, and terms their weights. Keeps nothing between calls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dfastllm.distill.data.calls import find_calls, required_present
from dfastllm.distill.data.collate import to_rows
from dfastllm.distill.forward import hidden_rows, layer_rows
from dfastllm.distill.losses import (
    Dense,
    Hidden,
    Sparse,
    combined_kd_loss,
    count_valid,
    early_tool_call_loss,
    early_tool_ramp,
    end_logprobs,
    entropy_temperature,
    even_layer_map,
    intermediate_layer_loss,
    length_aware_kd_loss,
    make_projections,
    span_labels,
    warmup_steps,
)
from dfastllm.distill.rollouts import Rollouts, prompts_of, rollout_batch
from dfastllm.distill.sampler import Batch
from dfastllm.distill.sections import Config
from dfastllm.distill.teacher.local import LocalTeacher
from dfastllm.errors import UnsupportedError
from dfastllm.models.decoder import Decoder
from dfastllm.text import Tokenizer, call_reading

__all__ = ["Objective", "Terms"]

Terms = tuple[dict[str, Tensor], dict[str, float]]  # weighted losses, diagnostics
SPANS = {
    "tool_name_labels": "tool_name_mask",
    "json_args_labels": "json_args_mask",
    "integration_labels": "integration_mask",
}


class Objective:
    """What a student is trained on.

    teacher          a model in this process; None: the distributions that the data's rows bring.
    steps_per_epoch  optimizer steps, of which the early-call loss's warm-up is counted.
    projections      learnt maps to the teacher's width, for the loss of intermediate layers; None where it needs none.
    quantization     the format whose rounding the student is trained with now; None: in float. Its rollouts follow it.
    """

    def __init__(
        self,
        config: Config,
        student: Decoder,
        tokenizer: Tokenizer,
        *,
        teacher: LocalTeacher | None = None,
        steps_per_epoch: float = 1.0,
    ) -> None:
        self.config, self.student, self.tokenizer, self.teacher = config, student, tokenizer, teacher
        self.ramp_steps = warmup_steps(steps_per_epoch, config.speed.early_tool_warmup_epochs)
        self.rollouts = Rollouts(tokenizer, config.speed.rollout_max_tokens, config.train.seed)
        self.quantization: str | None = None
        self.layer_map: dict[int, int] = {}
        self.projections: nn.ModuleDict | None = None
        if config.kd.layers_weight:
            assert teacher is not None  # the configuration asks for one
            ours, theirs = student.config, teacher.model.config
            self.layer_map = even_layer_map(ours.layers, theirs.layers)
            made = make_projections(self.layer_map, ours.hidden_size, theirs.hidden_size, config.train.seed)
            self.projections = None if made is None else made.to(student.device)
        kd = config.kd
        self.weights = {
            "kl_div": kd.kl_weight,
            "ce_teacher": kd.ce_teacher,
            "tool_name": kd.w_tool,
            "json_args": kd.w_args,
            "integration": kd.w_integr,
            "ce_ground_truth": kd.ce_ground_truth,
        }

    def __call__(self, batch: Batch, step: int) -> Terms:
        """The weighted losses of a batch (`collate_kd_batch`, on the student's device) at this optimizer step."""
        hidden, terms, diagnostics = self._kd(batch)
        speed = self.config.speed
        if speed.use_length_aware_kd and (speed.length_kd_mode == "survival" or step % speed.rollout_every == 0):
            length, found = self._length(batch, hidden, step)
            terms["length_kd"] = speed.length_kd_weight * length
            diagnostics |= found
        if speed.use_early_tool_call_loss and "tool_should_be_used" in batch:
            early, found = self._early(batch, hidden, step)
            terms["early_tool"] = speed.early_tool_weight * early
            diagnostics |= found
        return terms, diagnostics

    def held_out(self, batch: Batch) -> tuple[float, float, float]:
        """The weighted sum of the losses from the teacher (without those for speed), the mean cross entropy with the
        answers, and over how many tokens."""
        hidden, terms, _ = self._kd(batch)
        labels = to_rows(batch)["labels"]
        student = Hidden.of(self.student, hidden[labels != -100])
        plain = combined_kd_loss(
            student, None, labels[labels != -100], kl_weight=0.0, ce_teacher_weight=1.0, finite=False
        )
        return float(sum(term.item() for term in terms.values())), plain["total"].item(), len(labels[labels != -100])

    def counts(self, batch: Batch) -> dict[str, float]:
        """How much each term has in a batch: tokens, and rows of the two losses for speed."""
        rows = to_rows(batch)
        chosen = rows["labels"] != -100
        lead, tokens = rows["labels"][chosen].shape, float(chosen.sum())
        found = count_valid(lead, _sparse(rows, chosen), **_targets(rows, chosen))
        if self.teacher is not None:
            found["kl_div"] = tokens
        should = batch.get("tool_should_be_used")
        users = 0.0 if should is None else float(should.sum())
        return {**found, "layers": tokens, "length_kd": float(len(chosen)), "early_tool": users}

    def _kd(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor], dict[str, float]]:
        """The rows before the head [B, T, H], and the losses from the teacher's answers, distributions and layers."""
        kd, rows = self.config.kd, to_rows(batch)
        chosen = rows["labels"] != -100
        with layer_rows(self.student, self.layer_map) as ours:
            hidden = hidden_rows(self.student, batch["input_ids"], bf16=self.config.train.bf16)
        teacher: Dense | Sparse | None = _sparse(rows, chosen) if kd.kl_weight else None
        theirs: Mapping[int, Tensor] = {}
        if self.teacher is not None and (kd.kl_weight or self.layer_map):
            with layer_rows(self.teacher.model, self.layer_map.values()) as theirs:
                teacher = self.teacher.logits(batch)
        values = combined_kd_loss(
            Hidden.of(self.student, hidden[chosen]),
            teacher,
            **_targets(rows, chosen),
            kl_weight=kd.kl_weight,
            ce_teacher_weight=kd.ce_teacher,
            w_tool=kd.w_tool,
            w_args=kd.w_args,
            w_integr=kd.w_integr,
            ce_ground_truth_weight=kd.ce_ground_truth,
            temperature=self._temperature(teacher),
            divergence=kd.divergence,
            on_missing_logits=kd.on_missing_logits,
            finite=False,  # the loop's guard names what is not
        )
        terms = {name: self.weights[name] * value for name, value in values.items() if name != "total"}
        diagnostics: dict[str, float] = {}
        if self.layer_map:
            size = hidden.shape[:2].numel()
            found, diagnostics = intermediate_layer_loss(
                {layer: out.view(size, -1)[chosen.flatten()] for layer, out in ours.items()},
                {layer: out.view(size, -1)[chosen.flatten()] for layer, out in theirs.items()},
                self.layer_map,
                projections=self.projections,
            )
            terms["layers"] = kd.layers_weight * found
        return hidden, terms, diagnostics

    def _temperature(self, teacher: Dense | Sparse | None) -> float | Tensor:
        heat = self.config.kd.kd_temperature
        if teacher is None or not self.config.kd.entropy_temperature:
            return heat
        return entropy_temperature(teacher, sure=heat)

    def _length(self, batch: Batch, hidden: Tensor, step: int) -> tuple[Tensor, dict[str, float]]:
        speed = self.config.speed
        mode = speed.length_kd_mode
        teacher = batch.get("teacher_attention_mask")
        required = batch.get("required_fields_present")
        if mode == "rollout":
            rolled = self._rolled(batch, step)
            required = rolled["required_fields_present"]
            hidden = hidden_rows(self.student, rolled["input_ids"], bf16=self.config.train.bf16)
            mask = to_rows(rolled)["labels"] != -100
        else:
            mask = to_rows(batch)["labels"] != -100
        if required is None or not speed.exempt_complete:
            required = torch.zeros(len(mask), dtype=torch.bool, device=mask.device)
        ends = end_logprobs(Hidden.of(self.student, hidden), self.student.info.eos_ids, mask)
        return length_aware_kd_loss(
            mask,
            mask if teacher is None else teacher,
            required,
            speed.length_kd_hinge,
            speed.length_kd_slope,
            mode=mode,
            end_logprobs=ends,
        )

    def _rolled(self, batch: Batch, step: int) -> Batch:
        """The student's own answers to the batch's prompts, as a batch."""
        prompts = prompts_of(batch)
        answers = self.rollouts.draw(self.student, prompts, step, quantization=self.quantization)
        found = rollout_batch(prompts, answers, self.tokenizer.pad_id or 0)
        metadata = batch.get("metadata") or [{}] * len(prompts)
        present = [self._complete(one, answer) for one, answer in zip(metadata, answers, strict=True)]
        found["required_fields_present"] = torch.tensor(present)
        return {name: value.to(self.student.device) for name, value in found.items()}

    def _complete(self, metadata: Mapping[str, Any], answer: Sequence[int]) -> bool:
        """Whether an answer holds a call with all that its tool requires."""
        tools = metadata.get("tools") or []
        if not tools:
            return False
        names = {str(tool.get("function", tool).get("name")) for tool in tools}
        try:
            parser = call_reading(self.tokenizer, names).parser()
        except UnsupportedError:  # a template without calls
            return False
        text = self.tokenizer.decode(list(answer), skip_special=False)
        return bool(required_present(tools, [found.call for found in find_calls(text, parser)]))

    def _early(self, batch: Batch, hidden: Tensor, step: int) -> tuple[Tensor, dict[str, float]]:
        speed = self.config.speed
        return early_tool_call_loss(
            Hidden.of(self.student, hidden),
            batch["input_ids"],
            batch["tool_should_be_used"],
            self.tokenizer,
            batch.get("teacher_prefix_ids"),
            speed.early_tool_N,
            speed.early_tool_ce_weight,
            speed.early_tool_json_prior_weight,
            early_tool_ramp(step, self.ramp_steps),
            batch["response_start"] - 1,
        )


def _targets(rows: Batch, chosen: Tensor) -> dict[str, Any]:
    """Arguments of `combined_kd_loss`, [R] each, for the rows that predict a token of the answer [B, T]."""
    labels = rows["labels"]
    truth = rows.get("ground_truth_labels")
    spans = {name: None if key not in rows else span_labels(labels, rows[key])[chosen] for name, key in SPANS.items()}
    return {
        "teacher_targets": labels[chosen],
        "ground_truth_targets": None if truth is None else truth[chosen],
        **spans,
    }


def _sparse(rows: Batch, chosen: Tensor) -> Sparse | None:
    if "teacher_topk_ids" not in rows:
        return None
    return Sparse(rows["teacher_topk_ids"][chosen], rows["teacher_topk_logprobs"][chosen])
