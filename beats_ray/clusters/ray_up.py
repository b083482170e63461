"""What must hold of a `ray up` file: Ray's own checks, then sizes, labels, tokens and, by provider, the machines.

Ray does not look into `node_config`, which goes to the cloud as it is: a misspelt key there is found when the first
node is asked for, and a missing one leaves a default that is open to the world.
"""

import copy
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

from beats_ray.clusters import aws, gcp

TOKEN_FILE = "~/.ray/auth_token"  # noqa: S105  a path
DATA_NODE_LABEL = ("beats-ray/role", "data")
"""What `beats_ray.data.stream` places reading and decoding by."""
SECRET = re.compile(
    r"(?:AKIA|ASIA)[A-Z0-9]{16}|-----BEGIN [A-Z ]*PRIVATE KEY|(?i:secret_access_key|password)\s*[=:]\s*\S"
)
"""Keys and passwords that nobody writes for another reason."""

NodeRules = Callable[[dict[str, Any], bool], Iterator[str]]
"""Rules of one machine: its node_config and whether it is the head; yields `field=value: rule; remedy`."""
PROVIDERS: dict[str, tuple[NodeRules, Callable[[dict[str, Any]], bool]]] = {
    "aws": (aws.node_mistakes, aws.is_spot),
    "gcp": (gcp.node_mistakes, gcp.is_spot),
}


DOCKER_OPTIONS = ("run_options", "worker_run_options")


def find_mistakes(config: dict[str, Any]) -> list[str]:
    """Every mistake as `field=value: rule; remedy`. Ray's own come first and alone: the rest needs a whole file."""
    found = _ray_mistakes(config)
    if found:
        return found
    types: dict[str, dict[str, Any]] = config.get("available_node_types") or {}
    provider = config["provider"]["type"]
    found = [*_access_mistakes(config), *_placement_mistakes(config, types), *_secret_mistakes(config)]
    if provider not in PROVIDERS:
        return found  # nothing is known of its node_config
    rules, is_spot = PROVIDERS[provider]
    for name, node_type in types.items():
        field = f"available_node_types.{name}.node_config"
        is_head = name == config.get("head_node_type")
        found += [f"{field}.{mistake}" for mistake in rules(node_type["node_config"], is_head)]
    return found + list(_spot_mistakes(types, is_spot))


def _ray_mistakes(config: dict[str, Any]) -> list[str]:
    """What Ray says of a file before it starts anything."""
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    logging.getLogger("ray.autoscaler").setLevel(logging.WARNING)  # it tells what it fills in

    if "available_node_types" not in config or not isinstance(config.get("provider"), dict):
        return ["available_node_types: missing, or no provider; a cluster file has both"]
    try:
        validate_config(prepare_config(copy.deepcopy(config)))
    except jsonschema.ValidationError as error:
        field = ".".join(str(part) for part in error.absolute_path) or "the file"
        return [f"{field}: {error.message}; correct it (Ray's schema of `ray up` files)"]
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError, RuntimeError, ImportError) as error:
        return [f"Ray refuses the file: {' '.join(str(error).split())}"]
    return []


