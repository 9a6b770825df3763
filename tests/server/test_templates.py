"""Template variables of a request and of the server, and a template in place of the checkpoint's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dfastllm import LLM, SamplingParams
from dfastllm.errors import DFastLLMError, TokenizerError, ValidationError
from dfastllm.llm import load_engine, model_options
from dfastllm.settings import Settings
from dfastllm.text import ChatTemplates
from tests.kit.live import Live, serving

THINKING = (
    "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{% if enable_thinking is defined and enable_thinking is false %}=:{% else %}"
    "{{ opening or '?' }}{% endif %}{% endif %}"
)
U: dict[str, Any] = {"role": "user", "content": "1"}


def options(directory: Path, template: str = THINKING, variables: str | None = None) -> dict[str, Any]:
    """What `serve --chat-template FILE --default-chat-template-kwargs JSON` hands to the loading of a model."""
    file = directory / "own.jinja"
    file.write_text(template, encoding="utf-8")
    return model_options(Settings(chat_template=str(file), default_chat_template_kwargs=variables))


@pytest.fixture(scope="module")
def templated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    directory = tmp_path_factory.mktemp("templates")
    engines = {
        "plain": load_engine("demo-ar", **options(directory)),
        "quiet": load_engine("demo-ar", **options(directory, variables='{"enable_thinking": false, "bos_token": ""}')),
    }
    with serving(engines) as running:
        yield running


def rendered(live: Live, model: str, **body: Any) -> str:
    answer = live.post("/tokenize", {"model": model, "messages": [U], **body})
    assert answer.status_code == 200, answer.text
    return str(live.post("/detokenize", {"model": model, "tokens": answer.json()["tokens"]}).json()["prompt"])


def test_variables_of_a_request_win_over_the_servers(templated: Live) -> None:
    bos = rendered(templated, "plain", add_generation_prompt=False).removesuffix("1")
    assert rendered(templated, "plain") == f"{bos}1?"
    assert rendered(templated, "plain", chat_template_kwargs={"enable_thinking": False}) == f"{bos}1=:"
    assert rendered(templated, "plain", chat_template_kwargs={"enable_thinking": None, "opening": "+"}) == f"{bos}1+"
    assert rendered(templated, "quiet") == "1=:"
    assert rendered(templated, "quiet", chat_template_kwargs={"enable_thinking": True}) == "1?"
    assert rendered(templated, "quiet", add_generation_prompt=False) == "1"


def test_they_reach_the_prompt_of_an_answer(templated: Live) -> None:
    def prompt(**body: Any) -> list[int]:
        asked = {"model": "plain", "messages": [U], "max_tokens": 1, "return_token_ids": True, **body}
        answer = templated.post("/v1/chat/completions", asked)
        assert answer.status_code == 200, answer.text
        return list(answer.json()["prompt_token_ids"])

    for body in ({}, {"chat_template_kwargs": {"enable_thinking": False}}, {"add_generation_prompt": False}):
        tokens = templated.post("/tokenize", {"model": "plain", "messages": [U], **body}).json()["tokens"]
        assert prompt(**body) == tokens
    assert prompt(chat_template_kwargs={"enable_thinking": False}) != prompt()


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"messages": []}, "messages is no variable"),
        ({"tools": []}, "send tools as a field of its own"),
        ({"add_generation_prompt": False}, "send add_generation_prompt as a field"),
        (["enable_thinking"], "dictionary"),
        ("enable_thinking", "dictionary"),
    ],
)
def test_bad_variables_are_named(templated: Live, variables: Any, says: str) -> None:
    body = {"model": "plain", "messages": [U], "chat_template_kwargs": variables}
    answer = templated.post("/v1/chat/completions", body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "chat_template_kwargs"
    assert says in error["message"]


@pytest.mark.parametrize("text", ["x", "[1]", "3", "null", "{", '{"a": 1'])
def test_settings_that_are_no_object(text: str) -> None:
    with pytest.raises(ValidationError, match="must be a JSON object") as refused:
        Settings(default_chat_template_kwargs=text)
    assert refused.value.param == "default_chat_template_kwargs"


def test_what_a_person_spells_stays_text(templated: Live) -> None:
    """Special tokens in a message are text, in a raw prompt they are tokens, and `parse_special` says otherwise."""
    mask = templated.serving.models["plain"].tokenizer.spellings[-1]
    id = templated.serving.models["plain"].tokenizer.token_to_id(mask)
    said: dict[str, Any] = {"model": "plain", "messages": [{"role": "user", "content": f"a{mask}b"}]}
    raw = {"model": "plain", "prompt": f"a{mask}b"}

    def tokens(body: dict[str, Any], **rest: Any) -> list[int]:
        answer = templated.post("/tokenize", {**body, **rest})
        assert answer.status_code == 200, answer.text
        return list(answer.json()["tokens"])

    assert id not in tokens(said)
    assert id not in tokens(said, parse_special=False)
    assert id in tokens(said, parse_special=True)
    assert id in tokens(raw)
    assert id in tokens(raw, parse_special=True)
    assert id not in tokens(raw, parse_special=False)
    for parse, text in ((None, False), (False, False), (True, True)):
        body = {**said, "max_tokens": 1, "return_token_ids": True, "parse_special": parse}
        prompt = templated.post("/v1/chat/completions", body).json()["prompt_token_ids"]
        assert (id in prompt) is text
    for parse, text in ((None, True), (False, False)):
        body = {**raw, "max_tokens": 1, "return_token_ids": True, "parse_special": parse}
        answer = templated.post("/v1/completions", body).json()
        assert (id in answer["choices"][0]["prompt_token_ids"]) is text


def test_python_has_the_names_of_http_and_the_same_check(tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text(THINKING, encoding="utf-8")
    plain = {"chat_template": file, "chat_template_kwargs": {"bos_token": "", "enable_thinking": False}}
    with LLM("demo-ar", **plain) as llm:
        text = llm.tokenizer.decode(llm.render([U]), skip_special=False)
        assert text == "1=:"
        asked = llm.render([U], chat_template_kwargs={"enable_thinking": True, "opening": "+"})
        assert llm.tokenizer.decode(asked, skip_special=False) == "1+"
        with pytest.raises(ValidationError, match=r"messages\[0\] has no field 'contnet'. Did you mean 'content'"):
            llm.chat([{"role": "user", "contnet": "1"}])
        mask = llm.tokenizer.spellings[-1]
        said = [{"role": "user", "content": mask}]
        assert llm.tokenizer.token_to_id(mask) not in llm.render(said)
        assert llm.tokenizer.token_to_id(mask) in llm.render(said, parse_special=True)
        assert llm.chat(said, SamplingParams(max_tokens=1))[0].prompt_tokens == llm.render(said)
        assert llm.tokenizer.token_to_id(mask) not in llm.encode(mask, parse_special=False)
    older = load_engine("demo-ar", chat_template=file, template_variables={"bos_token": "", "enable_thinking": False})
    assert older.tokenizer is not None
    assert older.tokenizer.apply_chat_template([U]) == "1=:"
    with pytest.raises(ValidationError, match="one thing; got both"):
        load_engine("demo-ar", chat_template_kwargs={}, template_variables={})
    loaded = load_engine("demo-ar", **model_options(Settings(chat_parse_special=True)))
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.chat_parse_special


def test_a_template_that_cannot_be_used_ends_the_loading(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"missing\.jinja cannot be read"):
        load_engine("demo-ar", **model_options(Settings(chat_template=str(tmp_path / "missing.jinja"))))
    with pytest.raises(TokenizerError, match=r"template of .*own\.jinja does not parse: .* Mend that file"):
        load_engine("demo-ar", **options(tmp_path, "{% for %}"))
    with pytest.raises(ValidationError, match="messages is no variable"):
        load_engine("demo-ar", **options(tmp_path, variables='{"messages": []}'))
    (tmp_path / "config.json").write_text("no JSON")  # a model that cannot be read is not looked at before
    for wrong, said in (
        ({"template_variables": {"messages": []}}, "messages is no variable"),
        (options(tmp_path, "{% for %}"), "does not parse"),
        ({"speculative": '{"method": "ngram", "k": 3}'}, "has no field 'k'"),
    ):
        with pytest.raises(DFastLLMError, match=said):
            load_engine(tmp_path, **wrong)
    (tmp_path / "bytes.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(TokenizerError, match="not UTF-8"):
        load_engine("demo-ar", **model_options(Settings(chat_template=str(tmp_path / "bytes.jinja"))))


def test_a_chosen_template_takes_every_conversation() -> None:
    own = ChatTemplates({"default": "a", "tool_use": "b"}).chosen("{{ x }}", {"x": 1})
    tool = {"type": "function", "function": {"name": "f"}}
    assert own.render([U], [tool]) == own.render([U]) == "1"
    assert own.render([U], variables={"x": 2}) == "2"
    assert own.chosen(None, {"x": 3}).render([U]) == "3"
    assert own.render([U]) == "1"
