"""What runs the server elsewhere: the chart renders, objects fit their published schemas, all name settings and paths
that exist. No container engine is needed."""

from __future__ import annotations

import configparser
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from dfastllm.settings import Settings, unknown_variables

DEPLOY = Path(__file__).parents[2] / "deploy"
CHART = DEPLOY / "helm" / "dfastllm"
HELM = shutil.which("helm", path=str(Path(sys.executable).parent)) or shutil.which("helm")
needs_helm = pytest.mark.skipif(HELM is None, reason="helm is not installed")
KUBERNETES = "1.31"
EVERYTHING = {
    "models": ["/models/a", "demo-ar"],
    "settings": {"DFASTLLM_MAX_NUM_SEQS": "8"},
    "apiKey": {"secret": "keys"},
    "tenants": {"secret": "tenants"},
    "volumes": {"models": "weights", "state": "state"},
    "monitor": {"enabled": True, "secret": "scrape"},
    "nodeSelector": {"disk": "fast"},
    "tolerations": [{"key": "cpu", "operator": "Exists"}],
    "affinity": {"nodeAffinity": {}},
}


def render(tmp_path: Path, values: dict[str, Any], check: bool = True) -> list[dict[str, Any]]:
    assert HELM is not None
    given = tmp_path / "values.yaml"
    given.write_text(yaml.safe_dump(values))
    command = [HELM, "template", "dfastllm", str(CHART), "--values", str(given)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if not check:
        raise ValueError(done.stderr)
    assert done.returncode == 0, done.stderr
    return [found for found in yaml.safe_load_all(done.stdout) if found]


def validated(objects: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By kind; each held to the schema that Kubernetes publishes, unknown fields refused."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="the schemas are not installed")
    for found in objects:
        if found["apiVersion"].startswith("monitoring."):
            continue  # of an operator, with a schema of its own
        kubernetes_validate.validate(found, KUBERNETES, strict=True)
    return {found["kind"]: found for found in objects}


def plain() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / "kubernetes" / "dfastllm.yaml").read_text()))


def test_the_manifest_fits_the_schema() -> None:
    found = validated(plain())
    assert set(found) == {"Deployment", "Service"}
    wrong = plain()
    wrong[0]["spec"]["replica"] = 2
    with pytest.raises(Exception, match="replica"):
        validated(wrong)


@needs_helm
def test_the_chart_with_and_without_everything_fits_the_schema(tmp_path: Path) -> None:
    assert set(validated(render(tmp_path, {}))) == {"Deployment", "Service"}
    found = validated(render(tmp_path, EVERYTHING))
    assert set(found) == {"Deployment", "Service", "ServiceMonitor"}
    endpoint = found["ServiceMonitor"]["spec"]["endpoints"][0]
    assert endpoint["authorization"] == {"credentials": {"name": "scrape", "key": "metrics-key"}}
    pod = found["Deployment"]["spec"]["template"]["spec"]
    server = pod["containers"][0]
    assert server["args"] == ["/models/a", "demo-ar"]
    names = [one["name"] for one in server["env"]]
    assert names == ["DFASTLLM_SHUTDOWN_TIMEOUT", "DFASTLLM_API_KEY", "DFASTLLM_TENANTS_DB", "DFASTLLM_MAX_NUM_SEQS"]
    assert {one["name"] for one in server["volumeMounts"]} == {one["name"] for one in pod["volumes"]}
    assert pod["nodeSelector"] == {"disk": "fast"}


@needs_helm
def test_the_manifest_is_the_chart_s(tmp_path: Path) -> None:
    """Two files, one pod: what one of them learns, the other has."""
    chart = validated(render(tmp_path, {"apiKey": {"secret": "dfastllm"}}))["Deployment"]["spec"]["template"]["spec"]
    ours = validated(plain())["Deployment"]["spec"]["template"]["spec"]
    for pod in (chart, ours):
        server = pod["containers"][0]
        server.pop("args", None)
        server.pop("imagePullPolicy", None)
        server["env"].sort(key=lambda one: one["name"])
    assert chart == ours


