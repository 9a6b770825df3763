"""What a bigram head and a confidence head are worth to a masked draft model: counts, and a model of the cost.

    python benchmarks/distillation/block_heads.py --json benchmarks/distillation/block-heads.json

Greedy decoding of held-out prompts is replayed: a draft depends on the text alone, so a drafter is asked once at every
position of every answer, and any rule of lengths can be walked over what it said. `engine` counts in the engine
itself, without and with the head.

The confidence head predicts whether a draft token stands, given that those before it do, from what its row says
(chance, margin, entropy) and its place. The draft is verified as far as that gives the most tokens per second of a
step, by the measured costs of steps (`verify` of benchmarks/speculation.json) and a draft that costs `--draft-cost`
plain steps. It is held against the best fixed length, the engine's rule (averages by place, of request and method), and
an oracle that knows what will stand. Nothing is timed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dfastllm import assemble
from dfastllm.bench.speculation import requests_of
from dfastllm.core import Request, SpeculativeParams
from dfastllm.distill.students.answers import Answer
from dfastllm.distill.students.bigram import Chains, record
from dfastllm.engine import Engine, EngineConfig
from dfastllm.engine.speculate import DraftCanvas
from dfastllm.engine.speculate.bigram import Candidates, best_chain
from dfastllm.engine.speculate.length import Chances
from dfastllm.kernels import set_threads
from dfastllm.llm import resolve
from dfastllm.metrics.records import write_record
from dfastllm.metrics.speculation import answer, counts
from dfastllm.models.bigram import Bigram
from dfastllm.tasks import MIXED, draw

TARGET = "demo-ar"
MOST = 8
DRAWS = 2000

Floats = np.ndarray[Any, np.dtype[np.float64]]
Length = Callable[[int, int], int]  # (draft, answer) -> tokens of it that are verified


class Replay:
    """Answers of the target and what a drafter says at each of their positions."""

    def __init__(self, target: Any, model: Any, split: str, seed: int, each: int) -> None:
        config = EngineConfig(kv_tokens=8192, max_sequences=16, max_waiting=100_000, prefix_caching=False)
        engine = Engine(target.model, target.tokenizer, config)
        texts, self.tasks = [], []
        for task in MIXED:
            for number in range(each):
                sample = draw(split, seed, number, task)  # type: ignore[arg-type]
                text = target.tokenizer.apply_chat_template(sample.messages, sample.tools or None)
                texts.append(tuple(target.tokenizer.encode(text, add_special=False)))
                self.tasks.append(task)
        requests = requests_of(texts, 0.0, 64)
        run = answer(engine, requests)
        end = target.model.info.eos_ids[0]
        self.answers, parts, self.firsts, at = [], [], [], 0
        for request in requests:
            name = request.request_id
            ids = (*run.tokens[name], *((end,) if name in run.ended else ()))
            self.answers.append(ids)
            part = record(model, target.model.info, [Answer(name, "", request.prompt, ids, True)], MOST)
            parts.append(part)
            self.firsts.append(at)  # number of the answer's first draft
            at += len(part.ids) // MOST
        columns = [torch.cat([getattr(p, name) for p in parts]) for name in ("ids", "logits", "previous", "said")]
        self.chains = Chains(columns[0], columns[1], columns[2], columns[3], MOST)

    def drafts(self, head: Bigram | None) -> tuple[Any, Any]:
        """Drafted tokens int64 [drafts, MOST], and what the rows say of them, float32 [drafts, MOST, 4]."""
        chains = self.chains
        given = Bigram(torch.zeros(2048, 1), torch.zeros(2048, 1)) if head is None else head
        told = Candidates(chains.ids.long().numpy(), chains.logits.numpy(), given.after.numpy()[chains.ids.numpy()])
        firsts = chains.previous.view(-1, MOST)[:, 0].numpy()
        tokens = best_chain(given, told, firsts, np.full(len(firsts), MOST))
        before = np.concatenate([firsts[:, None], tokens.reshape(-1, MOST)[:, :-1]], axis=1).reshape(-1)
        chance = torch.from_numpy(told.after_tokens(given.before.numpy()[before])).softmax(-1)
        two = chance.topk(2).values
        entropy = -(chance * chance.clamp(min=1e-12).log()).sum(-1)
        columns = (two[:, 0].log(), torch.log1p(-two[:, 0].clamp(max=0.99999)), two[:, 0] - two[:, 1], entropy)
        return tokens.reshape(-1, MOST), torch.stack(columns, -1).view(-1, MOST, 4)

    def right(self, tokens: Any) -> Any:
        """bool [drafts, MOST]: whether a token and all before it stand."""
        return (tokens == self.chains.said.view(-1, MOST).numpy()).cumprod(axis=1).astype(bool)

    def walk(self, right: Any, length: Length, cost: Floats, draft: float) -> Floats:
        """float64 [answers, 4]: forwards, draft tokens, accepted ones, and what the steps cost."""
        found = np.zeros((len(self.answers), 4))
        for number, ids in enumerate(self.answers):
            at = 0
            while at < len(ids):
                one = self.firsts[number] + at
                most = min(length(one, number), len(ids) - at - 1)
                stood = int(right[one, :most].sum())
                found[number] += (1, most, stood, cost[most] + (draft if most else 0.0))
                at += stood + 1
        return found


def ratio(new: Floats, old: Floats, over: int, per: int) -> dict[str, Any]:
    """How many times as much of column `over` for each of column `per`, with a 95 % interval that resamples answers."""
    picks = np.random.default_rng(0).integers(0, len(new), (DRAWS, len(new)))

    def rate(x: Floats) -> Floats:
        found: Floats = x[..., over].sum(-1) / x[..., per].sum(-1)
        return found

    again = rate(new[picks]) / rate(old[picks])
    low, high = np.quantile(again, [0.025, 0.975])
    return {"ratio": float(rate(new) / rate(old)), "low": float(low), "high": float(high)}


def lengths_of(replay: Replay, plain: Any, headed: Any) -> list[dict[str, Any]]:
    """Accepted tokens of a verifying forward without and with the bigram head, by task and draft length."""
    rows, tasks = [], np.array(replay.tasks)
    for k in range(3, MOST + 1):
        walks = [replay.walk(right, lambda *_, k=k: k, np.zeros(MOST + 1), 0.0) for right in (plain, headed)]  # type: ignore[misc]
        for task in (*MIXED, "all"):
            old, new = (w if task == "all" else w[tasks == task] for w in walks)
            rows.append({"k": k, "task": task, "before": float(old[:, 2].sum() / old[:, 0].sum())})
            rows[-1] |= {"after": float(new[:, 2].sum() / new[:, 0].sum()), **ratio(new, old, 2, 0)}
            rows[-1]["forwards"] = [int(x[:, 0].sum()) for x in (old, new)]
    return rows


def confidence(train: Replay, test: Replay, head: Bigram | None) -> Any:
    """float64 [drafts of test, MOST]: the chance that a token stands where those before it do, by a small network."""
    tokens, seen = train.drafts(head)
    right = torch.from_numpy(train.right(tokens))
    reached = torch.cat([torch.ones(len(right), 1, dtype=torch.bool), right[:, :-1]], 1)
    reached &= train.chains.said.view(-1, MOST) >= 0
    places = torch.eye(MOST)[None]
    inputs = torch.cat([seen, places.expand(len(seen), -1, -1)], -1)[reached]
    mean, size = inputs.mean(0), inputs.std(0) + 1e-6
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4 + MOST, 16), nn.SiLU(), nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(net.parameters(), 5e-3)
    wanted = right[reached].float()
    for _ in range(600):
        some = torch.randint(len(inputs), (1024,))
        loss = nn.functional.binary_cross_entropy_with_logits(net((inputs[some] - mean) / size)[:, 0], wanted[some])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    seen = test.drafts(head)[1]
    with torch.no_grad():
        given = (torch.cat([seen, places.expand(len(seen), -1, -1)], -1) - mean) / size
        found: Floats = torch.sigmoid(net(given))[..., 0].double().numpy()
        return found


def averages(right: Any, cost: Floats, draft: float) -> Length:
    """The engine's rule: what stood so far at each place, of the request and of the method, decides the length."""
    method, own = Chances(MOST), dict[int, Chances]()

    def length(one: int, number: int) -> int:
        mine = own.setdefault(number, Chances(MOST))
        worth: Floats = np.cumprod(mine.given(method.given(0.8, 1.0), 2.0), dtype=np.float64)
        k = best(worth, cost, draft, None)
        if k:
            stood = int(right[one, :k].sum())
            mine.add(k, stood, 0.95)
            method.add(k, stood, 0.99)
        return k

    return length


