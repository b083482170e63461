"""`cluster/kuberay`: what kustomize renders fits the published schemas and is closed; each way to break it is seen."""

import copy
import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.manifests import kuberay_mistakes, kubernetes_mistakes

from beats_ray.clusters.check import KUSTOMIZE, read_manifests
from beats_ray.clusters.kubernetes import find_mistakes
from beats_ray.data.stream import DATA_NODE_LABELS
from beats_ray.errors import UserError

pytestmark = pytest.mark.unit

KUBERAY = Path(__file__).parents[3] / "cluster" / "kuberay"
FOLDERS = ["overlays/small", "overlays/large", "jobs/sweep-esc50"]
Objects = list[dict[str, Any]]


@cache
def _rendered(folder: str) -> Objects:
    if not any(shutil.which(program) for program, _ in KUSTOMIZE):
        pytest.skip("neither kubectl nor kustomize is installed")
    return read_manifests(KUBERAY / folder)


def render(folder: str) -> Objects:
    return copy.deepcopy(_rendered(folder))


def of_kind(objects: Objects, kind: str) -> dict[str, Any]:
    return next(item for item in objects if item["kind"] == kind)


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_objects_are_closed(folder: str) -> None:
    assert find_mistakes(render(folder)) == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_objects_fit_kuberay_s_schemas(folder: str) -> None:
    ray = [item for item in render(folder) if item["apiVersion"].startswith("ray.io/")]
    assert [item["kind"] for item in ray] == ["RayJob" if folder.startswith("jobs/") else "RayCluster"]
    assert [kuberay_mistakes(item) for item in ray] == [[]]


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_other_objects_fit_kubernetes_schemas(folder: str) -> None:
    others = [item for item in render(folder) if not item["apiVersion"].startswith("ray.io/")]
    assert {"Namespace", "ServiceAccount", "NetworkPolicy"} <= {item["kind"] for item in others}
    assert [line for item in others for line in kubernetes_mistakes(item)] == []


@pytest.mark.parametrize(("component", "policy"), [("gke", "metadata-server"), ("monitoring", "metrics")])
def test_a_component_adds_its_policy_and_leaves_the_objects_closed(component: str, policy: str, tmp_path: Path) -> None:
    if not any(shutil.which(program) for program, _ in KUSTOMIZE):
        pytest.skip("neither kubectl nor kustomize is installed")
    base, added = (os.path.relpath(KUBERAY / part, tmp_path) for part in ("overlays/small", f"components/{component}"))
    (tmp_path / "kustomization.yaml").write_text(f"resources: [{base}]\ncomponents: [{added}]\n")
    objects = read_manifests(tmp_path)
    assert find_mistakes(objects) == []
    policies = [item for item in objects if item["kind"] == "NetworkPolicy"]
    assert policy in {item["metadata"]["name"] for item in policies}
    assert {item["metadata"]["namespace"] for item in policies} == {"beats-ray"}
    assert [line for item in policies for line in kubernetes_mistakes(item)] == []


def test_the_node_s_metadata_is_open_to_pods_by_gke_s_component_alone() -> None:
    objects = render("overlays/small")
    names = next(item for item in objects if item["metadata"]["name"] == "names-and-storage")
    names["spec"]["egress"].append({"to": [{"ipBlock": {"cidr": "169.254.169.254/32"}}]})
    (mistake,) = find_mistakes(objects)
    assert "NetworkPolicy names-and-storage: 169.254.169.254" in mistake
    names["metadata"]["name"] = "metadata-server"
    assert find_mistakes(objects) == []


