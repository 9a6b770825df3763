"""The file that names the tokens of a draft, and a head of these alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dfastllm import assemble
from dfastllm.core import Span
from dfastllm.engine.batch import pack
from dfastllm.engine.pages import Pages, PageTable
from dfastllm.engine.runners.native import NativeRunner
from dfastllm.errors import ModelLoadError, ValidationError
from dfastllm.kernels.rows import Rows
from dfastllm.models.shortlist import FILE, read_shortlist, write_shortlist
from tests.kit.convert_models import write_tiny


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert read_shortlist(tmp_path, 10) is None
    write_shortlist(tmp_path, [7, 0, 3], 10)
    found = read_shortlist(tmp_path, 10)
    assert found is not None
    assert found.tolist() == [0, 3, 7]


@pytest.mark.parametrize("ids", [[], [3, 3], [-1, 2], [10]])
def test_what_is_no_list_of_tokens_is_refused(tmp_path: Path, ids: list[int]) -> None:
    with pytest.raises(ValidationError, match=r"different ids, each in \[0, 9\]"):
        write_shortlist(tmp_path, ids, 10)
    (tmp_path / FILE).write_text(f'{{"ids": {ids}}}')
    with pytest.raises(ModelLoadError, match=FILE):
        read_shortlist(tmp_path, 10)


@pytest.mark.parametrize(
    "text", ["", "[1, 2]", "{}", '{"ids": 3}', '{"ids": [1.0]}', '{"ids": ["1"]}', '{"ids": [true]}']
)
def test_a_file_of_another_form_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(ModelLoadError, match=FILE):
        read_shortlist(tmp_path, 10)


@pytest.mark.parametrize("quantization", [None, "w8", "w4"])
@pytest.mark.parametrize("tied", [False, True])
def test_its_logits_are_the_same_bits(tmp_path: Path, quantization: str | None, tied: bool) -> None:
    """A head of some rows gives the columns of the whole one; and only what drafts gets it."""
    place = write_tiny(tmp_path / "m", layers=1, tied=tied)
    ids = [*range(1, 100, 7), 200, 259]
    write_shortlist(place, ids, 260)
    load = {"backend": "native", "quantization": quantization}
    whole, short = (logits(assemble.load(place, drafting=drafting, **load).model) for drafting in (False, True))  # type: ignore[arg-type]
    assert whole.shape[1] == 260
    assert torch.equal(short, whole[:, ids])


def logits(model: object) -> torch.Tensor:
    runner = NativeRunner(model, 64, torch.float32, 16)  # type: ignore[arg-type]
    table = PageTable(Pages(4, 16))
    table.grow(8)
    rows: Rows = runner.run(pack([(Span(0, (5, 9, 7), "causal", "keep", want=(0, 1, 2)), table, 0)], runner.block_size))
    return rows.logits().clone()
