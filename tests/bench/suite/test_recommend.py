"""Advice: the best by the lower end, never a wrong or a failing one, and plain words when nothing can be said."""

from __future__ import annotations

import pytest

from dfastllm.bench.suite.cells import percent
from dfastllm.bench.suite.recommend import judge, recommend
from dfastllm.bench.suite.schema import Client, ConfigurationResult, Forwards, Recommendation, Results, Target
from tests.kit.suite_example import against, configuration, figures, load_point, results

BASE = configuration("baseline", "No speculation")


def advised(found: Results) -> Recommendation:
    made = [r for r in recommend(found) if r.kind == "configuration"]
    assert len(made) == 1
    return made[0]


def warnings(found: Results) -> str:
    return "\n".join(r.text for r in recommend(found) if r.kind == "warning")


def test_best_configuration_use_case_and_gain() -> None:
    found = results()
    best = advised(found)
    assert best.configuration == "ngram-k5"
    assert best.options == {"speculative_config": {"method": "ngram", "num_speculative_tokens": 5}}
    assert best.gain == against(1.62)
    assert "1.62× (+62 %, 1.57–1.67)" in best.text
    assert "+57 to +67 %" in best.text
    assert "accuracy 93.3 % (28/30)" in best.text
    case = next(r for r in recommend(found) if r.kind == "use_case")
    assert case.prompt_type == "code"
    assert case.gain == against(1.9)
    assert "Creative problem solving under n-gram, 5 tokens: is slower (0.88×" in warnings(found)


def test_the_lower_end_decides_not_the_lucky_middle() -> None:
    lucky, steady = configuration("a", "A", 1.6, spread=0.5), configuration("b", "B", 1.4, spread=0.05)
    assert advised(results(BASE, lucky, steady)).configuration == "b"


@pytest.mark.parametrize(("correct", "wanted"), [(28, "a"), (30, "a"), (27, None)])
def test_a_lower_accuracy_disqualifies(correct: int, wanted: str | None) -> None:
    found = results(BASE, configuration("a", "A", 1.5, correct=correct))
    assert advised(found).configuration == wanted
    if wanted is None:
        assert "Keep the baseline" in advised(found).text
        assert "accuracy fell from 93.3 % (28/30) to 90 % (27/30)" in warnings(found)


def test_the_next_best_takes_the_place_of_a_disqualified_one() -> None:
    found = results(BASE, configuration("a", "A", 2.0, correct=10), configuration("b", "B", 1.2))
    assert advised(found).configuration == "b"
    assert "A is faster, 2.00×" in warnings(found)


@pytest.mark.parametrize(("equal", "wanted"), [(60, "a"), (59, None), (None, None)])
def test_ungraded_answers_must_equal_the_baselines(equal: int | None, wanted: str | None) -> None:
    base = configuration("baseline", "No speculation", correct=None)
    found = results(base, configuration("a", "A", 1.5, correct=None, equal=equal))
    assert advised(found).configuration == wanted
    if equal == 59:
        assert "1 of 60 answers differ" in warnings(found)
    if equal is None:
        assert "nothing says whether its answers are still right" in warnings(found)


@pytest.mark.parametrize(("nfe", "wanted"), [(20.5, None), (21.0, None), (12.0, "a")])
def test_speculation_that_saved_no_forward_is_not_faster(nfe: float, wanted: str | None) -> None:
    config = configuration("a", "A", 1.5)
    assert config.figures is not None
    work = {"speculation": None, "forwards": Forwards(nfe=nfe, tokens_per_forward=1.0)}
    found = results(BASE, config.model_copy(update={"figures": config.figures.model_copy(update=work)}))
    assert advised(found).configuration == wanted
    if wanted is None:
        assert "made as many forward passes as the baseline" in warnings(found)


def test_a_cache_may_be_faster_with_as_many_forwards() -> None:
    config = configuration("a", "A", 1.5, axis="diffusion")
    assert config.figures is not None
    config = config.model_copy(update={"figures": config.figures.model_copy(update={"speculation": None})})
    assert advised(results(BASE, config)).configuration == "a"


def test_more_failures_than_the_baseline_disqualify() -> None:
    found = results(BASE, configuration("a", "A", 1.5, errors=2))
    assert advised(found).configuration is None
    assert "2 requests failed, 0 of the baseline's" in warnings(found)


def test_speculation_that_loses_is_to_be_switched_off() -> None:
    text = advised(results(BASE, configuration("a", "A", 0.8), configuration("b", "B", 0.9))).text
    assert text == "Speculation loses here: at best B 0.90× (-10 %, 0.85–0.95). Switch it off."