def best(worth: Floats, cost: Floats, draft: float, rate: float | None) -> int:
    """The length that gives the most tokens per second, or, where the draft is paid for already and others come after
    it at `rate`, that gains the most against it. worth [MOST]: the chance that the first j + 1 tokens stand."""
    tokens = 1 + np.concatenate([[0.0], np.cumsum(worth)])
    paid = cost + np.where(np.arange(MOST + 1) > 0, draft, 0.0)
    return int(np.argmax(tokens / paid if rate is None else tokens - rate * cost))


def rules(replay: Replay, right: Any, chance: Any, cost: Floats, draft: float) -> dict[str, Any]:
    """Tokens per cost of each rule, in tokens of a plain step, and against the engine's rule."""
    walks = {
        f"fixed {k}": replay.walk(right, lambda *_, k=k: k, cost, draft)  # type: ignore[misc]
        for k in range(MOST + 1)
    }

    def worth(walk: Floats) -> float:
        return float((walk[:, 0] + walk[:, 2]).sum() / walk[:, 3].sum())

    top = max(walks, key=lambda name: worth(walks[name]))
    found = {
        "none": walks["fixed 0"],
        "fixed": walks[top],
        "averages": replay.walk(right, averages(right, cost, draft), cost, draft),
    }
    for name, survives in (("confidence", chance.cumprod(axis=1)), ("oracle", right.astype(np.float64))):
        rate = worth(found["fixed"])
        for _ in range(4):  # to the rate that the rule itself reaches (Dinkelbach)
            walk = replay.walk(right, lambda one, _, s=survives, r=rate: best(s[one], cost, draft, r), cost, draft)  # type: ignore[misc]
            rate = worth(walk)
        found[name] = walk
    whole = {name: np.column_stack([w, w[:, 0] + w[:, 2]]) for name, w in found.items()}
    return {"best fixed": top} | {
        name: {"tokens": worth(found[name]), **ratio(w, whole["averages"], 4, 3)} for name, w in whole.items()
    }


