"""The demo models of the package: small, one tokenizer, and as good on the test split as their cards say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dfastllm import assemble, models
from dfastllm.core import Request, SamplingParams, SpeculativeParams
from dfastllm.engine import Engine, EngineConfig
from dfastllm.engine.speculate import DraftCanvas
from dfastllm.llm import LLM, resolve, shipped_models
from dfastllm.metrics.speculation import answer
from dfastllm.tasks import draw, grade
from dfastllm.train.data import encode
from dfastllm.train.evaluate import evaluate
from dfastllm.train.recipes import RECIPES

MODELS = ("demo-ar", "demo-block", "demo-diffusion", "demo-draft")
CURVES = Path(__file__).parents[2] / "benchmarks" / "training"


def test_all_four_are_shipped_and_small() -> None:
    assert set(MODELS) <= set(shipped_models())
    for name in MODELS:
        assert sum(file.stat().st_size for file in resolve(name).iterdir()) <= 10_000_000


def test_they_share_one_tokenizer() -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert len({(resolve(name) / file).read_bytes() for name in MODELS}) == 1


@pytest.mark.parametrize("name", MODELS)
def test_shape_and_wiring_are_the_recipes(name: str) -> None:
    model, recipe = models.load(resolve(name)), RECIPES[name]
    assert model.info.family == recipe.family
    assert model.info.block == recipe.block
    assert {field: getattr(model.config, field) for field in recipe.shape} == recipe.shape


@pytest.mark.parametrize("name", MODELS)
def test_held_out_answers_are_as_good_as_the_card_says(name: str) -> None:
    """24 test samples through the engine; the margin is three standard errors of that many."""
    recorded = json.loads((CURVES / f"{name}.test.json").read_text())
    card = (resolve(name) / "README.md").read_text()
    assert f"**{recorded['total']:.1%}**" in card
    assert f"dfastllm train {name}" in card
    total = recorded["total"]
    assert evaluate(name, per_task=4).total >= total - 3 * (total * (1 - total) / 24) ** 0.5


def test_a_result_counts_what_was_answered() -> None:
    """Shares of right answers by task and over all, and what an answer took, against the answers themselves."""
    with LLM("demo-ar") as llm:
        found = evaluate(llm, tasks=("arithmetic", "rewrite", "prose"), per_task=3, max_tokens=24, split="validation")
        samples = [draw("validation", 0, i, task) for task in ("arithmetic", "rewrite") for i in range(3)]
        prompts = [encode(llm.tokenizer, sample).prompt for sample in samples]
        answers = [one.outputs[0] for one in llm.generate(prompts, SamplingParams(temperature=0, max_tokens=24))]
    right = [grade(sample, answer.text) for sample, answer in zip(samples, answers, strict=True)]
    assert found.accuracy == {"arithmetic": sum(right[:3]) / 3, "rewrite": sum(right[3:]) / 3}
    assert found.total == sum(right) / 6
    assert len(found.wrong) == 6 - sum(right)
    forwards = sum(answer.usage.forwards for answer in answers)
    assert found.forwards == forwards / 6
    assert found.tokens_per_forward == sum(answer.usage.completion_tokens for answer in answers) / forwards
    assert (found.model, found.split, found.per_task, found.decode) == ("demo-ar", "validation", 3, "greedy")


@pytest.mark.parametrize("name", ["demo-block", "demo-diffusion"])
def test_its_bigram_head_makes_more_drafts_stand(name: str) -> None:
    """Prose for demo-ar: at least a quarter more tokens of a draft, where the card has much more; and the same text."""
    target, draft = assemble.load(resolve("demo-ar"), backend="native"), assemble.load(resolve(name), drafting=True)
    config = EngineConfig(kv_tokens=2048, max_sequences=8)
    sampling = SamplingParams(temperature=0.0, max_tokens=32)
    requests = [
        Request(str(i), encode(target.tokenizer, draw("test", 4, i, "prose")).prompt, sampling) for i in range(8)
    ]
    asked = [replace(r, speculative=SpeculativeParams("diffusion", 6, adaptive=False)) for r in requests]
    accepted, said = {}, []
    for head in (None, draft.bigram):
        drafter = DraftCanvas(draft.model, config, bigram=head)
        run = answer(Engine(target.model, target.tokenizer, config, drafters={"diffusion": drafter}), asked)
        used = run.usages.values()
        accepted[head is not None] = sum(u.accepted_tokens for u in used) / sum(u.drafts for u in used)
        said.append(run.tokens)
    assert said[0] == said[1]
    assert accepted[True] > 1.25 * accepted[False]