def test_a_diffusion_axis_that_loses_keeps_the_baseline() -> None:
    text = advised(results(BASE, configuration("a", "A", 0.8, axis="diffusion"))).text
    assert text == "Every other configuration loses here: at best A 0.80× (-20 %, 0.75–0.85). Keep the baseline."


def test_noise_is_no_verdict() -> None:
    found = results(BASE, configuration("a", "A", 1.1, spread=0.3))
    assert advised(found).configuration is None
    assert advised(found).gain is None
    assert advised(found).text.startswith("No verdict: the noise is wider than the difference; at best A 1.10×")


def test_no_difference_is_no_gain() -> None:
    text = advised(results(BASE, configuration("a", "A", 1.0, spread=0.01))).text
    assert text == "Speculation gains nothing here: at best A 1.00× (+0 %, 0.99–1.01). Switch it off."


def test_slower_ones_are_named_beside_the_winner() -> None:
    assert "B is slower than the baseline: 0.70×" in warnings(
        results(BASE, configuration("a", "A", 1.5), configuration("b", "B", 0.7))
    )


@pytest.mark.parametrize(
    ("configurations", "said"),
    [
        ((BASE,), "No verdict: no configuration was compared"),
        (
            (BASE, ConfigurationResult(name="a", label="A", axis="custom", status="refused", message="what is that")),
            "No verdict: the server refused every configuration but the baseline (what is that).",
        ),
        ((configuration("a", "A", 1.5),), "No verdict: there is no measured baseline"),
    ],
)
def test_results_that_say_nothing_say_so(configurations: tuple[ConfigurationResult, ...], said: str) -> None:
    assert advised(results(*configurations)).text.startswith(said)


def test_prompt_types_are_judged_against_their_own_baseline() -> None:
    # The whole is right as often as the baseline; one type is not.
    wrong = figures(150, correct=20, gain=against(1.5), equal=60)
    config = configuration("a", "A", 1.5)
    config = config.model_copy(update={"prompt_types": config.prompt_types | {"code": wrong}})
    found = results(BASE, config)
    assert [j.why_not is None for j in judge(found, "code")] == [False]
    assert [j.why_not is None for j in judge(found, "arithmetic")] == [True]
    assert "Code generation under A: accuracy fell" in warnings(found)
    assert next(r for r in recommend(found) if r.kind == "use_case").prompt_type != "code"


def test_system_prompts() -> None:
    def prompts(first: tuple[float, int], second: tuple[float, int]) -> Results:
        made = results()
        pair = (
            made.system_prompts[i].model_copy(update={"figures": figures(tps, correct=correct)})
            for i, (tps, correct) in enumerate((first, second))
        )
        return made.model_copy(update={"system_prompts": tuple(pair)})

    def said(found: Results) -> str:
        return "\n".join(r.text for r in recommend(found) if r.kind == "system_prompt")

    assert "no verdict" in said(prompts((100, 28), (101, 28)))
    assert "'concise' answers soonest" in said(prompts((100, 28), (200, 28)))
    assert "most right answers: 'empty', 93.3 %" in said(prompts((100, 28), (200, 20)))
    assert "'concise' costs accuracy: 33.3 % (10/30), the best has 93.3 % (28/30)" in warnings(
        prompts((100, 28), (200, 10))
    )
    # 29 of 30 and 30 of 30 are not told apart by their intervals.
    assert "costs accuracy" not in warnings(prompts((100, 30), (200, 29)))


def test_system_prompts_are_judged_within_the_advised_configuration() -> None:
    made = results()
    slow = made.system_prompts
    fast = [p.model_copy(update={"configuration": "ngram-k5", "figures": figures(300)}) for p in slow]
    fast[1] = fast[1].model_copy(update={"figures": figures(600)})
    said = [r for r in recommend(results(system_prompts=(*slow, *fast))) if r.kind == "system_prompt"]
    assert len(said) == 1
    assert said[0].configuration == "ngram-k5"
    assert "'concise' answers soonest" in said[0].text


def test_load_names_the_knee_and_the_goodput() -> None:
    # 290 is over 90 % of 300
    texts = [r.text for r in recommend(results()) if r.kind == "load"]
    assert texts[0].startswith("Load: 290 tok/s with 4 in flight, E2E p95 234 ms; more in flight gives at most 300")
    assert "at most 6.00 requests/s within e2el ≤ 1,000 ms, ttft ≤ 50.0 ms, at 8 in flight" in texts[1]