def engine_counts(target: Any, model: Any, head: Bigram, each: int) -> list[dict[str, Any]]:
    """In the engine, greedy and drawn, without and with the head. Raises AssertionError where an answer differs."""
    config = EngineConfig(kv_tokens=8192, max_sequences=8, prefix_caching=False)
    rows = []
    for label, given in (("without", None), ("with", head)):
        drafter = DraftCanvas(model, config, bigram=given)
        engine = Engine(target.model, target.tokenizer, config, drafters={"diffusion": drafter})
        for temperature in (0.0, 1.0):
            for task in MIXED:
                samples = [draw("test", 3, n, task) for n in range(each)]
                texts = [target.tokenizer.apply_chat_template(s.messages, s.tools or None) for s in samples]
                ids = [tuple(target.tokenizer.encode(text, add_special=False)) for text in texts]
                requests: Sequence[Request] = requests_of(ids, temperature, 64)
                asked = SpeculativeParams("diffusion", 5, adaptive=False)
                run = answer(engine, [replace(r, speculative=asked) for r in requests])
                assert run.tokens == answer(engine, requests).tokens, f"an answer of {task} changed"
                rows.append({"head": label, "temperature": temperature, "task": task, "k": 5, **counts(run)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--drafters", nargs="+", default=["demo-diffusion", "demo-block"], help="with a bigram head")
    parser.add_argument("--each", type=int, default=60, help="prompts of each task")
    parser.add_argument("--draft-cost", type=float, default=0.25, help="of a draft, in plain steps")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    set_threads(1)
    torch.set_num_threads(1)
    costs: dict[int, Mapping[int, float]] = {}
    steps = json.loads((Path(__file__).parents[1] / "speculation.json").read_text())["results"]["verify"]
    for batch in sorted({row["batch"] for row in steps}):
        costs[batch] = {row["k"]: max(1.0, row["ratio"]) for row in steps if row["batch"] == batch}
    target = assemble.load(resolve(TARGET), backend="native")
    results = {}
    for name in args.drafters:
        loaded = assemble.load(resolve(name), backend="native", drafting=True)
        head = loaded.bigram
        assert head is not None, f"{name} has no bigram head"
        train, test = (Replay(target, loaded.model, split, 5, args.each) for split in ("train", "test"))
        plain, headed = (test.right(test.drafts(given)[0]) for given in (None, head))
        found: dict[str, Any] = {"bigram": lengths_of(test, plain, headed), "confidence": {}}
        for label, given, right in (("without", None, plain), ("with", head, headed)):
            chance = confidence(train, test, given)
            for batch, curve in costs.items():
                slope = curve[7] + (curve[7] - curve[5]) / 2
                cost = np.interp(np.arange(MOST + 1), [*curve, MOST], [*curve.values(), slope])
                key = f"{label} bigram head, {batch} sequences"
                found["confidence"][key] = rules(test, right, chance, cost, args.draft_cost)
        found["engine"] = engine_counts(target, loaded.model, head, max(8, args.each // 3))
        results[name] = found
        for row in found["bigram"]:
            print(name, row)
        for key, row in found["confidence"].items():
            print(
                name, key, {n: round(v["ratio"], 3) for n, v in row.items() if isinstance(v, dict)}, row["best fixed"]
            )
    if args.json:
        about = {"target": TARGET, "samples": args.each * len(MIXED), "draft_cost": args.draft_cost}
        write_record(args.json, "distillation: heads of block drafters", results, **about)


if __name__ == "__main__":
    main()