@needs_helm
@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"replica": 2}, "replica"),
        ({"settings": {"MAX": "1"}}, "MAX"),
        ({"service": {"port": 70000}}, "65535"),
        ({"shutdownTimeout": "30s"}, "shutdownTimeout"),
    ],
)
def test_wrong_values_are_refused(tmp_path: Path, values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        render(tmp_path, values, check=False)


def pods() -> list[dict[str, Any]]:
    return [found["spec"]["template"]["spec"] for found in plain() if found["kind"] == "Deployment"]


def test_a_pod_ends_after_its_requests() -> None:
    """It has time for the pause and for what runs; probes ask paths that there are."""
    from dfastllm.server.app import create_app

    paths = {getattr(route, "path", "") for route in create_app().routes}
    for pod in pods():
        server = pod["containers"][0]
        pause = int(server["lifecycle"]["preStop"]["exec"]["command"][1])
        env = {one["name"]: one.get("value") for one in server["env"]}
        assert pod["terminationGracePeriodSeconds"] > pause + float(env["DFASTLLM_SHUTDOWN_TIMEOUT"])
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            assert server[probe]["httpGet"]["path"] in paths


def settings_named(text: str) -> set[str]:
    return {name for name in re.findall(r"DFASTLLM_[A-Z0-9_]+", text) if not name.endswith("_PASSWORD")}


def test_every_setting_that_is_named_exists() -> None:
    known = {f"DFASTLLM_{name.upper()}" for name in Settings.__dataclass_fields__}
    files = [path for path in DEPLOY.rglob("*") if path.is_file() and path.name != "values.schema.json"]
    assert len(files) >= 10
    for path in files:
        unknown = settings_named(path.read_text(encoding="utf-8")) - known
        assert not unknown, f"{path.relative_to(DEPLOY)} names {sorted(unknown)}"


def test_the_compose_file() -> None:
    found = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    services = found["services"]
    assert (DEPLOY / services["dfastllm"]["build"]["context"] / services["dfastllm"]["build"]["dockerfile"]).is_file()
    for service in services.values():
        for one in service.get("configs", ()):
            content = yaml.safe_load(found["configs"][one["source"]]["content"])
            assert content
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert source in found["volumes"] or (DEPLOY / source).exists(), volume
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), "open to the world unless someone says so"
    target = yaml.safe_load(found["configs"]["prometheus"]["content"])["scrape_configs"][0]["static_configs"][0]
    assert target["targets"] == ["dfastllm:8000"]
    grace = float(services["dfastllm"]["stop_grace_period"].removesuffix("s"))
    assert grace > float(services["dfastllm"]["environment"]["DFASTLLM_SHUTDOWN_TIMEOUT"])


def test_the_unit() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(DEPLOY / "dfastllm.service")
    service = unit["Service"]
    assert service["ExecStart"].split()[1:] == ["serve"]
    assert float(service["TimeoutStopSec"]) > float(service["Environment"].split("=")[1])
    verify = shutil.which("systemd-analyze")
    if verify is not None:
        command = [verify, "verify", "--man=no", str(DEPLOY / "dfastllm.service")]
        said = subprocess.run(command, capture_output=True, text=True, check=False).stderr.splitlines()
        complaints = [line for line in said if "dfastllm.service" in line and "not executable" not in line]
        assert not complaints


def instructions() -> list[tuple[str, str]]:
    """(word, rest) of the Containerfile, comments and line ends taken away."""
    text = re.sub(r"^#.*\n", "", (DEPLOY / "Containerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    lines = [line.split(None, 1) for line in text.splitlines() if line.strip()]
    return [(word, " ".join(rest.split())) for word, rest in lines]


def test_the_containerfile() -> None:
    """What it copies is there, and all that the build reads; parts and settings that it names exist; it answers where
    it is asked for its health; the server that it starts is not root's."""
    found = instructions()
    words = [word for word, _ in found]
    known = "FROM ARG RUN WORKDIR COPY LABEL ENV USER EXPOSE STOPSIGNAL HEALTHCHECK ENTRYPOINT"
    assert set(words) <= set(known.split())
    copied = [path for word, rest in found if word == "COPY" and "--from" not in rest for path in rest.split()[:-1]]
    assert all((DEPLOY.parent / path).exists() for path in copied)
    project = tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text())
    assert {"pyproject.toml", "CMakeLists.txt", "src", project["project"]["readme"]} <= set(copied)
    stages = [rest.partition(" AS ")[2] for word, rest in found if word == "FROM"]
    taken = [rest.split()[0].removeprefix("--from=") for word, rest in found if word == "COPY" and "--from" in rest]
    assert taken == ["build"]
    assert stages == ["build", ""]
    (wanted,) = re.findall(r"[\"']\.\[([a-z,]+)\]", " ".join(rest for word, rest in found if word == "RUN"))
    assert set(wanted.split(",")) <= project["project"]["optional-dependencies"].keys()
    ((_, variables),) = [one for one in found if one[0] == "ENV"]
    environment = dict(pair.split("=", 1) for pair in variables.split())
    assert unknown_variables(environment) == []
    settings = Settings.load(env=environment)
    assert settings.host == "0.0.0.0"
    assert ("EXPOSE", str(settings.port)) in found
    ((_, health),) = [one for one in found if one[0] == "HEALTHCHECK"]
    program, flag, code = json.loads(health.partition("CMD ")[2])
    assert (program, flag) == ("python", "-c")
    assert f"http://127.0.0.1:{settings.port}/health/ready" in code
    compile(code, "HEALTHCHECK", "exec")
    assert words.index("USER") < words.index("ENTRYPOINT")
    assert "USER 0" not in [f"{word} {rest}" for word, rest in found]
    assert [json.loads(rest) for word, rest in found if word == "ENTRYPOINT"] == [["dfastllm", "serve"]]
    assert project["project"]["scripts"].keys() == {"dfastllm"}
