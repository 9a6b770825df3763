"""Autoregressive families against transformers, on tiny random checkpoints that transformers itself writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dfastllm import models
from dfastllm.errors import ModelLoadError

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 120,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 1000000.0, "factor": 4.0, "original_max_position_embeddings": 32}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16}
# longrope beyond the trained length: every text of the tests is longer than 8, so transformers takes the long factors.
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 8.0],
    "long_factor": [1.25, 2.0, 4.0, 6.0, 9.0, 30.0],
}
PHI = {"num_attention_heads": 3, "num_key_value_heads": 1}
HYBRID = {"sliding_window": 9, "num_hidden_layers": 5}
GRANITE = {"embedding_multiplier": 6.0, "residual_multiplier": 0.22, "attention_multiplier": 0.25}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-llama3-wide": (  # enough frequencies that some lie in the band between kept and stretched
        "Llama",
        {"head_dim": 64, "rope_parameters": {**LLAMA3, "rope_theta": 1e4, "original_max_position_embeddings": 128}},
    ),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("Llama", {"head_dim": 12}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 24, "head_dim": 16}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    "qwen3-window": (
        "Qwen3",
        {"head_dim": 16, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
    ),
    "qwen2": ("Qwen2", {}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3-tied-yarn": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True, "rope_parameters": YARN}),
    "qwen3-yarn-tuned": (
        "Qwen3",
        {"head_dim": 16, "rope_parameters": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.3}},
    ),
    "qwen3-yarn-not-truncated": ("Qwen3", {"head_dim": 64, "rope_parameters": {**YARN, "truncate": False}}),
    "qwen3-yarn-mscale": (
        "Qwen3",
        {"head_dim": 16, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}},
    ),
    "qwen3-moe": (
        "Qwen3Moe",
        {
            "head_dim": 16,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
    "gemma2": ("Gemma2", {**GEMMA, "sliding_window": 16}),
    "gemma2-wide-window": ("Gemma2", {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma2-not-capped": ("Gemma2", {**GEMMA, "attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma3": ("Gemma3", {**GEMMA, "sliding_window": 16, "num_hidden_layers": 7}),
    "gemma3-linear": (
        "Gemma3",
        {
            **GEMMA,
            "sliding_window": 16,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "phi3": ("Phi3", {}),
    "phi3-window": ("Phi3", {"sliding_window": 16, "tie_word_embeddings": True}),
    "phi3-partial": ("Phi3", {**PHI, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.75}}),
    "phi3-longrope": ("Phi3", {**PHI, "rope_parameters": LONGROPE, "original_max_position_embeddings": 8}),
    "phi3-longrope-not-stretched": (
        "Phi3",
        {**PHI, "rope_parameters": LONGROPE, "original_max_position_embeddings": 256},
    ),
    "phi3-longrope-tuned": (
        "Phi3",
        {
            **PHI,
            "rope_parameters": {**LONGROPE, "attention_factor": 1.4, "factor": 16.0},
            "original_max_position_embeddings": 8,
        },
    ),
    "granite": ("Granite", {**GRANITE, "logits_scaling": 3.0}),
    "granite-biases": (
        "Granite",
        {**GRANITE, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "logits_scaling": 0.5},
    ),
    "granite-silent": ("Granite", {}),
    "olmo2": ("Olmo2", {}),
    "olmo2-biases": ("Olmo2", {"attention_bias": True, "tie_word_embeddings": True}),
    "olmo2-yarn": ("Olmo2", {"rope_parameters": YARN}),
    "olmo3": ("Olmo3", {"sliding_window": 16, "num_hidden_layers": 5}),
    "olmo3-yarn": (
        "Olmo3",
        {
            "sliding_window": 9,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": YARN,
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e4},
            },
        },
    ),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 5}),
    "smollm3-yarn": ("SmolLM3", {"no_rope_layer_interval": 2, "rope_parameters": YARN, "use_sliding_window": False}),
    "smollm3-window": (
        "SmolLM3",
        {
            **HYBRID,
            "use_sliding_window": True,
            "no_rope_layers": [1, 0, 1, 0, 1],
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": False,
        },
    ),
    "smollm3-window-with-positions": (
        "SmolLM3",
        {
            "use_sliding_window": True,
            "sliding_window": 9,
            "no_rope_layer_interval": 3,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        },
    ),
    "seed-oss": ("SeedOss", {"head_dim": 12}),
    "seed-oss-other-biases": (
        "SeedOss",
        {"head_dim": 16, "attention_bias": False, "attention_out_bias": True, "mlp_bias": True},
    ),
    "exaone": ("Exaone", {"rope_parameters": LLAMA3}),
    "exaone-tied": ("Exaone", {"tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
    "exaone4": ("Exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 3}),
    "exaone4-hybrid": ("Exaone4", {**HYBRID, "rope_parameters": LLAMA3}),
    "exaone4-windows-only": (
        "Exaone4",
        {"sliding_window": 9, "layer_types": ["sliding_attention"] * 3, "tie_word_embeddings": True},
    ),
    "exaone4-no-positions": ("Exaone4", {"sliding_window": 9, "layer_types": ["full_attention"] * 3}),
    "mistral-small": (
        "Mistral",
        {"sliding_window": None, "head_dim": 12, "rope_parameters": {"rope_type": "default", "rope_theta": 1e8}},
    ),
    "mistral3": ("Mistral3", {"sliding_window": None, "head_dim": 12}),
}
# Which of the families that transformers has are not covered by plain forwards of their own (test_parity_plain).
FAMILIES = {"Llama": "llama", "Mistral": "mistral", "Qwen2": "qwen2", "Qwen3": "qwen3", "Qwen3Moe": "qwen3_moe"}
FAMILIES |= {"Gemma2": "gemma2", "Gemma3": "gemma3"}
FAMILIES |= {"Phi3": "phi3", "Granite": "granite", "Olmo2": "olmo2", "Olmo3": "olmo2"}
FAMILIES |= {"SmolLM3": "smollm3", "SeedOss": "seed_oss", "Exaone4": "exaone4", "Mistral3": "mistral3"}
FAMILIES |= {"Exaone": "exaone"}  # whose class transformers has not; it is Llama's computation under other names
# Those that are written here for transformers to read.
SAVED = sorted(set(FAMILIES.values()) - {"qwen3_moe", "mistral3", "exaone"})


def test_every_family_has_a_case() -> None:
    """A family that is registered is compared with transformers here or with a plain forward there."""
    from tests.models.test_parity_plain import CASES as PLAIN

    plain = {case[0]()[0]["architectures"][0] for case in PLAIN.values()}
    here = {FAMILIES[kind] for kind, _ in CASES.values()}
    there = {name for name, family in models.FAMILIES.items() if plain & set(family.architectures)}
    assert here | there == set(models.FAMILIES)


def _published(case: str, directory: Path) -> Any:
    """A random model of transformers, also written to the directory."""
    kind, extra = CASES[case]
    torch.manual_seed(sum(map(ord, case)))
    if kind == "Mistral3":
        model = _with_vision(extra).eval()
    else:
        name = {"Gemma3": "Gemma3Text", "Exaone": "Llama"}.get(kind, kind)
        config = getattr(transformers, f"{name}Config")(**{**SMALL, **extra}, attn_implementation="eager")
        name = {"Exaone": "Llama"}.get(kind, kind)
        model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():  # biases and norms start at constants that would hide mistakes
        if parameter.ndim == 1:
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter) * 0.2)
        assert name
    model.save_pretrained(directory)
    if kind == "Exaone":
        _as_exaone(directory)
    return model


def _with_vision(fields: dict[str, Any]) -> Any:
    """A model that also sees pictures, of which the text part counts here."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Mistral3Config(
        text_config=transformers.MistralConfig(**{**SMALL, **fields}),
        vision_config=transformers.PixtralVisionConfig(**sizes),
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    return transformers.Mistral3ForConditionalGeneration(config)


