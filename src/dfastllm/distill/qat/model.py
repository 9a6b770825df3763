"""A float model made ready for quantisation-aware training: which matrices round, one switch for all of them, and what
they become at the end.

The modules take the place of the plain ones and keep their parameters, so names, checkpoints and optimizers are the
same with and without. Norms and biases stay float, as they are served; embedding and head round in the formats that
`dfastllm quantize` gives them. With its search for scales, too, what is exported is bit for bit what that command makes
of the trained float weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dfastllm.convert.quantise import Options
from dfastllm.distill.qat.export import write_quantised
from dfastllm.distill.qat.linear import QatEmbedding, QatHead, QatLinear, Rounding, Switch
from dfastllm.distill.qat.schedule import QatConfig
from dfastllm.errors import CheckpointError, ValidationError
from dfastllm.kernels.packed import QTensor
from dfastllm.models.checkpoint import quantisable
from dfastllm.models.decoder import Decoder
from dfastllm.models.family import find_family
from dfastllm.quant.checkpoint import QuantConfig
from dfastllm.quant.formats import require_divisible

__all__ = ["Qat", "prepare_qat"]


@dataclass(eq=False)
class Qat:
    """A prepared model. Made by `prepare_qat`; rounding is off at first.

    roundings: own parameter name -> how it is rounded, of every matrix that is.
    """

    model: Decoder
    config: QatConfig
    options: Options
    switch: Switch
    roundings: Mapping[str, Rounding]

    @property
    def enabled(self) -> bool:
        """Whether the model computes on rounded numbers now."""
        return self.switch.on

    def enable(self) -> None:
        self.switch.on = True

    def disable(self) -> None:
        """The plain float model again, to the bit."""
        self.switch.on = False
        for rounding in self.roundings.values():
            rounding.forget()

    def state(self) -> dict[str, Any]:
        """JSON for a checkpoint. Codes and scales follow from the weights and are not part of it."""
        return {
            "enabled": self.enabled,
            "format": self.options.format,
            "head": self.options.head_format,
            "search": self.options.search,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Raises CheckpointError for a state that is not one, or of other formats."""
        mine = self.state()
        if state.keys() != mine.keys() or not isinstance(state["enabled"], bool):
            raise CheckpointError(
                f"the checkpoint's state of quantisation-aware training is unreadable: {state!r:.200}."
            )
        for name in ("format", "head", "search"):
            if state[name] != mine[name]:
                raise CheckpointError(
                    f"the checkpoint was trained with {name} {state[name]!r}, now it is {mine[name]!r}.",
                    param=name,
                    hint="Resume with the same quant section, or start this run afresh.",
                )
        if state["enabled"]:
            self.enable()
        else:
            self.disable()

    def convert(self) -> dict[str, QTensor]:
        """Own parameter name -> what the weight is served as, on the CPU: the codes and scales that the last forward
        pass used, where the weights have not changed since. Raises CheckpointError naming a matrix with NaN or
        infinity."""
        parameters = dict(self.model.named_parameters())
        found = {name: rounding.quantise(parameters[name]) for name, rounding in self.roundings.items()}
        return {name: _on_cpu(weight) for name, weight in found.items()}

    def export(self, out: str | Path, files: Iterable[str | Path] = ()) -> Path:
        """Write a quantised checkpoint that the engine serves; `files` (of the tokenizer) are copied beside it. Returns
        the directory. Raises CheckpointError as `convert` does, StorageError where it cannot be written."""
        config = QuantConfig(self.options.format, self.options.head_format)
        return write_quantised(self.model, self.convert(), config, Path(out), files)


def _on_cpu(weight: QTensor) -> QTensor:
    def moved(part: Tensor | None) -> Tensor | None:
        return None if part is None else part.cpu()

    return QTensor(weight.format, weight.codes.cpu(), moved(weight.scales), moved(weight.mins), moved(weight.steps))


def prepare_qat(model: Decoder, config: QatConfig) -> Qat:
    """Put rounding modules in the places of the linear layers, the embedding and the head, switched off. The model is
    changed in place; its parameters and their names stay.

    Raises ValidationError for a model that is prepared already, UnsupportedError for matrices that the format's groups
    do not divide; nothing is changed then.
    """
    if any(isinstance(module, QatLinear | QatEmbedding | QatHead) for module in model.modules()):
        raise ValidationError(f"{model.info.name} is prepared for quantisation-aware training already.", param="model")
    options = Options(config.format, head=config.head, search=config.search)
    published = find_family(model.info.family).names.published
    parameters = dict(model.named_parameters())
    roundings: dict[str, Rounding] = {}
    for name in quantisable(model):
        format = options.of(name)
        if format is not None:
            require_divisible(format, parameters[name].shape[1], published(name))
            roundings[name] = Rounding(format, search=config.search, name=published(name))
    switch = Switch()
    for name, rounding in roundings.items():
        _replace(model, name.removesuffix(".weight"), rounding, switch)
    return Qat(model, config, options, switch, roundings)


def _replace(model: Decoder, name: str, rounding: Rounding, switch: Switch) -> None:
    """name: of a module."""
    module = model.get_submodule(name)
    parent, _, leaf = name.rpartition(".")
    factor = model.program.logits_factor
    if isinstance(module, nn.Embedding):
        embed = QatEmbedding(module, rounding, switch, whole=model.config.tied)
        embed.train(module.training)
        model.embed = embed
        if model.config.tied:
            head = QatHead(embed, factor=factor)
            model.lm_head = head.train(module.training)  # type: ignore[assignment]
        return
    assert isinstance(module, nn.Linear)
    linear = QatLinear(module, rounding, switch, factor=factor if name == "lm_head" else 1.0)
    setattr(model.get_submodule(parent), leaf, linear.train(module.training))
