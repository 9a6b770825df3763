"""The consolidated test report that the project set out from, line by line: each line is a test here, made true.

The eight legacy modules and the HTTP lines have tests of their own (test_legacy, tests/server); here the HTTP lines
stand in their Python form.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import subprocess
import sys
import threading
import warnings
from typing import Any

import pytest

import dfastllm
from dfastllm import (
    LLM,
    AsyncScheduler,
    Completion,
    DFastLLMError,
    DiffusionConfig,
    DiffusionGenerator,
    FinishReason,
    GenerationError,
    GenerationMode,
    ModelLoadError,
    ModelNotFoundError,
    ModelRegistry,
    QueueFullError,
    Request,
    RequestState,
    SamplingParams,
    Scheduler,
    SchedulerConfig,
    SchedulerStats,
    StreamChunk,
    TimeoutError,
    ValidationError,
    create_generator,
    create_scheduler,
)
from dfastllm.compat import legacy
from dfastllm.text import Tokenizer
from tests.compat.conftest import Writer

# ---- import tests (8) ----


@pytest.mark.parametrize(
    "names",
    [
        pytest.param("LLM Engine EngineConfig", id="core engine"),
        pytest.param("DiffusionGenerator DiffusionConfig GenerationMode GenerationResult StreamChunk", id="generator"),
        pytest.param("Scheduler SchedulerConfig SchedulerStats Request RequestState AsyncScheduler", id="scheduler"),
        pytest.param("SamplingParams DecodeParams", id="sampling params"),
        pytest.param("RequestOutput Completion Usage FinishReason StepEvent", id="outputs"),
        pytest.param("APDDecoder APDConfig", id="apd"),
        pytest.param("ModelRegistry", id="model registry"),
    ],
)
def test_import(names: str) -> None:
    for name in names.split():
        assert name in dfastllm.__all__
        assert getattr(dfastllm, name).__name__ == name


def test_import_legacy_modules() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        modules = [importlib.import_module(f"dfastllm.compat.legacy.{name}") for name in legacy.__all__]
    assert len(modules) == 8


def test_every_public_name_is_there_and_importing_is_light() -> None:
    for name in dfastllm.__all__:
        assert getattr(dfastllm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = dfastllm.nonsense
    code = "import sys, dfastllm; dfastllm.SamplingParams(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


# ---- DiffusionConfig (4) ----


def test_default_diffusion_config() -> None:
    config = DiffusionConfig()
    assert config.mode is GenerationMode.STANDARD
    assert (config.min_steps, config.max_steps, config.temperature) == (1, None, None)


def test_turbo_mode_config() -> None:
    assert DiffusionConfig(mode=GenerationMode.TURBO).max_parallel_tokens == 64


def test_streaming_mode_config() -> None:
    assert DiffusionConfig(mode=GenerationMode.STREAMING).stream_interval == 2


def test_custom_thresholds(llm: LLM) -> None:
    config = DiffusionConfig(confidence_threshold=0.8, early_stop_confidence=0.95)
    assert (config.confidence_threshold, config.early_stop_confidence) == (0.8, 0.95)
    assert DiffusionGenerator(llm, config=config).generate("The dog", 32).steps_taken < 32


# ---- Scheduler (5) ----


def test_create_scheduler_with_config(model: Writer, tokenizer: Tokenizer) -> None:
    scheduler = Scheduler(SchedulerConfig(max_batch_size=4, max_tokens_per_batch=256), model, tokenizer)
    assert scheduler.config.max_batch_size == scheduler.engine.config.max_sequences == 4
    assert scheduler.engine.config.max_batch_rows == 256
    assert scheduler.pending_count == scheduler.running_count == 0


def test_scheduler_config_validation() -> None:
    SchedulerConfig(max_batch_size=8, max_tokens_per_batch=512, max_wait_time_ms=5.0, scheduling_policy="fcfs")
    with pytest.raises(ValidationError, match="max_batch_size"):
        SchedulerConfig(max_batch_size=0)


def test_create_request_with_all_fields() -> None:
    request = Request("r1", [1, 2, 3], 100, 0.7, 5, 12.5, RequestState.PENDING)
    assert (request.request_id, request.prompt_tokens, request.max_tokens) == ("r1", [1, 2, 3], 100)
    assert (request.temperature, request.priority, request.arrival_time) == (0.7, 5, 12.5)
    assert request.state is RequestState.PENDING


def test_request_properties() -> None:
    request = Request(prompt_tokens=[1, 2, 3], max_tokens=100)
    assert request.total_tokens == 103
    assert not request.is_finished
    for state in (RequestState.COMPLETED, RequestState.CANCELLED, RequestState.FAILED):
        request.state = state
        assert request.is_finished


def test_scheduler_stats_record_batch() -> None:
    stats = SchedulerStats()
    stats.record_batch(batch_size=4, tokens=100, time_ms=50.0)
    assert (stats.total_batches, stats.total_tokens, stats.average_batch_size) == (1, 100, 4.0)
    assert stats.tokens_per_second == 2000.0


# ---- GenerationMode (2) ----


def test_generation_modes() -> None:
    assert {mode.name for mode in GenerationMode} == {"STANDARD", "FAST", "STREAMING", "TURBO"}


def test_generation_mode_values() -> None:
    assert [GenerationMode(mode.value) for mode in GenerationMode] == list(GenerationMode)
    assert GenerationMode.TURBO == "turbo"


# ---- factories (2) ----


def test_create_generator(llm: LLM) -> None:
    generator = create_generator(llm, mode="turbo", max_steps=20)
    assert generator.config == DiffusionConfig(mode=GenerationMode.TURBO, max_steps=20)
    assert generator.generate("The dog", 16).num_generated == 16


def test_create_scheduler(model: Writer, tokenizer: Tokenizer) -> None:
    with create_scheduler(model, tokenizer, max_batch_size=3) as scheduler:
        assert scheduler.config == SchedulerConfig(max_batch_size=3)
        completion = scheduler.submit(Request(prompt_tokens="The dog", max_tokens=8)).result(10)
    assert isinstance(completion, Completion)
    assert len(completion.token_ids) == 8


# ---- SamplingParams (3) ----


def test_sampling_params_defaults_are_vllms() -> None:
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.max_tokens) == (1, 1.0, 1.0, 0, None)


def test_sampling_params_custom() -> None:
    params = SamplingParams(temperature=0.8, top_p=0.95, top_k=50, max_tokens=100, stop="\n", seed=7)
    assert params.stop == ("\n",)


def test_sampling_params_validation() -> None:
    for fields in ({"temperature": -1.0}, {"top_p": -0.1}, {"max_tokens": 0}, {"n": 0}):
        with pytest.raises(ValidationError, match=next(iter(fields))):
            SamplingParams(**fields)  # type: ignore[arg-type]


# ---- errors (2) ----


def test_error_tree() -> None:
    for kind in (ModelLoadError, GenerationError, ValidationError, TimeoutError, QueueFullError, ModelNotFoundError):
        assert issubclass(kind, DFastLLMError)


def test_errors_carry_code_status_and_hint() -> None:
    error = QueueFullError("full.", retry_after=2.0, hint="Wait.")
    assert (error.code, error.status, error.retry_after, error.hint) == ("queue_full", 429, 2.0, "Wait.")


# ---- async scheduler (2) ----


def test_async_scheduler_starts_and_stops(model: Writer, tokenizer: Tokenizer) -> None:
    async def run() -> None:
        before = threading.active_count()
        scheduler = await AsyncScheduler(SchedulerConfig(), model, tokenizer).start()
        assert threading.active_count() > before
        await scheduler.stop()

    asyncio.run(run())


def test_async_scheduler_answers(model: Writer, tokenizer: Tokenizer) -> None:
    async def run() -> Completion:
        async with AsyncScheduler(SchedulerConfig(), model, tokenizer) as scheduler:
            return await scheduler.submit(Request(prompt_tokens="The dog", max_tokens=8))

    assert len(asyncio.run(run()).token_ids) == 8


# ---- StreamChunk (2) ----


def test_stream_chunk_fields() -> None:
    chunk = StreamChunk("ab", "b", (1, 2), 2, 8, 0.25, False, "ab")
    assert (chunk.text, chunk.new_text, chunk.tokens, chunk.unmasked_count) == ("ab", "b", (1, 2), 2)
    assert (chunk.total_tokens, chunk.progress, chunk.finished) == (8, 0.25, False)


def test_stream_chunks_of_a_stream(llm: LLM) -> None:
    chunks = list(DiffusionGenerator(llm).generate_stream("The dog", 16))
    assert all(isinstance(chunk, StreamChunk) for chunk in chunks)
    assert chunks[-1].finished
    assert len(chunks) > 2


# ---- legacy (4): more in test_legacy ----


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("turbo_decoder", ["TurboConfig", "TurboDecoder"]),
        ("fast_diffusion", ["FastDiffusionConfig"]),
        ("batcher", ["BatchStats", "ContinuousBatcher"]),
        ("ultra_fast_streaming", ["UltraFastConfig"]),
    ],
)
def test_legacy(module: str, names: list[str], llm: LLM) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        found = importlib.import_module(f"dfastllm.compat.legacy.{module}")
        for name in names:
            old = getattr(found, name)
            arguments = {"TurboDecoder": [llm], "ContinuousBatcher": [SchedulerConfig(), llm]}.get(name, [])
            assert isinstance(old(*arguments), old)


# ---- what the report tested over HTTP, in Python ----


def test_health(llm: LLM) -> None:
    assert llm.worker.is_alive


def test_list_models(llm: LLM) -> None:
    registry = ModelRegistry()
    registry.register("served", llm)
    assert "served" in registry.list()


def test_completion(llm: LLM) -> None:
    [output] = llm.generate("The dog", SamplingParams(max_tokens=8, temperature=0.0))
    assert output.outputs[0].text == llm.tokenizer.decode(output.outputs[0].token_ids) != ""


def test_chat_completion(model: Writer, tokenizer: Tokenizer) -> None:
    from dfastllm.compat.generator import build_engine
    from dfastllm.text import ChatTemplates

    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    chatty = Tokenizer(tokenizer.backend, templates=ChatTemplates({"default": template}))
    with LLM(engine=build_engine(model, chatty)) as llm:
        chat: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]
        wanted = llm.generate([chatty.encode("user: Hi\nassistant:")])[0].text
        assert llm.chat(chat)[0].text == wanted != ""


def test_invalid_model_error() -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        LLM("no-such-model")
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")


@pytest.mark.parametrize("prompt", ["", []])
def test_empty_prompt_error(llm: LLM, prompt: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        DiffusionGenerator(llm).generate(prompt, 8)
    assert caught.value.status == 400


def test_greedy_decoding(llm: LLM) -> None:
    generator = DiffusionGenerator(llm)
    assert len({generator.generate("The dog", 16, temperature=0.0).tokens for _ in range(3)}) == 1


def test_concurrent_requests(llm: LLM) -> None:
    """Threads at once, each answer as if alone."""
    generator = DiffusionGenerator(llm)
    lengths = [8, 16, 24, 32, 40, 48]
    alone = [generator.generate("The dog", n).tokens for n in lengths]
    together: dict[int, tuple[int, ...]] = {}
    threads = [
        threading.Thread(target=lambda n=n: together.update({n: generator.generate("The dog", n).tokens}))
        for n in lengths
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [together[n] for n in lengths] == alone


def test_finish_reasons_read_as_openais() -> None:
    assert json.dumps([FinishReason.STOP, FinishReason.LENGTH]) == '["stop", "length"]'
