"""Many requests at once, each with its own parameters, each equal to what the library gives it alone."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dfastllm.core import DecodeParams, SamplingParams
from dfastllm.engine import Engine
from dfastllm.llm import LLM
from tests.kit.live import Live
from tests.kit.served import random_engine


@dataclass(frozen=True)
class Case:
    """A request as the wire and as the library say it."""

    model: str
    prompt: str
    n: int
    stream: bool
    body: dict[str, Any]
    sampling: SamplingParams
    decode: DecodeParams | None


def cases(count: int) -> list[Case]:
    draw = random.Random(7)
    made = []
    for index in range(count):
        shared: dict[str, Any] = {
            "max_tokens": draw.randint(3, 40),
            "temperature": draw.choice([0.0, 0.6, 1.0]),
            "top_p": draw.choice([1.0, 0.9]),
            "top_k": draw.choice([0, 20]),
            "seed": draw.randrange(1000),
            "ignore_eos": draw.random() < 0.5,
            "repetition_penalty": draw.choice([1.0, 1.3]),
        }
        shared["min_tokens"] = draw.choice([0, shared["max_tokens"] // 2])
        body = dict(shared)
        decode = None
        model = ("canvas", "causal", "blocks", "causal")[index % 4]
        if model == "canvas":
            use, dual = draw.choice([(True, True), (True, False), (False, False)])
            block = draw.choice([4, 8, 32])
            blocks = -(-shared["max_tokens"] // block)
            steps = draw.randint(blocks, 48)
            rule = draw.choice([{}, {"threshold": 0.3}, {"factor": 2.0}, {"remasking": "margin"}])
            body |= {"use_cache": use, "use_dual_cache": dual, "block_length": block, "steps": steps, **rule}
            cache = {(True, True): "dual", (True, False): "prefix", (False, False): "none"}[use, dual]
            decode = DecodeParams(cache=cache, block_length=block, steps=steps, **rule)  # type: ignore[arg-type]
        elif model == "blocks":
            rule = draw.choice([{}, {"threshold": 0.3}, {"factor": 2.0}])
            body |= rule
            decode = DecodeParams(**rule)
        made.append(
            Case(
                model=model,
                prompt="".join(draw.choices("abcdefgh ", k=draw.randint(1, 60))),
                n=draw.choice([1, 1, 2]),
                stream=draw.random() < 0.5,
                body=body,
                sampling=SamplingParams(**shared),
                decode=decode,
            )
        )
    return made


def alone(engines: dict[str, Engine], case: Case) -> list[tuple[list[int], str, str]]:
    with LLM(engine=engines[case.model]) as llm:
        out = []
        for choice in range(case.n):
            sampling = SamplingParams(**{**vars(case.sampling), "seed": (case.sampling.seed or 0) + choice})
            done = llm.generate(case.prompt, sampling, case.decode)[0].outputs[0]
            out.append((list(done.token_ids), done.text, str(done.finish_reason)))
        return out


async def over_http(live: Live, case: Case, model: str) -> list[tuple[list[int], str, str]]:
    async with live.async_client() as client:
        answer = await client.completions.create(
            model=model,
            prompt=case.prompt,
            n=case.n,
            stream=case.stream,
            extra_body={**case.body, "return_token_ids": True},
        )
        ids: list[list[int]] = [[] for _ in range(case.n)]
        texts = [""] * case.n
        reasons = [""] * case.n
        for chunk in [chunk async for chunk in answer] if case.stream else [answer]:
            for choice in chunk.choices:
                ids[choice.index] += choice.model_extra.get("token_ids", [])
                texts[choice.index] += choice.text
                reasons[choice.index] = choice.finish_reason or reasons[choice.index]
        return list(zip(ids, texts, reasons, strict=True))


async def all_at_once(
    live: Live, wanted: list[Case], names: Mapping[str, str] | None = None
) -> list[list[tuple[list[int], str, str]]]:
    """`names`: what the server calls the cases' models, where it differs."""
    return await asyncio.gather(*(over_http(live, case, (names or {}).get(case.model, case.model)) for case in wanted))


def test_thirty_two_mixed_requests_equal_their_solo_results(live: Live) -> None:
    wanted = cases(32)
    engines = {
        "canvas": random_engine("llada"),
        "causal": random_engine("llama", seed=1),
        "blocks": random_engine("sdar", seed=2),
    }
    solo = [alone(engines, case) for case in wanted]
    before = live.metric("engine_steps_total", model_name="causal")
    together = asyncio.run(all_at_once(live, wanted))
    for case, one, many in zip(wanted, solo, together, strict=True):
        assert many == one, case
    assert sum(len(ids) for result in solo for ids, _, _ in result) > 400
    # They did run side by side: far fewer steps than forward passes.
    taken = live.metric("engine_steps_total", model_name="causal") - before
    tokens = sum(len(ids) for case, r in zip(wanted, solo, strict=True) if case.model == "causal" for ids, _, _ in r)
    assert taken < tokens / 2
