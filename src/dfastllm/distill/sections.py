"""The sections of a distillation: keys, types, ranges, defaults. `distill.config` reads them from YAML."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator, model_validator

from dfastllm.distill.qat.schedule import QatConfig
from dfastllm.distill.shapes import shape_probabilities
from dfastllm.distill.students.draft_settings import DraftSettings
from dfastllm.distill.students.settings import CertaintySettings, TrajectorySettings
from dfastllm.distill.teacher.settings import TeacherSettings
from dfastllm.errors import ValidationError

__all__ = [
    "ChooseSection",
    "Config",
    "DataSection",
    "EvalSection",
    "GenerateSection",
    "KdSection",
    "ModelSection",
    "SpeedSection",
    "TrainSection",
]

Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Paths = tuple[str, ...]


class _Section(BaseModel):
    """Unknown keys are refused, values are not turned into other types, and nothing changes afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelSection(_Section):
    """The student.

    student    a shipped model's name, a directory of our families or a GGUF file: the weights to begin with.
    shape      in its place: fields of models.DecoderConfig but vocab_size and max_len, for random weights.
    family     of a `shape`.
    max_len    of a `shape`: its longest context.
    tokenizer  directory of the tokenizer of a `shape`; a student has its own.
    layers     keep these layers of the student, in this order (a smaller student by layer dropping); None: all.
    name       of the exported model; "": the output directory's.
    dtype      the exported weights'.
    """

    student: str | None = None
    shape: dict[str, Any] | None = None
    family: str = "llama"
    max_len: Count = 2048
    tokenizer: str | None = None
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    name: str = ""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"

    @model_validator(mode="after")
    def _one_origin(self) -> ModelSection:
        if (self.student is None) == (self.shape is None):
            raise ValueError("give one of student (weights to begin with) and shape (random weights)")
        if self.shape is not None and self.tokenizer is None:
            raise ValueError("a shape needs tokenizer: the directory of the tokenizer it shall have")
        if self.student is not None and self.tokenizer is not None:
            raise ValueError("tokenizer goes with shape; a student has its own")
        if self.layers is not None and not self.layers:
            raise ValueError("layers must name at least one layer")
        return self


class GenerateSection(_Section):
    """A distillation set made from the task mix of this package.

    samples     training samples.
    validation  validation samples.
    seed        of both.
    style       plain, or verbose: words before each answer, but for a share of `brief`.
    tasks, mix  these tasks in turn, or factors on the shares of tasks ({"tools": 3.0}); see `distill.data.generate`.
    own_answers  learn from the set's answers although there is a teacher; otherwise a teacher answers the prompts.
    """

    samples: Count = 4000
    validation: Count = 200
    seed: int = 0
    style: Literal["plain", "verbose"] = "plain"
    brief: Share = 0.0
    own_answers: bool = False
    tasks: tuple[str, ...] = ()
    mix: dict[str, Weight] = {}


class DataSection(_Section):
    """What is learnt from.

    train           JSONL files with one conversation a line.
    validation      JSONL files that are only measured on.
    generate        in their place: a set made from the task mix.
    max_seq_length  longer samples lose the beginning of their prompt.
    """

    train: Paths = ()
    validation: Paths = ()
    generate: GenerateSection | None = None
    max_seq_length: Count = 2048

    @model_validator(mode="after")
    def _one_origin(self) -> DataSection:
        if bool(self.train) == (self.generate is not None):
            raise ValueError("give one of train (JSONL files) and generate (a set made from the task mix)")
        if self.generate is not None and self.validation:
            raise ValueError("generate makes its own validation set; leave validation out")
        return self


