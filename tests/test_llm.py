"""The facade over small random models: batches, options per prompt, streams, choices, errors."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dfastllm.core import DecodeParams, FinishReason, Request, SamplingParams, SpeculativeConfig, SpeculativeParams
from dfastllm.engine import Engine, EngineConfig
from dfastllm.errors import (
    CancelledError,
    ModelLoadError,
    ModelNotFoundError,
    TokenizerError,
    UnsupportedError,
    ValidationError,
)
from dfastllm.llm import LLM, load_engine, resolve, shipped_models, split_choices
from dfastllm.models import save, tiny

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def canvas() -> Iterator[LLM]:
    with LLM(engine=Engine(tiny("llada", seed=1), config=EngineConfig(kv_tokens=2048, max_waiting=3))) as llm:
        yield llm


def test_a_batch_equals_each_alone(canvas: LLM) -> None:
    prompts = [tuple(range(1, 3 + i)) for i in range(8)]  # more than the queue holds: submitted in windows
    decode = [DecodeParams(block_length=4, cache=("none", "dual")[i % 2]) for i in range(8)]
    together = canvas.generate(prompts, GREEDY, decode)
    assert [o.prompt_tokens for o in together] == prompts
    for prompt, params, output in zip(prompts, decode, together, strict=True):
        assert canvas.generate(prompt, GREEDY, params)[0].outputs[0].token_ids == output.outputs[0].token_ids
        assert output.outputs[0].usage.completion_tokens <= 12


def test_a_stream_concatenates_to_the_result(canvas: LLM) -> None:
    events = list(canvas.stream((1, 2, 3), GREEDY, DecodeParams(block_length=4)))
    tokens = tuple(t for e in events for t in e.token_ids)
    assert tokens == canvas.generate((1, 2, 3), GREEDY, DecodeParams(block_length=4))[0].outputs[0].token_ids
    assert [e.finish is not None for e in events] == [False] * (len(events) - 1) + [True]
    assert events[-1].finish.reason is FinishReason.LENGTH


def test_leaving_a_stream_frees_its_pages(canvas: LLM) -> None:
    stream = canvas.stream((1, 2, 3), GREEDY, DecodeParams(cache="dual", block_length=2))
    next(stream)
    stream.close()
    canvas.generate((1,), GREEDY)  # runs after the cancel on the same thread
    assert canvas.engine.pages.used == 0


def test_n_choices_are_seeded_apart_and_the_first_is_the_seed(canvas: LLM) -> None:
    sampling = SamplingParams(n=3, temperature=1.5, seed=-4, max_tokens=12)
    outputs = canvas.generate((1, 2), sampling)[0].outputs
    assert [o.index for o in outputs] == [0, 1, 2]
    assert len({o.token_ids for o in outputs}) > 1
    alone = [canvas.generate((1, 2), single)[0].outputs[0].token_ids for single in split_choices(sampling)]
    assert alone == [o.token_ids for o in outputs]
    assert split_choices(sampling)[0].seed == -4


def test_infilling_keeps_both_sides(canvas: LLM) -> None:
    [output] = canvas.generate([(5, 6)], GREEDY, suffixes=[(7, 8, 9)])
    assert len(output.outputs[0].token_ids) <= 12
    with_other = canvas.generate([(5, 6)], GREEDY, suffixes=[(17, 18, 19)])[0]
    assert with_other.outputs[0].token_ids != output.outputs[0].token_ids  # the suffix is seen


def test_bad_calls_are_named(canvas: LLM) -> None:
    with pytest.raises(ValidationError, match="sampling: got 2, wanted one for all"):
        canvas.generate([(1,), (2,), (3,)], [GREEDY, GREEDY])
    with pytest.raises(ValidationError, match="suffixes"):
        canvas.generate([(1,), (2,)], GREEDY, suffixes=[()])
    with pytest.raises(TokenizerError):
        canvas.generate("text")
    with pytest.raises(ValidationError, match="prompt"):
        canvas.generate([()])
    with pytest.raises(ModelNotFoundError, match="no-such-model"):
        LLM("no-such-model")


def test_an_unknown_dtype_is_named(tmp_path: Path) -> None:
    save(tiny("llama"), tmp_path / "m")
    with pytest.raises(ValidationError, match="float12"):
        load_engine(tmp_path / "m", dtype="float12")


def test_one_bad_request_fails_the_batch_and_leaves_nothing(canvas: LLM) -> None:
    with pytest.raises(UnsupportedError, match="rule"):
        canvas.generate([(1,), (2,)], GREEDY, [None, DecodeParams(rule="no-such-rule")])
    canvas.generate((1,), GREEDY)
    assert canvas.engine.pages.used == 0


def test_closing_ends_requests() -> None:
    llm = LLM(engine=Engine(tiny("llama", seed=1)))
    stream = llm.submit((1, 2), SamplingParams(max_tokens=200, ignore_eos=True))
    stream.cancel()
    with pytest.raises(CancelledError):
        list(stream)
    llm.close()
    assert not llm.worker.is_alive


def test_names_resolve_to_directories() -> None:
    for name in shipped_models():
        assert (resolve(name) / "config.json").is_file()


def test_chat_gives_a_list_as_vllms_does() -> None:
    """One RequestOutput per conversation, the same for one alone as among others."""
    first = [{"role": "user", "content": "What is 12 + 30?"}]
    second = [{"role": "user", "content": "What is 7 + 5?"}]
    with LLM("demo-ar") as llm:
        alone = llm.chat(first, SamplingParams(max_tokens=24))
        both = llm.chat([first, second], SamplingParams(max_tokens=24))
    assert [len(alone), len(both)] == [1, 2]
    assert alone[0].text == both[0].text
    assert "42" in alone[0].text
    assert "12" in both[1].text


def test_the_same_question_has_the_same_defaults_on_every_front() -> None:
    """The demo models' generation_config.json says greedy; nobody else has an opinion."""
    with LLM("demo-diffusion") as llm:
        asked = llm.submit("The dog").request
    assert (asked.sampling.temperature, asked.sampling.max_tokens, asked.decode.cache) == (0.0, 128, "dual")
    assert asked.sampling.given == frozenset()


