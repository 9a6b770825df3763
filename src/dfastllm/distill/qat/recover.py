"""What rounding costs a model, and how much of it a short run on rounded weights wins back.

`python -m dfastllm.distill.qat.recover MODEL --format w4 --steps 300 [--out DIR]`

The student starts as the float model and is rounded from the first step on; it is trained to give the float model's own
distribution (forward KL on the rows that the model's objective asks for), on the training split of the task mix. What
is measured on the test split: the divergence and the agreement of the best token, of the model as it is served; and the
accuracy of the exported checkpoints, through the engine. A few rows make up a large part of the divergence (ten of
28,835 a quarter of it, `demo-ar` in w4), so it wants many samples.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from dfastllm.convert.report import log_probabilities
from dfastllm.convert.samples import task_examples
from dfastllm.convert.source import Source
from dfastllm.distill.qat.model import Qat, prepare_qat
from dfastllm.distill.qat.schedule import QatConfig
from dfastllm.kernels.extension import set_threads
from dfastllm.models.checkpoint import load
from dfastllm.models.decoder import Decoder
from dfastllm.text import Tokenizer
from dfastllm.train.data import Batch, Stream
from dfastllm.train.evaluate import evaluate
from dfastllm.train.loop import fit
from dfastllm.train.objectives import OBJECTIVES, Rows, make_objective, short_attention
from dfastllm.train.plan import OptimizerName, Plan
from dfastllm.train.work import Losses, Work

__all__ = ["Figures", "LikeFloat", "Recovered", "recover"]


@dataclass(frozen=True)
class Figures:
    """One model on held-out rows.

    divergence  KL of it from the float model, nats a token.
    error       standard error of that, over rows.
    agreement   share of rows with the same best token.
    accuracy    share of right answers through the engine.
    """

    divergence: float
    error: float
    agreement: float
    accuracy: float


@dataclass(frozen=True)
class Recovered:
    """Figures of the float model, of plain rounding to nearest, of the scale search that `dfastllm quantize` does, and
    of the trained model. answers: that each accuracy is a share of."""

    model: str
    format: str
    head: str
    steps: int
    answers: int
    float_: Figures
    plain: Figures
    searched: Figures
    trained: Figures

    def share(self, measure: str) -> float | None:
        """Of what plain rounding costs in "divergence" or "accuracy", what the trained model does not cost; None: plain
        rounding costs nothing."""
        best, worst, now = (getattr(f, measure) for f in (self.float_, self.plain, self.trained))
        return None if worst == best else (worst - now) / (worst - best)


class LikeFloat(Work):
    """Training a student to give the distribution of a float model, in the rows of its own objective."""

    start = (0, 0)

    def __init__(self, student: Decoder, model: Decoder, tokenizer: Tokenizer, *, tokens: int, seed: int) -> None:
        self.model, self.float_model = student, model
        self.objective = make_objective(OBJECTIVES[model.info.kind], model)
        self.tokenizer, self.tokens, self.seed = tokenizer, tokens, seed

    def batches(self, position: Any) -> Iterator[tuple[Batch, tuple[int, int]]]:
        window, number = position
        return Stream(self.tokenizer, "train", self.seed, self.tokens, self.objective.cost).at((window, number))

    def losses(self, batch: Batch, step: int) -> Losses:
        noise = torch.Generator().manual_seed(self.seed * 1_000_003 + batch.number)
        rows = self.objective.rows(batch.examples, noise).to(str(self.model.device))
        with torch.no_grad():
            wanted = _log_probabilities(self.float_model, rows)
        found = _log_probabilities(self.model, rows)
        distance = (wanted.exp() * (wanted - found)).sum(-1)
        return Losses(
            {"divergence": (distance * rows.weights).sum()}, {}, rows.batch * rows.length, len(batch.examples)
        )


def _log_probabilities(model: Decoder, rows: Rows) -> Tensor:
    """[wanted rows, vocabulary]"""
    hidden = model(rows.ids, rows.positions, short_attention(rows))
    return model.head(hidden[rows.wanted]).float().log_softmax(-1)


def _cost(reference: Sequence[Tensor], found: Sequence[Tensor]) -> tuple[float, float, float]:
    """(mean KL(reference || found) in nats, its standard error over rows, share of rows with the same best token) of
    log-probabilities [rows, vocabulary]."""
    pairs = list(zip(reference, found, strict=True))
    distance = torch.cat([(p.exp() * (p - q)).sum(-1, dtype=torch.float64) for p, q in pairs])
    same = torch.cat([p.argmax(-1) == q.argmax(-1) for p, q in pairs])
    error = distance.std(correction=0) / len(distance) ** 0.5
    return distance.mean().item(), error.item(), same.double().mean().item()


def recover(
    model: str | Path,
    *,
    format: str = "w4",
    head: str = "",
    steps: int = 300,
    lr: float = 1e-4,
    optimizer: str = "adamw",
    tokens: int = 2048,
    samples: int = 1600,
    per_task: int = 50,
    seed: int = 0,
    search: bool = True,
    out: Path | None = None,
) -> Recovered:
    """Measure rounding, train, measure again.

    model      a shipped model's name or a Hugging Face directory.
    optimizer  of the layers' matrices, see `Plan`.
    tokens     of a batch, padding counted.
    samples    of the test split, for the divergence.
    per_task   samples of each task of the test split, for the accuracy.
    search     whether scales are searched for while training and in what is exported.
    out        where the trained model's checkpoint is written; None: kept nowhere.

    Raises as loading, `prepare_qat` and the training loop do.
    """
    source = Source(model)
    source.require_tokenizer("the task mix")
    tokenizer = Tokenizer.load(source.directory)
    examples = task_examples(tokenizer, "test", samples, seed + 1)
    original = load(source.directory, dtype=torch.float32)
    reference = log_probabilities(original, examples)
    files = source.files()
    found: dict[str, Figures] = {}
    with tempfile.TemporaryDirectory(prefix="dfastllm-recover-") as temporary:
        work = Path(temporary)

        def figures(qat: Qat, where: Path) -> Figures:
            qat.enable()
            cost = _cost(reference, log_probabilities(qat.model, examples))
            return Figures(*cost, evaluate(qat.export(where, files), per_task=per_task, seed=seed + 1).total)

        for name, searched in (("plain", False), ("searched", True)):
            found[name] = figures(_prepared(source, format, head, searched), work / name)
        qat = _prepared(source, format, head, search)
        qat.model.requires_grad_(True)
        qat.enable()
        plan = Plan(
            f"{source.info.name} {format}",
            steps,
            lr=lr,
            matrix_lr=lr,
            optimizer=optimizer,
            weight_decay=0.0,
            warmup=min(20, steps),
            schedule="cosine",
            seed=seed,
            save_every=steps,
            validate_every=steps,
        )
        fit(LikeFloat(qat.model, original, tokenizer, tokens=tokens, seed=seed), plan, work / "run")
        found["trained"] = figures(qat, out or work / "trained")
    before = evaluate(source.directory, per_task=per_task, seed=seed + 1)
    answers = per_task * len(before.accuracy)
    head = qat.options.head_format
    return Recovered(
        source.info.name, format, head, steps, answers, float_=Figures(0.0, 0.0, 1.0, before.total), **found
    )


def _prepared(source: Source, format: str, head: str, search: bool) -> Qat:
    config = QatConfig(enabled=True, start_fraction=0.0, format=format, head=head, search=search)
    return prepare_qat(load(source.directory, dtype=torch.float32), config)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dfastllm.distill.qat.recover", description="What rounding costs, and what training wins back."
    )
    parser.add_argument("model", help="a shipped model's name or a directory")
    parser.add_argument("--format", default="w4", help="w8, w8g, w6, w4m or w4")
    parser.add_argument("--head", default="", help="format of embedding and head; default: as dfastllm quantize")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--optimizer", choices=get_args(OptimizerName), default="adamw", help="of the layers' matrices")
    parser.add_argument("--tokens", type=int, default=2048, help="of a batch")
    parser.add_argument("--samples", type=int, default=1600, help="held-out samples for the divergence")
    parser.add_argument("--per-task", type=int, default=50, help="held-out samples of each task for the accuracy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plain", action="store_true", help="train and export with plain rounding, without the search")
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--out", type=Path, help="write the trained model's checkpoint here")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args(arguments)
    set_threads(args.threads)
    found = recover(
        args.model,
        format=args.format,
        head=args.head,
        steps=args.steps,
        lr=args.lr,
        optimizer=args.optimizer,
        tokens=args.tokens,
        samples=args.samples,
        per_task=args.per_task,
        seed=args.seed,
        search=not args.plain,
        out=args.out,
    )
    print(f"{found.model}, {found.format}, embedding and head {found.head}; accuracy of {found.answers} answers")
    print(f"{'':24}{'KL, nats/token':>20}{'same best token':>17}{'accuracy':>10}")
    lines = {
        "float": found.float_,
        "plain rounding": found.plain,
        "with the scale search": found.searched,
        f"trained {found.steps} steps": found.trained,
    }
    for name, f in lines.items():
        print(f"{name:24}{f.divergence:10.5f} ± {f.error:.5f}{f.agreement:17.2%}{f.accuracy:10.2%}")
    for measure in ("divergence", "accuracy"):
        share = found.share(measure)
        print(f"{measure}: {'plain rounding costs none' if share is None else f'{share:.0%} of the cost recovered'}")
    if args.json:
        settings = {name: value for name, value in vars(args).items() if name not in ("model", "out", "json")}
        args.json.write_text(json.dumps({**asdict(found), "settings": settings}, indent=1) + "\n")


if __name__ == "__main__":
    main()