def test_the_overlays_differ_in_size_and_the_job_s_cluster_is_the_overlay_s() -> None:
    small, large = (of_kind(render(f"overlays/{size}"), "RayCluster")["spec"] for size in ("small", "large"))
    groups = [[group["groupName"] for group in spec["workerGroupSpecs"]] for spec in (small, large)]
    assert groups == [["data", "gpu1", "gpu8"]] * 2
    assert [group["maxReplicas"] for group in small["workerGroupSpecs"]] == [4, 4, 0]
    assert [group["maxReplicas"] for group in large["workerGroupSpecs"]] == [32, 8, 8]
    assert small["workerGroupSpecs"][0]["labels"] == DATA_NODE_LABELS
    assert all(group["minReplicas"] == 0 for spec in (small, large) for group in spec["workerGroupSpecs"])
    assert ("tlsOptions" in small, large["tlsOptions"]) == (False, {"enabled": True})
    assert large["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]["secretKeyRef"]["key"] == "password"
    job = of_kind(render("jobs/sweep-esc50"), "RayJob")
    assert job["spec"]["rayClusterSpec"] == small


def test_a_job_waits_for_the_last_checkpoint_and_its_script_is_there() -> None:
    from beats_ray.train.jobs import NOTICE_SECONDS

    job = of_kind(render("jobs/sweep-esc50"), "RayJob")["spec"]
    environment = yaml.safe_load(job["runtimeEnvYAML"])["env_vars"]
    assert float(environment["RAY_JOB_STOP_WAIT_TIME_S"]) > NOTICE_SECONDS + 10
    for word in job["entrypoint"].split():
        if word.startswith("/opt/beats-ray/"):
            assert (KUBERAY.parents[1] / word.removeprefix("/opt/beats-ray/")).exists(), word
    groups = job["rayClusterSpec"]["workerGroupSpecs"]
    assert all(group["template"]["spec"]["terminationGracePeriodSeconds"] > NOTICE_SECONDS for group in groups)


def cluster(objects: Objects) -> dict[str, Any]:
    found: dict[str, Any] = of_kind(objects, "RayCluster")["spec"]
    return found


def pod(objects: Objects, group: int) -> dict[str, Any]:
    found: dict[str, Any] = cluster(objects)["workerGroupSpecs"][group]["template"]["spec"]
    return found


def without(objects: Objects, name: str) -> None:
    objects[:] = [item for item in objects if item["metadata"]["name"] != name]


OPEN: list[tuple[str, Callable[[Objects], Any], str]] = [
    ("no token", lambda o: cluster(o).pop("authOptions"), "authOptions.mode=None"),
    ("head trains", lambda o: cluster(o)["headGroupSpec"]["rayStartParams"].pop("num-cpus"), "num-cpus=None"),
    (
        "to the world",
        lambda o: cluster(o)["headGroupSpec"].update(serviceType="LoadBalancer"),
        "serviceType=LoadBalancer",
    ),
    ("ingress", lambda o: cluster(o)["headGroupSpec"].update(enableIngress=True), "enableIngress=true"),
    ("old autoscaler", lambda o: cluster(o)["autoscalerOptions"].update(version="v1"), "only v2 starts nodes by label"),
    ("no data group", lambda o: cluster(o)["workerGroupSpecs"][0].pop("labels"), "no group has the label"),
    ("root", lambda o: pod(o, 1)["securityContext"].pop("runAsNonRoot"), "workerGroupSpecs.1.template.spec.securityC"),
    ("no seccomp", lambda o: pod(o, 1)["securityContext"].pop("seccompProfile"), "system calls are not filtered"),
    ("host network", lambda o: pod(o, 0).update(hostNetwork=True), "hostNetwork=true"),
    (
        "host path",
        lambda o: pod(o, 0)["volumes"].append({"name": "h", "hostPath": {"path": "/"}}),
        "volumes.2.hostPath",
    ),
    ("API token", lambda o: pod(o, 0).update(automountServiceAccountToken=True), "speak to the Kubernetes API"),
    ("more rights", lambda o: pod(o, 0)["containers"][0].pop("securityContext"), "allowPrivilegeEscalation"),
    ("capabilities", lambda o: pod(o, 0)["containers"][0]["securityContext"].pop("capabilities"), "capabilities.drop"),
    ("privileged", lambda o: pod(o, 0)["containers"][0]["securityContext"].update(privileged=True), "own the node"),
    ("latest", lambda o: pod(o, 0)["containers"][0].update(image="beats-ray:latest"), "with a tag other than latest"),
    ("no limit", lambda o: pod(o, 0)["containers"][0].pop("resources"), "limits.memory: missing"),
    (
        "GPU in requests alone",
        lambda o: pod(o, 1)["containers"][0]["resources"]["limits"].pop("nvidia.com/gpu"),
        "nvidia.com/gpu is 1 in requests and None in limits",
    ),
    (
        "password",
        lambda o: pod(o, 0)["containers"][0].update(env=[{"name": "REDIS_PASSWORD", "value": "x"}]),
        "env.REDIS_PASSWORD: a secret in a file",
    ),
    ("a Secret", lambda o: o.append({"kind": "Secret", "metadata": {"name": "s"}}), "make it with `kubectl create sec"),
    ("open network", lambda o: without(o, "deny-all"), "none denies ingress by default"),
    (
        "open to all",
        lambda o: next(i for i in o if i["metadata"]["name"] == "operator-to-dashboard")["spec"].update(ingress=[{}]),
        "without `from` lets everybody in",
    ),
]


@pytest.mark.parametrize(("break_it", "said"), [case[1:] for case in OPEN], ids=[case[0] for case in OPEN])
def test_an_open_object_is_named_with_field_and_remedy(break_it: Callable[[Objects], Any], said: str) -> None:
    objects = render("overlays/small")
    break_it(objects)
    found = find_mistakes(objects)
    assert any(said in line for line in found), found


def test_a_job_whose_cluster_stays_or_is_open_is_named() -> None:
    objects = render("jobs/sweep-esc50")
    spec = of_kind(objects, "RayJob")["spec"]
    spec["shutdownAfterJobFinishes"] = False
    spec["rayClusterSpec"]["authOptions"]["mode"] = "disabled"
    spec["entrypoint"] += " password=hunter2"
    del spec["submitterPodTemplate"]["spec"]["securityContext"]
    found = "\n".join(find_mistakes(objects))
    assert "RayJob/sweep-esc50: spec.shutdownAfterJobFinishes" in found
    assert "spec.rayClusterSpec.authOptions.mode=disabled" in found
    assert "spec.entrypoint: holds what looks like a key" in found
    assert "spec.submitterPodTemplate.spec.securityContext.runAsNonRoot" in found


INVALID: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
    ("misspelt key", lambda c: c.update(enableInTreeAutoscalin=True), "'enableInTreeAutoscalin' was unexpected"),
    ("wrong type", lambda c: c["workerGroupSpecs"][0].update(maxReplicas="4"), "is not of type 'integer'"),
    ("no head", lambda c: c.pop("headGroupSpec"), "'headGroupSpec' is a required property"),
    ("unknown value", lambda c: c["authOptions"].update(mode="password"), "is not one of"),
    ("no group name", lambda c: c["workerGroupSpecs"][1].pop("groupName"), "'groupName' is a required property"),
    (
        "number for text",
        lambda c: c["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
        "is not of type 'string'",
    ),
]


@pytest.mark.parametrize(("break_it", "said"), [case[1:] for case in INVALID], ids=[case[0] for case in INVALID])
def test_a_cluster_or_job_that_kuberay_would_not_take_is_seen(
    break_it: Callable[[dict[str, Any]], Any], said: str
) -> None:
    for folder in ("overlays/small", "jobs/sweep-esc50"):
        objects = render(folder)
        item = next(item for item in objects if item["apiVersion"].startswith("ray.io/"))
        break_it(item["spec"].get("rayClusterSpec") or item["spec"])
        found = kuberay_mistakes(item)
        assert any(said in line for line in found), found


@pytest.mark.parametrize(
    ("kind", "break_it", "said"),
    [
        ("NetworkPolicy", lambda o: o["spec"].update(policyType=["Ingress"]), "policyType"),
        ("NetworkPolicy", lambda o: o["spec"].update(policyTypes="Ingress"), "is not of type"),
        ("ServiceAccount", lambda o: o.update(automountServiceAccountToken="no"), "is not of type"),
        ("ServiceAccount", lambda o: o["metadata"].update(annotation={}), "annotation"),
        ("StatefulSet", lambda o: o["spec"].pop("selector"), "'selector' is a required property"),
        ("StatefulSet", lambda o: o["spec"]["template"]["spec"]["containers"][0].pop("name"), "'name' is a required"),
        ("Service", lambda o: o["spec"]["ports"][0].update(port="redis"), "is not of type"),
        ("Namespace", lambda o: o["metadata"].update(labels=["restricted"]), "is not of type"),
    ],
)
def test_an_object_that_kubernetes_would_not_take_is_seen(
    kind: str, break_it: Callable[[dict[str, Any]], Any], said: str
) -> None:
    item = of_kind(render("overlays/large"), kind)
    assert kubernetes_mistakes(item) == []
    break_it(item)
    found = kubernetes_mistakes(item)
    assert any(said in line for line in found), found


def test_a_broken_kustomization_and_a_machine_without_kustomize_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="has no kustomization"):
        read_manifests(tmp_path)
    (tmp_path / "kustomization.yaml").write_text("resources: [absent.yaml]")
    if any(shutil.which(program) for program, _ in KUSTOMIZE):
        with pytest.raises(UserError, match=r"absent\.yaml.*correct the kustomization"):
            read_manifests(tmp_path)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="needs kubectl or kustomize"):
        read_manifests(tmp_path)