def test_public_names_have_one_owner() -> None:
    """The package's Request, Scheduler and Completion are the documents' and the facade's, not the engine's own."""
    import dfastllm
    from dfastllm import compat, core, engine, llm

    assert (dfastllm.Request, dfastllm.Scheduler, dfastllm.Completion) == (
        compat.Request,
        compat.Scheduler,
        llm.Completion,
    )
    assert dfastllm.Request is not core.Request
    assert not {"Request", "Scheduler", "Completion"} & set(engine.__all__)


def test_a_dict_in_place_of_the_options_is_refused_by_what_was_wanted(canvas: LLM) -> None:
    wrong: Any = {"max_tokens": 3}
    for call, param, wanted in (
        (lambda: canvas.generate((1, 2), wrong), "sampling", "SamplingParams"),
        (lambda: canvas.generate([(1, 2)], [wrong]), "sampling", "SamplingParams"),
        (lambda: canvas.generate((1, 2), {}), "sampling", "SamplingParams"),
        (lambda: canvas.submit((1, 2), wrong), "sampling", "SamplingParams"),
        (lambda: canvas.generate((1, 2), GREEDY, wrong), "decode", "DecodeParams"),
    ):
        with pytest.raises(ValidationError, match=f"{param} must be {wanted}, got dict") as refused:
            call()
        assert refused.value.param == param


