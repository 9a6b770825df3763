"""CPU records that run models: our side's forwards, diffusion end to end, the neutral comparison's arithmetic and plot.

Tiny shapes and few samples; never a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dfastllm import assemble
from dfastllm.bench.cpu.cases import Case
from dfastllm.bench.cpu.diffusion import Job, Run, end_to_end, side_names, summary
from dfastllm.bench.cpu.neutral import (
    AR,
    DRAFTED,
    Accuracy,
    Contender,
    Pass,
    contenders,
    measure_accuracy,
    measure_speed,
    open_models,
    plot,
    winners,
)
from dfastllm.bench.cpu.ours import Ours
from dfastllm.bench.cpu.shapes import Shape
from dfastllm.bench.cpu.weights import packed
from dfastllm.core import Span
from dfastllm.llm import LLM
from dfastllm.models import build
from tests.models.test_program import native_logits, torch_logits

QWEN = Shape("tiny-qwen", "qwen2", 64, 2, 4, 2, 96, 300, False, 1e4)
LLADA = Shape("tiny-llada", "llada", 64, 2, 2, 2, 96, 300, False, 1e4)


MIXTURE = Shape("tiny-moe", "qwen3_moe", 64, 2, 4, 2, 96, 300, False, 1e4, experts=6, chosen=2)


def test_a_mixtures_file_for_the_peer_is_the_model_we_measure(tmp_path: Path) -> None:
    """Written with the gguf package, as llama.cpp's quantiser gets it."""
    pytest.importorskip("gguf")
    from dfastllm.bench.cpu.peers.llamacpp import write_base
    from dfastllm.models.gguf import open_gguf

    path = tmp_path / "m.gguf"
    write_base(MIXTURE.published() | {"architecture": "qwen3moe"}, path, seed=0)
    with open_gguf(path) as opened:
        config, info = MIXTURE.own()
        assert (opened.config, opened.info.kind) == (config, info.kind)
        tensors = {name: tuple(value.shape) for name, value, _ in opened.tensors()}
    built = build(config, info)
    assert tensors == {name: tuple(p.shape) for name, p in built.named_parameters()}
    ids = torch.tensor([3, 41, 7, 250, 18])
    plain, packed = (assemble.load(path, backend=b, dtype="float32").model for b in ("torch", "native"))  # type: ignore[arg-type]
    wanted = torch_logits(plain, ids, torch.arange(5))  # type: ignore[arg-type]
    assert (native_logits(packed, ids) - wanted).abs().max() <= 1e-5  # type: ignore[arg-type]


def ours(native: bool) -> Ours:
    plain = build(*QWEN.own(), deviation=0.5, dtype=torch.float32)
    return Ours(assemble.pack(plain, "w8g") if native else plain, threads=1)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize(
    ("case", "attend", "store", "want", "starts"),
    [
        (Case("decode", 1, 20, grow=True), "causal", "keep", (0,), [20, 21, 22]),
        (Case("concurrent", 1, 8, grow=True, sequences=3), "causal", "keep", (0,), [8, 8, 8, 9, 9, 9, 10, 10, 10]),
        (Case("prefill", 24, 0, every_row=False), "causal", "keep", (23,), [0, 0, 0]),
        (Case("block", 4, 20), "full", "scratch", (0, 1, 2, 3), [20, 20, 20]),
        (Case("block", 4, 20, every_row=False), "full", "scratch", (3,), [20, 20, 20]),
    ],
)
def test_our_forwards_are_the_spans_a_case_describes(
    native: bool, case: Case, attend: str, store: str, want: tuple[int, ...], starts: list[int]
) -> None:
    side, seen = ours(native), []
    run = side._run

    def watched(items: list[tuple[Span, object, int]]) -> object:
        seen.extend(span for span, _, _ in items)
        return run(items)

    side._run = watched  # type: ignore[method-assign, assignment]
    seconds = side.measure(case, 3)
    assert len(seconds) == 3
    assert min(seconds) > 0
    prompts, measured = seen[: len(seen) - len(starts)], seen[-len(starts) :]
    assert [len(span.ids) for span in prompts] == ([case.cached] * case.sequences if case.cached else [])
    assert [span.start for span in measured] == starts
    assert {(span.attend, span.store, span.want) for span in measured} == {(attend, store, want)}
    seen.clear()
    side.measure(case, 2, "logits")
    assert len(seen) == 2 * case.sequences, "the prompt's K,V are kept from burst to burst"


def test_decoding_follows_its_own_argmax() -> None:
    """Stats and whole logits give the same next tokens, so both sides of a comparison decode the same kind of text."""
    case, fed = Case("decode", 1, 20, grow=True), []
    for answer in ("stats", "logits"):
        side = ours(False)
        run, ids = side._run, []

        def watched(items: list[tuple[Span, object, int]], run=run, ids=ids) -> object:  # type: ignore[no-untyped-def]
            ids.append(items[0][0].ids)
            return run(items)

        side._run = watched  # type: ignore[method-assign, assignment]
        side.measure(case, 6, answer)  # type: ignore[arg-type]
        fed.append(ids[2:])
    assert fed[0] == fed[1]
    assert len(set(fed[0])) > 1


