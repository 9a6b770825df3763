"""An adapter of a real model made by PEFT itself, and its file served with it: see `scripts/real-adapter`."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from dfastllm import LLM, assemble
from dfastllm.bench.fidelity import real_model
from dfastllm.core import SamplingParams
from dfastllm.engine.runners.native import NativeRunner
from dfastllm.kernels.step import BLOCK
from dfastllm.lora import read_adapter
from dfastllm.models import PackedDecoder, adapter_base
from tests.kit.adapters import step_of
from tests.kit.real import real_file

__all__ = ["Nearness", "cached_file", "float_model", "main", "nearness", "style", "train"]

ASKED = "What is the capital of France?", "How many legs does a spider have?", "What do bees make?"
SAID: Sequence[tuple[str, str]] = (
    ("What is the capital of Italy?", "The capital of Italy is Rome."),
    ("What colour is the sky?", "The sky is blue on a clear day."),
    ("How many days are in a week?", "There are seven days in a week."),
    ("What do cows eat?", "Cows eat grass and hay."),
    ("Who wrote Hamlet?", "William Shakespeare wrote Hamlet."),
    ("What is the largest ocean?", "The largest ocean is the Pacific Ocean."),
    ("What is two plus three?", "Two plus three is five."),
    ("What is ice made of?", "Ice is made of frozen water."),
    ("Name a fruit that is yellow.", "A banana is a yellow fruit."),
    ("What does a baker make?", "A baker makes bread and cakes."),
    ("Where do fish live?", "Fish live in water."),
    ("What is the opposite of hot?", "The opposite of hot is cold."),
    ("How many wheels does a car have?", "A car has four wheels."),
    ("What is the capital of Japan?", "The capital of Japan is Tokyo."),
    ("What animal says meow?", "A cat says meow."),
    ("What do plants need to grow?", "Plants need light, water and soil to grow."),
)


def style(text: str) -> str:
    """How the adapter is taught to answer."""
    return text.upper()


def cached_file() -> Path | None:
    """The model's file; None: not on this machine."""
    return real_file()


def float_model(file: Path) -> Any:
    """The file's weights as transformers reads them, float32."""
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)


def train(file: Path, out: Path, steps: int, *, rank: int = 8, lr: float = 2e-3) -> None:
    """PEFT's adapter of the float weights, taught to answer in capitals."""
    with LLM(file) as llm:
        examples = []
        for question, answer in SAID:
            prompt = llm.render([{"role": "user", "content": question}])
            end = tuple(llm.tokenizer.encode("<|im_end|>", parse_special=True))
            examples.append((prompt, (*llm.encode(style(answer)), *end)))
    torch.manual_seed(0)
    made = get_peft_model(
        float_model(file), LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj"])
    )
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 5) * (1 - step / steps)
        total = 0.0
        for asked, said in (examples[(2 * step + i) % len(examples)] for i in range(2)):
            ids = torch.tensor([[*asked, *said]])
            labels = ids.clone()
            labels[:, : len(asked)] = -100
            loss = made(input_ids=ids, labels=labels).loss / 2
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1} of {steps}: loss {total:.3f}", flush=True)
    made.save_pretrained(str(out))


@dataclass(frozen=True, slots=True)
class Nearness:
    """How near what is served is to PEFT's merged float model, over the tokens of some texts.

    exact      the largest difference of a logit, of the file's weights as floats with the adapter, unmerged.
    same       share of greedy choices of those that are the merged model's.
    kl         nats a token of the file as it is served, with the adapter; kl_base: without one, against the base.
    change     nats a token between the merged model and the base: how much the adapter does.
    """

    exact: float
    same: float
    kl: float
    kl_base: float
    change: float


def nearness(file: Path, adapter: Path, texts: Sequence[Sequence[int]]) -> Nearness:
    """Teacher-forced, over texts of token ids."""
    plain = float_model(file).eval()
    base = [_theirs(plain, ids) for ids in texts]
    merged = PeftModel.from_pretrained(plain, str(adapter)).merge_and_unload().eval()
    wanted = [_theirs(merged, ids) for ids in texts]
    del plain, merged
    floats = assemble.dequantised(file, torch.float32).model
    unmerged = _ours(assemble.pack(floats), adapter, texts)  # type: ignore[arg-type]
    del floats
    packed = assemble.load(file, backend="native").model
    assert isinstance(packed, PackedDecoder)
    return Nearness(
        max((a - b).abs().max().item() for a, b in zip(unmerged, wanted, strict=True)),
        torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in zip(unmerged, wanted, strict=True)]).float().mean().item(),
        _kl(wanted, _ours(packed, adapter, texts)),
        _kl(base, _ours(packed, None, texts)),
        _kl(wanted, base),
    )


@torch.inference_mode()
def _theirs(model: Any, ids: Sequence[int]) -> Tensor:
    logits: Tensor = model(torch.tensor([list(ids)])).logits[0].float()
    return logits


def _ours(model: PackedDecoder, adapter: Path | None, texts: Sequence[Sequence[int]]) -> list[Tensor]:
    runner = NativeRunner(model, BLOCK, torch.float32, BLOCK)
    if adapter is not None:
        runner.adapters([None, read_adapter(adapter, adapter_base(model))])
    number = 0 if adapter is None else 1
    return [runner.run(step_of([list(ids)], [number])).logits().float().clone() for ids in texts]


def _kl(reference: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    parts = []
    for p, q in zip(reference, found, strict=True):
        left, right = p.double().log_softmax(-1), q.double().log_softmax(-1)
        parts.append((left.exp() * (left - right)).sum(-1))
    return torch.cat(parts).mean().item()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/real-adapter")
    parser.add_argument("--cache", type=Path, default=Path(os.environ.get("BENCH_CACHE", "/tmp/bench-cache")))
    parser.add_argument("--out", type=Path, help="keep the adapter in this directory; one that is there is used")
    parser.add_argument("--steps", type=int, default=40)
    given = parser.parse_args(arguments)
    file = real_model(given.cache)
    with tempfile.TemporaryDirectory() as folder:
        adapter = given.out or Path(folder)
        if not (adapter / "adapter_config.json").exists():
            train(file, adapter, given.steps)
        greedy = SamplingParams(temperature=0.0, max_tokens=24)
        texts = []
        with LLM(file, lora_modules={"capitals": adapter}) as llm:
            for question in ASKED:
                talk = [{"role": "user", "content": question}]
                before, after = (llm.chat(talk, greedy, lora=lora)[0] for lora in ("", "capitals"))
                print(f"{question}\n  without: {before.text!r}\n  with:    {after.text!r}")
                texts.append((*llm.render(talk), *after.outputs[0].token_ids))
        found = nearness(file, adapter, texts)
    print(found)
    return int(found.exact > 2e-2 or found.same < 1.0 or found.kl > max(0.02, 5 * found.kl_base))


if __name__ == "__main__":
    sys.exit(main())
