"""What must hold of Kubernetes manifests of a Ray cluster: closed pods, tokens, placement, and a closed network.

Keys are for the API server to judge (`kubectl apply --dry-run=server`); this is about what it would accept.
"""

import re
from collections.abc import Iterator
from typing import Any

from beats_ray.clusters.ray_up import DATA_NODE_LABEL, SECRET, is_pinned

METADATA_ADDRESS = "169.254.169.254"
METADATA_POLICY = "metadata-server"
"""The policy of `cluster/kuberay/components/gke`, which alone may open it."""
PODS_OF = {"StatefulSet": "template", "Deployment": "template", "Job": "template", "DaemonSet": "template"}
SECRET_NAME = re.compile(r"(?i)password|secret|token|access_key")
RAY_KINDS = ("RayCluster", "RayJob")


def find_mistakes(manifests: list[dict[str, Any]]) -> list[str]:
    """Every mistake as `Kind/name: field=value: rule; remedy`, of objects that are applied together."""
    found: list[str] = []
    for manifest in manifests:
        kind, name = manifest.get("kind", "?"), (manifest.get("metadata") or {}).get("name", "?")
        spec = manifest.get("spec") or {}
        lines = [f"{field}.{line}" for field, pod in _pods(kind, spec) for line in _pod_mistakes(pod)]
        if kind == "RayCluster":
            lines += _cluster_mistakes(spec, "spec")
        if kind == "RayJob":
            lines += _job_mistakes(spec)
        if kind == "Secret":
            lines.append("kind=Secret: a secret in a file; make it with `kubectl create secret`")
        found += [f"{kind}/{name}: {line}" for line in lines]
    if any(manifest.get("kind") in RAY_KINDS for manifest in manifests):
        found += _network_mistakes(manifests)
    return found


def _cluster_mistakes(spec: dict[str, Any], field: str) -> Iterator[str]:
    """Of a RayCluster's spec, or a RayJob's rayClusterSpec."""
    mode = (spec.get("authOptions") or {}).get("mode")
    if mode != "token":
        yield f"{field}.authOptions.mode={mode}: whoever reaches the cluster could run code; set token"
    head = spec.get("headGroupSpec") or {}
    cpus = (head.get("rayStartParams") or {}).get("num-cpus")
    if cpus != "0":
        yield (
            f"{field}.headGroupSpec.rayStartParams.num-cpus={cpus}: training and decoding would run on the head, and "
            'end it when memory is short; set "0"'
        )
    service = head.get("serviceType", "ClusterIP")
    if service != "ClusterIP" or head.get("enableIngress"):
        what = "enableIngress=true" if head.get("enableIngress") else f"serviceType={service}"
        yield f"{field}.headGroupSpec.{what}: opens the cluster to others; use ClusterIP and `kubectl port-forward`"
    if spec.get("enableInTreeAutoscaling") and (spec.get("autoscalerOptions") or {}).get("version") != "v2":
        yield f"{field}.autoscalerOptions.version: only v2 starts nodes by label and priority; set v2"
    groups = spec.get("workerGroupSpecs") or []
    name, value = DATA_NODE_LABEL
    if groups and not any((group.get("labels") or {}).get(name) == value for group in groups):
        yield (
            f"{field}.workerGroupSpecs: no group has the label {name}={value}, so data.placement=data-nodes would wait "
            f"for ever; add `labels: {{{name}: {value}}}` to the group that decodes"
        )
    for index, group in enumerate(groups):
        pod = ((group.get("template") or {}).get("spec")) or {}
        if pod.get("automountServiceAccountToken") is not False:
            yield (
                f"{field}.workerGroupSpecs.{index}.template.spec.automountServiceAccountToken: jobs could speak "
                "to the Kubernetes API; set false"
            )


def _job_mistakes(spec: dict[str, Any]) -> Iterator[str]:
    cluster = spec.get("rayClusterSpec")
    if cluster is not None:
        yield from _cluster_mistakes(cluster, "spec.rayClusterSpec")
        if not spec.get("shutdownAfterJobFinishes"):
            yield "spec.shutdownAfterJobFinishes: the job's cluster would stay and cost; set true"
    for field in ("entrypoint", "runtimeEnvYAML"):
        if SECRET.search(str(spec.get(field, ""))):
            yield f"spec.{field}: holds what looks like a key or password; use the service account, and remove it here"


