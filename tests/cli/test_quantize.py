"""`dfastllm quantize` as a user sees it: the table, the files, and one line for what is wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from dfastllm import assemble
from dfastllm.cli.quantize import FORMATS as WRITTEN
from dfastllm.convert import GGUF_FORMATS
from dfastllm.errors import TokenizerError
from dfastllm.models import check, save, tiny
from dfastllm.models.gguf import write_gguf
from dfastllm.quant import FORMATS
from tests.kit.cli_models import write_tokenizer

Cli = Callable[..., Result]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source") / "small"
    ids = write_tokenizer(directory)
    return save(tiny("llama", ids=ids, vocab_size=260, hidden_size=32, intermediate_size=64, max_len=256), directory)


def test_help_names_the_formats_there_are() -> None:
    assert re.split(r", | or ", WRITTEN) == [*FORMATS, *GGUF_FORMATS]


def test_quantize(cli: Cli, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = cli("quantize", source, "--format", "w4", "--calibrate", "gptq", "--samples", "3", "--out", out)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[-1] == str(out)
    assert "bits a weight" in result.stdout
    assert "down_proj" in result.stdout
    report = json.loads((out / "quantization_report.json").read_text())
    assert (report["format"], report["head"], report["calibration"]) == ("w4", "w8g", "gptq")
    assert f"{report['bits_per_weight']:.2f} bits" in result.stdout
    assert "quantising" not in result.stdout, "the progress bar belongs on stderr"
    assert check(out).quantised == "w4"


def test_check_says_quantised(cli: Cli, source: Path, tmp_path: Path) -> None:
    cli("quantize", source, "--format", "w8", "--out", tmp_path / "out")
    result = cli("check", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "quantised w8" in result.output
    small = json.loads(cli("check", tmp_path / "out", "--json").output)
    large = json.loads(cli("check", source, "--json").output)
    assert small["quantised"] == "w8"
    assert large["quantised"] is None
    assert small["weight_bytes"] < 0.35 * large["weight_bytes"]


def test_report(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("quantize", "demo-draft", "--format", "w8", "--report", "--report-samples", "1", "--out", out)
    result = cli(*command)
    assert result.exit_code == 0, result.output
    quality = json.loads((out / "quantization_report.json").read_text())["quality"]
    for shown in (f"{quality['loss_before']:.5f}", f"{quality['loss_after']:.5f}", "perplexity", "arithmetic"):
        assert shown in result.stdout


def test_gguf(cli: Cli, source: Path, tmp_path: Path) -> None:
    from gguf import GGUFReader

    out = tmp_path / "deep" / "model.gguf"
    result = cli("quantize", source, "--format", "gguf-q4_0", "--out", out)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == str(out)
    found = GGUFReader(out)
    kinds = {t.tensor_type.name for t in found.tensors}
    assert kinds == {"Q4_0", "Q8_0", "F32"}  # the head keeps 8 bits
    assert "tokenizer.ggml.tokens" in found.fields
    again = cli("quantize", source, "--format", "gguf-q4_0", "--out", out)
    assert (again.exit_code, "exists" in again.stderr) == (2, True)
    assert cli("quantize", source, "--format", "gguf-q8_0", "--out", out, "--force").exit_code == 0


def test_check_of_a_gguf_file_is_what_loading_says(cli: Cli, source: Path, tmp_path: Path) -> None:
    file, bare = tmp_path / "m.gguf", tmp_path / "bare.gguf"
    assert cli("quantize", source, "--format", "gguf-q4_0", "--out", file).exit_code == 0
    assemble.load(file)
    result = cli("check", file)
    assert result.exit_code == 0, result.output
    assert "It would load." in result.output
    assert "quantised gguf-q4_0" in result.output
    whole, found = (json.loads(cli("check", path, "--json").output) for path in (source, file))
    assert found["loads"]
    assert (found["parameters"], found["info"]["family"]) == (whole["parameters"], "llama")
    write_gguf(source, bare, "F32")
    with pytest.raises(TokenizerError) as caught:
        assemble.load(bare)
    report = json.loads(cli("check", bare, "--json").output)
    assert report["problems"] == [{"code": "bad_tokenizer", "message": str(caught.value)}]
    assert cli("check", bare).exit_code == 1
    file.write_bytes(file.read_bytes()[:5000])
    assert cli("check", file).exit_code == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--format", "w5"), "error: format must be w8, w8r, w8g, w8gr, w6, w4m, w4, w4r, 8bit, got 'w5'"),
        (("--format", "gguf-q2_k"), "format must be gguf-q8_0, gguf-q4_0, got 'gguf-q2_k'"),
        (("--format", "gguf-q8_0"), "out must be a file name that ends in .gguf"),
        (("--format", "gguf-q8_0", "--calibrate", "gptq"), "without calibration"),
        (("--format", "gguf-q8_0", "--report"), "without calibration, --head and --report"),
        (("--format", "w4", "--head", "w2"), "head must be w8"),
        (("--format", "w4", "--calibrate", "magic"), "calibrate must be none, aware, gptq"),
        (("--format", "w4", "--calibration-file", "x.txt"), "calibrate is none"),
        (("--format", "w4", "--calibrate", "aware", "--calibration-file", "no.txt"), "no.txt does not exist"),
        (("--format", "w4", "--samples", "0"), "samples"),
        (("--format", "w4", "--threads", "0"), "threads"),
    ],
)
def test_what_is_wrong_is_named(cli: Cli, source: Path, tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    result = cli("quantize", source, *arguments, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert said in result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_mixture(cli: Cli, tmp_path: Path) -> None:
    directory = tmp_path / "mixture"
    ids = write_tokenizer(directory)
    save(tiny("qwen3_moe", ids=ids, vocab_size=260, hidden_size=32, intermediate_size=64, max_len=256), directory)
    for format, out in (("w8", tmp_path / "out"), ("gguf-q8_0", tmp_path / "out.gguf")):
        assert cli("quantize", directory, "--format", format, "--out", out).exit_code == 0
        assert cli("check", out).exit_code == 0
        assert cli("generate", "--model", out, "--max-tokens", "3", "a").exit_code == 0


def test_sources(cli: Cli, source: Path, tmp_path: Path) -> None:
    for name, said in (("nowhere", "no model 'nowhere'"), ("a.gguf", "a.gguf is no GGUF file")):
        result = cli("quantize", name, "--format", "w8", "--out", tmp_path / "out")
        assert result.exit_code == 2
        assert said in result.stderr
    assert cli("quantize", source, "--format", "w8", "--out", tmp_path / "out").exit_code == 0
    result = cli("quantize", source, "--format", "w8", "--out", tmp_path / "out")
    assert (result.exit_code, "--force" in result.stderr) == (2, True)
    again = cli("quantize", tmp_path / "out", "--format", "w4", "--out", tmp_path / "out2")
    assert (again.exit_code, "already quantised (w8)" in again.stderr) == (2, True)
