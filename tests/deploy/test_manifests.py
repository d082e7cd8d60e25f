"""The cluster files of examples/ray: valid by their schemas, and of one mind with the config beside them.

What the schemas cover: `ray up`'s is Ray's own. Of the KubeRay manifest, pods are checked strictly against Kubernetes'
own definitions, and what is KubeRay's against a schema written by hand after its API. Neither is a cloud or an
operator.
"""

from __future__ import annotations

import copy
import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT7

from pairmill.plan import compile_plan
from pairmill.run import load_config, load_recipe
from pairmill.stage import Resources

EXAMPLES = Path("examples/ray")
SCHEMAS = Path(__file__).parent / "schemas"


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((EXAMPLES / name).read_text(encoding="utf-8"))
    return found


def check_kuberay(manifest: dict[str, Any]) -> None:
    pods = json.loads(gzip.decompress((SCHEMAS / "kubernetes-1.37-pods.json.gz").read_bytes()))
    registry = Registry().with_resource("kubernetes", Resource(pods, DRAFT7))
    schema = json.loads((SCHEMAS / "raycluster.json").read_text())
    jsonschema.Draft7Validator(schema, registry=registry).validate(manifest)


def check_ray_up(cluster: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(copy.deepcopy(cluster)))


def test_the_cluster_files_are_valid():
    check_kuberay(read("kuberay.yaml"))
    check_ray_up(read("cluster.yaml"))


