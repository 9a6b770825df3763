"""Templates that ask for too much work, memory or nesting: stopped at once, by a named error, whatever they do."""

from __future__ import annotations

import resource
import threading
import time
from typing import Any

import pytest

from dfastllm.errors import TokenizerError, ValidationError
from dfastllm.text import ChatTemplates
from dfastllm.text.templates import budget

USER = [{"role": "user", "content": "Hi"}]

# What could not be compiled, and what raised no error of ours.
UNCOMPILED = {
    "a loop's word outside a loop": ("{% break %}", "does not compile: 'break' outside loop"),
    "500 lists in one another": ("{{ " + "[" * 500 + "]" * 500 + " }}", "does not parse: it nests too deeply"),
    "300 conditions in one another": ("{% if 1 %}" * 300 + "{% endif %}" * 300, "does not parse: it nests too deeply"),
    "30 loops in one another": ("{% for a in [1] %}" * 30 + "{% endfor %}" * 30, "too many statically nested blocks"),
    "a number of 10,000 digits": ("{{ " + "9" * 10000 + " }}", "does not compile: Exceeds the limit"),
    "a number of 80,000 bits": ("{{ 0x" + "f" * 20000 + " }}", "is refused: it has a number of more than 65,536 bits"),
    "5,000 attributes": ("{{ a" + ".b" * 5000 + " }}", "is refused: it nests more than 100 deep"),
    "5,000 filters": ("{{ a" + "|trim" * 5000 + " }}", "is refused: it nests more than 100 deep"),
    "a long source": ("{# " + "x" * 300_000 + " #}", "is refused: it has 300,006 characters"),
    "a filter that is none": ("{{ 'a' | urlize }}", "does not parse: No filter named 'urlize'"),
}

GROW = "{{% set ns = namespace(s={}) %}}{{% for i in range(60) %}}{{% set ns.s = {} %}}{{% endfor %}}{{{{ ns.s {}}}}}"
LONG = "{% set s = 'a' * 1000000 %}"
TOO_LARGE = {
    "repeated": "{{ 'a' * 10000000000 }}",
    "repeated list": "{{ ([1] * 1000000000) | length }}",
    "folded by the compiler": "{{ 'a' | center(1000000000) }}",
    "doubled by +": GROW.format("'aaaa'", "ns.s + ns.s", ""),
    "doubled by ~": GROW.format("'aaaa'", "ns.s ~ ns.s", ""),
    "doubled by a macro": "{% macro m(s) %}{{ m(s + s) }}{% endmacro %}{{ m('aaaa') }}",
    "a list of itself twice": GROW.format("[1]", "[ns.s, ns.s]", ""),
    "a tuple of itself twice": GROW.format("(1,)", "(ns.s, ns.s)", ""),
    "an object of itself twice": GROW.format("{}", "{'a': ns.s, 'b': ns.s}", "| tojson"),
    "dict() of itself twice": GROW.format("{}", "dict(a=ns.s, b=ns.s)", "| tojson"),
    "lists of itself added": GROW.format("[1]", "[ns.s] + [ns.s]", ""),
    "a list of itself repeated": GROW.format("[1]", "[ns.s] * 2", ""),
    "lists of itself, trimmed": GROW.format("[1]", "[ns.s, ns.s]", "| trim | length"),
    "lists of itself, joined by ~": GROW.format("[1]", "[ns.s, ns.s]", "~ 'a'"),
    "lists of itself, formatted": GROW.format("[1]", "[ns.s, ns.s]", "| string | length"),
    "a number multiplied": GROW.format("10 ** 1000", "ns.s * ns.s", ""),
    "a number raised": "{{ 10 ** 1000000000 }}",
    "a number read": "{{ ('f' * 100000) | int(base=16) }}",
    "output": LONG + "{% for i in range(90000) %}{{ s }}{% endfor %}",
    "output of a macro": LONG + "{% macro m() %}{% for i in range(90000) %}{{ s }}{% endfor %}{% endmacro %}{{ m() }}",
    "output of a set": LONG + "{% set x %}{% for i in range(90000) %}{{ s }}{% endfor %}{% endset %}",
    "texts that are kept": LONG
    + "{% set ns = namespace(l=[]) %}{% for i in range(9000) %}{% set ns.l = ns.l + [s[1:]] %}{% endfor %}",
    "joined": "{{ (['a' * 1000000] * 1000) | join('') }}",
    "joined by a method": "{{ ''.join(['a' * 1000000] * 1000) }}",
    "letters joined": "{{ ('a' * 100000) | join('b' * 100000) }}",
    "replaced": LONG + "{{ s | replace('a', s) }}",
    "replaced by a method": LONG + "{{ s.replace('a', s) }}",
    "nothing replaced": LONG + "{{ s.replace('', s) }}",
    "padded": "{{ 'a'.ljust(1000000000) }}",
    "zeros": "{{ 'a'.zfill(1000000000) }}",
    "tabs": LONG + "{{ ('\\t' * 1000000).expandtabs(1000000) }}",
    "indented": "{{ ('a\\n' * 10000) | indent(1000000) }}",
    "a wide format": "{{ '{:1000000000}'.format(1) }}",
    "a wide format by a value": "{{ '{:{}}'.format(1, 1000000000) }}",
    "a wide %": "{{ '%1000000000d' % 1 }}",
    "a wide % by a value": "{{ '%*d' % (1000000000, 1) }}",
    "a wide % of a filter": "{{ '%1000000000d' | format(1) }}",
    "a wide format of safe text": "{{ ('{:1000000000}' | safe).format(1) }}",
    "many places of a format": LONG + "{{ ('{0}' * 100000).format(s) }}",
    "many places of a map": LONG + "{{ ('{a}' * 100000).format_map({'a': s}) }}",
    "many places of a %": LONG + "{{ ('%(a)s' * 100000) % {'a': s} }}",
    "tojson, indented": "{{ messages | tojson(indent=1000000000) }}",
    "tojson, separated": LONG + "{{ messages | tojson(separators=(s, s)) }}",
    "rounded": "{{ 1.5 | round(1000000000, 'ceil') }}",
    "filled up": "{{ [1] | batch(1000000000, 'x') | list }}",
    "sliced": "{{ [1] | slice(1000000000) | list }}",
    "cut at every letter": "{{ ('a' * 3000000).split('a') | length }}",
    "a list of letters": "{{ ('é' * 3000000) | list | length }}",
    "a long date": "{{ strftime_now('%Y' * 1000) }}",
}
TOO_LONG = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops that pass all over": "{% for a in range(9999) %}{% for b in range(9999) if false %}{% endfor %}{% endfor %}",
    "recursive loops": "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "macros": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a block of itself": "{% block a %}{{ self.a() }}{% endblock %}",
    "maps": "{% for a in range(99999) %}{% set x = range(99999) | map('string') | list %}{% endfor %}",
    "sorts": "{% for a in range(99999) %}{% set x = range(99999) | sort %}{% endfor %}",
}
FORBIDDEN = {
    "translate": "{{ 'a'.translate({97: 'b'}) }}",
    "to_bytes": "{{ (5).to_bytes(1000000000) }}",
    "encode": "{{ 'a'.encode() }}",
}


