"""docs/distillation.md tells the truth: its configurations, keys and names are there."""

from __future__ import annotations

import importlib
import re

import pytest

import dfastllm.distill
from dfastllm.distill.config import Config
from dfastllm.distill.qat.schedule import QatConfig
from dfastllm.distill.teacher.settings import TeacherSettings
from tests.kit.source import ROOT

TEXT = (ROOT / "docs" / "distillation.md").read_text(encoding="utf-8")
MAPPED = TEXT.split("## The distillation document's names")[1].split("\n## ")[0]
OTHERS = {"speed.json", "speed.measure_failed", "train.loop.Loop"}  # a file, an event, a class
SECTIONS = {name: field.annotation for name, field in Config.model_fields.items()}
KEY = re.compile(rf"`((?:{'|'.join(SECTIONS)})\.[a-z_.A-Z]+)`")


def keys(section: str) -> set[str]:
    if section == "quant":
        return set(QatConfig.__dataclass_fields__)
    return set(SECTIONS[section].model_fields)  # type: ignore[union-attr]


def right_cells() -> list[tuple[str, str]]:
    rows = [line.split("|")[1:-1] for line in MAPPED.splitlines() if line.startswith("| ")][1:]
    return [(left.strip(), right.strip()) for left, right in rows]


def test_keys_are_there() -> None:
    """Keys of a section, and where a row says "the same keys", those that its left cell lists."""
    found = set(KEY.findall(TEXT.split("## The distillation document's names")[0]))
    found |= {key for _, right in right_cells() for key in KEY.findall(right)}
    assert len(found) > 10
    for key in found - OTHERS:
        section, name, *rest = key.split(".")
        assert name in keys(section), key
        if rest:
            assert rest[0] in TeacherSettings.model_fields or name in ("trajectory", "certainty", "draft"), key
    for left, right in right_cells():
        if right.startswith("the same keys"):
            where = re.search(r"in `(\w+)`", right)
            section = where.group(1) if where else left.split(".")[0].lstrip("`")
            for name in re.findall(r"`(?:\w+\.)?(\w+)`", left):
                assert name in keys(section), (left, name)


def test_names_are_importable() -> None:
    names = {name for _, right in right_cells() for name in re.findall(r"`([A-Za-z_][\w.]*)`", right)}
    plain = {name for name in names if "." not in name and re.search(rf"\b{name}\b", MAPPED)}
    exported = {name for name in plain if name in dfastllm.distill.__all__}
    assert {"KDDataset", "collate_kd_batch", "prepare_qat", "fit_batch_to_shape"} <= exported
    for name in names:
        module, _, attribute = name.rpartition(".")
        if module.split(".")[0] not in ("metrics", "train", "distill"):
            continue
        if module in SECTIONS:
            continue
        try:
            found = importlib.import_module(f"dfastllm.{module}")
        except ModuleNotFoundError:
            pytest.fail(f"{name} is nowhere")
        assert hasattr(found, attribute), name


@pytest.mark.parametrize("name", sorted(set(re.findall(r"\b([\w-]+\.yaml)", TEXT))))
def test_configurations_are_there(name: str) -> None:
    assert (ROOT / "configs" / name).is_file()


def test_the_table_lists_every_configuration() -> None:
    listed = TEXT.split("| file | what |")[1]
    assert [path.name for path in (ROOT / "configs").glob("*.yaml") if path.name not in listed] == []
