"""LoRA over HTTP: how an adapter is chosen, loading and unloading at run time, refusals, what a restart keeps."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import torch
from safetensors.torch import load_file, save_file

from dfastllm.engine import Engine
from dfastllm.errors import AdapterError, ValidationError
from dfastllm.models import Decoder
from dfastllm.server.shelf import STATE, Shelf
from dfastllm.settings import Settings
from tests.kit.live import Live, serving
from tests.kit.merged import write_strong
from tests.kit.served import random_engine

ASK = {"prompt": "The dog", "max_tokens": 6, "temperature": 0, "ignore_eos": True}


def base(engine: Engine) -> Decoder:
    assert isinstance(engine.model, Decoder)
    return engine.model


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with three adapters of one model, and one beside it."""
    top = tmp_path_factory.mktemp("lora")
    model = base(random_engine("llama"))
    for seed, name in enumerate(("one", "two", "three")):
        write_strong(top / "root" / name, model, seed, strength=2.0)
    write_strong(top / "outside", model, 9)
    (top / "root" / "link").symlink_to(top / "outside")
    linked = top / "root" / "linked-file"
    write_strong(linked, model, 10)
    (linked / "adapter_model.safetensors").unlink()
    (linked / "adapter_model.safetensors").symlink_to(top / "outside" / "adapter_model.safetensors")
    return top / "root"


@pytest.fixture
def live(root: Path, tmp_path: Path) -> Iterator[Live]:
    """Two models; one adapter by the settings; a root to load more from, without an earlier server's list."""
    (root / STATE).unlink(missing_ok=True)
    engines = {"base": random_engine("llama"), "canvas": random_engine("llada")}
    settings = {"lora_modules": (f"base:one={root / 'one'}",), "enable_lora": True, "lora_root": str(root)}
    with serving(engines, **settings) as live:
        yield live


def text(live: Live, **more: Any) -> str:
    reply = live.post("/v1/completions", {**ASK, **more})
    assert reply.status_code == 200, reply.text
    answer: str = reply.json()["choices"][0]["text"]
    return answer


def refused(live: Live, path: str, body: Any, status: int, param: str | None) -> str:
    reply = live.post(path, body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (status, param), reply.text
    message: str = reply.json()["error"]["message"]
    return message


def load(live: Live, name: str, path: str, **more: Any) -> Any:
    reply = live.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path, "model": "base", **more})
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_every_way_to_choose_an_adapter_gives_its_answer(live: Live) -> None:
    plain, adapted = text(live, model="base"), text(live, model="one")
    assert plain != adapted
    for ways in (
        {"model": "base:one"},
        {"model": "base", "lora": "one"},
        {"model": "base", "adapter_id": "one"},
        {"model": "base", "lora": [{"id": "one", "scale": 1.0}]},
        {"model": "base", "lora": [{"id": "one"}], "adapter_id": "one"},
        {"model": "one", "lora": "one"},
    ):
        assert text(live, **ways) == adapted, ways
    reply = live.post("/v1/completions", {**ASK, "model": "one"}).json()
    assert reply["model"] == "one"
    chat = {"messages": [{"role": "user", "content": "The dog"}], "max_tokens": 6, "temperature": 0}
    said = [live.post("/v1/chat/completions", {**chat, "model": m}).json() for m in ("base", "one")]
    assert said[0]["choices"][0]["message"] != said[1]["choices"][0]["message"]


def test_choices_that_cannot_be(live: Live) -> None:
    path = "/v1/completions"
    assert "no adapter 'none'" in refused(live, path, {**ASK, "model": "base", "lora": "none"}, 404, "lora")
    refused(live, path, {**ASK, "model": "base", "adapter_id": "none"}, 404, "adapter_id")
    refused(live, path, {**ASK, "model": "base:none"}, 404, "lora")
    assert "base, canvas; adapters: one." in refused(live, path, {**ASK, "model": "none"}, 404, "model")
    refused(live, path, {**ASK, "model": "canvas", "lora": "one"}, 404, "lora")
    assert "send one" in refused(live, path, {**ASK, "model": "one", "lora": "two"}, 400, "lora")
    assert "scale 0.5" in refused(
        live, path, {**ASK, "model": "base", "lora": [{"id": "one", "scale": 0.5}]}, 400, "lora"
    )
    two = [{"id": "one"}, {"id": "two"}]
    assert "2 adapters" in refused(live, path, {**ASK, "model": "base", "lora": two}, 400, "lora")
    refused(live, path, {**ASK, "model": "base", "lora": []}, 400, "lora")


