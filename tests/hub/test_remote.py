"""Models of a hub, against one on loopback: what is fetched, what is kept, what goes wrong and how it is named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from dfastllm.errors import DownloadError, ModelLoadError, ModelNotFoundError, ValidationError
from dfastllm.hub import find_model, title
from dfastllm.hub.catalogue import catalogue, remove
from dfastllm.hub.find import pull
from dfastllm.hub.ids import ModelId, parse_id
from dfastllm.llm import LLM
from tests.kit.convert_models import write_tiny
from tests.kit.hub_server import Hub, Repository

REPO = "some/tiny"
OTHERS = {
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": b"twice",
    "modeling_tiny.py": b"code",
    "README.md": b"words",
    "onnx/model.onnx": b"other",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    directory = write_tiny(tmp_path_factory.mktemp("hub") / "tiny")
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def hub(files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub().serve() as hub:
        hub.repositories[REPO] = Repository({**files, **OTHERS})
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.chdir(tmp_path)
        yield hub


def test_a_model_is_fetched_once_and_only_what_it_needs(hub: Hub, files: dict[str, bytes]) -> None:
    directory = find_model(REPO)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == files
    assert set(hub.fetched()) == set(files)
    hub.asked.clear()
    assert find_model(REPO) == directory
    assert title(directory) == REPO
    assert hub.asked == []
    with LLM(REPO) as llm:
        assert llm.info.name == REPO
        assert llm.generate("hello")[0].outputs


def test_a_revision_is_a_branch_or_a_commit(hub: Hub, files: dict[str, bytes]) -> None:
    hub.repositories[REPO].branches["refs/pr/1"] = "b" * 40
    assert find_model(f"{REPO}@refs/pr/1").name == "b" * 40
    assert find_model(f"{REPO}@{'a' * 40}").name == "a" * 40
    assert title(f"{REPO}@refs/pr/1") == REPO
    with pytest.raises(ModelNotFoundError, match="no revision 'gone'"):
        find_model(f"{REPO}@gone")


def test_what_was_cut_off_goes_on_where_it_ended(
    hub: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    hub.cut["model.safetensors"] = 5000
    directory = find_model(REPO)
    assert (directory / "model.safetensors").read_bytes() == files["model.safetensors"]
    ranges = [span for method, path, span in hub.asked if method == "GET" and path.endswith("model.safetensors")]
    assert len(ranges) == 2
    assert int(ranges[1].removeprefix("bytes=").split("-")[0]) == 5000


def test_a_cache_that_lacks_the_weights_is_completed(hub: Hub) -> None:
    directory = find_model(REPO)
    (directory / "model.safetensors").unlink()
    hub.asked.clear()
    assert (find_model(REPO) / "model.safetensors").exists()
    assert hub.asked


def test_shards_are_those_of_the_index(hub: Hub, files: dict[str, bytes]) -> None:
    shards = {f"model-0000{i}-of-00002.safetensors": files["model.safetensors"] for i in (1, 2)}
    index = {"weight_map": {f"tensor{i}": name for i, name in enumerate(shards)}}
    small = {name: data for name, data in files.items() if name != "model.safetensors"}
    stray = {"model-00001-of-00009.safetensors": b"of another conversion"}
    whole = {**small, **shards, **stray, "model.safetensors.index.json": json.dumps(index).encode()}
    hub.repositories[REPO] = Repository(whole)
    assert {path.name for path in find_model(REPO).iterdir()} == whole.keys() - stray.keys()


def test_one_gguf_file_of_several_is_named_by_its_variant(hub: Hub) -> None:
    data = b"GGUF" + bytes(60)
    names = ["tiny-Q4_K_M.gguf", "tiny-Q4_K_S.gguf", "tiny-Q8_0.gguf", "mmproj-tiny.gguf"]
    hub.repositories["some/gguf"] = Repository(dict.fromkeys(names, data) | {"config.json": b"{}"})
    with pytest.raises(ModelLoadError, match=r"3 GGUF files.*some/gguf:Q4_K_M"):
        find_model("some/gguf")
    assert find_model("some/gguf:q8_0").name == "tiny-Q8_0.gguf"
    assert hub.fetched() == ["tiny-Q8_0.gguf"]
    with pytest.raises(ModelLoadError, match="none called 'Q2_K'"):
        find_model("some/gguf:Q2_K")
    assert title("some/gguf:q8_0@main") == "some/gguf:q8_0"


def test_what_is_not_there_is_named(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no model some/absent at http://127.*HF_TOKEN"):
        find_model("some/absent")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ModelNotFoundError, match="or it is private"):
        find_model("some/absent")
    hub.repositories["some/gated"] = Repository({"config.json": b"{}", "model.safetensors": b""}, gated=True)
    with pytest.raises(DownloadError, match=rf"gated.*{hub.url}/some/gated.*HF_TOKEN"):
        find_model("some/gated")
    hub.repositories["some/pickle"] = Repository({"config.json": b"{}", "pytorch_model.bin": b""})
    with pytest.raises(ModelLoadError, match=r"pytorch_model\.bin, which are not read"):
        find_model("some/pickle")


def test_a_token_opens_what_is_private(hub: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories["some/private"] = Repository(files, private="hf_mine")
    with pytest.raises(ModelNotFoundError):
        find_model("some/private")
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    assert (find_model("some/private") / "config.json").exists()


def test_offline_uses_the_cache_and_says_so_where_it_is_empty(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelNotFoundError, match=rf"{REPO} is not in the cache.*HF_HUB_OFFLINE.*dfastllm pull {REPO}"):
        find_model(REPO)
    assert hub.asked == []
    monkeypatch.delenv("HF_HUB_OFFLINE")
    directory = find_model(REPO)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert find_model(REPO) == directory


def test_a_hub_that_does_not_answer_is_named(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DownloadError, match=r"127\.0\.0\.1:9"):
        find_model(REPO)


def test_a_directory_wins_over_an_id(hub: Hub, tmp_path: Path) -> None:
    place = write_tiny(tmp_path / "some" / "tiny")
    assert find_model(REPO).resolve() == place
    assert title(REPO) is None
    assert hub.asked == []


def test_list_and_rm(hub: Hub) -> None:
    pull(REPO)
    [row] = [one for one in catalogue() if one.source == "hub"]
    assert (row.name, row.ready) == (REPO, True)
    assert row.size > 10_000
    assert {"demo-ar", "smollm2-135m"} <= {one.name for one in catalogue()}
    place, freed = remove(REPO)
    assert freed == row.size
    assert not place.exists()
    with pytest.raises(ModelNotFoundError, match="is not here"):
        remove(REPO)
    with pytest.raises(ValidationError, match="part of the package"):
        remove("demo-ar")


def test_one_revision_is_removed_alone(hub: Hub, files: dict[str, bytes]) -> None:
    hub.repositories[REPO].branches["next"] = "b" * 40
    pull(REPO)
    pull(f"{REPO}@next")
    remove(f"{REPO}@next")
    assert [one.name for one in catalogue() if one.source == "hub"] == [REPO]
    assert find_model(REPO).name == "a" * 40


def test_pull_follows_the_branch(hub: Hub) -> None:
    pull(REPO)
    hub.repositories[REPO].branches["main"] = "c" * 40
    assert find_model(REPO).name == "a" * 40
    assert pull(REPO).name == "c" * 40
    assert find_model(REPO).name == "c" * 40


@pytest.mark.parametrize("name", ["x", "a/b/c", "../b", "a/.b", "a/b@../../etc", "a/b@/x", "a b/c", "", "a/b:"])
def test_names_that_are_no_ids(name: str) -> None:
    assert parse_id(name) is None


def test_ids() -> None:
    assert parse_id("org/na.me-1_x") == ModelId("org/na.me-1_x")
    assert parse_id("o/n:Q4_K_M@v1.0") == ModelId("o/n", "v1.0", "Q4_K_M")
    assert str(parse_id("o/n:Q4_K_M@v1.0")) == "o/n:Q4_K_M@v1.0"
