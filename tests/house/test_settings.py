"""One settings table: documented, honoured, and the same on the command line, in the environment and in Python."""

from __future__ import annotations

import ast
from typing import Any

import pytest

from dfastllm import settings
from dfastllm.errors import ValidationError
from dfastllm.settings import SETTINGS, Setting, Settings, reference, unknown_variables
from tests.kit.source import ROOT, modules

BY_NAME = {setting.name: setting for setting in SETTINGS}
# A value for each setting that differs from its default, as text, and the same typed.
OTHER: dict[str, tuple[str, object]] = {
    "host": ("0.0.0.0", "0.0.0.0"),
    "port": ("9000", 9000),
    "uds": ("/run/x.sock", "/run/x.sock"),
    "uds_mode": ("660", "660"),
    "allowed_hosts": ("a.example,*.b.example", ("a.example", "*.b.example")),
    "max_connections": ("7", 7),
    "websocket_connections": ("9", 9),
    "websocket_calls": ("8", 8),
    "websocket_auth_timeout": ("1.5", 1.5),
    "websocket_ping_interval": ("5.5", 5.5),
    "header_timeout": ("1.5", 1.5),
    "body_timeout": ("2.5", 2.5),
    "write_timeout": ("3.5", 3.5),
    "keep_alive_timeout": ("4.5", 4.5),
    "api_key": ("s3cret", "s3cret"),
    "tenants_db": ("tenants.db", "tenants.db"),
    "usage_journal": ("/run/usage.journal", "/run/usage.journal"),
    "usage_retention_days": ("7", 7),
    "allowed_origins": ("https://a.example,https://b.example", ("https://a.example", "https://b.example")),
    "max_body_bytes": ("4096", 4096),
    "max_body_values": ("2048", 2048),
    "max_tokenize_length": ("100", 100),
    "max_prompts": ("3", 3),
    "request_timeout": ("1.5", 1.5),
    "shutdown_timeout": ("0", 0.0),
    "pipelines": ("a.yaml,b.yaml", ("a.yaml", "b.yaml")),
    "record_prompts": ("/run/prompts.jsonl", "/run/prompts.jsonl"),
    "record_prompts_bytes": ("4096", 4096),
    "log_level": ("debug", "debug"),
    "model": ("demo-ar,demo-block", ("demo-ar", "demo-block")),
    "served_model_name": ("a,b", ("a", "b")),
    "device": ("cuda:1", "cuda:1"),
    "draft_model": ("demo-draft", "demo-draft"),
    "dtype": ("bfloat16", "bfloat16"),
    "threads": ("3", 3),
    "backend": ("torch", "torch"),
    "batch_invariant": ("1", True),
    "gpu_memory_utilization": ("0.5", 0.5),
    "speculative_config": ('{"method": "ngram"}', '{"method": "ngram"}'),
    "quantization": ("w4m", "w4m"),
    "kv_cache_dtype": ("int8", "int8"),
    "chat_template": ("x.jinja", "x.jinja"),
    "default_chat_template_kwargs": ('{"a": 1}', '{"a": 1}'),
    "chat_parse_special": ("true", True),
    "edits": ("yes", "yes"),
    "trained_block": ("8", 8),
    "lora_modules": ("a=x,b=y", ("a=x", "b=y")),
    "enable_lora": ("true", True),
    "lora_root": ("adapters", "adapters"),
    "max_loras": ("3", 3),
    "lora_memory": ("4096", 4096),
    "max_lora_rank": ("8", 8),
    "max_model_len": ("128", 128),
    "max_num_seqs": ("2", 2),
    "max_num_batched_tokens": ("99", 99),
    "min_num_batched_tokens": ("4", 4),
    "prefill_chunk": ("7", 7),
    "max_waiting": ("5", 5),
    "ageing_steps": ("0", 0),
    "enable_prefix_caching": ("false", False),
    "kv_cache_tokens": ("4096", 4096),
    "page_size": ("32", 32),
}
ALSO = {  # what some cannot be without
    "served_model_name": {"DFASTLLM_MODEL": "x,y"},
    "batch_invariant": {"DFASTLLM_DEVICE": "cuda"},
    "gpu_memory_utilization": {"DFASTLLM_DEVICE": "cuda"},
}
BAD = {
    int: ["x", "", "1.5", "-1"],
    float: ["x", "nan", "inf", "-1"],
    tuple: ["a,,b", ","],
    str: [""],
    bool: ["x", "", "2"],
}


def test_reference_is_fresh() -> None:
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert page == reference(), "stale: run `python -m dfastllm.settings > docs/settings.md`"


def test_every_setting_is_documented() -> None:
    for setting in SETTINGS:
        assert setting.help.endswith("."), setting.name
        assert f"`{setting.flag}`" in reference(), setting.name
        assert f"`{setting.variable}`" in reference(), setting.name


