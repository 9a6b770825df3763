"""DiffusionGenerator: the modes do what they say, streams add up to results, nothing is left behind."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import threading
from pathlib import Path
from typing import Any

import pytest

from dfastllm import (
    LLM,
    DecodeParams,
    DiffusionConfig,
    DiffusionGenerator,
    FinishReason,
    GenerationMode,
    ModelNotFoundError,
    Request,
    SamplingParams,
    Scheduler,
    UnsupportedError,
    ValidationError,
    create_generator,
)
from dfastllm.compat.generator import build_engine
from dfastllm.text import Tokenizer
from tests.compat.conftest import Writer

MODES = sorted(GenerationMode)


def answer(llm: LLM, prompt: str = "The dog", max_tokens: int = 64, **fields: Any) -> Any:
    return DiffusionGenerator(llm, config=DiffusionConfig(**fields)).generate(prompt, max_tokens)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_answers_and_streams_the_same(llm: LLM, mode: GenerationMode) -> None:
    generator = DiffusionGenerator(llm, config=DiffusionConfig(mode=mode))
    result = generator.generate("The dog", 40)
    assert result.num_generated == len(result.tokens) == 40
    assert result.finish_reason is FinishReason.LENGTH
    assert result.text == llm.tokenizer.decode(result.tokens)
    assert result.exactness == ("reference" if mode is GenerationMode.STANDARD else "approximate")
    assert result.generation_time_ms > 0
    assert result.prompt_tokens == len(llm.encode("The dog"))
    chunks = list(generator.generate_stream("The dog", 40))
    assert "".join(chunk.new_text for chunk in chunks) == result.text
    assert chunks[-1].tokens == result.tokens
    assert [chunk.finished for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    text = ""
    for chunk in chunks:
        text += chunk.new_text
        assert chunk.text == text
        assert chunk.preview.startswith(text)
        assert 0 < chunk.unmasked_count <= chunk.total_tokens
    counts = [chunk.unmasked_count for chunk in chunks]
    assert counts == sorted(counts)
    assert chunks[-1].progress == 1.0
    assert chunks[-1].finish_reason is FinishReason.LENGTH


def test_standard_is_the_engines_plain_diffusion(llm: LLM) -> None:
    decode = DecodeParams(rule="schedule", cache="none", block_length=32, steps=64)
    plain = llm.generate("The dog", SamplingParams(temperature=0.0, max_tokens=40), decode)[0].outputs[0]
    assert answer(llm, max_tokens=40).tokens == plain.token_ids


def test_the_modes_take_ever_fewer_steps(llm: LLM) -> None:
    steps = {mode: answer(llm, mode=mode).steps_taken for mode in MODES}
    assert steps[GenerationMode.STANDARD] == 64  # one token a step
    assert steps[GenerationMode.FAST] < 32
    assert steps[GenerationMode.TURBO] < steps[GenerationMode.STREAMING] < 64


@pytest.mark.parametrize("least", [1, 7, 30, 64])
def test_min_steps(llm: LLM, least: int) -> None:
    assert answer(llm, confidence_threshold=0.001, min_steps=least).steps_taken >= least


@pytest.mark.parametrize("most", [2, 5, 16, 64])
def test_max_steps(llm: LLM, most: int) -> None:
    assert answer(llm, max_steps=most).steps_taken == most
    assert answer(llm, max_steps=most, confidence_threshold=1.0).steps_taken <= most


def test_max_steps_below_the_number_of_blocks_is_refused(llm: LLM) -> None:
    with pytest.raises(ValidationError, match="steps must be at least the number of blocks, 2"):
        answer(llm, max_steps=1)


@pytest.mark.parametrize("cap", [1, 3, 8])
def test_max_parallel_tokens(llm: LLM, cap: int) -> None:
    generator = DiffusionGenerator(
        llm, config=DiffusionConfig(confidence_threshold=0.001, max_parallel_tokens=cap, stream_interval=1)
    )
    counts = [0, *(chunk.unmasked_count for chunk in generator.generate_stream("The dog", 64))]
    grown = [after - before for before, after in itertools.pairwise(counts)]
    assert max(grown) == cap


def test_a_lower_threshold_commits_more_at_once(llm: LLM) -> None:
    steps = [answer(llm, confidence_threshold=t).steps_taken for t in (1.0, 0.9, 0.5, 0.001)]
    assert steps == sorted(steps, reverse=True)
    assert steps[-1] == 2  # one for each block


def test_early_stop_confidence_ends_blocks_early(llm: LLM) -> None:
    assert answer(llm, early_stop_confidence=0.0).steps_taken == 64
    assert 2 < answer(llm, early_stop_confidence=0.5).steps_taken < 64
    assert answer(llm, early_stop_confidence=0.001).steps_taken == 2  # every token is surer than that
    # A threshold below it commits all such tokens anyway.
    assert (
        answer(llm, confidence_threshold=0.5, early_stop_confidence=0.9).tokens
        == answer(llm, confidence_threshold=0.5).tokens
    )


def test_stream_interval(llm: LLM) -> None:
    for interval in (1, 2, 5):
        generator = create_generator(llm, stream_interval=interval)
        chunks = list(generator.generate_stream("The dog", 32))
        assert [c.unmasked_count for c in chunks[:-1]] == list(range(interval, 32 + (32 % interval > 0), interval))[
            : len(chunks) - 1
        ]


def test_streaming_shows_guesses_and_the_first_text_early(llm: LLM) -> None:
    streaming = list(create_generator(llm, mode="streaming").generate_stream("The dog", 64))
    shown = streaming[0].preview
    assert len(shown.replace("\u2591", "")) > streaming[0].unmasked_count  # guesses beside what is decided
    assert max(len(chunk.preview) for chunk in create_generator(llm, mode="turbo").generate_stream("The dog", 9)) == 9
    quiet = next(create_generator(llm, mode="streaming", provisional=False).generate_stream("The dog", 64))
    assert len(quiet.preview.replace("\u2591", "")) == quiet.unmasked_count
    plain = list(create_generator(llm, mode="standard", stream_interval=1).generate_stream("The dog", 64))
    assert plain[next(i for i, c in enumerate(plain) if len(c.text) >= 8)].unmasked_count >= 8 * 3
    assert next(c for c in streaming if c.text).unmasked_count <= 16


def test_the_text_ends_early_and_alike_in_the_stream(ending_model: Writer, tokenizer: Tokenizer) -> None:
    with DiffusionGenerator(ending_model, tokenizer) as generator:
        result = generator.generate("The dog", 64)
        assert result.finish_reason is FinishReason.STOP
        assert 0 < result.num_generated < 64
        assert result.steps_taken < 64
        chunks = list(generator.generate_stream("The dog", 64))
        assert "".join(chunk.new_text for chunk in chunks) == result.text
        assert chunks[-1].progress == 1.0
        assert chunks[-1].preview == result.text


def test_stop_strings_and_seeds_reach_the_engine(llm: LLM) -> None:
    generator = DiffusionGenerator(llm)
    full = generator.generate("The dog", 64)
    stop = full.text[5:7]
    cut = generator.generate("The dog", 64, sampling=SamplingParams(temperature=0.0, stop=(stop,)))
    assert cut.text == full.text[: full.text.index(stop)]
    assert cut.finish_reason is FinishReason.STOP
    warm = [generator.generate("The dog", 32, 1.0, sampling=SamplingParams(seed=s)).tokens for s in (1, 1, 2)]
    assert warm[0] == warm[1] != warm[2]
    assert warm[0] != full.tokens[:32]


def test_temperature_of_the_config_is_the_default(llm: LLM) -> None:
    hot = DiffusionGenerator(llm, config=DiffusionConfig(temperature=5.0))
    cold = DiffusionGenerator(llm)
    assert hot.generate("The dog", 32).tokens != cold.generate("The dog", 32).tokens
    assert hot.generate("The dog", 32, temperature=0.0).tokens == cold.generate("The dog", 32).tokens


def test_token_ids_are_a_prompt_too(llm: LLM) -> None:
    generator = DiffusionGenerator(llm)
    assert generator.generate(llm.encode("The dog"), 16).tokens == generator.generate("The dog", 16).tokens


def test_default_length_is_128(llm: LLM) -> None:
    assert answer(llm, max_tokens=None, confidence_threshold=0.001).num_generated == 128


def test_block_diffusion_models(block_model: Writer, tokenizer: Tokenizer) -> None:
    for mode in MODES:
        with DiffusionGenerator(block_model, tokenizer, DiffusionConfig(mode=mode)) as generator:
            result = generator.generate("The lazy dog", 24)
            assert result.num_generated == 24
            assert result.forwards >= result.steps_taken > 0
            assert "".join(c.new_text for c in generator.generate_stream("The lazy dog", 24)) == result.text


def test_autoregressive_models_are_refused_at_once(ar_model: Writer, tokenizer: Tokenizer) -> None:
    threads = threading.active_count()
    with pytest.raises(UnsupportedError, match="writer-ar is autoregressive"):
        DiffusionGenerator(ar_model, tokenizer)
    assert threading.active_count() == threads


def test_closing_a_stream_cancels_it(model: Writer, tokenizer: Tokenizer) -> None:
    with DiffusionGenerator(model, tokenizer) as generator:
        stream = generator.generate_stream("The dog", 128)
        next(stream)
        stream.close()
        engine = generator.llm.engine
        for _ in range(500):
            if not engine.has_work:
                break
            threading.Event().wait(0.01)
        assert not engine.has_work
        assert engine.pages.used == 0


def test_warmup_runs_the_model(model: Writer, tokenizer: Tokenizer) -> None:
    with DiffusionGenerator(model, tokenizer, DiffusionConfig(min_steps=40)) as generator:
        before = model.forwards
        assert generator.warmup() > 0
        assert model.forwards >= before + 40


def test_models_come_in_many_forms(llm: LLM, model: Writer, tokenizer: Tokenizer) -> None:
    wanted = DiffusionGenerator(llm).generate("The dog", 8).tokens
    with DiffusionGenerator(build_engine(llm)) as generator:
        assert generator.generate("The dog", 8).tokens == wanted
    with create_generator(model, tokenizer) as generator:
        assert generator.generate("The dog", 8).tokens == wanted
    with DiffusionGenerator(model) as generator:  # no tokenizer: ids only
        assert generator.generate(llm.encode("The dog"), 8).tokens == wanted


def test_a_borrowed_llm_stays_open(llm: LLM) -> None:
    with DiffusionGenerator(llm) as generator:
        generator.generate("The dog", 4)
    assert llm.worker.is_alive


def test_wrong_models_are_named(llm: LLM, tokenizer: Tokenizer, model: Writer, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="model must be an LLM, an Engine, a name"):
        DiffusionGenerator(object())
    with pytest.raises(ValidationError, match="brings its own tokenizer"):
        DiffusionGenerator(llm, tokenizer)
    with pytest.raises(ModelNotFoundError, match="no-such-model"):
        DiffusionGenerator("no-such-model")
    with pytest.raises(ValidationError, match="unknown option 'speed'; there are mode, min_steps"):
        create_generator(llm, speed=9)


def test_other_vocabularies_are_refused(model: Writer, tokenizer: Tokenizer) -> None:
    small = Writer(mask_id=3)
    small.info = dataclasses.replace(small.info, vocab_size=100)
    with pytest.raises(Exception, match="only 100 embeddings"):
        DiffusionGenerator(small, tokenizer)
    gc.collect()


def test_the_fields_of_the_configuration_are_keywords_too(llm: LLM) -> None:
    for mode in MODES:
        assert DiffusionGenerator(llm, mode=mode).config == DiffusionConfig(mode=mode)
    config = DiffusionGenerator(llm, mode=GenerationMode.TURBO, early_stop_threshold=0.95).config
    assert config == DiffusionConfig(mode="turbo", early_stop_confidence=0.95)
    with pytest.raises(ValidationError, match="unknown option 'speed'; there are mode, min_steps"):
        DiffusionGenerator(llm, speed=9)
    with pytest.raises(ValidationError, match="a configuration and mode beside it") as refused:
        DiffusionGenerator(llm, config=DiffusionConfig(), mode="fast")
    assert refused.value.param == "mode"


def test_a_text_is_a_users_message_unless_it_is_raw() -> None:
    ask = "What is 12 + 30?"
    with DiffusionGenerator() as generator:
        said = generator.llm.chat(
            [{"role": "user", "content": ask}],
            decode=generator.config.decode_params(16, generator.llm.info),
            sampling=SamplingParams(temperature=0.0, max_tokens=16),
        )[0]
        answer = generator.generate(ask, 16)
        assert "42" in answer.text
        assert (answer.text, answer.prompt_tokens) == (said.text, len(said.prompt_tokens))
        assert "".join(chunk.new_text for chunk in generator.generate_stream(ask, 16)) == answer.text
        raw = generator.generate(ask, 16, raw=True)
        assert raw.prompt_tokens == len(generator.llm.encode(ask))
        assert raw.tokens == generator.generate(generator.llm.encode(ask), 16).tokens
        with Scheduler(model=generator.llm) as scheduler:
            jobs = [Request(prompt_tokens=ask, max_tokens=16, temperature=0.0, raw=raw) for raw in (False, True)]
            texts = [done.result(30).text for done in scheduler.submit_batch(jobs)]
            assert "42" in texts[0]
            assert len(jobs[0].prompt_tokens) == answer.prompt_tokens
            assert len(jobs[1].prompt_tokens) == raw.prompt_tokens
