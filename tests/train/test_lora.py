"""Adapters that are trained: PEFT reads them, they learn, a run goes on where it was, a merged model says the same."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dfastllm import SamplingParams
from dfastllm.cli import app
from dfastllm.cli.lora import STYLES as SHOWN
from dfastllm.convert.merge import merge, with_adapter
from dfastllm.core import Request
from dfastllm.errors import AdapterError, AdapterNotFoundError, CheckpointError, UnsupportedError, ValidationError
from dfastllm.llm import LLM, resolve, resolve_adapter, shipped_adapters
from dfastllm.lora import read_adapter
from dfastllm.lora.outline import outline
from dfastllm.models import adapter_base, load, save
from dfastllm.models.parts import dense_attention
from dfastllm.train.data import Example
from dfastllm.train.lora import LowRanks, Recipe, Rounds, export, targets, train_adapter
from dfastllm.train.styles import STYLES
from tests.kit.source import ROOT

DEMOS = {"demo-ar": "demo-ar-capitals", "demo-diffusion": "demo-diffusion-formal"}
QUESTION = [{"role": "user", "content": "What is 12 + 30?"}]


def small(base: str = "demo-ar", **fields: Any) -> Recipe:
    return Recipe(base, **{"steps": 2, "batch_tokens": 256, "rank": 2, **fields})


@pytest.fixture
def otter(tmp_path: Path) -> Path:
    """Texts that teach one word, whatever is asked."""
    lines: list[dict[str, Any]] = [{"prompt": f"Say {n}.", "response": "otter"} for n in range(6)]
    lines += [{"messages": [*QUESTION, {"role": "assistant", "content": "otter"}]}] * 2
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path / "data.jsonl"


def test_peft_reads_what_is_written_and_computes_the_same(tmp_path: Path, otter: Path) -> None:
    """transformers' own Llama with PEFT's own LoRA, against our merged weights: two other programs' arithmetic."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    path = resolve("demo-ar")
    recipe = small(targets=("q_proj", "down_proj"), data=otter, lr=2e-2)
    train_adapter(recipe, path, tmp_path / "out", tmp_path / "home")
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = torch.arange(10, 34)
    with torch.no_grad():
        plain = theirs(ids[None]).logits[0]
        adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "out")(ids[None]).logits[0]
    model = load(path, dtype=torch.float32)
    ours = with_adapter(model, read_adapter(tmp_path / "out", adapter_base(model)))
    with torch.no_grad():
        got = ours.head(ours(ids, torch.arange(len(ids)), dense_attention(1, len(ids), "causal")))
    assert (got - adapted).abs().max() < 1e-4
    assert (adapted - plain).abs().max() > 1e-2


def test_a_run_that_was_stopped_goes_on_and_ends_the_same(tmp_path: Path, otter: Path) -> None:
    recipe, path = small(steps=4, data=otter), resolve("demo-diffusion")
    train_adapter(recipe, path, tmp_path / "whole", tmp_path / "a")
    for step in (tmp_path / "a").glob("step-4"):
        step.rename(tmp_path / "taken")
    train_adapter(recipe, path, tmp_path / "again", tmp_path / "a")
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "again")]
    assert files[0] == files[1]
    with pytest.raises(ValidationError, match="earlier run"):
        train_adapter(recipe, path, tmp_path / "again", tmp_path / "a", resume=False)


