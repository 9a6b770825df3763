"""The server of golden transcripts and of examples: two demo models, tenants, adapters, pipelines."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clients.golden.transcripts import ADMIN, KEY, LIMITED, PIPELINE
from tests.kit.live import Live, serving

__all__ = ["MODELS", "Platform", "golden_server", "write_adapter"]

MODELS = ("demo-ar", "demo-diffusion")
RANK = 4


@dataclass(frozen=True)
class Platform:
    """keys: the keys of this run by the names that transcripts have for them. adapter: a PEFT directory of demo-ar."""

    live: Live
    keys: Mapping[str, str]
    adapter: Path


@contextmanager
def golden_server(folder: Path) -> Iterator[Platform]:
    """Serve until the block ends. folder: empty, for the database and the adapter."""
    from dfastllm.engine import EngineConfig
    from dfastllm.llm import load_engine
    from dfastllm.tenants.store import Store

    file, adapter = folder / "tenants.db", write_adapter(folder / "adapters" / "example")
    store = Store(str(file), create=True)
    store.create_tenant("golden", actor="cli:golden")
    for name in LIMITED:
        store.create_tenant(f"limited-{name}", actor="cli:golden", requests_per_minute=1)

    def key(tenant: str, *scopes: str) -> str:
        return store.create_key(tenant, actor="cli:golden", scopes=scopes)[1]

    keys = {
        KEY: key("golden", "generate", "pipelines", "usage", "adapters", "metrics"),
        **{LIMITED[name]: key(f"limited-{name}", "generate") for name in LIMITED},
        ADMIN: key("golden", "admin"),
    }
    settings: dict[str, Any] = {"tenants_db": str(file), "enable_lora": True, "lora_root": str(adapter.parent)}
    engines = {name: load_engine(name, config=EngineConfig(kv_tokens=16384)) for name in MODELS}
    with serving(engines, **settings) as live:
        authorized = {"Authorization": f"Bearer {keys[KEY]}"}
        assert live.post("/v1/pipelines", PIPELINE, headers=authorized).status_code == 200
        yield Platform(live, keys, adapter)
    store.close()


def write_adapter(folder: Path) -> Path:
    """A LoRA adapter of demo-ar that nobody trained: it only changes what is said."""
    import torch
    from safetensors.torch import save_file

    from dfastllm.llm import resolve

    config = json.loads((resolve("demo-ar") / "config.json").read_text(encoding="utf-8"))
    width, layers = config["hidden_size"], config["num_hidden_layers"]
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for layer in range(layers):
        for name in ("q_proj", "v_proj"):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(RANK, width, generator=generator) * width**-0.5
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(width, RANK, generator=generator) * 0.5
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["q_proj", "v_proj"]}
    about |= {"base_model_name_or_path": "demo-ar", "task_type": "CAUSAL_LM", "bias": "none", "lora_dropout": 0.0}
    (folder / "adapter_config.json").write_text(json.dumps(about), encoding="utf-8")
    return folder