def test_diffusion_sides_commit_the_same_number_of_tokens() -> None:
    job = Job(prompt=12, canvas=16, block=8, per_step=2)
    runs = list(end_to_end(LLADA, 1, ["w8g"], job, 2, side_names(["w8g"])))
    assert [run.side for run in runs] == side_names(["w8g"]) + side_names(["w8g"])[::-1]
    assert {run.tokens for run in runs} == {16}
    by_side = {run.side: run.forwards for run in runs}
    assert by_side["torch bf16, none"] == by_side["native w8g, none"] == 8
    assert by_side["native w8g, dual"] == by_side["torch bf16, dual"] >= 8


def test_diffusion_summary_pairs_turns_and_drops_unfinished_ones() -> None:
    runs = [
        Run(turn, side, 100, 50, seconds, None)
        for turn, slow in ((0, 1.0), (1, 3.0))
        for side, seconds in (("torch bf16, none", 12 * slow), ("native w8g, dual", slow))
    ]
    rows = summary([*runs, Run(2, "torch bf16, none", 100, 50, 1.0, None)])
    assert rows[1]["times_plain"].median == pytest.approx(12)
    assert (rows[1]["aim"], rows[1]["verdict"]) == (10.0, "met?")
    assert (rows[0]["aim"], rows[0]["times_plain"].median) == (None, 1)
    assert rows[0]["tokens_per_s"].n == 2


FIELD = [Contender(AR, "greedy", None), *(Contender("masked diffusion", s, None) for s in ("careful", "bold", "wild"))]


def judged(right: int, name: str, samples: int = 100) -> Accuracy:
    return Accuracy(name, right / samples, 0.02, samples, 20, 10, tuple(i < right for i in range(samples)))


def passes(speed: dict[str, float]) -> list[Pass]:
    return [
        Pass(turn, name, flight, rate * factor * (1 + turn), None)
        for turn in range(3)
        for name, rate in speed.items()
        for flight, factor in (("one at a time", 1.0), ("in flight", 4.0))
    ]


def test_winner_is_the_fastest_that_is_as_accurate() -> None:
    names = [one.name for one in FIELD]
    accuracy = [judged(right, name, 1000) for right, name in zip((950, 970, 949, 700), names, strict=True)]
    rows = winners(FIELD, accuracy, passes(dict(zip(names, (100, 50, 250, 900), strict=True))))
    picked = {(row["flight"], row["family"]): row for row in rows}
    best = picked["one at a time", "masked diffusion"]
    assert best["setting"] == "bold"  # one answer of a thousand fewer is less than a point, 250 are not
    assert best["times_autoregression"].median == pytest.approx(2.5)
    assert best["tokens_per_forward"] == 2
    assert picked["in flight", AR]["tokens_per_s"].median == pytest.approx(800)


def test_no_winner_where_nothing_is_as_accurate() -> None:
    names = [one.name for one in FIELD]
    # 7 of 1,000 answers fewer: within a point, but a loss of more than one is not excluded
    accuracy = [judged(right, name, 1000) for right, name in zip((950, 943, 700, 600), names, strict=True)]
    rows = winners(FIELD, accuracy, passes(dict.fromkeys(names, 100.0)))
    assert [row["setting"] for row in rows] == ["greedy", "none is as accurate"] * 2


def test_plot_is_drawn(tmp_path: Path) -> None:
    names = [one.name for one in FIELD]
    plot(FIELD, [judged(90, name) for name in names], passes(dict.fromkeys(names, 9.0)), tmp_path / "p.png", "title")
    assert (tmp_path / "p.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_contenders_are_settings_their_models_take() -> None:
    field = contenders(32)
    assert len({one.name for one in field}) == len(field)
    chosen = [one for one in field if one.family == AR or one.setting == "threshold 0.9, dual"]
    models = {AR: LLM("demo-ar"), "masked diffusion": LLM("demo-diffusion")}
    try:
        found = list(measure_accuracy(models, chosen, samples=9, canvas=32))
        speed = list(measure_speed(models, chosen, alone=1, together=2, canvas=32, rounds=2))
    finally:
        for model in models.values():
            model.close()
    assert all(one.accuracy >= 0.5 and one.samples == len(one.marks) == 9 for one in found)
    assert found[0].tokens <= found[0].forwards  # autoregression: a forward a token, the last one for the end
    assert found[1].tokens > found[1].forwards
    assert [(p.turn, p.name) for p in speed[::2]] == [
        (turn, one.name) for turn, order in ((0, chosen), (1, chosen[::-1])) for one in order
    ]
    assert min(p.tokens_per_s for p in speed) > 0


def test_the_drafted_side_drafts_and_answers_as_the_plain_one() -> None:
    models = open_models([AR, DRAFTED], in_flight=4)
    try:
        plain, drafted = measure_accuracy(models, contenders(32)[:2], samples=9, canvas=32)
    finally:
        for model in models.values():
            model.close()
    assert (plain.marks, plain.tokens) == (drafted.marks, drafted.tokens)
    assert drafted.forwards < plain.forwards


@pytest.mark.parametrize("form", [None, "w8", "w8g", "w4"])
def test_packed_random_weights_have_the_format_of_assembled_ones(form: str | None) -> None:
    plain = build(*LLADA.own(), dtype=torch.bfloat16)
    quick, usual = packed(plain, form), assemble.pack(plain, form)
    assert quick.nbytes == usual.nbytes
    assert quick.dtype == usual.dtype
    assert quick.formats == usual.formats
    assert quick.head is not None
    assert usual.head is not None
    assert (quick.embed.format, quick.head.format) == (usual.embed.format, usual.head.format)
