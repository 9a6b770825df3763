"""The configuration of a distillation: a YAML file with the sections model, data, train, kd, speed, quant and eval.

Everything is checked before anything is loaded: keys (a misspelt one gets a suggestion), ranges, and the files that
must be there. What needs the models (vocabularies, contexts) is checked by `distill.run` before the first step.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic import ValidationError as SchemaError

from dfastllm.distill.sections import Config
from dfastllm.errors import ModelNotFoundError, ValidationError
from dfastllm.llm import resolve
from dfastllm.text.strict_yaml import StrictLoader

__all__ = ["Config", "changed_keys", "load_config", "parse_config"]

MOST_BYTES = 1 << 20  # of a file


def load_config(path: str | Path, *, files: bool = True) -> Config:
    """The configuration in a YAML file. Relative paths in it are taken from the working directory. files: also check
    that the files and models it names are there. Raises ValidationError naming the key, what it got and what is
    wanted."""
    path = Path(path)
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):  # a pipe would be waited for
            raise ValidationError(f"{path} is no file.", param="config")
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise ValidationError(f"{path} has more than {MOST_BYTES:,} bytes.", param="config")
        text = data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValidationError(
            f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.",
            param="config",
            hint="Give a YAML file; configs/ has examples.",
        ) from error
    try:
        raw = _Loader(text).get_single_data()
    except (yaml.YAMLError, ValueError) as error:  # a ValueError: a date that there is not
        raise ValidationError(f"{path} is not YAML: {' '.join(str(error).split())}.", param="config") from error
    config = parse_config(raw, str(path))
    if files:
        _require_files(config, path)
    return config


class _Loader(StrictLoader):
    """2e-4 is a number (YAML 1.1 wants 2.0e-4 and would take it for a word)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+"), list("-+0123456789")
)


def parse_config(raw: Any, name: str = "the configuration") -> Config:
    """A configuration from what a YAML file holds. Raises ValidationError."""
    if not isinstance(raw, Mapping):
        raise ValidationError(
            f"{name} must hold sections, got {raw!r:.60}.",
            param="config",
            hint=f"Sections are {', '.join(Config.model_fields)}.",
        )
    try:
        return Config.model_validate(_plain(raw))
    except SchemaError as error:
        raise _named(error, name) from None


def _plain(value: Any) -> Any:
    """Lists become tuples, which nothing changes afterwards; keys become words."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return tuple(_plain(inner) for inner in value)
    return value


def _named(error: SchemaError, name: str) -> ValidationError:
    """The first problem in words: where, what was given, what is wanted."""
    first = error.errors()[0]
    keys = tuple(str(part) for part in first["loc"])
    where = ".".join(keys)
    more = f" ({error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        known = list(_section(keys[:-1]).model_fields)
        near = difflib.get_close_matches(keys[-1], known, n=1)
        inside = ".".join(keys[:-1]) or "the top level"
        hint = f"Did you mean {near[0]}?" if near else f"{inside} knows {', '.join(known)}."
        return ValidationError(f"{name}: unknown key {where}{more}.", param=where, hint=hint)
    if first["type"] == "missing":
        return ValidationError(f"{name}: {where} is missing{more}.", param=where)
    if first["type"] == "value_error":  # of our own checks
        said = str(first["ctx"]["error"]).rstrip(".")
        return ValidationError(f"{name}: {where + ': ' if where else ''}{said}{more}.", param=where or None)
    said = first["msg"].removeprefix("Input should be ")
    return ValidationError(f"{name}: {where} must be {said}, got {first['input']!r:.60}{more}.", param=where)


def _section(keys: tuple[str, ...]) -> type[BaseModel]:
    """The class of the section that these keys lead to."""
    found: type[BaseModel] = Config
    for key in keys:
        annotation = found.model_fields[key].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        found = next(one for one in options if isinstance(one, type) and issubclass(one, BaseModel))
    return found


def _require_files(config: Config, file: Path) -> None:
    """Raises ValidationError for a data file, and ModelNotFoundError for a model, that is not there. file: where the
    configuration stands; one beside it may be what makes the model."""
    for key, names in (("data.train", config.data.train), ("data.validation", config.data.validation)):
        for name in names:
            if not Path(name).is_file():
                raise ValidationError(f"{key}: there is no file {name}.", param=key, hint="Paths start here: .")
    for model in (config.model.student, config.kd.local_teacher):
        if model is not None:
            try:
                resolve(model)
            except ModelNotFoundError as error:
                maker = _maker(model, file)
                if maker is None:
                    raise
                raise ModelNotFoundError(
                    f"there is no model {model} yet.", param="model", hint=f"Make it first: dfastllm distill {maker}"
                ) from error
    if config.model.tokenizer is not None and not Path(config.model.tokenizer).is_dir():
        raise ValidationError(
            f"model.tokenizer: there is no directory {config.model.tokenizer}.", param="model.tokenizer"
        )
    if config.speed.baseline is not None and not Path(config.speed.baseline).is_file():
        raise ValidationError(
            f"speed.baseline: there is no file {config.speed.baseline}.",
            param="speed.baseline",
            hint="Record it with dfastllm gate record --out, or leave the key out.",
        )


def changed_keys(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Keys ("train.lr") of two configurations (as JSON) whose values differ."""
    return sorted(_changes(before, after, ""))


def _changes(before: Any, after: Any, where: str) -> Iterator[str]:
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in before.keys() | after.keys():
            yield from _changes(before.get(key), after.get(key), f"{where}.{key}" if where else str(key))
    elif before != after:
        yield where


def _maker(model: str, file: Path) -> Path | None:
    """The configuration beside `file` whose run the model would lie in, as `dfastllm distill` names runs: runs/NAME of
    NAME.yaml. None: there is none."""
    parts = Path(model).parts
    if len(parts) < 3 or parts[-3] != "runs":
        return None
    found = file.with_name(f"{parts[-2]}.yaml")
    return found if found.is_file() and found != file else None