def test_every_setting_is_honoured() -> None:
    """Some code above settings reads `settings.NAME`; the engine's are passed on by engine_options."""
    read = set()
    for module in modules():
        if module.room in ("settings", "engine"):
            continue
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Attribute):
                owner = node.value
                name = owner.id if isinstance(owner, ast.Name) else getattr(owner, "attr", "")
                if name.endswith("settings"):
                    read.add(node.attr)
    wanted = {s.name for s in SETTINGS if not s.engine} | {"engine_options"}
    assert wanted - read == set(), "declared and read by nothing"


def test_engine_settings_are_the_engines() -> None:
    from dfastllm.engine.config import EngineConfig

    config = EngineConfig(**Settings().engine_options())
    assert config == EngineConfig(), "a default differs between settings and EngineConfig"
    assert set(Settings().engine_options()) == set(EngineConfig.__dataclass_fields__)


@pytest.mark.parametrize("name", OTHER)
def test_environment_and_python_agree(name: str) -> None:
    text, value = OTHER[name]
    also = ALSO.get(name, {})
    loaded = Settings.load(env={BY_NAME[name].variable: text, **also})
    assert getattr(loaded, name) == value != BY_NAME[name].default
    assert getattr(Settings.load({name: value}, env=also), name) == value


def test_the_table_above_is_complete() -> None:
    assert set(OTHER) == set(BY_NAME)


def test_precedence() -> None:
    env = {"DFASTLLM_PORT": "9000", "DFASTLLM_MAX_WAITING": ""}
    assert Settings.load(env=env).port == 9000
    assert Settings.load({"port": 7000}, env=env).port == 7000
    assert Settings.load({"port": None}, env=env).port == 9000
    assert Settings.load(env=env).max_waiting == Settings().max_waiting


@pytest.mark.parametrize(
    ("setting", "text"),
    [(s, text) for s in SETTINGS for text in BAD[s.type] if not (s.optional and text == "" and s.type is int)],
    ids=lambda v: v.name if isinstance(v, Setting) else repr(v),
)
def test_bad_values_are_named(setting: Setting, text: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Settings.load({setting.name: text}, env={})
    message = str(caught.value)
    assert caught.value.param == setting.name
    assert message.startswith(f"{setting.name} must be {setting.wanted}")
    assert f"(from {setting.flag})" in message
    assert ("not shown" if setting.secret else repr(text)) in message


def test_limits() -> None:
    """Each limit itself passes; a step beyond it does not."""
    for setting in SETTINGS:
        for limit, step in ((setting.minimum, -0.001), (setting.maximum, 0.001)):
            if limit is None:
                continue
            assert setting.parse(limit) == limit
            beyond = limit + step * (1 if setting.type is float else 1000)
            with pytest.raises(ValidationError):
                setting.parse(beyond)


def test_settings_that_contradict() -> None:
    with pytest.raises(ValidationError, match="served_model_name must name each model once"):
        Settings(model=("a",), served_model_name=("x", "y"))
    with pytest.raises(ValidationError, match="page_size must not exceed kv_cache_tokens"):
        Settings(page_size=64, kv_cache_tokens=32)
    with pytest.raises(ValidationError, match="Did you mean 'max_num_seqs'"):
        Settings.load({"max_seqs": 3}, env={})


def test_secrets_are_not_shown() -> None:
    assert "s3cret" not in repr(Settings(api_key="s3cret"))


def test_unknown_variables() -> None:
    env = {"DFASTLLM_PORT": "1", "DFASTLLM_PROT": "1", "OTHER": "x"}
    assert unknown_variables(env) == ["DFASTLLM_PROT"]


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"page_size": 8}, "page_size"),
        ({"page_size": 24, "backend": "native"}, "page_size"),
        ({"quantization": "w8", "backend": "torch"}, "quantization"),
        ({"quantization": "w8", "device": "cuda", "backend": "torch"}, "quantization"),
        ({"quantization": "w8", "device": "mps"}, "quantization"),
        ({"quantization": "fp8"}, "quantization"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype"),
        ({"page_size": 24, "device": "cuda"}, "page_size"),
        ({"gpu_memory_utilization": 0.5}, "gpu_memory_utilization"),
        ({"batch_invariant": True, "device": "mps"}, "batch_invariant"),
        ({"kv_cache_dtype": "int8", "backend": "torch"}, "kv_cache_dtype"),
        ({"kv_cache_dtype": "int8", "device": "mps"}, "kv_cache_dtype"),
    ],
)
def test_what_the_backend_cannot_do_is_told_before_anything_is_loaded(given: dict[str, Any], param: str) -> None:
    with pytest.raises(ValidationError) as raised:
        Settings(**given)
    assert raised.value.param == param
    assert raised.value.hint


def test_what_another_backend_can_do_is_taken() -> None:
    from dfastllm.kernels.step import BLOCK

    assert settings.BLOCK == BLOCK
    Settings(page_size=BLOCK * 3)
    Settings(page_size=8, backend="torch")
    Settings(page_size=8, device="mps")
    Settings(page_size=8, device="cuda", backend="torch")
    Settings(device="cuda", quantization="fp8", kv_cache_dtype="fp8", batch_invariant=True, gpu_memory_utilization=0.9)
    Settings(device="cuda:1", quantization="w4", kv_cache_dtype="int8")
    Settings(kv_cache_dtype="bfloat16", backend="torch")
