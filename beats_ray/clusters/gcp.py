"""What must hold of a `node_config` on Google Cloud: keys as Compute Engine's API has them, and closed machines.

A test compares the table of keys with the API's own description where google-api-python-client is installed.
"""

import difflib
from collections.abc import Iterator
from typing import Any

Keys = dict[str, "Keys | tuple[str, ...] | None"]
"""Keys of an object: those of the objects below it, the values it takes, or None for anything."""

_ANY = dict.fromkeys
INSTANCE: Keys = {
    **_ANY(
        (
            "advancedMachineFeatures", "confidentialInstanceConfig", "canIpForward", "deletionProtection",
            "description", "displayDevice", "hostname", "keyRevocationActionType", "labels", "machineType",
            "minCpuPlatform", "networkPerformanceConfig", "params", "privateIpv6GoogleAccess", "reservationAffinity",
            "resourcePolicies", "sourceMachineImage",
        )
    ),
    "disks": {
        **_ANY(
            (
                "architecture", "autoDelete", "boot", "deviceName", "diskEncryptionKey", "diskSizeGb",
                "guestOsFeatures", "interface", "mode", "source",
            )
        ),
        "type": ("PERSISTENT", "SCRATCH"),
        "initializeParams": _ANY(
            (
                "description", "diskName", "diskSizeGb", "diskType", "labels", "provisionedIops",
                "provisionedThroughput", "resourcePolicies", "sourceImage", "sourceSnapshot", "storagePool",
            )
        ),
    },
    "guestAccelerators": _ANY(("acceleratorCount", "acceleratorType")),
    "metadata": {"items": _ANY(("key", "value"))},
    "networkInterfaces": _ANY(
        ("accessConfigs", "aliasIpRanges", "ipv6AccessConfigs", "network", "networkIP", "nicType", "queueCount",
         "stackType", "subnetwork")
    ),
    "scheduling": {
        **_ANY(("automaticRestart", "localSsdRecoveryTimeout", "maxRunDuration", "nodeAffinities", "preemptible")),
        "instanceTerminationAction": ("DELETE", "STOP"),
        "onHostMaintenance": ("MIGRATE", "TERMINATE"),
        "provisioningModel": ("SPOT", "STANDARD", "FLEX_START", "RESERVATION_BOUND"),
    },
    "serviceAccounts": _ANY(("email", "scopes")),
    "shieldedInstanceConfig": _ANY(("enableIntegrityMonitoring", "enableSecureBoot", "enableVtpm")),
    "tags": {"items": None},
}  # fmt: skip
"""Of Compute Engine v1, instances.insert: what a request may set."""
RAYS_KEYS = {"sourceInstanceTemplate"}
"""Keys that Ray takes out before it calls the API."""


def is_spot(node: dict[str, Any]) -> bool:
    """Whether Compute Engine may take the machine back."""
    scheduling = node.get("scheduling")
    return isinstance(scheduling, dict) and (
        scheduling.get("provisioningModel") == "SPOT" or bool(scheduling.get("preemptible"))
    )


def node_mistakes(node: dict[str, Any], is_head: bool) -> Iterator[str]:
    """Every mistake as `field=value: rule; remedy`; nothing but the keys is looked at where these are wrong."""
    unknown = list(_unknown({key: value for key, value in node.items() if key not in RAYS_KEYS}, INSTANCE, ""))
    if unknown:
        yield from unknown
        return
    yield from _network_mistakes(node)
    if not node.get("serviceAccounts"):
        yield "serviceAccounts: missing: the node would have the rights of another account; name one of its own"
    shield = node.get("shieldedInstanceConfig") or {}
    for switch in ("enableVtpm", "enableIntegrityMonitoring"):
        if shield.get(switch) is not True:
            yield f"shieldedInstanceConfig.{switch}={shield.get(switch)}: changes at start-up would go unseen; set true"
    for index, disk in enumerate(node.get("disks") or []):
        if disk.get("autoDelete") is not True:
            yield f"disks.{index}.autoDelete={disk.get('autoDelete')}: the disk would outlive its node; set true"
    if is_spot(node):
        yield from _spot_mistakes(node["scheduling"], is_head)


def _network_mistakes(node: dict[str, Any]) -> Iterator[str]:
    interfaces = node.get("networkInterfaces") or []
    if not interfaces:
        yield "networkInterfaces: missing: Ray would give the node a public address; name a subnetwork"
    for index, interface in enumerate(interfaces):
        for kind in ("accessConfigs", "ipv6AccessConfigs"):
            if interface.get(kind):
                yield f"networkInterfaces.{index}.{kind}={interface[kind]}: a public address; leave it out"
    if node.get("canIpForward"):
        yield "canIpForward=true: the node could send under other addresses; leave it out"


def _spot_mistakes(scheduling: dict[str, Any], is_head: bool) -> Iterator[str]:
    if is_head:
        yield "scheduling.provisioningModel=SPOT: the cluster ends with its head node; leave it out"
    if scheduling.get("preemptible"):
        yield "scheduling.preemptible=true: such nodes end after a day at the latest; use provisioningModel: SPOT"
    action = scheduling.get("instanceTerminationAction")
    if action != "DELETE":
        yield (
            f"scheduling.instanceTerminationAction={action}: a node that is only stopped keeps its disk and comes back "
            "as none that Ray knows; set DELETE"
        )
    if scheduling.get("automaticRestart") is not False:
        yield (
            f"scheduling.automaticRestart={scheduling.get('automaticRestart')}: spot machines cannot be started again "
            "by themselves; set false"
        )


def _unknown(value: Any, keys: "Keys | tuple[str, ...] | None", field: str) -> Iterator[str]:
    if isinstance(value, list):
        for index, part in enumerate(value):
            yield from _unknown(part, keys, f"{field}.{index}")
    elif isinstance(keys, dict):
        if not isinstance(value, dict):
            yield f"{field}={value}: must be an object with {', '.join(keys)}; correct it"
            return
        for name, part in value.items():
            place = f"{field}.{name}" if field else name
            if name in keys:
                yield from _unknown(part, keys[name], place)
            else:
                near = difflib.get_close_matches(name, keys, 1, 0.6)
                yield f"{place}: unknown key; " + (f"did you mean {near[0]}?" if near else f"known: {', '.join(keys)}")
    elif keys is not None and value not in keys:
        yield f"{field}={value}: is none of {', '.join(keys)}; use one of these"