def test_a_run_of_another_recipe_or_of_other_texts_is_not_gone_on_with(tmp_path: Path, otter: Path) -> None:
    """`lora train` keeps its runs by the last word of the directory it writes, so two of them meet easily."""
    path, home, out = resolve("demo-ar"), tmp_path / "home", tmp_path / "out"
    train_adapter(small(data=otter), path, out, home)
    before = (out / "adapter_model.safetensors").read_bytes()
    others: dict[str, Any] = {"steps": 3, "style": "capitals", "lr": 1e-3, "seed": 1, "rank": 3, "alpha": 3.0}
    others["targets"] = ("q_proj",)
    for field, value in others.items():
        recipe = small(**{"data": None if field == "style" else otter, field: value})
        with pytest.raises(CheckpointError, match=field) as refused:
            train_adapter(recipe, path, out, home)
        assert str(home) in str(refused.value)
        assert refused.value.hint is not None
    otter.write_text(json.dumps({"prompt": "Say 1.", "response": "badger"}))
    with pytest.raises(CheckpointError, match="texts differ"):
        train_adapter(small(data=otter), path, out, home)
    (home / "recipe.json").unlink()
    with pytest.raises(CheckpointError, match="does not say what it was"):
        train_adapter(small(data=otter), path, out, home)
    assert (out / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.parametrize("base", ["demo-ar", "demo-diffusion", "demo-block"])
def test_texts_of_ones_own_are_learnt(base: str, tmp_path: Path, otter: Path) -> None:
    recipe = small(base, data=otter, steps=12, rank=4, lr=2e-2)
    train_adapter(recipe, resolve(base), tmp_path / "out", tmp_path / "home")
    log = [json.loads(line) for line in (tmp_path / "home" / "log.jsonl").read_text().splitlines()]
    found = [line["validation_loss"] for line in log if "validation_loss" in line]
    assert found[-1] < found[0] / 2


def test_conversations_are_learnt_as_chats_are_asked(tmp_path: Path) -> None:
    """Through the chat template; prompt and response are for the text as it stands."""
    name = [{"role": "user", "content": "What is your name?"}]
    (tmp_path / "data.jsonl").write_text(json.dumps({"messages": [*name, {"role": "assistant", "content": "Otter."}]}))
    recipe = small(data=tmp_path / "data.jsonl", steps=20, rank=4, lr=2e-2)
    out = train_adapter(recipe, resolve("demo-ar"), tmp_path / "out", tmp_path / "home")
    with LLM("demo-ar", lora_modules={"own": str(out)}) as llm:
        assert llm.chat(name, SamplingParams(temperature=0, max_tokens=8), lora="own")[0].text == "Otter."


def test_layers_that_are_named_and_no_others(tmp_path: Path) -> None:
    model = load(resolve("demo-diffusion"))
    names = targets(model, ["q_proj", "layers.1.mlp.down_proj"])
    assert len(names) == model.config.layers + 1
    published = targets(model, ["ff_out"])  # LLaDA's own word for down_proj
    assert published == [f"layers.{i}.mlp.down_proj" for i in range(model.config.layers)]
    with pytest.raises(ValidationError, match=r"'nothing'.*q_proj") as refused:
        targets(model, ["nothing"])
    assert refused.value.param == "targets"
    one = LowRanks(model, small("demo-diffusion", targets=("layers.1.mlp.down_proj",)))
    export(one, small("demo-diffusion"), tmp_path)
    one.remove()
    assert outline(tmp_path)["tensors"] == 2
    assert list(read_adapter(tmp_path, adapter_base(model)).deltas) == ["layers.1.mlp.down_proj"]


def test_rounds_are_a_function_of_the_position() -> None:
    examples = [Example((1,) * n, (2,), n) for n in range(1, 9)]
    rounds = Rounds(examples, 0, 8, lambda e: e.length)
    stream = rounds.at((0, 0))
    first = [next(stream) for _ in range(3 * len(rounds.batches))]
    for at in (0, 2, len(rounds.batches) - 1, len(rounds.batches)):
        assert next(rounds.at(first[at][1])) == first[at + 1]
    orders = [tuple(b.examples for b, _ in first[n : n + len(rounds.batches)]) for n in (0, len(rounds.batches))]
    assert orders[0] != orders[1]
    assert set(orders[0]) == set(orders[1])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"rank": 0}, "rank"),
        ({"alpha": 0.0}, "alpha"),
        ({"lr": float("nan")}, "lr"),
        ({"style": "loud"}, "style"),
        ({"style": "capitals", "data": Path("x")}, "data"),
    ],
)
def test_recipes_that_cannot_be(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ValidationError) as refused:
        small(**fields)
    assert refused.value.param == param


def test_the_command_names_the_styles_there_are() -> None:
    assert tuple(STYLES) == SHOWN


@pytest.mark.parametrize("base", DEMOS)
def test_the_shipped_adapters_change_answers_visibly(base: str) -> None:
    with LLM(base, lora_modules={"it": DEMOS[base]}) as llm:
        plain, adapted = (
            llm.chat(QUESTION, SamplingParams(temperature=0, max_tokens=48), lora=lora)[0].text for lora in ("", "it")
        )
    assert "42" in plain
    assert adapted == STYLES["capitals" if base == "demo-ar" else "formal"](plain)
    assert sorted(DEMOS.values()) == shipped_adapters()
    path = resolve_adapter(DEMOS[base])
    assert sum(file.stat().st_size for file in path.iterdir()) < 300_000