def test_loaded_replaced_and_unloaded_while_the_server_runs(live: Live, root: Path) -> None:
    one = text(live, model="one")
    card = load(live, "more", "two")
    assert (card["id"], card["parent"], card["root"]) == ("more", "base", str(root / "two"))
    two = text(live, model="more")
    assert two not in (one, text(live, model="base"))
    listed = {card["id"]: card.get("parent") for card in live.get("/v1/models").json()["data"]}
    assert listed == {"base": None, "canvas": None, "one": "base", "more": "base"}
    assert live.get("/v1/models/base:more").json()["parent"] == "base"
    body = {"lora_name": "more", "lora_path": "three", "model": "base"}
    assert "already" in refused(live, "/v1/load_lora_adapter", body, 400, "lora_name")
    assert text(live, model="more") == two
    load(live, "more", "three", load_inplace=True)
    assert text(live, model="more") not in (one, two)
    gone = live.post("/v1/unload_lora_adapter", {"lora_name": "more"})
    assert (gone.status_code, gone.json()["parent"]) == (200, "base")
    refused(live, "/v1/completions", {**ASK, "model": "more"}, 404, "model")
    refused(live, "/v1/unload_lora_adapter", {"lora_name": "more", "model": "base"}, 404, "lora")
    assert "there are: one" in refused(live, "/v1/unload_lora_adapter", {"lora_name": "more"}, 404, "lora_name")
    assert text(live, model="one") == one


@pytest.mark.parametrize("path", ["../outside", "link", "linked-file", "/etc", ".", "one/../../outside", "a\0b"])
def test_no_path_leads_out_of_the_root(path: str, live: Live, root: Path) -> None:
    body = {"lora_name": "x", "lora_path": path, "model": "base"}
    assert refused(live, "/v1/load_lora_adapter", body, 400, "lora_path").startswith("lora_path must lie below")
    absent = {**body, "lora_path": f"{root}-absent"}
    assert refused(live, "/v1/load_lora_adapter", absent, 400, "lora_path").startswith("lora_path must lie below")


@pytest.mark.parametrize("name", ["a\nb", "a\0b", "\x1b[31mred", "a\u202eb", " a", "a:b", "base"])
def test_names_that_cannot_be(name: str, live: Live) -> None:
    """They would be lines of the log, colours of a terminal, addresses that no route has."""
    body = {"lora_name": name, "lora_path": "two", "model": "base"}
    refused(live, "/v1/load_lora_adapter", body, 400, "lora_name")


@pytest.mark.parametrize("name", ["a/b", "../x", "日本語 🎉", 'q"\\', "x" * 256, "none", "a%2Fb"])
def test_names_that_can_be(name: str, live: Live) -> None:
    two = text(live, model=load(live, name, "two")["id"])
    assert text(live, model="base", lora=name) == two == text(live, model=f"base:{name}")
    assert live.get(f"/v1/models/{quote(name, safe='')}").json()["id"] == name
    assert live.metric("lora_requests_total", model_name="base", lora_name=name) == 3
    assert live.post("/v1/unload_lora_adapter", {"lora_name": name}).status_code == 200


def test_an_adapter_whose_numbers_overflow_fails_alone_and_by_name(live: Live, root: Path) -> None:
    huge = root / "huge"
    huge.mkdir(exist_ok=True)
    (huge / "adapter_config.json").write_bytes((root / "one" / "adapter_config.json").read_bytes())
    tensors = load_file(root / "one" / "adapter_model.safetensors")
    save_file({name: torch.full_like(t, 3e38) for name, t in tensors.items()}, huge / "adapter_model.safetensors")
    load(live, "huge", "huge")
    one, plain = text(live, model="one"), text(live, model="base")
    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(live.post, "/v1/completions", {**ASK, "model": "huge"}) for _ in range(3)]
        beside = [pool.submit(text, live, model=name) for name in ("one", "base") * 3]
        assert [each.result() for each in beside] == [one, plain] * 3
        for each in asked:
            error = each.result().json()["error"]
            assert (each.result().status_code, error["param"]) == (500, "lora")
            assert "its adapter 'huge' gave logits that are not finite" in error["message"]


def test_bad_directories_are_refused_by_name(live: Live, root: Path) -> None:
    def tell(name: str, **config: Any) -> str:
        body = {"lora_name": "bad", "lora_path": name, "model": config.pop("model", "base")}
        reply = live.post("/v1/load_lora_adapter", body)
        assert reply.status_code == 400, reply.text
        message: str = reply.json()["error"]["message"]
        return message

    def copy(name: str) -> Path:
        target = root / name
        target.mkdir(exist_ok=True)
        for file in (root / "one").iterdir():
            (target / file.name).write_bytes(file.read_bytes())
        return target

    assert "no directory" in tell("absent")
    assert "canvas" in tell("one", model="canvas") or "layers" in tell("one", model="canvas")
    (copy("no-config") / "adapter_config.json").unlink()
    assert "adapter_config.json" in tell("no-config")
    weights = copy("pickled") / "adapter_model.safetensors"
    weights.rename(weights.with_name("adapter_model.bin"))
    assert "pickle" in tell("pickled")
    weights = copy("nan") / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name] * float("nan")}, weights)
    assert name in tell("nan")
    weights = copy("shape") / "adapter_model.safetensors"
    save_file({**tensors, name: tensors[name][:, :-1].contiguous()}, weights)
    assert name in tell("shape")
    config = copy("other") / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_bdlora": True}))
    assert "use_bdlora" in tell("other")
    write_strong(root / "rank", base(random_engine("llama")), 3, rank=600)
    assert "600" in tell("rank")
    assert [named.name for named in live.serving.shelf._models["base"].named()] == ["one"]


