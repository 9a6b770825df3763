"""APDDecoder: the small model judges, and only it."""

from __future__ import annotations

import itertools
import threading

import pytest

from dfastllm import (
    LLM,
    APDConfig,
    APDDecoder,
    DiffusionConfig,
    DiffusionGenerator,
    ModelNotFoundError,
    Request,
    Scheduler,
    UnsupportedError,
    ValidationError,
)
from dfastllm.compat.generator import build_engine
from dfastllm.text import Tokenizer
from tests.compat.conftest import Writer
from tests.kit.fake import FakeModel


def left_to_right(decoder: APDDecoder) -> list[int]:
    """Tokens committed at each step; they must come in order."""
    counts = [0, *(chunk.unmasked_count for chunk in decoder.generate_stream("The dog", 64))]
    return [after - before for before, after in itertools.pairwise(counts)]


def test_the_cap_and_the_weight(llm: LLM, ar_model: Writer) -> None:
    steps = {}
    for weight in (0.0, 0.5, 1.0):
        config = APDConfig(mixture_weight=weight, max_parallel_tokens=8, stream_interval=1)
        with APDDecoder(llm, ar_model, config=config) as decoder:
            grown = left_to_right(decoder)
            assert max(grown) <= 8
            steps[weight] = len(grown)
            assert decoder.generate("The dog", 64).num_generated == 64
    # Alone the diffusion model agrees with itself, so every step takes all it may; a stranger nearly always objects.
    assert steps[1.0] == 64 // 8
    assert steps[0.0] > steps[0.5] >= steps[1.0]


def test_lookahead_bounds_a_step_too(llm: LLM, ar_model: Writer) -> None:
    config = APDConfig(mixture_weight=1.0, max_parallel_tokens=0, max_lookahead=3, stream_interval=1)
    with APDDecoder(llm, ar_model, config=config) as decoder:
        assert max(left_to_right(decoder)) == 3


def test_disabled_is_the_plain_generator(llm: LLM) -> None:
    with APDDecoder(llm, "no such model", config=APDConfig(enabled=False)) as decoder:
        wanted = DiffusionGenerator(llm, config=DiffusionConfig()).generate("The dog", 32)
        assert decoder.generate("The dog", 32).tokens == wanted.tokens


def test_draft_in_many_forms(llm: LLM, ar_model: Writer, tokenizer: Tokenizer) -> None:
    with APDDecoder(llm, ar_model) as decoder:
        wanted = decoder.generate("The dog", 16).tokens
    with APDDecoder(llm, build_engine(ar_model, tokenizer)) as decoder:
        assert decoder.generate("The dog", 16).tokens == wanted


def test_an_engine_that_shares_the_weights_keeps_the_draft(llm: LLM, ar_model: Writer) -> None:
    with APDDecoder(llm, ar_model) as decoder:
        decode = decoder.config.decode_params(16, llm.info)
        wanted = decoder.generate("The dog", 16).tokens
        with Scheduler(model=decoder.llm, decode=decode) as scheduler:
            request = Request(prompt_tokens="The dog", max_tokens=16)
            assert scheduler.submit(request).result(10).token_ids == wanted
    with pytest.raises(UnsupportedError, match="apd"):
        Scheduler(model=llm, decode=decode).submit(Request(prompt_tokens="The dog", max_tokens=16))


def test_wrong_drafts_are_refused_at_once(llm: LLM, model: Writer) -> None:
    threads = threading.active_count()
    with pytest.raises(UnsupportedError, match="a scorer must be autoregressive"):
        APDDecoder(llm, model)
    with pytest.raises(ValidationError, match="vocabulary of 48"):
        APDDecoder(llm, FakeModel("ar"))
    with pytest.raises(ValidationError, match="draft must be an autoregressive model"):
        APDDecoder(llm, 3)
    with pytest.raises(ModelNotFoundError):
        APDDecoder(llm, "no such model")
    assert threading.active_count() == threads


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mixture_weight": 1.5}, "mixture_weight must be in"),
        ({"max_lookahead": 0}, "max_lookahead must be at least 1"),
        ({"max_parallel_tokens": -1}, "max_parallel_tokens"),
        ({"confidence_threshold": 0.9}, "apd is a rule of its own; got confidence_threshold 0.9"),
        ({"mode": "turbo"}, "apd is a rule of its own; got factor 1.0"),
    ],
)
def test_wrong_configurations(fields: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        APDConfig(**fields)