def _as_exaone(directory: Path) -> None:
    """Llama's files under the names of EXAONE 3.5's."""
    raw = json.loads((directory / "config.json").read_text())
    fields = {"num_hidden_layers": "num_layers", "rms_norm_eps": "layer_norm_epsilon"}
    fields |= {"hidden_act": "activation_function", "attention_bias": "", "mlp_bias": ""}
    raw = {fields.get(name, name): value for name, value in raw.items()}
    raw |= {"architectures": ["ExaoneForCausalLM"], "model_type": "exaone"}
    (directory / "config.json").write_text(json.dumps({name: value for name, value in raw.items() if name}))
    words = [("model.layers.", "transformer.h."), ("embed_tokens", "wte"), ("model.", "transformer.")]
    words += [("self_attn.o_proj", "self_attn.out_proj"), ("self_attn", "attn.attention"), ("input_layernorm", "ln_1")]
    words += [("post_attention_layernorm", "ln_2"), (".norm.", ".ln_f."), ("gate_proj", "c_fc_0")]
    words += [("up_proj", "c_fc_1"), ("down_proj", "c_proj")]
    weights = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        for one, other in words:
            name = name.replace(one, other)
        weights[name] = tensor
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def _greedy(model: models.Decoder, ids: list[int], count: int) -> list[int]:
    for _ in range(count):
        attend = models.dense_attention(1, len(ids), "causal")
        hidden = model(torch.tensor(ids), torch.arange(len(ids)), attend)
        ids = [*ids, int(model.head(hidden[-1:]).argmax())]
    return ids


