"""The demo models' tokenizer: byte-level BPE trained on the task mix, with a chat template. Any UTF-8 round-trips.

Writes the two files of the Hugging Face convention (tokenizer.json, tokenizer_config.json). Reading them back, and
rendering the template, is the text room's work.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from dfastllm.tasks import Sample, draw

__all__ = ["CHAT_TEMPLATE", "MAX_LEN", "PLAIN", "SPECIAL", "VOCAB_SIZE", "train_tokenizer"]

VOCAB_SIZE = 1280
MAX_LEN = 512  # positions a demo model is configured for
SPECIAL = {
    "pad_token": "<|pad|>",
    "bos_token": "<|bos|>",
    "eos_token": "<|end|>",
    "mask_token": "<|mask|>",
}
ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
PLAIN = ("<tool_call>", "</tool_call>")  # one token each, but shown in decoded text

# Words carry the space before them; every digit is a token of its own, so that numbers have one spelling.
WORDS = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"

# Tools are shown as signatures: a tenth of the tokens of their JSON schemas.
CHAT_TEMPLATE = """\
{%- macro signature(tool) -%}
{%- set f = tool.function if tool.function is defined else tool -%}
{%- set schema = f.parameters if f.parameters is defined and f.parameters else {} -%}
{{- f.name }}(
{%- for name, value in (schema.get('properties') or {}).items() -%}
{{- '' if loop.first else ', ' }}{{ name }}{{ '' if name in (schema.get('required') or []) else '?' }}: \
{{- ' ' }}{{ value.get('type', 'any') }}
{%- endfor -%}
)
{%- endmacro -%}
{{- bos_token -}}
{%- set ns = namespace(system='') -%}
{%- for message in messages if message.role == 'system' -%}
{%- set ns.system = ns.system ~ ('\\n' if ns.system else '') ~ message.content -%}
{%- endfor -%}
{%- if tools -%}
{%- set ns.system = ns.system ~ ('\\n' if ns.system else '') ~ 'Tools:' -%}
{%- for tool in tools -%}{%- set ns.system = ns.system ~ '\\n' ~ signature(tool) -%}{%- endfor -%}
{%- endif -%}
{%- if ns.system -%}{{- '<|system|>' ~ ns.system ~ '<|end|>' -}}{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{{- '<|user|>' ~ message.content ~ '<|end|>' -}}
{%- elif message.role == 'assistant' -%}
{{- '<|assistant|>' ~ (message.content or '') -}}
{%- for call in (message.tool_calls or []) -%}
{%- set f = call.function if call.function is defined else call -%}
{{- '<tool_call>{"name": "' ~ f.name ~ '", "arguments": ' -}}
{{- (f.arguments if f.arguments is string else f.arguments | tojson) ~ '}</tool_call>' -}}
{%- endfor -%}
{{- '<|end|>' -}}
{%- elif message.role == 'tool' -%}{{- '<|tool|>' ~ message.content ~ '<|end|>' -}}
{%- elif message.role != 'system' -%}{{- raise_exception('unknown role ' ~ message.role) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


def texts_of(sample: Sample) -> Iterator[str]:
    """Every text of a sample that a tokenizer should know: its turns, its tools' names, its answer."""
    for message in sample.messages:
        yield message["content"]
    for tool in sample.tools:
        function = tool["function"]
        arguments = ", ".join(f"{k}: {v['type']}" for k, v in function["parameters"]["properties"].items())
        yield f"{function['name']}({arguments})"
    yield sample.response


def train_tokenizer(out: Path, *, seed: int = 0, samples: int = 20_000, vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Train on the first `samples` of the training stream and write tokenizer.json and tokenizer_config.json to `out`.

    The same seed gives the same files. Returns the trained tokenizer.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [*SPECIAL.values(), *ROLES]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(PLAIN),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    stream = (text for i in range(samples) for text in texts_of(draw("train", seed, i)))
    tokenizer.train_from_iterator(stream, trainer)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in PLAIN])
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    added = {
        str(tokenizer.token_to_id(token)): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": token in special,
        }
        for token in (*special, *PLAIN)
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **SPECIAL,
        "additional_special_tokens": list(ROLES),
        "added_tokens_decoder": added,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_LEN,
        "chat_template": CHAT_TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    return tokenizer