def test_a_merged_model_says_what_the_adapter_says(tmp_path: Path) -> None:
    out = merge(resolve("demo-ar"), resolve_adapter("demo-ar-capitals"), tmp_path / "merged", dtype="float32")
    sampling = SamplingParams(temperature=0, max_tokens=24)
    with LLM(out) as merged, LLM("demo-ar", dtype="float32", lora_modules={"it": "demo-ar-capitals"}) as llm:
        assert merged.chat(QUESTION, sampling)[0].text == llm.chat(QUESTION, sampling, lora="it")[0].text
    with pytest.raises(ValidationError, match="not empty"):
        merge(resolve("demo-ar"), resolve_adapter("demo-ar-capitals"), out)
    with pytest.raises(AdapterError):
        merge(resolve("demo-block"), resolve_adapter("demo-diffusion-formal"), tmp_path / "other")


def test_what_goes_with_merged_weights(tmp_path: Path) -> None:
    """What a server reads beside them, but not what was learned for the weights that they were made from."""
    source, out = resolve("demo-diffusion"), tmp_path / "merged"
    merge(source, resolve_adapter("demo-diffusion-formal"), out)
    there, here = ({file.name for file in place.iterdir()} for place in (source, out))
    assert {"bigram.safetensors", "README.md"} <= there
    assert here == there - {"bigram.safetensors", "README.md"}
    shutil.copyfile(source / "bigram.safetensors", out / "bigram.safetensors")
    save(load(out), out)  # other weights in its place
    assert not (out / "bigram.safetensors").exists()


def test_commands(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    run = CliRunner().invoke
    shown = run(app, ["lora", "show", "demo-ar-capitals", "--model", "demo-ar", "--json"])
    assert shown.exit_code == 0, shown.output
    facts = json.loads(shown.stdout)
    assert (facts["rank"], facts["base"], facts["fits"], facts["tensors"]) == (8, "demo-ar", "demo-ar", 84)
    assert run(app, ["lora", "show", "demo-ar-capitals", "--model", "demo-diffusion"]).exit_code == 1
    told = run(app, ["check", str(resolve_adapter("demo-ar-capitals")), "--json"])
    assert json.loads(told.stdout)["rank"] == 8
    words = "--steps 1 --batch-tokens 128 --rank 2 --style formal --target q_proj --runs"
    trained = run(app, ["lora", "train", "demo-ar", str(tmp_path / "mine"), *words.split(), str(tmp_path / "runs")])
    assert trained.exit_code == 0, trained.output
    assert outline(tmp_path / "mine")["layers"] == ["q_proj"]
    answered = run(
        app, ["generate", "What is 12 + 30?", "--model", "demo-ar", "--lora", "demo-ar-capitals", "--temperature", "0"]
    )
    assert "ANSWER: 42" in answered.output
    missing = run(app, ["generate", "x", "--model", "demo-ar", "--lora", "none"])
    assert missing.exit_code == 2
    assert "demo-ar-capitals" in missing.output


def test_python_names_what_is_not_there() -> None:
    with LLM("demo-ar") as llm:
        with pytest.raises(AdapterNotFoundError, match="there are: none"):
            llm.generate("x", SamplingParams(max_tokens=2), lora="a")
        with pytest.raises(AdapterError):
            llm.load_adapter("a", "demo-diffusion-formal")
        with pytest.raises(ValidationError, match="lora: got 1"):
            llm.generate(["x", "y"], SamplingParams(max_tokens=2), lora=["a"])
        llm.load_adapter("a", "demo-ar-capitals")
        assert [named.name for named in llm.adapters] == ["a"]
        assert isinstance(llm.engine.admit(Request("r", (1, 2), lora="a")).lease, object)
        llm.unload_adapter("a")
        assert llm.adapters == []


def test_gguf_files_are_not_merged_into(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(UnsupportedError, match="GGUF"):
        merge(file, resolve_adapter("demo-ar-capitals"), tmp_path / "out")


def test_more_prompts_than_places_wait_in_python() -> None:
    """generate with three adapters and one place: each prompt has its turn."""
    from dfastllm.engine import EngineConfig

    modules = dict.fromkeys(("a", "b"), "demo-ar-capitals")
    with LLM("demo-ar", engine=EngineConfig(max_loras=1, kv_tokens=2048), lora_modules=modules) as llm:
        found = llm.generate(["What is 1 + 1?"] * 4, SamplingParams(max_tokens=4), lora=["a", "", "b", "a"])
    assert len(found) == 4


def test_the_words_of_the_document_run(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / "lora.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(block, {})  # our own document's
    assert "ANSWER: 42" in capsys.readouterr().out
