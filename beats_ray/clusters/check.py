"""`beats-ray check-cluster FILE|DIR ...`: whether files that start a cluster are sound and safe.

    beats-ray check-cluster cluster/aws.yaml cluster/kuberay/overlays/small cluster/iam/aws-worker.json

A YAML file with node types is one for `ray up`, a folder with a kustomization and any other YAML are Kubernetes
manifests, JSON is an IAM policy. Nothing is asked of a cloud or a cluster.
"""

import json
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from beats_ray.clusters import iam, kubernetes, ray_up
from beats_ray.errors import UserError

KUSTOMIZE = (("kubectl", "kustomize"), ("kustomize", "build"))
"""Programs that render a kustomization; the first one that is installed does."""


def check_files(paths: Sequence[str]) -> tuple[list[str], list[str]]:
    """What each file is, and every mistake as `FILE: field=value: rule; remedy`. UserError where one cannot be read."""
    found, mistakes = [], []
    for path in paths:
        description, lines = _check(Path(path))
        found.append(f"{path}: {description}")
        mistakes += [f"{path}: {line}" for line in lines]
    return found, mistakes


def read_manifests(path: Path) -> list[dict[str, Any]]:
    """The Kubernetes objects of a YAML file, or of a folder with a kustomization, rendered."""
    text = _render(path) if path.is_dir() else path.read_text()
    return [document for document in _load_all(path, text) if document]


def _check(path: Path) -> tuple[str, list[str]]:
    if not path.exists():
        raise UserError(f"{path}: does not exist; give a `ray up` file, Kubernetes manifests or an IAM policy")
    if path.suffix == ".json":
        try:
            policy = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: is no JSON ({error}); correct it") from None
        return "IAM policy", _judge(iam.find_mistakes, policy)
    documents = read_manifests(path)
    if not all(isinstance(document, dict) for document in documents) or not documents:
        raise UserError(f"{path}: is neither a `ray up` file nor Kubernetes manifests; give one of these")
    if any("cluster_name" in document or "available_node_types" in document for document in documents):
        config = documents[0]
        types = len(config.get("available_node_types") or {})
        return f"`ray up` file, {types} node types", _judge(ray_up.find_mistakes, config)
    return f"{len(documents)} Kubernetes objects", _judge(kubernetes.find_mistakes, documents)


def _judge(rules: Callable[[Any], list[str]], content: Any) -> list[str]:
    """What the rules find. They take fields for what they are; where one is of another type, that is the mistake."""
    try:
        return rules(content)
    except (AttributeError, KeyError, TypeError) as error:
        return [f"a field holds a value of another type than it must ({error}); correct it: the rest was not looked at"]


def _render(folder: Path) -> str:
    if not (folder / "kustomization.yaml").exists():
        raise UserError(f"{folder}: has no kustomization.yaml; give a folder that has one, or a file")
    command = next((list(command) for command in KUSTOMIZE if shutil.which(command[0])), None)
    if command is None:
        raise UserError(f"{folder}: a kustomization needs kubectl or kustomize, and neither is installed; install one")
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{folder}: {' '.join(done.stderr.split())}; correct the kustomization")
    return done.stdout


def _load_all(path: Path, text: str) -> list[Any]:
    try:
        return list(yaml.safe_load_all(text))
    except yaml.YAMLError as error:
        raise UserError(f"{path}: is no YAML ({' '.join(str(error).split())}); correct it") from None
