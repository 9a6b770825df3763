"""What `generate` and `chat` share: opening a model, and running one request to its end on the screen."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from dfastllm.cli.canvas import Canvas, Screen, summary
from dfastllm.cli.output import console, printable
from dfastllm.core import DecodeParams, SamplingParams
from dfastllm.settings import Settings

if TYPE_CHECKING:
    from dfastllm.engine import Stream
    from dfastllm.llm import LLM

__all__ = ["Lora", "cancelled_by_interrupt", "load_lora", "open_model", "run"]

Lora = Annotated[
    str | None, typer.Option(help="A LoRA adapter to answer with: a PEFT directory or a shipped adapter's name.")
]


def open_model(model: str, settings: Settings, draft: str | None = None) -> LLM:
    """The model, and the draft model of rule apd if one is named, loaded as the settings say."""
    from dfastllm.hub import find_model

    find_model(model)  # what has to be fetched draws bars of its own
    with console(stderr=True).status(f"loading {model}"):
        from dfastllm.engine import EngineConfig
        from dfastllm.kernels import set_threads
        from dfastllm.llm import LLM, model_options

        set_threads(settings.threads)
        config = EngineConfig(**settings.engine_options())
        return LLM(model, **model_options(settings), engine=config, draft=draft)


def load_lora(llm: LLM, adapter: str | None) -> str:
    """The name under which the adapter was loaded, "" for none. Raises AdapterNotFoundError, AdapterError."""
    if adapter is None:
        return ""
    name = Path(adapter).resolve().name.replace(":", "-") or "adapter"
    return llm.load_adapter(name, adapter, replace=True).name


@contextmanager
def cancelled_by_interrupt(stream: Stream) -> Iterator[None]:
    """Ctrl-C cancels the stream, which then ends with CancelledError; a second one is a KeyboardInterrupt as usual, in
    case a step hangs. Outside the main thread, which alone may handle signals, ctrl-C stays what it was."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def cancel(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stream.cancel()

    before = signal.signal(signal.SIGINT, cancel)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def run(
    llm: LLM,
    prompt: str | Sequence[int],
    sampling: SamplingParams,
    decode: DecodeParams | None,
    *,
    plain: bool,
    suffix: str = "",
    lora: str = "",
) -> str:
    """Run one request; on a terminal show its canvas while it runs and then the text with a line about it, elsewhere
    (and where it is to be plain) print the text as it becomes final.

    Returns the text. Raises CancelledError after ctrl-C, once the engine has let go of the request.
    """
    canvas = Canvas(llm.tokenizer, frozenset(llm.info.eos_ids))
    out = console()
    live = out.is_terminal and not out.is_dumb_terminal and not plain
    if live and llm.info.kind != "ar":
        decode = replace(decode or DecodeParams(), provisional=True)
    stream = llm.submit(prompt, sampling, decode, suffix=suffix, lora=lora)
    try:
        with cancelled_by_interrupt(stream):
            if live:
                with Screen(out, canvas) as screen:
                    for event in stream:
                        canvas.absorb(event)
                        screen.show()
            else:
                for event in stream:
                    canvas.absorb(event)
                    out.file.write(printable(event.text) if out.is_terminal else event.text)
                    out.file.flush()
    finally:
        if not stream.done:
            stream.cancel()
    assert canvas.usage is not None, "a stream that ends without raising ends with a Finish"
    if live:
        out.print(printable(canvas.text), markup=False, soft_wrap=True)
        out.print(summary(canvas.usage), style="dim")
    else:
        typer.echo("")
    return canvas.text