def groups(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = manifest["spec"]["workerGroupSpecs"]
    return found


def container(group: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = group["template"]["spec"]["containers"][0]
    return found


WRONG: dict[str, Callable[[dict[str, Any]], object]] = {
    "an unknown field": lambda m: m["spec"].update(workerGroups=[]),
    "no bounds": lambda m: groups(m)[0].pop("maxReplicas"),
    "a number where ray start takes text": lambda m: groups(m)[0]["rayStartParams"].update({"num-cpus": 1}),
    "a misspelt field of a pod": lambda m: groups(m)[1]["template"]["spec"].update(toleration=[]),
    "a mount without a place": lambda m: container(groups(m)[1])["volumeMounts"][0].pop("mountPath"),
    "a token in no secret": lambda m: m["spec"]["autoscalerOptions"]["env"][1]["valueFrom"].update(secret="x"),
    "a mode that is none": lambda m: m["spec"]["autoscalerOptions"].update(upscalingMode="Fast"),
    "no containers": lambda m: m["spec"]["headGroupSpec"]["template"]["spec"].pop("containers"),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_manifest_is_refused(wrong: Callable[[dict[str, Any]], object]):
    manifest = copy.deepcopy(read("kuberay.yaml"))
    wrong(manifest)
    with pytest.raises(jsonschema.ValidationError):
        check_kuberay(manifest)


WRONG_UP: dict[str, Callable[[dict[str, Any]], object]] = {
    "an unknown field": lambda c: c.update(worker_nodes_max=3),
    "half a GPU of a machine": lambda c: c["available_node_types"]["gpu"]["resources"].update(GPU=0.5),
    "a misspelt field of a node": lambda c: c["available_node_types"]["gpu"].update(max_worker=3),
    "a provider without a type": lambda c: c["provider"].pop("type"),
}


@pytest.mark.parametrize("wrong", WRONG_UP.values(), ids=WRONG_UP.keys())
def test_a_wrong_cluster_file_is_refused(wrong: Callable[[dict[str, Any]], object]):
    cluster = copy.deepcopy(read("cluster.yaml"))
    wrong(cluster)
    with pytest.raises((jsonschema.ValidationError, KeyError, ValueError)):
        check_ray_up(cluster)


# -- what they say ----------------------------------------------------------------------------------------------------


def offers() -> dict[str, dict[str, dict[str, float]]]:
    """What one node of each kind offers, by file and kind: CPU, GPU and custom resources."""
    up = {name: kind["resources"] for name, kind in read("cluster.yaml")["available_node_types"].items()}
    kube: dict[str, dict[str, float]] = {}
    for group in groups(read("kuberay.yaml")):
        limits = container(group)["resources"]["limits"]
        # KubeRay puts the value into a shell's command line, hence the quotes within quotes
        custom = json.loads(json.loads(re.sub(r"^'|'$", "", group["rayStartParams"].get("resources", "'\"{}\"'"))))
        kube[group["groupName"]] = {
            "CPU": float(limits["cpu"]),
            "GPU": float(limits.get("nvidia.com/gpu", 0)),
            **custom,
        }
    assert read("kuberay.yaml")["spec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    kube["head"] = {"CPU": 0.0}
    return {"cluster.yaml": up, "kuberay.yaml": kube}


def fits(need: Resources, node: dict[str, float]) -> bool:
    wanted = {"CPU": need.cpus, "GPU": need.gpus, **dict(need.custom)}
    return all(node.get(name, 0) >= amount for name, amount in wanted.items())


@pytest.mark.parametrize("file", ["cluster.yaml", "kuberay.yaml"])
def test_stages_of_the_config_fit_the_nodes_that_they_are_for(file: str):
    nodes = offers()[file]
    plan = compile_plan(load_recipe(load_config(str(EXAMPLES / "config.yaml"))))
    placed = {
        step.name: {kind for kind, node in nodes.items() if fits(group.resources, node)}
        for segment in plan.segments
        for group in segment.groups
        for step in group.steps
        if step.kind == "stage"
    }
    assert {name for name, where in placed.items() if where == {"gpu"}} == {"clip", "captions", "caption_clip", "itm"}
    assert {name for name, where in placed.items() if where == {"fetch"}} == {"text_stats", "images", "image_stats"}
    assert not any("head" in where for where in placed.values())


def test_every_node_speaks_with_the_token_and_keeps_weights_in_one_place():
    kube = read("kuberay.yaml")
    pods = [kube["spec"]["headGroupSpec"], *groups(kube)]
    for said in [kube["spec"]["autoscalerOptions"]["env"], *(container(pod)["env"] for pod in pods)]:
        named = {entry["name"]: entry for entry in said}
        assert named["RAY_AUTH_MODE"]["value"] == "token"
        assert named["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": "pairmill-ray", "key": "token"}
    for pod in pods:
        cache = {entry["name"]: entry.get("value") for entry in container(pod)["env"]}
        mounts = {mount["mountPath"]: mount["name"] for mount in container(pod)["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["template"]["spec"]["volumes"]}
        assert str(cache["HF_HOME"]).startswith("/cache/") and str(cache["PAIRMILL_CACHE"]).startswith("/cache/")
        assert mounts["/cache"] in volumes
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    options = " ".join(read("cluster.yaml")["docker"]["run_options"])
    assert "RAY_AUTH_MODE=token" in options
    path = re.search(r"RAY_AUTH_TOKEN_PATH=(\S+)", options)
    assert path is not None and path[1] in read("cluster.yaml")["file_mounts"]


def test_one_image_one_ray():
    kube = read("kuberay.yaml")
    images = {container(pod)["image"] for pod in [kube["spec"]["headGroupSpec"], *groups(kube)]}
    assert images == {read("cluster.yaml")["docker"]["image"]} == {"REGISTRY/pairmill:TAG"}
    assert f"ray=={kube['spec']['rayVersion']}\n" in Path("requirements.txt").read_text()


def test_all_that_the_image_copies_is_there():
    lines = (EXAMPLES / "Dockerfile").read_text(encoding="utf-8").splitlines()
    copied = {name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]}
    assert {"pairmill", "schemas", "filters", "captioners", "pipelines", "pyproject.toml"} <= copied
    assert [name for name in copied if not Path(name).exists()] == []


def test_the_runtime_environment_is_one_that_ray_takes():
    from ray.runtime_env import RuntimeEnv

    said = read("runtime_env.yaml")
    assert Path(said["pip"]).is_file()
    assert {"HF_HOME", "PAIRMILL_CACHE"} <= said["env_vars"].keys()
    RuntimeEnv(**{**said, "pip": Path(said["pip"]).read_text().splitlines()[:1]})
    with pytest.raises(TypeError):
        RuntimeEnv(**{**said, "env_vars": {"HF_HOME": 1}})
