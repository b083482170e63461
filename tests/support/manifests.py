"""Kubernetes objects against published schemas: KubeRay's own, and Kubernetes' (package `kubernetes-validate`).

A key that a schema does not name is a mistake here; an API server would drop it.
"""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

SCHEMAS = Path(__file__).parents[3] / "shared" / "schemas"
"""KubeRay's definitions (operator 1.7.0) as JSON, one file a kind; no part of the repository."""
KUBERNETES_VERSION = "1.32"


def kuberay_mistakes(manifest: dict[str, Any]) -> list[str]:
    """What the schema of the object's kind says against it. Skips where the schema is absent."""
    path = SCHEMAS / f"kuberay-{manifest['kind'].lower()}s-v1.json"
    if not path.exists():
        pytest.skip(f"KubeRay's schemas are not beside the repository ({path.name})")
    schema = _strict(json.loads(path.read_text())["schema"])
    errors = jsonschema.Draft7Validator(schema).iter_errors(manifest)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in errors]


def kubernetes_mistakes(manifest: dict[str, Any]) -> list[str]:
    """What Kubernetes' schema says against an object of its own. Skips where the package is absent."""
    package = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    try:
        package.validate(manifest, KUBERNETES_VERSION, strict=True)
    except package.ValidationError as error:
        return [str(error.message)]
    return []


def _strict(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _strict(part) for key, part in schema.items()}
    if closed.get("type") == "object" and "properties" in closed:
        closed.setdefault("additionalProperties", False)
    return closed
