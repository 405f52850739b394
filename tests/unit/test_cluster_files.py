"""The files of cluster/, against what reads them: Ray's loaders, Kubernetes' schemas, the linters of shell and Dockerfile.

KubeRay's own schemas come with no package. Point KUBERAY_CRDS at a folder with them (ray-operator/config/crd/bases of
https://github.com/ray-project/kuberay) to check the manifests against them too.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
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
MANIFESTS = ("job", "cluster")
OPTIONS = sorted(path.name for path in (CLUSTER / "kubernetes" / "options").iterdir())
LAUNCHED = ("aws", "gcp", "local")
WITH_COMMANDS = [
    *sorted(path for path in CLUSTER.iterdir() if path.suffix in (".yaml", ".sh")),
    *(CLUSTER / "kubernetes" / name / "kustomization.yaml" for name in MANIFESTS),
    CLUSTER / "monitoring" / "kustomization.yaml",
]
FILES = sorted(path for path in CLUSTER.rglob("*") if path.is_file())
NO_DIGEST = "sha256:" + 64 * "0"
Resource = dict[str, Any]


def load(name: str) -> Any:
    return read_yaml((CLUSTER / f"{name}.yaml").read_text())


@functools.cache
def built(folder: Path) -> tuple[Resource, ...]:
    """The resources that ``kubectl apply -k`` would send."""
    done = subprocess.run([tool("kubectl"), "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return tuple(map(read_yaml, done.stdout.split("\n---\n")))


def manifests(name: str) -> tuple[Resource, ...]:
    return built(CLUSTER / "kubernetes" / name)


def of_kind(resources: Sequence[Resource], kind: str) -> Resource:
    (resource,) = (resource for resource in resources if resource["kind"] == kind)
    return resource


def cluster_spec(name: str, resources: Sequence[Resource] = ()) -> Resource:
    resources = resources or manifests(name)
    spec: Resource = of_kind(resources, "RayJob" if name == "job" else "RayCluster")["spec"]
    return spec["rayClusterSpec"] if name == "job" else spec


def groups(name: str, resources: Sequence[Resource] = ()) -> list[Resource]:
    spec = cluster_spec(name, resources)
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def pods(name: str) -> list[Resource]:
    templates = [group["template"] for group in groups(name)]
    return (
        [*templates, of_kind(manifests(name), "RayJob")["spec"]["submitterPodTemplate"]] if name == "job" else templates
    )


def containers(name: str) -> list[Resource]:
    return [container for group in groups(name) for container in group["template"]["spec"]["containers"]]


# Kubernetes.


@pytest.mark.parametrize("name", MANIFESTS)
def test_kubernetes_takes_the_resources(name: str) -> None:
    for template in pods(name):
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": template}
        kubernetes_validate.validate(pod, "1.31", strict=True)
    for resource in manifests(name):
        if not resource["kind"].startswith("Ray"):
            kubernetes_validate.validate(resource, "1.31", strict=True)


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
    assert cluster_spec("job") == cluster_spec("cluster")
    alone, job = ({(r["kind"], r["metadata"]["name"]) for r in manifests(name)} for name in ("cluster", "job"))
    assert alone ^ job == {("RayCluster", "emloc-ray"), ("RayJob", "emloc-ray")}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_token_is_asked_for_and_secrets_come_from_outside(name: str) -> None:
    assert cluster_spec(name)["authOptions"] == {"mode": "token"}
    for container in containers(name):
        assert {variable["name"] for variable in container["env"]} == {"EMLOC_RAY_CACHE_SIZE"}
        assert container["envFrom"] == [{"secretRef": {"name": "emloc-ray-environment", "optional": True}}]


@pytest.mark.parametrize("name", MANIFESTS)
def test_pods_have_no_privileges_and_ask_for_all_that_they_use(name: str) -> None:
    for template in pods(name):
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        held = [container["securityContext"] for container in spec["containers"]]
        held += [cluster_spec(name)["autoscalerOptions"]["securityContext"]]
        assert all(
            context == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}} for context in held
        )
    for group in groups(name):
        spec = group["template"]["spec"]
        resources = spec["containers"][0]["resources"]
        assert resources["requests"] == resources["limits"]
        (scratch,) = (volume["emptyDir"]["sizeLimit"] for volume in spec["volumes"] if volume["name"] == "scratch")
        assert int(scratch.removesuffix("Gi")) < int(resources["requests"]["ephemeral-storage"].removesuffix("Gi"))


@pytest.mark.parametrize("name", MANIFESTS)
def test_the_head_stays_and_workers_are_others(name: str) -> None:
    head, *workers = (group["template"] for group in groups(name))
    accounts = {r["metadata"]["name"]: r for r in manifests(name) if r["kind"] == "ServiceAccount"}
    assert accounts[head["spec"]["serviceAccountName"]].get("automountServiceAccountToken") is not False
    assert {worker["spec"]["serviceAccountName"] for worker in workers} == {"emloc-ray-worker"}
    assert accounts["emloc-ray-worker"]["automountServiceAccountToken"] is False
    budget = of_kind(manifests(name), "PodDisruptionBudget")["spec"]["selector"]["matchLabels"]
    assert budget.items() <= head["metadata"]["labels"].items()
    assert not any(budget.items() <= worker["metadata"]["labels"].items() for worker in workers)
    assert head["metadata"]["annotations"]["cluster-autoscaler.kubernetes.io/safe-to-evict"] == "false"


@pytest.mark.parametrize("name", MANIFESTS)
def test_pods_reach_one_another(name: str) -> None:
    policy = of_kind(manifests(name), "NetworkPolicy")["spec"]
    ours = policy["podSelector"]["matchLabels"]
    assert policy["ingress"][0] == {"from": [{"podSelector": {"matchLabels": ours}}]}  # by any port
    assert all(ours.items() <= pod["metadata"]["labels"].items() for pod in pods(name))


def with_options(folder: Path, name: str, *options: str) -> tuple[Resource, ...]:
    """The resources of a copy whose kustomization has these of its options, that are comments in it."""
    copy = folder / "kubernetes"
    shutil.copytree(CLUSTER / "kubernetes", copy)
    file = copy / name / "kustomization.yaml"
    named = re.findall(r"^# components: \[(.+)\]$", file.read_text(), re.MULTILINE)[0].split(", ")
    assert sorted(Path(path).name for path in named) == OPTIONS
    chosen = ", ".join(path for path in named if Path(path).name in options)
    file.write_text(re.sub(r"^# components: .+$", f"components: [{chosen}]", file.read_text(), flags=re.MULTILINE))
    return built(copy / name)


@pytest.mark.parametrize("name", MANIFESTS)
def test_options_change_the_cluster_as_they_say(name: str, tmp_path: Path) -> None:
    resources = with_options(tmp_path, name, *OPTIONS)
    spec = cluster_spec(name, resources)
    assert spec["tlsOptions"] == {"enabled": True}
    assert spec["gcsFaultToleranceOptions"]["backend"] == "rocksdb"
    assert not spec["enableInTreeAutoscaling"]
    assert all(group["replicas"] for group in spec["workerGroupSpecs"])
    queued = of_kind(resources, "RayJob" if name == "job" else "RayCluster")
    assert queued["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-a"
    classes = {r["metadata"]["name"]: r["value"] for r in resources if r["kind"] == "PriorityClass"}
    head, *workers = (group["template"]["spec"] for group in groups(name, resources))
    assert all(classes[head["priorityClassName"]] > classes[worker["priorityClassName"]] for worker in workers)
    assert all("affinity" in worker for worker in workers)
    assert "affinity" not in head
    assert {t["key"] for t in workers[1]["tolerations"]} == {"nvidia.com/gpu", "cloud.google.com/gke-spot"}


@pytest.mark.parametrize("name", MANIFESTS)
@pytest.mark.skipif("KUBERAY_CRDS" not in os.environ, reason="KUBERAY_CRDS names no folder of KubeRay's schemas")
def test_manifests_against_kuberays_own_schemas(name: str, tmp_path: Path) -> None:
    kind = "RayJob" if name == "job" else "RayCluster"
    text = (Path(os.environ["KUBERAY_CRDS"]) / f"ray.io_{kind.lower()}s.yaml").read_text()
    versions = {
        version["name"]: version["schema"]["openAPIV3Schema"] for version in read_yaml(text)["spec"]["versions"]
    }
    schema = closed(versions["v1"])
    schema["properties"]["metadata"] = {"type": "object"}
    for resources in (manifests(name), with_options(tmp_path, name, *OPTIONS)):
        jsonschema.validate(of_kind(resources, kind), schema)
    cluster_spec(name, resources)["headGroupSpecs"] = {}
    with pytest.raises(jsonschema.ValidationError, match="headGroupSpecs"):
        jsonschema.validate(of_kind(resources, kind), schema)


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


@pytest.mark.parametrize(("name", "image"), [("aws", "resolve:ssm:/aws/service/deeplearning/"), ("gcp", "nvidia-580")])
def test_nodes_boot_an_image_with_a_driver_for_cuda_13(name: str, image: str) -> None:
    text = (CLUSTER / f"{name}.yaml").read_text()
    named = re.findall(r"^ +(?:ImageId|sourceImage): (\S+)$", text, re.MULTILINE)
    assert len(named) == len(load(name)["available_node_types"])
    assert all(image in each for each in named)


def test_the_launcher_refuses_what_is_misspelt() -> None:
    config = load("aws")
    config["available_node_type"] = config.pop("available_node_types")
    with pytest.raises(Exception, match="available_node_type"):
        validate_config(prepare_config(config))


# Shell and Docker.


@pytest.mark.parametrize("name", ["slurm.sh", "hosts.sh", "image.sh"])
def test_scripts_are_sound(name: str) -> None:
    subprocess.run(["bash", "-n", str(CLUSTER / name)], check=True)
    result = subprocess.run([tool("shellcheck"), str(CLUSTER / name)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    assert os.access(CLUSTER / name, os.X_OK)


@pytest.mark.parametrize("whose", ["mine", "a link", "another's"])
def test_a_folder_of_another_user_is_not_taken(tmp_path: Path, whose: str) -> None:
    scratch, real = tmp_path / "scratch", tmp_path / "real"
    real.mkdir(mode=0o777)
    (real / "ray.log").write_text("kept")
    (real / "ray.pid").write_text("4194305")  # above the kernel's highest number
    if whose == "a link":
        scratch.symlink_to(real)
    else:
        real.rename(scratch)
    if whose == "another's":
        if os.geteuid():
            pytest.skip("only root gives a folder away")
        os.chown(scratch, 65534, 65534)
    (tmp_path / "ray").write_text("#!/bin/sh\necho Ray runtime started\nexec sleep 60\n")
    (tmp_path / "ray").chmod(0o755)
    environment = {**os.environ, "SCRATCH": str(scratch), "EMLOC_BIN": str(tmp_path)}
    for action in ("start", "stop"):
        command = ["bash", str(CLUSTER / "hosts.sh"), "on-host", action, "192.0.2.1", "192.0.2.1"]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert (result.returncode == 0) is (whose == "mine"), result.stderr
        if whose != "mine":
            assert "is another user's, or a link: remove it, or set SCRATCH" in result.stderr
            assert (scratch / "ray.log").read_text() == "kept"
            assert not (scratch / "spill").exists()
    if whose == "mine":
        assert scratch.stat().st_mode & 0o777 == 0o700


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


def test_the_lock_file_has_what_the_project_takes() -> None:
    text = (CLUSTER / "requirements.lock").read_text()
    locked = dict(line.split("==") for line in text.splitlines() if not line.startswith("#"))
    extras = re.findall(r"--extra (\w+)", text)
    assert set(extras) == set(re.findall(r"^ARG EXTRAS=(\S+)$", DOCKERFILE, re.MULTILINE)[0].split(","))
    wanted = [*PROJECT["dependencies"], *(r for extra in extras for r in PROJECT["optional-dependencies"][extra])]
    for requirement in map(Requirement, wanted):
        assert locked[canonicalize_name(requirement.name)] in requirement.specifier
    assert locked["ray"] == RAY_VERSION


def test_one_image_everywhere_by_a_digest_that_the_build_fills_in(tmp_path: Path) -> None:
    shutil.copytree(CLUSTER, tmp_path / "cluster")
    digest, docker = "sha256:" + 64 * "a", tmp_path / "docker"
    docker.write_text(
        '#!/usr/bin/env bash\nwhile [ "$1" != --metadata-file ]; do shift; done\n'
        f'echo \'{{"containerimage.digest": "{digest}"}}\' >"$2"\n'
    )
    docker.chmod(0o755)
    assert images(CLUSTER) == {f"example.com/emloc-ray@{NO_DIGEST}"}
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run([tmp_path / "cluster" / "image.sh", "registry.example/mine"], env=environment, check=True)
    assert images(tmp_path / "cluster") == {f"registry.example/mine@{digest}"}


def images(folder: Path) -> set[str]:
    """Of all nodes, as the files of a folder name them."""
    named = {read_yaml((folder / f"{name}.yaml").read_text())["docker"]["image"] for name in ("aws", "gcp")}
    for name in MANIFESTS:
        named |= set(re.findall(r"'image': '(\S+)'", str(built(folder / "kubernetes" / name))))
    return named


# All of them.


@pytest.mark.parametrize("path", WITH_COMMANDS, ids=lambda path: str(path.relative_to(CLUSTER)))
def test_the_commands_stand_at_the_top(path: Path) -> None:
    head = list(itertools.takewhile(lambda line: line.startswith("#"), path.read_text().splitlines()))
    commands = [line for line in head if line.startswith("#     ")]
    named = path.parent if path.name == "kustomization.yaml" else path
    assert any(str(named.relative_to(ROOT)) in line for line in commands)
    for call in re.findall(r"-- (emloc-ray run [^#\n]+)", "\n".join(commands)):
        arguments = call.split()[1:]
        result = CliRunner().invoke(app, arguments)
        assert "my.yaml" in result.output  # the file is missing, but every argument was understood
        assert "No such option" not in result.output


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CLUSTER)))
def test_no_file_holds_a_secret(path: Path) -> None:
    text = path.read_text()
    assert not re.search(
        r"AKIA[0-9A-Z]{16}|hf_[A-Za-z0-9]{20,}|-----BEGIN|(SECRET|PASSWORD|_KEY|_TOKEN)\s*[=:]\s*[\w/+]{8,}", text
    )


def test_the_page_names_every_file() -> None:
    named = {Path(path) for path in re.findall(r"\]\(([\w./]+)\)", (CLUSTER / "README.md").read_text())}
    there = {path.relative_to(CLUSTER) for path in FILES} - {Path("README.md")}
    assert all((CLUSTER / path).exists() for path in named)
    assert all(named & {path, *path.parents} for path in there)