@pytest.mark.parametrize(
    ("model", "own", "param", "said"),
    [
        ("demo-block", {"cache": "dual"}, "cache", "of kind block"),
        ("demo-block", {"block_length": 3}, "block_length", "of kind block"),
        ("demo-ar", {"steps": 4}, "steps", "of kind ar"),
        ("demo-diffusion", {"rule": "nope"}, "rule", "rule 'nope' is unknown"),
        ("demo-diffusion", {"n": 2}, "n", "has no option 'n'"),
        ("demo-diffusion", {"treshold": 0.9}, "treshold", "Did you mean 'threshold'"),
        ("demo-diffusion", {"mode": "quick"}, "mode", "mode must be one of"),
    ],
)
def test_defaults_that_cannot_serve_are_refused_when_the_model_is_loaded(
    tmp_path: Path, model: str, own: dict[str, Any], param: str, said: str
) -> None:
    directory = with_defaults(tmp_path, model, own)
    with pytest.raises(ModelLoadError, match=said) as refused:
        load_engine(directory)
    assert refused.value.param == param
    assert str(directory / "generation_config.json") in str(refused.value)


def test_a_mode_of_the_models_file_is_honoured(tmp_path: Path) -> None:
    engine = load_engine(with_defaults(tmp_path, "demo-diffusion", {"mode": "turbo", "threshold": 0.8}))

    def chosen(**decode: Any) -> Any:
        return engine.admit(Request("r", (20,), decode=DecodeParams(**decode))).state.policy.choice

    plain = chosen()
    assert (plain.rule, plain.options["threshold"], plain.block_length) == ("threshold", 0.8, 64)
    assert plain.options["max_parallel_tokens"] == 64
    streaming = chosen(mode="streaming")  # the request's own displaces the file's
    assert (streaming.block_length, streaming.options["threshold"], streaming.provisional) == (8, 0.9, True)
    assert chosen(block_length=16).block_length == 16


def with_defaults(tmp_path: Path, model: str, own: dict[str, Any]) -> Path:
    """A copy of a shipped model that says `own` of the options of a request."""
    directory = tmp_path / model
    shutil.copytree(resolve(model), directory)
    (directory / "generation_config.json").write_text(json.dumps({"do_sample": False, "dfastllm": own}))
    return directory


def test_of_several_speculations_the_first_is_the_default() -> None:
    """And the others are there for requests that name them."""
    first, second = (SpeculativeConfig(SpeculativeParams(method)) for method in ("suffix", "ngram"))
    for given, wanted in (((first, second), "suffix"), ((second, first), "ngram"), (second, "ngram"), (None, None)):
        engine = load_engine("demo-ar", speculative=given)
        asked = engine.admit(Request("r", (40, 41))).request.speculative
        assert (asked.method if asked is not None else None) == wanted
        own = SpeculativeParams("ngram", num_speculative_tokens=3)
        assert engine.admit(Request("r", (40, 41), speculative=own)).request.speculative == own


def test_the_others_of_a_failed_batch_are_cancelled() -> None:
    """Not left to run to their end for nobody."""
    with LLM(engine=Engine(tiny("llama", seed=1, max_len=4096), config=EngineConfig(kv_tokens=8192))) as llm:
        ended: list[Any] = []
        llm.engine.subscribe(lambda step: ended.extend(finish.reason for finish in step.finished))
        long = SamplingParams(temperature=0, max_tokens=4000, ignore_eos=True)
        with pytest.raises(ValidationError, match="token id 9999"):
            llm.generate([(1,), (2,), (9999,)], long)
        end = time.monotonic() + 20
        while llm.engine.has_work and time.monotonic() < end:
            time.sleep(0.002)
        assert llm.engine.pages.used == 0
        llm.generate((1,), GREEDY)
        assert set(ended) == {FinishReason.CANCELLED, FinishReason.LENGTH}
        assert ended.count(FinishReason.LENGTH) == 1


def test_a_suffix_of_text_gets_no_special_tokens(canvas: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on with the text: a tokenizer's BOS belongs before the prompt alone."""
    asked: list[tuple[Any, bool]] = []

    def encode(prompt: Any, *, add_special: bool = True) -> tuple[int, ...]:
        asked.append((prompt, add_special))
        return (1, 2)

    monkeypatch.setattr(canvas, "encode", encode)
    list(canvas.submit("before", GREEDY, suffix="after"))
    assert asked == [("before", True), ("after", False)]