@pytest.mark.parametrize("name", UNCOMPILED)
def test_what_cannot_be_compiled_is_named(name: str) -> None:
    template, message = UNCOMPILED[name]
    with pytest.raises(TokenizerError, match=message):
        ChatTemplates({"default": template}).render(USER)
    with pytest.raises(TokenizerError, match=message):
        ChatTemplates({}).chosen(template)


def stopped(template: str, kind: type[Exception] = TokenizerError) -> str:
    """The error's message; the rendering took little time and memory."""
    memory, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.thread_time()
    with pytest.raises(kind) as refused:
        ChatTemplates({"default": template}).render(USER)
    assert time.thread_time() - begun < budget.SECONDS + 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 600_000  # kB
    return str(refused.value)


@pytest.mark.parametrize("name", TOO_LARGE)
def test_too_large(name: str) -> None:
    assert "was stopped: it" in stopped(TOO_LARGE[name])


@pytest.mark.parametrize("name", TOO_LONG)
def test_too_long(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "STEPS", 120_000)
    said = stopped(TOO_LONG[name])
    assert "was stopped: it takes more than 120,000 steps" in said or "RecursionError" in said


@pytest.mark.parametrize("name", FORBIDDEN)
def test_methods_that_make_much_of_little_are_denied(name: str) -> None:
    assert f"the method {name}" in stopped(FORBIDDEN[name])


def test_a_million_steps() -> None:
    assert "takes more than 1,000,000 steps" in stopped(TOO_LONG["loops"])


def test_the_clock_is_the_last_resort(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "SECONDS", 0.05)
    slow = "{% set s = 'a' * 3000000 %}{% for i in range(99999) %}{% if 'b' in s %}{% endif %}{% endfor %}"
    assert "works for more than 0.05 seconds" in stopped(slow)