def _access_mistakes(config: dict[str, Any]) -> Iterator[str]:
    """Tokens, ports and images."""
    if config["provider"].get("use_internal_ips") is not True:
        given = config["provider"].get("use_internal_ips")
        yield (
            f"provider.use_internal_ips={given}: nodes would be reached over public addresses; set true, and "
            "auth.ssh_proxy_command for the way in"
        )
    if not any(str(target).endswith("/.ray/auth_token") for target in config.get("file_mounts") or {}):
        yield f"file_mounts: no node gets the cluster's token; add {TOKEN_FILE}: {TOKEN_FILE}"
    for field in ("head_start_ray_commands", "worker_start_ray_commands"):
        commands = [command for command in config.get(field) or [] if "ray start" in command]
        if not commands:
            yield (
                f"{field}: missing, or has no `ray start`; Ray's own command starts it without tokens, and on the head "
                "with a dashboard that is open to all; write it out with `export RAY_AUTH_MODE=token;` in front"
            )
        for command in commands:
            if "RAY_AUTH_MODE=token" not in command:
                yield f"{field}={command!r}: starts Ray without tokens; put `export RAY_AUTH_MODE=token;` in front"
            if re.search(r"--dashboard-host[= ]+(?!127\.0\.0\.1|localhost)", command):
                yield f"{field}={command!r}: the dashboard must listen on loopback; use --dashboard-host=127.0.0.1"
    image = (config.get("docker") or {}).get("image") or ""
    if not is_pinned(image):
        yield f"docker.image={image!r}: all nodes must run one image; name it with a tag other than latest, or a digest"
    options = " ".join(
        str(option) for name in DOCKER_OPTIONS for option in (config.get("docker") or {}).get(name) or []
    )
    node_types = config.get("available_node_types") or {}
    if "NVIDIA_VISIBLE_DEVICES=" not in options and any(
        (node_type.get("resources") or {}).get("GPU") for node_type in node_types.values()
    ):
        yield (
            "docker.worker_run_options: NVIDIA's runtime shows a container no GPU without NVIDIA_VISIBLE_DEVICES; add "
            "--env=NVIDIA_VISIBLE_DEVICES=all"
        )


def is_pinned(image: str) -> bool:
    """Whether an image's name stands for one image, as far as its owner keeps tags."""
    if "@sha256:" in image:
        return True
    _, _, tag = image.rpartition("/")[2].partition(":")
    return tag not in ("", "latest")


def _placement_mistakes(config: dict[str, Any], types: dict[str, dict[str, Any]]) -> Iterator[str]:
    """What runs where."""
    head = config["head_node_type"]
    if types[head]["resources"].get("CPU") != 0:
        yield (
            f"available_node_types.{head}.resources.CPU={types[head]['resources'].get('CPU')}: training and decoding "
            "would run on the head node, and end it when memory is short; set 0"
        )
    name, value = DATA_NODE_LABEL
    if not any((node_type.get("labels") or {}).get(name) == value for node_type in types.values()):
        yield (
            f"available_node_types: none has the label {name}={value}, so data.placement=data-nodes would wait for "
            f"ever; add `labels: {{{name}: {value}}}` to the types that decode"
        )


def _spot_mistakes(types: dict[str, dict[str, Any]], is_spot: Callable[[dict[str, Any]], bool]) -> Iterator[str]:
    """A spot type needs one that does the same work when spot capacity is gone, and comes before it."""

    def work(node_type: dict[str, Any]) -> tuple[Any, ...]:
        resources, labels = node_type["resources"], node_type.get("labels") or {}
        return resources.get("CPU"), resources.get("GPU", 0), sorted(labels.items())

    for name, node_type in types.items():
        if not is_spot(node_type["node_config"]):
            continue
        priority = node_type.get("priority", 0)
        others = [
            other
            for other in types.values()
            if not is_spot(other["node_config"]) and work(other) == work(node_type) and other.get("max_workers", 1)
        ]
        if not any(other.get("priority", 0) < priority for other in others):
            yield (
                f"available_node_types.{name}.priority={priority}: no on-demand type with the same CPU, GPU and labels "
                "and a lower priority takes over when spot capacity is gone; add one"
            )


def _secret_mistakes(config: dict[str, Any]) -> Iterator[str]:
    if "gcp_credentials" in config["provider"]:
        yield "provider.gcp_credentials: a credential in a file; use the service accounts of the nodes"
    for field, text in _strings(config):
        key = field.rpartition(".")[2]  # of `redis_password: abc` the value alone tells nothing
        if SECRET.search(f"{key}: {text}"):
            yield f"{field}: holds what looks like a key or password; use the nodes' own role, and remove it here"


def _strings(value: Any, field: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _strings(part, f"{field}.{key}" if field else str(key))
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from _strings(part, f"{field}.{index}")
    elif isinstance(value, str):
        yield field, value