@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_tokens(case: str, tmp_path: Path) -> None:
    theirs = _published(case, tmp_path)
    ours = models.load(tmp_path)
    ids = torch.randint(3, 120, (2, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = theirs(ids).logits
        positions = torch.arange(60).repeat(2)
        got = ours.head(ours(ids.flatten(), positions, models.dense_attention(2, 60, "causal"))).view(2, 60, -1)
        tokens = theirs.generate(ids[:1, :20], max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert wanted.std() > 0.3
    assert (got - wanted).abs().max() <= 1e-4
    assert _greedy(ours, ids[0, :20].tolist(), 20) == tokens[0].tolist()


@pytest.mark.parametrize("case", ["llama-llama3", "llama-linear", "qwen3-tied-yarn", "qwen3-yarn-mscale", "qwen2"])
def test_config_fields_of_transformers_4(case: str, tmp_path: Path) -> None:
    """`rope_theta` and `rope_scaling` beside each other mean what `rope_parameters` means."""
    _published(case, tmp_path)
    file = tmp_path / "config.json"
    raw = json.loads(file.read_text())
    now = models.load(tmp_path).config
    rope = raw.pop("rope_parameters")
    raw["rope_theta"] = rope.pop("rope_theta")
    raw["rope_scaling"] = None if rope == {"rope_type": "default"} else {**rope, "type": rope["rope_type"]}
    file.write_text(json.dumps(raw))
    assert models.load(tmp_path).config == now


def test_config_fields_of_olmo3_as_published(tmp_path: Path) -> None:
    """One `rope_theta` for all layers, a `rope_scaling` of those without a window; silence means every fourth layer."""
    _published("olmo3", tmp_path)
    file = tmp_path / "config.json"
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    raw = {**json.loads(file.read_text()), "rope_theta": 500000, "rope_scaling": scaling}
    del raw["rope_parameters"], raw["layer_types"]
    file.write_text(json.dumps(raw))
    config = models.load(tmp_path).config
    assert (config.window, config.windowed) == (16, (True, True, True, False, True))
    assert (config.rope_theta, config.local_theta) == (500000.0, 500000.0)
    assert config.rope_scaling == models.RopeScaling("yarn", 4.0, 32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    ids = torch.randint(3, 120, (1, 40), generator=torch.Generator().manual_seed(2))
    ours = models.load(tmp_path)
    with torch.no_grad():
        got = ours.head(ours(ids[0], torch.arange(40), models.dense_attention(1, 40, "causal")))
        assert (got - theirs(ids).logits[0]).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("case", "changes", "said"),
    [
        ("granite", {"attention_multiplier": 0.0}, "attention_multiplier must be greater than 0, got 0"),
        ("granite", {"logits_scaling": -8}, "logits_scaling must be greater than 0, got -8"),
        ("granite", {"residual_multiplier": "0.22"}, "'residual_multiplier' must be float"),
        ("olmo3", {"sliding_window": 0}, "sliding_window must be at least 1, or null for none, got 0"),
        ("olmo3", {"layer_types": ["full_attention"]}, "layer_types must be 5 times one of"),
        (
            "olmo3",
            {"rope_parameters": {"sliding_attention": {"rope_type": "yarn"}}},
            "sliding_attention: rope_type='yarn' is not supported",
        ),
        ("olmo2", {"rope_parameters": {"rope_type": "spiral"}}, "rope_type 'spiral' is not supported"),
        ("olmo2", {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
    ],
)
def test_fields_that_are_refused(case: str, changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    _published(case, tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, **changes}))
    with pytest.raises(ModelLoadError, match=said):
        models.load(tmp_path)


def test_our_files_load_in_transformers(tmp_path: Path) -> None:
    """What `save` writes is what transformers reads: same logits."""
    for family in SAVED:
        ours = models.tiny(family, seed=3, max_len=64)
        models.save(ours, tmp_path / family)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / family, attn_implementation="eager"
        ).eval()
        ids = torch.randint(0, 90, (1, 40), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            wanted = theirs(ids).logits[0]
            got = ours.head(ours(ids[0], torch.arange(40), models.dense_attention(1, 40, "causal")))
        assert (got - wanted).abs().max() <= 1e-4, family


def test_unused_sliding_window(tmp_path: Path) -> None:
    _published("qwen2", tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    del raw["layer_types"]
    for used, window in ((False, 0), (True, 8)):
        config = {**raw, "sliding_window": 8, "use_sliding_window": used, "max_window_layers": 1}
        (tmp_path / "config.json").write_text(json.dumps(config))
        read = models.load(tmp_path).config
        assert (read.window, read.windowed, read.max_len) == (window, (False, True, True) if used else (), 256)


@pytest.mark.parametrize("window", [0, -4])
def test_a_window_of_nothing(window: int, tmp_path: Path) -> None:
    _published("mistral", tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, "sliding_window": window}))
    with pytest.raises(ModelLoadError, match=f"sliding_window must be at least 1, or null for none, got {window}"):
        models.load(tmp_path)


def test_a_window_under_other_attention_than_causal() -> None:
    config = replace(models.tiny_config("sdar"), window=8)
    with pytest.raises(ModelLoadError, match="sdar: a sliding window of 8 is computed for autoregressive models only"):
        models.describe("sdar", config, models.Ids(mask=3))
