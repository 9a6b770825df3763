"""Earlier results: only what can be compared is compared, and a change needs more than the margin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dfastllm.bench.suite.history import (
    MARGIN,
    Entry,
    compare,
    comparison_table,
    earlier,
    entries,
    list_table,
    remember,
    trend_table,
    why_not_comparable,
)
from dfastllm.bench.suite.recommend import recommend
from dfastllm.bench.suite.schema import ConfigurationResult, Results, Round, save_results
from dfastllm.errors import ValidationError
from tests.kit.suite_example import configuration, figures, results


def base(rates: tuple[float, ...], **more: Any) -> ConfigurationResult:
    rounds = tuple(Round(output_throughput=r, duration=1.0, errors=0) for r in rates)
    middle = sorted(rates)[len(rates) // 2]
    return configuration("baseline", "No speculation").model_copy(
        update={"rounds": rounds, "figures": figures(middle, **more)}
    )


def at(day: int, *configurations: ConfigurationResult, **changes: Any) -> Results:
    return results(*configurations, **({"started": f"2026-11-{day:02d}T10:00:00Z"} | changes))


STEADY = (99.0, 100.0, 101.0, 100.0, 99.5)


@pytest.mark.parametrize(
    ("rates", "verdict"),
    [
        (STEADY, "same"),
        ((104.0, 105.0, 106.0, 105.0, 104.5), "same"),
        ((79.0, 80.0, 81.0, 80.0, 79.5), "slower"),
        ((149.0, 150.0, 151.0, 150.0, 149.5), "faster"),
        ((60.0, 140.0, 100.0, 60.0, 140.0), "no verdict"),
        ((80.0, 80.0), "no verdict"),
    ],
)
def test_verdicts(rates: tuple[float, ...], verdict: str) -> None:
    (change,) = compare(at(2, base(rates)), at(1, base(STEADY)))
    assert change.verdict == verdict
    assert (change.ratio is None) == (len(rates) < 3)


def test_the_ratio_is_now_over_before_with_the_interval_around_it() -> None:
    (change,) = compare(at(2, base((79.0, 80.0, 81.0))), at(1, base((99.0, 100.0, 101.0))))
    assert change.ratio is not None
    assert change.ratio.ratio == pytest.approx(0.8)
    # Independent resampling can at most pair the extremes of both sides.
    assert 79 / 101 - 1e-9 <= change.ratio.low <= 0.8 <= change.ratio.high <= 81 / 99 + 1e-9
    assert change.ratio.margin == MARGIN


def test_a_slowdown_is_a_slowdown_both_ways_round() -> None:
    (there,) = compare(at(2, base((79.0, 80.0, 81.0))), at(1, base(STEADY)))
    (back,) = compare(at(2, base(STEADY)), at(1, base((79.0, 80.0, 81.0))))
    assert (there.verdict, back.verdict) == ("slower", "faster")


def changed(**changes: Any) -> Results:
    made = at(1)
    for part, fields in changes.items():
        inner = getattr(made, part)
        made = made.model_copy(update={part: inner.model_copy(update=fields) if isinstance(fields, dict) else fields})
    return made


@pytest.mark.parametrize(
    ("before", "said"),
    [
        (changed(environment={"profile_key": "another-1c"}), "different hardware"),
        (changed(environment={"profile_key": "unknown-1234"}), "not known"),
        (changed(target={"model": "other"}), "different models"),
        (changed(target={"software": "llama.cpp 1"}), "different servers"),
        (changed(target=None), "measured no server"),
        (changed(run={"max_tokens": 8}), "max_tokens"),
        (changed(run={"concurrency": 9}), "concurrency"),
        (changed(run={"temperature": 1.0}), "temperature"),
        (changed(run={"requests": 1}), "requests"),
    ],
)
def test_what_cannot_be_compared_is_refused_with_the_reason(before: Results, said: str) -> None:
    assert said in str(why_not_comparable(at(2), before))
    with pytest.raises(ValidationError, match="cannot be compared") as raised:
        compare(at(2), before)
    assert said in str(raised.value)


def test_another_version_of_the_same_server_can_be_compared() -> None:
    assert why_not_comparable(at(2), changed(target={"software": "dfastllm 0.0.9"})) is None


def test_the_same_unknown_machine_is_not_the_same() -> None:
    unknown = changed(environment={"profile_key": "unknown-1234"})
    assert why_not_comparable(unknown, unknown) is not None


def test_kept_results_come_back_in_order_and_a_broken_file_hides_none(tmp_path: Path) -> None:
    second, first = at(2), at(1)
    paths = [remember(second, tmp_path), remember(first, tmp_path), remember(first, tmp_path)]
    assert paths[1] == paths[2], "the same result is kept once"
    whole = paths[0].read_text()
    (tmp_path / "cut.json").write_text(whole[: len(whole) // 2])
    (tmp_path / "other.json").write_text(json.dumps({"schema": "something"}))
    (tmp_path / "newer.json").write_text(json.dumps(json.loads(whole) | {"schema_version": 99}))
    kept, complaints = entries(tmp_path)
    assert [e.results for e in kept] == [first, second]
    assert len(complaints) == 3
    assert any("cut short" in c for c in complaints)
    assert any("newer dfastllm" in c for c in complaints)


def test_names_of_models_make_safe_file_names(tmp_path: Path) -> None:
    evil = changed(target={"model": "../../etc/passwd\n"})
    path = remember(evil, tmp_path)
    assert path.parent == tmp_path
    assert path.name == "20261101T100000Z-etc-passwd.json"


def test_nothing_kept_is_no_error(tmp_path: Path) -> None:
    assert entries(tmp_path / "nowhere") == ([], [])
    assert list_table([]).lines == ("Nothing is kept yet.",)


def test_the_latest_comparable_one_is_taken() -> None:
    other = at(4, environment=changed(environment={"profile_key": "another"}).environment)
    kept = [Entry(Path(f"{i}"), r) for i, r in enumerate((at(1), at(3), other, at(6)))]
    found = earlier(at(5), kept)
    assert found is not None
    assert found.results.started == "2026-11-03T10:00:00Z"
    assert earlier(at(1), kept) is None


def test_tables() -> None:
    old, new = at(1, base(STEADY)), at(2, base((79.0, 80.0, 81.0), correct=20))
    table = comparison_table(new, old)
    cells = [cell.text for cell in table.rows[0]]
    assert cells[:3] == ["No speculation", "100", "80.0"]
    assert cells[4] == "slower"
    assert cells[6] == "93.3 % (28/30) → 66.7 % (20/30)"
    listed = at(1)
    listed = listed.model_copy(update={"recommendations": recommend(listed), "partial": True})
    row = [cell.text for cell in list_table([Entry(Path("a.json"), listed)], ["b.json is broken"]).rows[0]]
    assert row[:3] == ["2026-11-01T10:00:00Z", "demo-ar", "abc1234"]
    assert row[4:] == ["100", "n-gram, 5 tokens", "1.62× (+62 %, 1.57–1.67)", "partial", "a.json"]


def test_trend_runs_from_the_first_comparable_to_now() -> None:
    kept = [Entry(Path(f"{i}"), at(i + 1, base((rate,) * 3))) for i, rate in enumerate((100.0, 90.0, 120.0))]
    foreign = Entry(Path("f"), changed(environment={"profile_key": "another"}))
    now = at(9, base((110.0,) * 3))
    table = trend_table([*kept, foreign], now)
    assert [cell.text for cell in table.rows[0]] == [
        "No speculation",
        "4",
        "100",
        "90.0",
        "120",
        "110",
        "+10.0 %",
        "▃▁█▆",
    ]
    assert "4 comparable results" in table.lines[0]
    # The result itself may already be among those kept.
    again = trend_table([*kept, Entry(Path("now"), now)], now)
    assert [c.text for c in again.rows[0]] == [c.text for c in table.rows[0]]


def test_a_steady_course_is_flat() -> None:
    kept = [Entry(Path(f"{i}"), at(i + 1, base((100.0 + i / 10,) * 3))) for i in range(3)]
    assert trend_table(kept, kept[-1].results).rows[0][-1].text == "▄▄▄"


def test_save_and_load_agree(tmp_path: Path) -> None:
    save_results(at(1), tmp_path / "r.json")
    assert entries(tmp_path)[0][0].results == at(1)