def test_load_is_advised_for_the_advised_configuration_alone() -> None:
    fast = [load_point(n, tps).model_copy(update={"configuration": "ngram-k5"}) for n, tps in ((1, 500), (2, 501))]
    found = results(load=(load_point(1, 100), load_point(2, 900), *fast))
    texts = [r.text for r in recommend(found) if r.kind == "load"]
    assert texts[0].startswith("Load: 500 tok/s with 1 in flight")


def test_the_last_point_tried_is_not_called_the_most() -> None:
    found = results(load=(load_point(1, 100), load_point(2, 200)))
    text = next(r.text for r in recommend(results(BASE, load=found.load)) if r.kind == "load")
    assert text.startswith("Load: 200 tok/s with 2 in flight")
    assert text.endswith("more was not tried.")


def test_load_without_goodput_says_so() -> None:
    point = load_point(1, 100)
    speed = point.figures.speed.model_copy(update={"request_goodput": 0.0})
    point = point.model_copy(update={"figures": point.figures.model_copy(update={"speed": speed})})
    assert "Goodput: no load met e2el" in "\n".join(r.text for r in recommend(results(BASE, load=(point,))))


def test_warnings_about_the_measuring_itself() -> None:
    busy = Client(
        chunks=1,
        cpu_us_per_chunk=None,
        cpu_share=0.99,
        loop_lag_p50_ms=9,
        loop_lag_p99_ms=90,
        loop_lag_max_ms=200,
        bounded=False,
    )
    target = Target(url="u", model="m", fields={"speculative_config": "ignored", "top_k": "ignored"})
    said = warnings(results(client=busy, target=target, partial=True, partial_reason="the server died"))
    assert "client was too busy" in said
    assert "ignores 'speculative_config'" in said
    assert "top_k" not in said, "no configuration asked for it"
    assert "partial: the server died" in said
    assert warnings(results(BASE)) == ""


def without_drafts(name: str, **speculative: object) -> ConfigurationResult:
    """As dfastllm's answers tell it: forward passes, and no word of drafts."""
    made = configuration(name, name, 1.0, spread=0.01, method="ngram")
    assert made.figures is not None
    idle = {"speculation": None, "forwards": Forwards(nfe=21.0, tokens_per_forward=1.0)}
    return made.model_copy(
        update={
            "options": {"speculative_config": {"method": "ngram", **speculative}},
            "figures": made.figures.model_copy(update=idle),
        }
    )


def test_drafting_that_drafted_nothing_is_named() -> None:
    said = warnings(results(BASE, without_drafts("A"), without_drafts("B"), configuration("c", "C", 1.5)))
    assert "Drafting drafted nothing: A; B. These figures are of plain decoding" in said
    assert "hold the drafts at k with --no-adaptive" in said
    held = warnings(results(BASE, without_drafts("A", adaptive=False)))
    assert "drafted nothing: A." in held
    assert "--no-adaptive" not in held
    assert "drafted nothing" not in warnings(results())


def test_a_server_that_tells_no_work_is_not_said_to_draft_nothing() -> None:
    made = without_drafts("A")
    assert made.figures is not None
    unknown = made.model_copy(update={"figures": made.figures.model_copy(update={"forwards": None})})
    assert "drafted nothing" not in warnings(results(BASE, unknown))


@pytest.mark.parametrize(("rate", "slow"), [(9.9, True), (10.0, False)])
def test_below_ten_tokens_a_second_there_are_hints(rate: float, slow: bool) -> None:
    def at(made: ConfigurationResult, tps: float) -> ConfigurationResult:
        return made.model_copy(update={"figures": figures(tps)})

    said = warnings(results(at(BASE, 4.0), at(configuration("a", "A", 1.5, method="ngram"), rate)))
    assert ("Slow: 9.90 tok/s at best (A), below 10." in said) == slow
    assert ("fewer draft tokens" in said) == slow
    alone = warnings(results(at(BASE, 4.0)))
    assert "Slow: 4.00 tok/s" in alone
    assert "draft" not in alone


@pytest.mark.parametrize(
    ("ratio", "text"), [(1.64, "+64 %"), (0.9, "-10 %"), (1.0, "+0 %"), (0.998, "+0 %"), (2.5, "+150 %")]
)
def test_a_ratio_in_percent(ratio: float, text: str) -> None:
    assert percent(ratio) == text
