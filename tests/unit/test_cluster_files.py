"""The files of cluster/, against what reads them: Ray's loaders, Kubernetes' schemas, the linters of shell and Dockerfile.

KubeRay's own schemas come with no package. Point KUBERAY_CRDS at a folder with them (ray-operator/config/crd/bases of
https://github.com/ray-project/kuberay) to check the manifests against them too.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config
from typer.testing import CliRunner

from emloc_ray.io.formats.yaml_text import read_yaml
from emloc_ray.ui.cli import app

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
DOCKERFILE = (CLUSTER / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RAY_VERSION = re.findall(r"^ARG RAY_VERSION=(\S+)$", DOCKERFILE, re.MULTILINE)[0]
MANIFESTS = ("rayjob", "raycluster")
LAUNCHED = ("aws", "gcp", "local")
ON_A_CLUSTER = sorted(path.name for path in CLUSTER.iterdir() if path.suffix in (".yaml", ".sh"))


def load(name: str) -> Any:
    return read_yaml((CLUSTER / f"{name}.yaml").read_text())


def cluster_spec(name: str) -> dict[str, Any]:
    spec: dict[str, Any] = load(name)["spec"]
    return spec["rayClusterSpec"] if name == "rayjob" else spec


def groups(name: str) -> list[dict[str, Any]]:
    spec = cluster_spec(name)
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def containers(name: str) -> list[dict[str, Any]]:
    return [container for group in groups(name) for container in group["template"]["spec"]["containers"]]


# Kubernetes.


@pytest.mark.parametrize("name", MANIFESTS)
def test_pods_are_pods(name: str) -> None:
    for group in groups(name):
        template = {
            "apiVersion": "v1",
            "kind": "PodTemplate",
            "metadata": {"name": "pod"},
            "template": group["template"],
        }
        kubernetes_validate.validate(template, "1.31", strict=True)


@pytest.mark.parametrize("name", MANIFESTS)
def test_rays_autoscaler_reads_the_groups(name: str) -> None:
    resource = {"metadata": {"name": "emloc-ray", "namespace": "default"}, "spec": cluster_spec(name)}
    config = _derive_autoscaling_config_from_ray_cr(resource)
    types = config["available_node_types"]
    assert {key: (t["resources"]["CPU"], t["resources"].get("GPU", 0)) for key, t in types.items()} == {
        "headgroup": (0, 0),
        "cpu": (8, 0),
        "gpu": (8, 1),
    }
    assert all(types[key]["max_workers"] > types[key]["min_workers"] == 0 for key in ("cpu", "gpu"))
    assert config["idle_timeout_minutes"] == 2


@pytest.mark.parametrize("name", MANIFESTS)
def test_parameters_of_ray_start_exist(name: str) -> None:
    from ray.scripts.scripts import start

    known = {option.removeprefix("--") for parameter in start.params for option in parameter.opts}
    for group in groups(name):
        assert set(group["rayStartParams"]) <= known
        assert group["rayStartParams"]["object-spilling-directory"].startswith("/scratch/")
        mounts = {mount["mountPath"] for mount in group["template"]["spec"]["containers"][0]["volumeMounts"]}
        assert "/scratch" in mounts


def test_the_job_brings_the_cluster_that_stands_alone() -> None:
    assert cluster_spec("rayjob") == cluster_spec("raycluster")


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_token_is_asked_for_and_secrets_come_from_outside(name: str) -> None:
    assert cluster_spec(name)["authOptions"] == {"mode": "token"}
    for container in containers(name):
        assert {variable["name"] for variable in container["env"]} == {"EMLOC_RAY_CACHE_SIZE"}
        assert container["envFrom"] == [{"secretRef": {"name": "emloc-ray-environment", "optional": True}}]


@pytest.mark.parametrize("name", MANIFESTS)
@pytest.mark.skipif("KUBERAY_CRDS" not in os.environ, reason="KUBERAY_CRDS names no folder of KubeRay's schemas")
def test_manifests_against_kuberays_own_schemas(name: str) -> None:
    text = (Path(os.environ["KUBERAY_CRDS"]) / f"ray.io_{name}s.yaml").read_text()
    versions = {
        version["name"]: version["schema"]["openAPIV3Schema"] for version in read_yaml(text)["spec"]["versions"]
    }
    schema = closed(versions["v1"])
    schema["properties"]["metadata"] = {"type": "object"}
    jsonschema.validate(load(name), schema)
    wrong = load(name)
    (wrong["spec"]["rayClusterSpec"] if name == "rayjob" else wrong["spec"])["headGroupSpecs"] = {}
    with pytest.raises(jsonschema.ValidationError, match="headGroupSpecs"):
        jsonschema.validate(wrong, schema)


def closed(schema: Any) -> Any:
    """The schema with unknown fields as errors, which Kubernetes would drop, and its own extensions in plain words."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: closed(part) for key, part in schema.items()}
    if found.get("type") == "object" and "properties" in found and "additionalProperties" not in found:
        found["additionalProperties"] = bool(found.get("x-kubernetes-preserve-unknown-fields"))
    if found.get("x-kubernetes-int-or-string"):
        found.pop("type", None)
    return found