class TrainSection(_Section):
    """The loop. steps are optimizer steps; grad_accum micro-batches of micro_batch_size samples make one.

    seq_lengths, shape_probs, periodic_upweight_rare  see `sample_enumerated_shape`; used when use_enumerated_shapes.
    The others are fields of `train.Plan` (val_every is its validate_every, betas and clip have its meaning).
    """

    steps: Count = 1000
    micro_batch_size: Count = 16
    grad_accum: Count = 1
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2e-4
    matrix_lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None  # None: lr
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    weight_decay: Weight = 0.01
    warmup: Annotated[int, Field(ge=0)] = 20
    schedule: Literal["cosine", "linear", "wsd"] = "cosine"
    clip: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    bf16: bool = False
    seed: int = 0
    use_enumerated_shapes: bool = False
    seq_lengths: tuple[Count, ...] = ()
    shape_probs: tuple[Weight, ...] | None = None
    periodic_upweight_rare: bool = True
    val_every: Count = 200
    save_every: Count = 200
    log_every: Count = 10
    tensorboard: bool = True

    @model_validator(mode="after")
    def _shapes(self) -> TrainSection:
        if self.use_enumerated_shapes and not self.seq_lengths:
            raise ValueError("use_enumerated_shapes needs seq_lengths")
        if list(self.seq_lengths) != sorted(set(self.seq_lengths)):
            raise ValueError(f"seq_lengths must rise, got {list(self.seq_lengths)}")
        if self.seq_lengths:
            shape_probabilities(self.seq_lengths, self.shape_probs)  # its errors are ValueErrors, and name the key
        elif self.shape_probs is not None:
            raise ValueError("shape_probs needs seq_lengths")
        return self


class ChooseSection(_Section):
    """Answers of the local teacher to choose from: of each prompt the shortest right one is learnt from.

    samples      answers to each prompt, the first greedy.
    temperature  of the others.
    max_tokens   of an answer; a longer one is not chosen.
    """

    samples: Count = 4
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    max_tokens: Count = 128


class KdSection(_Section):
    """What is learnt from the teacher. A weight of 0 leaves its loss out.

    teacher                       a server that answers prompts without teacher_text and tells its likeliest tokens.
    local_teacher                 in its place: a model of our families, by name or directory, that runs in this
                                  process with all its logits.
    choose                        several answers of the local teacher to each prompt, of which one is chosen.
    kl_weight, divergence,
    kd_temperature                divergence from the teacher's distributions, at a temperature; entropy_temperature:
                                  colder where the teacher is sure.
    on_missing_logits             skip the divergence where no distribution is known, or refuse to train (error).
    ce_teacher                    cross entropy with the teacher's answer.
    ce_ground_truth               cross entropy with the expected answer, where rows have one.
    w_tool, w_args, w_integr      cross entropy on the tool's name, its arguments, and the text around the call.
    layers_weight                 likeness of intermediate layers; needs a local teacher.
    draft                         of a draft model, which learns its target's distributions in place of all this; see
                                  `distill.students.draft`.
    trajectory, certainty         of a diffusion student, which learns from recorded decodings in place of all this; see
                                  `distill.students.diffusion`.
    """

    teacher: TeacherSettings | None = None
    local_teacher: str | None = None
    choose: ChooseSection | None = None
    kl_weight: Weight = 0.4
    divergence: Literal["forward", "reverse", "jsd"] = "forward"
    kd_temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2.0
    entropy_temperature: bool = False
    on_missing_logits: Literal["skip", "error"] = "skip"
    ce_teacher: Weight = 0.2
    ce_ground_truth: Weight = 0.2
    w_tool: Weight = 0.15
    w_args: Weight = 0.15
    w_integr: Weight = 0.10
    layers_weight: Weight = 0.0
    draft: DraftSettings | None = None
    trajectory: TrajectorySettings | None = None
    certainty: CertaintySettings = CertaintySettings()

    @model_validator(mode="after")
    def _something(self) -> KdSection:
        names = ("kl_weight", "ce_teacher", "ce_ground_truth", "w_tool", "w_args", "w_integr", "layers_weight")
        if not any(getattr(self, name) for name in names):
            raise ValueError(f"every weight is 0: nothing would be learnt; set one of {', '.join(names)}")
        if self.teacher is not None and self.local_teacher is not None:
            raise ValueError("give one of teacher (a server) and local_teacher (a model in this process)")
        if self.choose is not None and self.local_teacher is None:
            raise ValueError("choose needs local_teacher, which gives the answers to choose from")
        if self.layers_weight and self.local_teacher is None:
            raise ValueError("layers_weight needs local_teacher: the layers of a server cannot be seen")
        return self


