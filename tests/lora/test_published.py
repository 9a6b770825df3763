"""PEFT on transformers' own classes, saved by PEFT itself: their names, tied heads and experts, as users have them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.kit.adapters import pack, step_of

from dfastllm.engine.runners.native import NativeRunner
from dfastllm.engine.runners.torch import TorchRunner
from dfastllm.lora import read_adapter
from dfastllm.models import adapter_base, load

pytestmark = pytest.mark.filterwarnings("ignore")
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MOE = {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
TIED = {"tie_word_embeddings": True}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama, dora": ("Llama", {}, {"target_modules": "all-linear", "use_dora": True}),
    "qwen2, biases": ("Qwen2", {}, {"target_modules": "all-linear", "bias": "all"}),
    "phi3": ("Phi3", {}, {"target_modules": "all-linear"}),
    "a tied head, the embedding adapted": ("Llama", TIED, {"target_modules": ["embed_tokens", "q_proj"]}),
    "both tied": ("Llama", TIED, {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}),
    "a tied head, both saved": (
        "Llama",
        TIED,
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "both tied and saved": (
        "Llama",
        TIED,
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "a scaled embedding": ("Gemma3", {}, {"target_modules": ["q_proj", "embed_tokens"]}),
    "experts": (
        "Qwen3Moe",
        MOE,
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
    "a router": (
        "Qwen3Moe",
        {**MOE, "num_experts": 6},
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.gate.weight"]},
    ),
    "a router beside its experts": (
        "Qwen3Moe",
        MOE,
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_as_peft_on_the_published_class(case: str, tmp_path: Path) -> None:
    import transformers
    from peft import LoraConfig, get_peft_model

    name, shape, settings = CASES[case]
    config = getattr(transformers, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")(**SHAPE, **shape)
    torch.manual_seed(0)
    ids = [5, 9, 11, 3, 17, 2, 8]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
        model.save_pretrained(tmp_path / "base")
        plain = model(torch.tensor([ids])).logits[0].float()
        made = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, **settings))
        for parameter_name, parameter in made.named_parameters():
            if parameter.requires_grad and "magnitude" not in parameter_name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        made.save_pretrained(str(tmp_path / "adapter"))
        expected = made.eval()(torch.tensor([ids])).logits[0].float()
    base = load(tmp_path / "base", dtype="float32")
    adapter = read_adapter(tmp_path / "adapter", adapter_base(base))
    runners: list[Any] = [
        TorchRunner(base, 64, torch.float32, "cpu", 16, 16),
        NativeRunner(pack(base), 64, torch.float32, 16),
    ]
    moved = float((expected - plain).abs().max())
    for runner in runners:
        runner.adapters([None, adapter])
        off = float((runner.run(step_of([ids], [1])).logits() - expected).abs().max())
        assert off <= min(1e-5, moved / 100)