def test_loading_is_off_unless_it_was_allowed(root: Path) -> None:
    with serving({"base": random_engine("llama")}, lora_modules=(f"one={root / 'one'}",)) as live:
        body = {"lora_name": "x", "lora_path": "two"}
        assert "--enable-lora" in refused(live, "/v1/load_lora_adapter", body, 400, None)
        refused(live, "/v1/unload_lora_adapter", {"lora_name": "one"}, 400, None)
        assert text(live) != text(live, model="one")


def test_metrics_tell_adapters_apart(live: Live) -> None:
    text(live, model="base")
    text(live, model="one")
    assert live.metric("lora_requests_total", model_name="base", lora_name="one") == 1
    assert live.metric("lora_generation_tokens_total", model_name="base", lora_name="one") == 6
    info = [line for line in live.get("/metrics").text.splitlines() if line.startswith("dfastllm_lora_requests_info{")]
    assert len(info) == 1
    assert 'max_lora="64"' in info[0]


def test_what_was_loaded_at_run_time_is_there_after_a_restart(live: Live, root: Path) -> None:
    load(live, "kept", "two")
    load(live, "changed", "three")
    load(live, "forgotten", "three")
    live.post("/v1/unload_lora_adapter", {"lora_name": "forgotten"})
    two = text(live, model="kept")
    settings = {"enable_lora": True, "lora_root": str(root)}
    three = root / "three" / "adapter_model.safetensors"
    before = three.read_bytes()
    save_file({name: tensor * 1.5 for name, tensor in load_file(three).items()}, three)
    try:
        with serving({"base": random_engine("llama")}, **settings) as again:
            assert text(again, model="kept") == two
            refused(again, "/v1/completions", {**ASK, "model": "changed"}, 404, "model")
            refused(again, "/v1/completions", {**ASK, "model": "forgotten"}, 404, "model")
    finally:
        three.write_bytes(before)
    with serving({"base": random_engine("llama")}, **settings) as again:
        assert text(again, model="changed") != two  # what hindered it then is over


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        ({"lora_root": "."}, "lora_root"),
        ({"lora_root": "/absent", "enable_lora": True}, "lora_root"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], param: str) -> None:
    with pytest.raises(ValidationError) as error:
        Shelf(Settings(**settings))
    assert error.value.param == param


@pytest.mark.parametrize("module", ["one", "=x", "one=", "none:one=x"])
def test_modules_that_cannot_be(module: str) -> None:
    with pytest.raises(ValidationError) as error:
        Shelf(Settings(lora_modules=(module,))).open({"base": random_engine("llama")})
    assert error.value.param == "lora_modules"


def test_a_name_is_one_thing(root: Path) -> None:
    engines = {"base": random_engine("llama"), "twin": random_engine("llama")}
    shelf = Shelf(Settings(lora_modules=(f"base:one={root / 'one'}", f"twin:one={root / 'two'}")))
    shelf.open(engines)
    assert [name for name, _, _ in shelf.named()] == ["base:one", "twin:one"]
    assert shelf.find("twin:one") == ("twin", "one")
    with pytest.raises(ValidationError, match="base:one, twin:one"):
        shelf.find("one")
    with pytest.raises(ValidationError, match="name of a model"):
        Shelf(Settings(lora_modules=(f"base:twin={root / 'one'}",))).open(engines)


def test_a_list_of_adapters_that_is_damaged_is_told(root: Path, tmp_path: Path) -> None:
    (tmp_path / STATE).write_text("{")
    shelf = Shelf(Settings(enable_lora=True, lora_root=str(tmp_path)))
    with pytest.raises(AdapterError, match=STATE):
        shelf.open({"base": random_engine("llama")})


def test_more_adapters_than_places_are_served_one_after_the_other(root: Path) -> None:
    modules = tuple(f"{name}={root / name}" for name in ("one", "two", "three"))
    engine = random_engine("llama", max_loras=1)
    assert dataclasses.asdict(engine.config)["max_loras"] == 1
    with serving({"base": engine}, lora_modules=modules) as live:
        first = [text(live, model=name) for name in ("one", "two", "three")]
        assert [text(live, model=name) for name in ("one", "two", "three")] == first
        assert len(set(first)) == 3
        assert engine.adapters.evictions >= 5
