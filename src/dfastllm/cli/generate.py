"""`dfastllm generate`: one prompt, one answer (or n of them)."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dfastllm.cli.options import DECODE, SAMPLING, decode_params, from_settings, sampling_params, takes
from dfastllm.cli.session import Lora
from dfastllm.errors import ValidationError
from dfastllm.settings import Settings

if TYPE_CHECKING:
    from dfastllm.llm import LLM, Completion

__all__ = ["generate"]


@takes(settings=from_settings(alone=True), sampling=SAMPLING, decode=DECODE)
def generate(
    prompt: Annotated[str, typer.Argument(help="The prompt; '-' reads it from standard input.")],
    model: Annotated[
        str, typer.Option(help="A name of `dfastllm list`, a directory, a GGUF file, or ORG/NAME of a hub.")
    ] = "demo-diffusion",
    draft: Annotated[str | None, typer.Option(help="A small autoregressive model, for --rule apd.")] = None,
    lora: Lora = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as it stands: no chat template.")] = False,
    system: Annotated[str, typer.Option(help="System message (with the chat template).")] = "",
    suffix: Annotated[str, typer.Option(help="Infill: generate what stands between prompt and suffix (--raw).")] = "",
    plain: Annotated[bool, typer.Option("--plain", help="No live canvas on a terminal.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result, usage included, as JSON.")] = False,
    *,
    settings: dict[str, Any],
    sampling: dict[str, Any],
    decode: dict[str, Any],
) -> None:
    """Answer a prompt.

    The prompt is sent as a user's message when the model has a chat template, unless --raw is given. On a terminal the
    canvas fills in before your eyes; elsewhere only the text is printed.
    """
    loaded = Settings.load(settings)
    params, decoding = sampling_params(sampling), decode_params(decode)
    if system and raw:
        raise ValidationError("--system needs the chat template; got it together with --raw.", param="system")
    if suffix and not raw:
        raise ValidationError("--suffix continues plain text: give --raw as well.", param="suffix")
    if params.logprobs is not None and not as_json:
        raise ValidationError("--logprobs are shown in JSON only: give --json as well.", param="logprobs")

    from dfastllm.cli.session import load_lora, open_model, run

    text = sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt  # `echo` and editors add that newline
    with open_model(model, loaded, draft) as llm:
        chosen = load_lora(llm, lora)
        ids = _encode(llm, text, system, raw=raw)
        if params.n > 1 or as_json:
            [result] = llm.generate([ids], params, decoding, suffixes=[suffix], lora=chosen)
            if as_json:
                typer.echo(json.dumps(_report(llm, len(ids), result.outputs), indent=2, ensure_ascii=False))
                return
            for completion in result.outputs:
                typer.echo(f"--- {completion.index + 1} of {params.n}", err=True)
                typer.echo(completion.text)
            return
        run(llm, ids, params, decoding, plain=plain, suffix=suffix, lora=chosen)


def _encode(llm: LLM, text: str, system: str, *, raw: bool) -> tuple[int, ...]:
    if raw:
        return llm.encode(text)
    if not llm.tokenizer.has_chat_template:
        if system:
            raise ValidationError(f"{llm.info.name} has no chat template for --system.", param="system")
        return llm.encode(text)
    messages = [{"role": "system", "content": system}] if system else []
    return llm.render([*messages, {"role": "user", "content": text}])


def _report(llm: LLM, prompt_tokens: int, outputs: tuple[Completion, ...]) -> dict[str, Any]:
    choices = []
    for one in outputs:
        choice = {
            "index": one.index,
            "text": one.text,
            "token_ids": list(one.token_ids),
            "finish_reason": str(one.finish_reason),
            "stop": one.stop,
            "usage": {**dataclasses.asdict(one.usage), "tokens_per_forward": one.usage.tokens_per_forward},
        }
        if one.logprobs:
            choice["logprobs"] = [dataclasses.asdict(logprob) for logprob in one.logprobs]
        choices.append(choice)
    return {"model": llm.info.name, "prompt_tokens": prompt_tokens, "choices": choices}