# Ray's launcher.


@pytest.mark.parametrize("name", LAUNCHED)
def test_rays_launcher_takes_the_config(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = prepare_config(load(name))
    validate_config(config)
    commands = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    starts = [command for command in commands if "ray start" in command]
    assert len(starts) == 2
    for command in starts:
        assert "RAY_AUTH_MODE=token" in command
        assert "--object-spilling-directory=" in command
        assert subprocess.run(["bash", "-n"], input=command, text=True, check=False).returncode == 0
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_clouds_have_nodes_with_and_without_gpus(name: str) -> None:
    types = prepare_config(load(name))["available_node_types"]
    assert types["head"]["resources"]["CPU"] == 0
    assert types["cpu"]["resources"]["GPU"] == 0 < types["cpu"]["resources"]["CPU"]
    assert types["gpu"]["resources"]["GPU"] > 0
    assert all(types[kind]["max_workers"] > types[kind]["min_workers"] == 0 for kind in ("cpu", "gpu"))


def test_the_launcher_refuses_what_is_misspelt() -> None:
    config = load("aws")
    config["available_node_type"] = config.pop("available_node_types")
    with pytest.raises(Exception, match="available_node_type"):
        validate_config(prepare_config(config))


# Shell and Docker.


@pytest.mark.parametrize("name", ["slurm.sh", "hosts.sh"])
def test_scripts_are_sound(name: str) -> None:
    subprocess.run(["bash", "-n", str(CLUSTER / name)], check=True)
    result = subprocess.run([tool("shellcheck"), str(CLUSTER / name)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    assert os.access(CLUSTER / name, os.X_OK)


def test_the_dockerfile_is_sound() -> None:
    result = subprocess.run(
        [tool("hadolint"), str(CLUSTER / "Dockerfile")], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout


def tool(name: str) -> str:
    """A linter that was installed beside this Python."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert found is not None, f"{name} is not installed: pip install '.[test]'"
    return found


def test_the_image_is_made_of_what_there_is_and_is_not_roots() -> None:
    extras = re.findall(r"^ARG EXTRAS=(\S+)$", DOCKERFILE, re.MULTILINE)[0].split(",")
    assert set(extras) <= set(PROJECT["optional-dependencies"])
    for line in re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.MULTILINE):
        assert all((ROOT / source).exists() for source in line.split())
    assert re.findall(r"^USER (\S+)$", DOCKERFILE, re.MULTILINE) == ["1000"]


def test_one_ray_version_everywhere() -> None:
    wanted = next(r for r in map(Requirement, PROJECT["dependencies"]) if r.name == "ray")
    assert Version(RAY_VERSION) in wanted.specifier
    assert {cluster_spec(name)["rayVersion"] for name in MANIFESTS} == {RAY_VERSION}


def test_one_image_everywhere() -> None:
    named = {image for path in CLUSTER.iterdir() for image in re.findall(r"\S+/emloc-ray:[\w.]+\b", path.read_text())}
    assert named == {f"example.com/emloc-ray:{PROJECT['version']}"}


# All of them.


@pytest.mark.parametrize("name", ON_A_CLUSTER)
def test_the_commands_stand_at_the_top(name: str) -> None:
    head = list(itertools.takewhile(lambda line: line.startswith("#"), (CLUSTER / name).read_text().splitlines()))
    commands = [line for line in head if line.startswith("#     ")]
    assert any(name in line for line in commands)
    for call in re.findall(r"-- (emloc-ray run [^#\n]+)", "\n".join(commands)):
        arguments = call.split()[1:]
        result = CliRunner().invoke(app, arguments)
        assert "my.yaml" in result.output  # the file is missing, but every argument was understood
        assert "No such option" not in result.output


@pytest.mark.parametrize("path", sorted(CLUSTER.iterdir()), ids=lambda path: path.name)
def test_no_file_holds_a_secret(path: Path) -> None:
    text = path.read_text()
    assert not re.search(
        r"AKIA[0-9A-Z]{16}|hf_[A-Za-z0-9]{20,}|-----BEGIN|(SECRET|PASSWORD|_KEY|_TOKEN)\s*[=:]\s*[\w/+]{8,}", text
    )


def test_the_page_names_every_file() -> None:
    named = set(re.findall(r"\]\(([\w.]+)\)", (CLUSTER / "README.md").read_text()))
    assert named == {path.name for path in CLUSTER.iterdir()} - {"README.md"}