def _pods(kind: str, spec: dict[str, Any], field: str = "spec") -> Iterator[tuple[str, dict[str, Any]]]:
    """The pod specs of an object, with where they stand in it."""
    if kind == "RayCluster":
        yield f"{field}.headGroupSpec.template.spec", _spec_of(spec.get("headGroupSpec"))
        for index, group in enumerate(spec.get("workerGroupSpecs") or []):
            yield f"{field}.workerGroupSpecs.{index}.template.spec", _spec_of(group)
    elif kind == "RayJob":
        yield from (
            _pods("RayCluster", spec["rayClusterSpec"], f"{field}.rayClusterSpec") if "rayClusterSpec" in spec else ()
        )
        if "submitterPodTemplate" in spec:
            yield f"{field}.submitterPodTemplate.spec", spec["submitterPodTemplate"].get("spec") or {}
    elif kind == "Pod":
        yield field, spec
    elif kind in PODS_OF:
        yield f"{field}.template.spec", _spec_of(spec)


def _spec_of(holder: dict[str, Any] | None) -> dict[str, Any]:
    return ((holder or {}).get("template") or {}).get("spec") or {}


def _pod_mistakes(pod: dict[str, Any]) -> Iterator[str]:
    security = pod.get("securityContext") or {}
    if security.get("runAsNonRoot") is not True:
        yield f"securityContext.runAsNonRoot={security.get('runAsNonRoot')}: nothing here needs root; set true"
    profile = (security.get("seccompProfile") or {}).get("type")
    if profile not in ("RuntimeDefault", "Localhost"):
        yield f"securityContext.seccompProfile.type={profile}: system calls are not filtered; set RuntimeDefault"
    for switch in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(switch):
            yield f"{switch}=true: the pod would share the node's; leave it out"
    for index, volume in enumerate(pod.get("volumes") or []):
        if "hostPath" in volume:
            yield f"volumes.{index}.hostPath: opens the node's disk to the pod; use emptyDir or a claim"
    for index, container in enumerate([*(pod.get("initContainers") or []), *(pod.get("containers") or [])]):
        yield from (f"containers.{index}.{line}" for line in _container_mistakes(container))


def _container_mistakes(container: dict[str, Any]) -> Iterator[str]:
    security = container.get("securityContext") or {}
    if security.get("allowPrivilegeEscalation") is not False:
        yield "securityContext.allowPrivilegeEscalation: a program could take more rights than its user has; set false"
    if "ALL" not in ((security.get("capabilities") or {}).get("drop") or []):
        yield "securityContext.capabilities.drop: no capability is needed; set [ALL]"
    if security.get("privileged"):
        yield "securityContext.privileged=true: the container would own the node; leave it out"
    image = container.get("image") or ""
    if not is_pinned(image):
        yield f"image={image!r}: all nodes must run one image; name it with a tag other than latest, or a digest"
    resources = container.get("resources") or {}
    if not (resources.get("limits") or {}).get("memory"):
        yield "resources.limits.memory: missing: a full node ends whichever pod the kernel chooses; set it"
    gpus = [(resources.get(part) or {}).get("nvidia.com/gpu") for part in ("requests", "limits")]
    if gpus[0] != gpus[1]:
        yield f"resources: nvidia.com/gpu is {gpus[0]} in requests and {gpus[1]} in limits; Kubernetes wants both alike"
    for variable in container.get("env") or []:
        if "value" in variable and (
            SECRET_NAME.search(variable.get("name", "")) or SECRET.search(str(variable["value"]))
        ):
            yield f"env.{variable.get('name')}: a secret in a file; take it from a Secret with valueFrom.secretKeyRef"


def _network_mistakes(manifests: list[dict[str, Any]]) -> Iterator[str]:
    found = [manifest for manifest in manifests if manifest.get("kind") == "NetworkPolicy"]
    policies = [manifest.get("spec") or {} for manifest in found]
    for direction in ("Ingress", "Egress"):
        rule = direction.lower()
        if not any(
            not policy.get("podSelector") and direction in policy.get("policyTypes", []) and not policy.get(rule)
            for policy in policies
        ):
            yield (
                f"NetworkPolicy: none denies {rule} by default (podSelector: {{}}, policyTypes: [{direction}], no "
                "rules); add one, and allow what is needed"
            )
    for manifest, policy in zip(found, policies, strict=True):
        name = (manifest.get("metadata") or {}).get("name")
        peers = [peer for rule in policy.get("egress") or [] for peer in rule.get("to") or []]
        blocks = [(peer.get("ipBlock") or {}).get("cidr") or "" for peer in peers]
        if name != METADATA_POLICY and any(METADATA_ADDRESS in block for block in blocks):
            yield (
                f"NetworkPolicy {name}: {METADATA_ADDRESS} hands the node's own role to pods where it is not GKE's; "
                "leave it out, or use components/gke"
            )
        for rule in policy.get("ingress") or []:
            if not rule.get("from"):
                yield "NetworkPolicy: an ingress rule without `from` lets everybody in; name who may"
