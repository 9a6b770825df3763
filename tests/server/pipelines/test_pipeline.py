"""What a pipeline may be: names that exist, no circles, options of requests, templates that cannot run away."""

from __future__ import annotations

import base64
import time
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dfastllm.errors import PayloadTooLargeError, ValidationError
from dfastllm.server.pipelines.pipeline import Pipeline, understood
from dfastllm.server.pipelines.schema import PipelineBody
from dfastllm.server.pipelines.templates import Condition, Template
from dfastllm.server.reading import read_body, validated


def pipeline(*steps: dict[str, Any], **more: Any) -> Pipeline:
    return understood(validated(PipelineBody, {"name": "p", "steps": list(steps), **more}))


def step(id: str, reads: str = "input", **more: Any) -> dict[str, Any]:
    return {"id": id, "model": "m", "input": "{{ " + reads + " }}", **more}


def test_steps_come_after_what_they_read() -> None:
    found = pipeline(step("c", "b ~ a"), step("b", "a"), step("a"), step("z", "c", when="b | length > 2"))
    assert [one.id for one in found.steps] == ["a", "b", "c", "z"]
    assert found.steps[-1].needs == {"c", "b"}
    assert found.card().models == ["m"]


@given(st.permutations(range(6)), st.data())
def test_every_order_fits_what_is_read(order: list[int], data: st.DataObject) -> None:
    """Any graph in which steps read only steps of lower numbers, written down in any order."""
    reads = {i: data.draw(st.sets(st.integers(0, i - 1), max_size=3)) if i else set() for i in order}
    names = {i: " ~ ".join([f"s{j}" for j in sorted(reads[i])] or ["input"]) for i in order}
    found = [one.id for one in pipeline(*(step(f"s{i}", names[i]) for i in order)).steps]
    assert all(found.index(f"s{j}") < found.index(f"s{i}") for i in order for j in reads[i])


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([step("a", "a")], "steps wait for each other: a needs a"),
        ([step("a", "b"), step("b", "c"), step("c", "a")], "steps wait for each other: a needs b needs c needs a"),
        ([step("first"), step("b", "frist")], "names 'frist', which there is not. Did you mean 'first'"),
        ([step("a", "nothing")], "steps.a.input names 'nothing', which there is not. There are: input, a"),
        ([step("a", when="lenth > 1")], "steps.a.when names 'lenth'"),
        ([step("a"), step("a")], "two steps have the id 'a'"),
        ([step("a", output="x"), step("x")], "'x' of step 'x' is step 'a' already"),
        ([step("a", output="input")], "is the input of the run already"),
        ([{"id": "a", "model": "m"}], "steps.a needs input or messages"),
        ([step("a", messages=[{"role": "user", "content": "x"}])], "steps.a needs input or messages"),
        ([{"id": "a", "module": "m", "input": "x"}], "steps.a.module names 'm', which there is not"),
        ([{"id": "a", "module": "m", "model": "m", "input": "x"}], "module and model do not go together"),
        ([step("a", options={"max_tokns": 3})], "steps.a.options: .*max_tokens"),
        ([step("a", options={"temperature": -1})], "steps.a.options: .*temperature"),
        ([step("a", options={"stream": True})], "stream is not chosen there"),
        ([step("a", options={"n": 2})], "n is not chosen there"),
        ([{"id": "a", "model": "m", "input": "{{ input"}], "steps.a.input is no template"),
        ([{"id": "a", "model": "m", "input": "{% include 'x' %}{{ input }}"}], None),
        ([{"id": "a", "model": "m", "input": "x" * 70_000}], "has 70000 characters; a template may have 65536"),
        ([step("a", when="true %}x{% if true")], "must be an expression"),
        ([step("a", when="1 +")], "steps.a.when is no template"),
        ([], "steps"),
        ([step(f"s{i}") for i in range(33)], "steps"),
        ([step("a b")], "steps"),
        ([step("a", inptu="x")], "inptu"),
    ],
)
def test_what_cannot_be(steps: list[dict[str, Any]], said: str | None) -> None:
    if said is None:  # a file is reached for when it is rendered, and there is none
        with pytest.raises(ValidationError, match="may not"):
            pipeline(*steps).steps[0].inputs[0].render({"input": "x"})
        return
    with pytest.raises(ValidationError, match=said):
        pipeline(*steps)


@pytest.mark.parametrize(
    ("modules", "said"),
    [
        ({"m": {}}, "modules.m needs wat or wasm"),
        ({"m": {"wat": "(module)", "wasm": ""}}, "modules.m needs wat or wasm"),
        ({"m": {"wasm": "!!"}}, "modules.m.wasm is not base64"),
        ({"m": {"wasm": base64.b64encode(b"no").decode()}}, "m is no WebAssembly module"),
        ({"m": {"wat": "(module)"}}, "m must export alloc"),
        ({str(i): {"wat": "x"} for i in range(9)}, "modules"),
    ],
)
def test_modules_that_are_none(modules: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        pipeline(step("a"), modules=modules)


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
        "{{ 'x' * 999999999 }}",
        "{% set ns = namespace(t='x') %}{% for i in range(64) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}{{ ns.t }}",
        "{{ 9 ** 99999 ** 9 }}",
        "{{ '%999999999d' % 1 }}",
        "{{ ('x' * 99999999) ~ ('x' * 99999999) }}",
        "{{ ['x'] * 99999999 }}",
        "{{ 'x' | center(999999999) }}",
        "{% if ('x' * 999999999) | length > 1 %}x{% endif %}",
        "{{ input.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ input.nothing }}",
        "{{ input | nofilter }}",
        "{{ raise_exception('no') }}",
        "{{ 1 / 0 }}",
    ],
)
def test_templates_that_run_away(source: str) -> None:
    began = time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises(ValidationError, match=r"steps\.a"):
            Template(source, "steps.a.input").render({"input": "x"})
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert time.process_time() - began < 10
    assert most < 64 << 20, "bytes at once"


def test_conditions() -> None:
    holds = Condition("'?' in input and draft | length > 3", "w")
    assert holds.names == {"input", "draft"}
    assert holds.holds({"input": "why?", "draft": "long"})
    assert not holds.holds({"input": "why", "draft": "long"})
    assert not Condition("false", "w").holds({})
    assert Condition("input", "w").holds({"input": "x"})


def test_yaml_is_read_as_data() -> None:
    text = b"name: p\nsteps:\n  - {id: a, model: m, input: 'x {{ input }}', options: {max_tokens: 4}}\n"
    body = read_body(PipelineBody, text, "application/yaml; charset=utf-8", 1000)
    assert body.steps[0].options == {"max_tokens": 4}
    for bad, said in (
        (b"a: &x [1]\nb: *x", "anchors and aliases are not taken"),
        (b"name: p\nname: q", "key 'name' is there twice"),
        (b"!!python/object/apply:os.system [ls]", "not valid YAML"),
        (b"[" * 200, "nests more than 64 deep"),
        (b"? [a]\n: b", "a key is no text"),
        (b"name: \xff", "not UTF-8"),
        (b"a: [", "not valid YAML"),
        (b"just text", "object|dictionary|mapping"),
    ):
        with pytest.raises(ValidationError, match=said):
            read_body(PipelineBody, bad, "application/yaml", 1000)
    with pytest.raises(PayloadTooLargeError, match="may have 262144 bytes"):
        read_body(PipelineBody, b"a" * 300_000, "application/yaml", 1000)
