"""A distillation of a few steps with everything switched on, for the tests of the room and of the documents' names."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from dfastllm.convert.source import files_for_other_weights
from dfastllm.distill.config import parse_config
from dfastllm.distill.data.dataset import KDDataset
from dfastllm.distill.data.encode import RowEncoder
from dfastllm.distill.data.generate import distinct_samples, generate, row_of
from dfastllm.distill.run import load_student
from dfastllm.distill.sampler import Sampler, Shapes
from dfastllm.distill.sections import Config
from dfastllm.distill.teacher.local import LocalTeacher
from dfastllm.distill.work import DistillWork
from dfastllm.llm import resolve
from dfastllm.models import load, save

STEPS = 15
ALL: dict[str, Any] = {
    "model": {"student": "demo-draft", "name": "tiny"},
    "data": {"generate": {"samples": 24, "validation": 8, "tasks": ["tools", "arithmetic"]}, "max_seq_length": 320},
    "train": {
        "steps": STEPS,
        "micro_batch_size": 4,
        "grad_accum": 2,
        "lr": 3e-4,
        "warmup": 2,
        "schedule": "linear",
        "use_enumerated_shapes": True,
        "seq_lengths": [224, 320],
        "shape_probs": [0.7, 0.3],
        "val_every": 10,
        "save_every": 5,
        "log_every": 1,
    },
    "kd": {"kd_temperature": 1.0, "entropy_temperature": True},
    "speed": {
        "use_length_aware_kd": True,
        "length_kd_mode": "rollout",
        "length_kd_weight": 0.1,
        "exempt_complete": False,
        "rollout_every": 3,
        "rollout_max_tokens": 40,
        "use_early_tool_call_loss": True,
        "early_tool_weight": 0.5,
        "early_tool_warmup_epochs": 1,
        "measure": 2,
    },
    "quant": {"enabled": True, "start_fraction": 0.8, "lr_multiplier": 0.5, "check_every": 2, "min_cosine": 0.9},
    "eval": {"samples": 12, "validation": 4, "max_tokens": 48},
}


def settings(**sections: Any) -> dict[str, Any]:
    """`ALL` with these sections' keys in place of its own; None drops a key."""
    return changed(ALL, **sections)


def changed(base: dict[str, Any], **sections: Any) -> dict[str, Any]:
    """A configuration with these sections' keys in place of its own; None drops a key."""
    raw = copy.deepcopy(base)
    for name, section in sections.items():
        raw[name] = {k: v for k, v in {**raw.get(name, {}), **section}.items() if v is not None}
    return raw


def noisy(name: str, out: Path, noise: float = 0.4) -> Path:
    """A shipped model that has forgotten something: its matrices with normal noise of this share of their deviation."""
    source = resolve(name)
    model = load(source, dtype=torch.float32)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter += noise * parameter.std() * torch.randn(parameter.shape, generator=draw)
    save(model, out, files=files_for_other_weights(source))
    return out


def prompts(home: Path, count: int = 24) -> tuple[Path, Path]:
    """Training and validation prompts without answers."""
    tasks = ("tools", "arithmetic")
    train, held_out = home / "prompts.jsonl", home / "held-out.jsonl"
    generate(train, count, tasks=tasks, prompts_only=True)
    generate(held_out, 12, split="validation", tasks=tasks, prompts_only=True)
    return train, held_out


def made(
    raw: dict[str, Any], *, samples: int = 16, local: str | None = None, style: str = "plain"
) -> tuple[Config, DistillWork]:
    """A work over generated samples in memory, with the generator's answers."""
    config = parse_config(raw)
    student, tokenizer = load_student(resolve(config.model.student or ""))
    drawn = distinct_samples(samples, tasks=("tools", "arithmetic"), style=style)  # type: ignore[arg-type]
    encoder = RowEncoder(tokenizer, max_seq_length=config.data.max_seq_length)
    dataset = KDDataset.of([row_of(sample, str(index)) for index, sample in drawn], encoder)
    train = config.train
    shapes = Shapes(train.seq_lengths, train.shape_probs) if train.use_enumerated_shapes else None
    sampler = Sampler(dataset, train.micro_batch_size, train.seed, train.grad_accum, shapes)
    teacher = None if local is None else LocalTeacher.load(local, student=tokenizer)
    return config, DistillWork(config, student, tokenizer, sampler, Sampler(dataset, 8), teacher=teacher)
