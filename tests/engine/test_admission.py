"""Admission: what is filled in, what is refused and by which name, and that each request is understood once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from dfastllm.core import DecodeParams, Request, SamplingParams, SpeculativeParams, Tier
from dfastllm.decode.canvas import layout
from dfastllm.engine import Engine, EngineConfig
from dfastllm.engine.admission import Admission
from dfastllm.errors import ContextLengthError, UnsupportedError, ValidationError
from dfastllm.models import tiny
from tests.kit.served import random_engine

BLOCKS = DecodeParams(block_length=32)
KINDS = {"ar": "llama", "diffusion": "llada", "block": "sdar"}


def engine(kind: str, config: dict[str, Any] | None = None, **info: Any) -> Engine:
    model = tiny(KINDS[kind])
    model.info = replace(model.info, **info)
    return Engine(model, config=EngineConfig(**{"kv_tokens": 4096, **(config or {})}))


def ask(
    prompt: tuple[int, ...] = (5, 6, 7), suffix: tuple[int, ...] = (), decode: Any = None, **fields: Any
) -> Request:
    return Request("r", prompt, SamplingParams(**fields), decode, suffix)


def admitted(kind: str, request: Request, **info: Any) -> Admission:
    return engine(kind, **info).admit(request)


# ---- what is filled in ----


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_defaults_follow_model_then_kind_then_table(kind: str) -> None:
    canvas = kind != "ar"
    plain = admitted(kind, ask()).request.sampling
    assert plain.temperature == (0.0 if canvas else 1.0)
    assert plain.given == frozenset()
    said = admitted(kind, ask(), defaults={"temperature": 0.5, "top_k": 7}).request.sampling
    assert (said.temperature, said.top_k) == (0.5, 7)
    asked = admitted(kind, ask(temperature=1.0, top_k=0), defaults={"temperature": 0.5, "top_k": 7}).request.sampling
    assert (asked.temperature, asked.top_k) == (1.0, 0), "what was given stands, though it is the table's default"


def test_max_tokens_not_given_is_what_the_context_leaves() -> None:
    room = engine("ar").max_len - 3
    assert admitted("ar", ask()).request.sampling.max_tokens == room
    assert admitted("ar", ask(), defaults={"max_tokens": 9}).request.sampling.max_tokens == 9
    assert admitted("ar", ask(), defaults={"max_tokens": 10**6}).request.sampling.max_tokens == room


@pytest.mark.parametrize(
    ("kind", "prompt", "suffix", "max_len", "tokens", "positions"),
    [
        ("diffusion", 3, 0, 512, 128, 131),
        ("diffusion", 3, 5, 512, 128, 136),
        ("diffusion", 3, 0, 131, 128, 131),
        ("diffusion", 3, 0, 130, 96, 99),  # a canvas has whole blocks
        ("diffusion", 3, 5, 130, 122, 130),  # with a suffix it need not
        ("block", 3, 0, 512, 128, 132),
        ("block", 3, 0, 130, 125, 128),  # it ends with a whole block of 4
    ],
)
def test_a_default_canvas_is_cut_to_the_context(
    kind: str, prompt: int, suffix: int, max_len: int, tokens: int, positions: int
) -> None:
    made = engine(kind, {"max_len": max_len}).admit(ask((5,) * prompt, (6,) * suffix))
    assert (made.request.sampling.max_tokens, made.positions) == (tokens, positions)
    assert len(made.state.tokens) == positions


@pytest.mark.parametrize(
    ("prompt", "suffix", "fields", "tokens", "canvas", "last"),
    [
        (14, 0, {"max_tokens": 498}, 498, 498, 18),
        (14, 0, {"max_tokens": 480}, 480, 480, 32),
        (490, 0, {"max_tokens": 5}, 5, 22, 22),
        (481, 0, {}, 31, 31, 31),
        (511, 0, {}, 1, 1, 1),
        (450, 0, {}, 32, 32, 32),  # a whole block fits: as ever
        (300, 0, {"min_tokens": 200}, 200, 212, 20),
        (450, 50, {}, 12, 12, 12),
    ],
)
def test_a_default_block_is_shortened_to_the_context(
    prompt: int, suffix: int, fields: dict[str, int], tokens: int, canvas: int, last: int
) -> None:
    made = engine("diffusion", max_len=512).admit(ask((5,) * prompt, (6,) * suffix, **fields))
    laid = made.state.policy.layout
    assert (made.request.sampling.max_tokens, laid.stop - laid.start) == (tokens, canvas)
    assert (laid.length, laid.bounds[-1][1] - laid.bounds[-1][0]) == (32, last)
    assert made.positions == prompt + canvas + suffix == len(made.state.tokens)


@pytest.mark.parametrize(
    ("kind", "prompt", "fields", "hint"),
    [
        ("diffusion", 14, {"max_tokens": 499}, "Ask for at most 498 tokens."),
        ("diffusion", 14, {"max_tokens": 498, "decode": BLOCKS}, "Ask for at most 480 tokens."),
        ("diffusion", 14, {"max_tokens": 499, "decode": BLOCKS}, "Ask for at most 480 tokens."),
        ("diffusion", 490, {"max_tokens": 5, "decode": BLOCKS}, "Shorten the prompt or lower block_length."),
        ("diffusion", 511, {"max_tokens": 2}, "Ask for at most 1 token."),
        ("block", 14, {"max_tokens": 495}, "Ask for at most 494 tokens."),  # 508, the last whole block of 4
        ("ar", 14, {"max_tokens": 499}, "Ask for at most 498 tokens."),
    ],
)
def test_the_hint_is_the_largest_number_that_is_served(
    kind: str, prompt: int, fields: dict[str, Any], hint: str
) -> None:
    made, start = engine(kind, max_len=510 if kind == "block" else 512), (5,) * prompt
    with pytest.raises(ContextLengthError) as refused:
        made.admit(ask(start, **fields))
    assert refused.value.hint == hint
    if "at most" in hint:
        most = int(hint.split()[4])
        assert made.admit(ask(start, **{**fields, "max_tokens": most})).request.sampling.max_tokens == most


@pytest.mark.parametrize(
    ("kind", "prompt", "fields", "decode", "tokens", "lengths"),
    [
        ("diffusion", 3, {}, {"steps": 3}, 128, [64, 64]),
        ("diffusion", 3, {}, {"steps": 4}, 128, [32] * 4),
        ("diffusion", 3, {}, {"steps": 1}, 128, [128]),
        ("diffusion", 3, {"max_tokens": 160}, {"steps": 3}, 160, [64, 64, 32]),
        ("diffusion", 3, {}, {"steps": 3, "block_length": 32}, 96, [32] * 3),
        ("diffusion", 3, {}, {"steps": 3, "mode": "streaming"}, 128, [48, 48, 32]),
        ("block", 3, {}, {"steps": 10}, 37, [1] + [4] * 9),
        ("block", 4, {}, {"steps": 10}, 40, [4] * 10),
        ("block", 3, {}, {"steps": 10, "block_length": 2}, 17, [1] + [2] * 8),
        ("block", 4, {}, {"steps": 64}, 128, [4] * 32),
    ],
)
def test_a_default_canvas_gives_way_to_few_steps(
    kind: str, prompt: int, fields: dict[str, int], decode: dict[str, Any], tokens: int, lengths: list[int]
) -> None:
    made = admitted(kind, ask((5,) * prompt, decode=DecodeParams(**decode), **fields))
    laid = made.state.policy.layout
    assert made.request.sampling.max_tokens == tokens
    assert [stop - start for start, stop in laid.bounds] == lengths
    assert all(laid.share(b) >= 1 for b in range(laid.count))


@pytest.mark.parametrize(
    ("kind", "fields", "decode"),
    [
        ("diffusion", {"max_tokens": 128}, {"steps": 3, "block_length": 32}),
        ("diffusion", {"min_tokens": 100}, {"steps": 3, "block_length": 32}),
        ("block", {"max_tokens": 128}, {"steps": 10}),
        ("block", {}, {"steps": 1, "block_length": 1}),  # not even one block of the model
    ],
)
def test_a_canvas_that_was_given_does_not(kind: str, fields: dict[str, int], decode: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="steps must be at least the number of blocks") as refused:
        admitted(kind, ask((5, 6), decode=DecodeParams(**decode), **fields))
    assert refused.value.param == "steps"


def test_min_tokens_lengthens_a_default() -> None:
    assert admitted("diffusion", ask(min_tokens=200)).request.sampling.max_tokens == 200
    with pytest.raises(ContextLengthError, match="less than min_tokens 500") as error:
        engine("diffusion", {"max_len": 512}).admit(ask((5,) * 100, min_tokens=500))
    assert error.value.param == "min_tokens"


def test_a_canvas_takes_the_defaults_of_its_kind() -> None:
    made = admitted("diffusion", ask(max_tokens=192))
    choice = made.state.policy.choice
    assert (choice.rule, choice.cache, choice.block_length) == ("schedule", "dual", 32)
    assert made.state.policy.layout.steps == 128
    assert made.tier is Tier.APPROXIMATE
    block = admitted("block", ask(max_tokens=64)).state.policy
    assert (block.choice.cache, block.choice.block_length, block.layout.steps) == ("none", 4, None)


def test_defaults_give_way() -> None:
    """To more blocks than steps, to a bound on commits a step, to a rule that guesses ahead, to a whole-canvas rule."""
    wide = engine("diffusion", {"max_len": 9000, "kv_tokens": 16384}, max_len=9000)
    assert wide.admit(ask(max_tokens=128 * 64 + 1)).state.policy.layout.steps == 257
    slow = DecodeParams(options={"max_parallel_tokens": 1})
    assert wide.admit(ask(max_tokens=512, decode=slow)).state.policy.layout.steps is None, "one a token"
    ahead = wide.admit(ask(max_tokens=64, decode=DecodeParams(rule="free_dave")))
    assert (ahead.state.policy.choice.cache, ahead.tier) == ("none", Tier.EXACT_FAST)
    dream = wide.admit(ask(max_tokens=100, decode=DecodeParams(rule="dream"))).state.policy
    assert (dream.layout.count, dream.choice.block_length) == (1, 100)
    for demand in (
        {"cache": "dual", "rule": "free_dave"},
        {"steps": 3, "block_length": 32},
        {"steps": 128, **vars_of(slow)},
    ):
        with pytest.raises(ValidationError):
            wide.admit(ask(max_tokens=512, decode=DecodeParams(**demand)))


def vars_of(decode: DecodeParams) -> dict[str, Any]:
    return {name: getattr(decode, name) for name in decode.given}


def test_modes_are_presets_that_fields_override() -> None:
    wide = {"max_parallel_tokens": 64, "early_stop_confidence": 0.9}

    def chosen(kind: str = "diffusion", **fields: Any) -> Any:
        return admitted(kind, ask(max_tokens=64, decode=DecodeParams(**fields))).state.policy.choice

    fast = chosen(mode="fast")
    assert (fast.rule, fast.options["threshold"], fast.cache, fast.block_length) == ("threshold", 0.9, "dual", 32)
    turbo = chosen(mode="turbo")
    assert (turbo.rule, turbo.options["factor"], turbo.block_length) == ("factor", 1.0, 64)
    assert turbo.options.items() >= wide.items()
    assert chosen(mode="streaming").provisional
    assert not chosen(mode="streaming", provisional=False).provisional
    standard = admitted("diffusion", ask(max_tokens=192, decode=DecodeParams(mode="standard")))
    assert (standard.tier, standard.policy.bound(standard.policy.compile(standard.request, standard.state.model))) == (
        Tier.REFERENCE,
        192,
    )
    mixed = chosen(mode="turbo", threshold=0.7, options={"max_parallel_tokens": 4}, cache="prefix")
    assert (mixed.rule, mixed.options["threshold"], mixed.cache) == ("threshold", 0.7, "prefix")
    assert (mixed.options["max_parallel_tokens"], mixed.options["early_stop_confidence"]) == (4, 0.9)
    assert chosen(mode="fast", rule="entropy_bound").rule == "entropy_bound"
    assert chosen("block", mode="turbo").block_length == 4, "a block model has blocks and a cache of its own"


def test_the_models_own_defaults_of_a_canvas() -> None:
    own = {"threshold": 0.8, "cache": "prefix", "options": {"max_parallel_tokens": 3}}

    def chosen(**fields: Any) -> Any:
        return admitted(
            "diffusion", ask(max_tokens=64, decode=DecodeParams(**fields)), defaults=own
        ).state.policy.choice

    plain = chosen()
    assert (plain.rule, plain.options["threshold"], plain.cache) == ("threshold", 0.8, "prefix")
    assert plain.options["max_parallel_tokens"] == 3
    assert (chosen(factor=2.0).rule, chosen(mode="fast").options["threshold"]) == ("factor", 0.9)
    assert chosen(options={"early_stop_confidence": 0.5}).options["max_parallel_tokens"] == 3


def test_a_mode_of_the_models_own_is_behind_its_other_defaults() -> None:
    own = {"mode": "turbo", "factor": 2.0, "options": {"max_parallel_tokens": 3}}

    def chosen(**fields: Any) -> Any:
        decode = DecodeParams(**fields)
        return admitted("diffusion", ask(max_tokens=64, decode=decode), defaults=own).state.policy.choice

    plain = chosen()
    assert (plain.rule, plain.options["factor"], plain.block_length) == ("factor", 2.0, 64)
    assert (plain.options["max_parallel_tokens"], plain.options["early_stop_confidence"]) == (3, 0.9)
    assert (chosen(mode="fast").block_length, chosen(mode="fast").rule) == (32, "threshold")
    assert chosen(rule="entropy_bound").rule == "entropy_bound"


def test_an_engines_speculation_is_for_those_who_say_nothing() -> None:
    model = tiny("llama")
    made = Engine(model, speculative=SpeculativeParams("ngram"))
    assert made.admit(ask()).tier is Tier.EXACT_FAST
    assert made.admit(replace(ask(), speculative=SpeculativeParams())).tier is Tier.REFERENCE


# ---- what is refused ----


@pytest.mark.parametrize(
    ("kind", "fields", "error", "param"),
    [
        ("ar", {"n": 2}, ValidationError, "n"),
        ("ar", {"stop": "x"}, ValidationError, "stop"),
        ("ar", {"prompt": (5,) * 512}, ContextLengthError, "prompt"),
        ("ar", {"prompt": (4000,)}, ValidationError, "prompt"),
        ("ar", {"prompt": (-1,)}, ValidationError, "prompt"),
        ("ar", {"max_tokens": 510}, ContextLengthError, "max_tokens"),
        ("ar", {"suffix": (3,)}, UnsupportedError, "suffix"),
        ("ar", {"decode": DecodeParams(steps=4)}, UnsupportedError, "steps"),
        ("diffusion", {"suffix": (4000,)}, ValidationError, "suffix"),
        ("diffusion", {"max_tokens": 600}, ContextLengthError, "max_tokens"),
        ("diffusion", {"max_tokens": 490, "decode": BLOCKS}, ContextLengthError, "max_tokens"),  # its canvas has 512
        ("diffusion", {"max_tokens": 2**40}, ContextLengthError, "max_tokens"),
        ("diffusion", {"prompt": (5,) * 500, "decode": BLOCKS}, ContextLengthError, "prompt"),  # no block is left
        ("diffusion", {"prompt": (5,) * 512}, ContextLengthError, "prompt"),
        ("diffusion", {"stop_token_ids": (4000,)}, ValidationError, "stop_token_ids"),
        ("diffusion", {"logit_bias": {-1: 2.0}}, ValidationError, "logit_bias"),
        ("diffusion", {"allowed_token_ids": (4000,)}, ValidationError, "allowed_token_ids"),
        ("block", {"max_tokens": 510}, ContextLengthError, "max_tokens"),
    ],
)
def test_refused_by_name(kind: str, fields: dict[str, Any], error: type[ValidationError], param: str) -> None:
    with pytest.raises(error) as refused:
        admitted(kind, ask(**fields), max_len=512)
    assert refused.value.param == param


def test_the_mask_and_the_ends_are_no_text() -> None:
    made = engine("diffusion")
    mask = made.info.mask_id
    assert mask is not None
    for fields, param in (
        ({"prompt": (5, mask)}, "prompt"),
        ({"suffix": (mask,)}, "suffix"),
        ({"allowed_token_ids": (mask,)}, "allowed_token_ids"),
        ({"allowed_token_ids": made.info.eos_ids, "min_tokens": 1, "max_tokens": 4}, "allowed_token_ids"),
    ):
        with pytest.raises(ValidationError) as refused:
            made.admit(ask(**fields))
        assert refused.value.param == param


def test_a_canvas_rounded_up_past_all_kv_is_refused() -> None:
    """It would wait for ever: 33 tokens fit into 48 positions, the canvas of two blocks does not."""
    small = engine("diffusion", {"kv_tokens": 48, "page_size": 16})
    with pytest.raises(ContextLengthError, match="needs K,V for 67 positions; the engine holds 48") as refused:
        small.admit(ask(max_tokens=33))
    assert refused.value.param == "max_tokens"
    assert small.admit(ask(max_tokens=32)).positions == 35


# ---- once ----


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often a request is checked, compiled and begun."""
    from dfastllm.decode.ar import Autoregressive
    from dfastllm.decode.canvas.diffusion import MaskedDiffusion
    from dfastllm.engine import admission, loop

    seen = {"admit": 0, "ids": 0, "choose": 0, "compile": 0, "begin": 0}

    def count(name: str, owner: Any, attribute: str) -> None:
        real: Callable[..., Any] = getattr(owner, attribute)

        def counting(*args: Any, **kwargs: Any) -> Any:
            seen[name] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, attribute, counting)

    count("admit", loop, "admit")
    count("ids", admission, "_check_ids")
    count("choose", layout, "choose")
    for policy in (Autoregressive, MaskedDiffusion):
        count("compile", policy, "compile")
        count("begin", policy, "begin")
    return seen


@pytest.mark.parametrize(("family", "canvas"), [("llada", 1), ("llama", 0)])
@pytest.mark.parametrize("front", ["http", "python", "command line"])
def test_one_request_is_one_check_one_compile_one_begin(
    front: str, family: str, canvas: int, counted: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    made = random_engine(family)
    if front == "http":
        from tests.kit.live import serving

        with serving({"m": made}) as live:
            reply = live.post("/v1/completions", {"model": "m", "prompt": "The dog", "max_tokens": 8})
            assert reply.status_code == 200, reply.text
    else:
        from dfastllm.llm import LLM

        with LLM(engine=made) as llm:
            if front == "python":
                assert llm.generate("The dog", SamplingParams(max_tokens=8))[0].outputs[0].token_ids
            else:
                from dfastllm.cli.options import decode_params, sampling_params
                from dfastllm.cli.session import run

                run(llm, "The dog", sampling_params({"max_tokens": "8"}), decode_params({}), plain=True)
    assert counted == {"admit": 1, "ids": 1, "choose": canvas, "compile": 1, "begin": 1}