class SpeedSection(_Section):
    """The two losses that make answers short and calls early, and the gates at the end.

    use_length_aware_kd, length_kd_*   see `length_aware_kd_loss`; mode "rollout" samples the student's own answers with
                                       our engine (every rollout_every steps, the student's weights of that step).
    exempt_complete                    an answer with all that its tool requires is never too long.
    use_early_tool_call_loss,
    early_tool_*                       see `early_tool_call_loss`; its weight rises from 0 over the first
                                       early_tool_warmup_epochs; early_tool_prefix: where a row brings none, the first
                                       tokens of the teacher's answer, or of the call in it.
    measure                            requests measured at a validation and, five times as many, at the end; 0: none.
    baseline                           report of `dfastllm gate record`; None: the student before training, measured
                                       here in the format that the student is served in.
    regression_threshold, ttfa_limit   of the gates, see `metrics.gates.check`.
    """

    use_length_aware_kd: bool = False
    length_kd_weight: Weight = 0.05
    length_kd_hinge: Weight = 0.15
    length_kd_slope: Weight = 1.0
    length_kd_mode: Literal["rollout", "survival"] = "survival"
    exempt_complete: bool = True
    rollout_every: Count = 1
    rollout_max_tokens: Count = 64
    use_early_tool_call_loss: bool = False
    early_tool_weight: Weight = 0.05
    early_tool_N: Count = 25
    early_tool_ce_weight: Weight = 0.2
    early_tool_json_prior_weight: Weight = 0.02
    early_tool_prefix: Literal["response", "call"] = "response"
    early_tool_warmup_epochs: Weight = 5.0
    measure: Annotated[int, Field(ge=0)] = 8
    baseline: str | None = None
    regression_threshold: Weight = 0.05
    ttfa_limit: Weight = 25.0


class EvalSection(_Section):
    """How good the student is, measured in our engine on held-out samples.

    samples     paired samples at the end, before and after training; 0: no evaluation.
    validation  samples at each validation.
    max_tokens  of an answer.
    margin      accuracy that may be lost and still counts as equal.
    alpha       of the one-sided bound.
    """

    samples: Annotated[int, Field(ge=0)] = 200
    validation: Annotated[int, Field(ge=0)] = 32
    max_tokens: Count = 96
    margin: Annotated[float, Field(gt=0, lt=1)] = 0.01
    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.05


def _quant(raw: Any) -> QatConfig:
    try:
        return QatConfig.of(raw)
    except ValidationError as error:
        raise ValueError(str(error).rstrip(".")) from error


def _quant_json(config: QatConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in QatConfig.__dataclass_fields__}


class Config(_Section):
    """A whole distillation. quant: see `distill.qat.schedule.QatConfig`."""

    model: ModelSection
    data: DataSection
    train: TrainSection = TrainSection()
    kd: KdSection = KdSection()
    speed: SpeedSection = SpeedSection()
    quant: Annotated[QatConfig, PlainValidator(_quant), PlainSerializer(_quant_json)] = QatConfig()
    eval: EvalSection = EvalSection()

    @model_validator(mode="after")
    def _fits(self) -> Config:
        longest = max(self.train.seq_lengths, default=0)
        if longest > self.data.max_seq_length:
            raise ValueError(
                f"train.seq_lengths goes up to {longest}, but data.max_seq_length cuts at {self.data.max_seq_length}"
            )
        return self