def test_what_a_client_nests_is_the_clients_fault() -> None:
    deep: Any = "x"
    for _ in range(300):
        deep = [deep]
    template = "{% set all = [messages, [messages]] %}{{ all | tojson }}"
    with pytest.raises(ValidationError, match="nests others more than 200 deep"):
        ChatTemplates({"default": template}).render([{"role": "user", "content": deep}])


def test_lipsum_is_gone() -> None:
    with pytest.raises(ValidationError, match="'lipsum' is undefined"):
        ChatTemplates({"default": "{{ lipsum(n=100) }}"}).render(USER)


def test_limits_grow_with_the_conversation() -> None:
    """6 million characters are more than a template may make of nothing, and little for those who have them."""
    text = "word " * 1_200_000
    template = "{% for m in messages %}{{ '<' + m.content + '>' }}{{ m.content | trim | length }}{% endfor %}"
    rendered = ChatTemplates({"default": template}).render([{"role": "user", "content": text}])
    assert rendered == f"<{text}>{len(text) - 1}"
    many = [{"role": ("user", "assistant")[i % 2], "content": "a" * 40} for i in range(30_000)]
    counting = "{% for m in messages %}{% for i in range(40) %}{% endfor %}{{ m.content }}{% endfor %}"
    assert ChatTemplates({"default": counting}).render(many) == "a" * 1_200_000


def test_a_stopped_rendering_leaves_others_as_they_are() -> None:
    templates = ChatTemplates({"default": "{% if messages[0].content == 'bad' %}{{ 'a' * 10000000000 }}{% endif %}ok"})
    answers: list[str] = []

    def work(text: str) -> None:
        for _ in range(20):
            try:
                answers.append(templates.render([{"role": "user", "content": text}]))
            except TokenizerError:
                answers.append("stopped")

    threads = [threading.Thread(target=work, args=(text,)) for text in ("good", "bad", "good", "bad")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == ["ok"] * 40 + ["stopped"] * 40


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ 'a' + 'b' ~ 1 ~ [2, 'c'] }}", "ab1[2, 'c']"),
        (
            "{% set x = [1] + [2] %}{{ x }}{{ (1, 2) * 2 }}{{ 7 % 4 }}{{ '%s-%s' % (1, 2) }}{{ 2 ** 5 }}",
            "[1, 2](1, 2, 1, 2)31-232",
        ),
        (
            "{{ '{0}:{a}'.format(1, a='b') }}{{ 'x'.center(3) }}{{ 'a' | center(3) }}|{{ 'a-b'.split('-') }}",
            "1:b x  a |['a', 'b']",
        ),
        ("{% for a, b in {'x': 1, 'y': 2}.items() if b > 1 %}{{ a }}{{ loop.length }}{% else %}none{% endfor %}", "y1"),
        ("{% for a in [[1, [2]], []] recursive %}{{ a if a is number else loop(a) }}{% endfor %}", "12"),
        (
            "{{ [3, 1, 2] | sort | join(', ') }}{{ 'a\nb' | indent(2) }}{{ ' A ' | trim | lower }}{{ none | string }}",
            "1, 2, 3a\n  baNone",
        ),
        ("{{ range(5) | batch(2, 'x') | map('list') | list }}", "[[0, 1], [2, 3], [4, 'x']]"),
        ("{{ '<b>' | e }}{{ '<b>' | safe }}{{ ('<' | e) + '>' }}", "&lt;b&gt;<b>&lt;&gt;"),
        ("{{ undefined }}{{ undefined | default('d') }}{{ undefined | trim }}", "d"),
        ("{% set ns = namespace(a=1) %}{% set ns.a = ns.a + 1 %}{{ ns.a }}{{ 'abc'[1:] }}{{ 'abc'[::-1] }}", "2bccba"),
        (
            "{% macro m(a, b='x' + 'y') %}{{ a }}{{ b }}{{ caller() }}{% endmacro %}{% call m('q') %}!{% endcall %}",
            "qxy!",
        ),
        ("{% filter upper %}a{{ 'b' }}{% endfilter %}{% set x %}c{{ 1 }}{% endset %}{{ x }}", "ABc1"),
        ("{{ " + " + ".join(["'a'"] * 80) + " }}", "a" * 80),
    ],
)
def test_what_templates_do_is_done_as_by_jinja(template: str, text: str) -> None:
    import jinja2

    assert jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(template).render() == text
    assert ChatTemplates({"default": template}).render(USER) == text
