"""What must hold of a `node_config` on AWS: keys and types as EC2's own description has them, and closed machines."""

import difflib
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

RAYS_KEYS = {"SubnetIds": None}
"""Keys that Ray takes out before it calls EC2."""
REQUIRED = {"MinCount": 1, "MaxCount": 1}
"""What Ray adds."""


def is_spot(node: dict[str, Any]) -> bool:
    """Whether EC2 may take the machine back."""
    options = node.get("InstanceMarketOptions")
    return isinstance(options, dict) and options.get("MarketType") == "spot"


def node_mistakes(node: dict[str, Any], is_head: bool) -> Iterator[str]:
    """Every mistake as `field=value: rule; remedy`; nothing but the keys is looked at where these are wrong."""
    unknown = list(_unknown(node))
    if unknown:
        yield from unknown
        return
    yield from _network_mistakes(node)
    tokens = (node.get("MetadataOptions") or {}).get("HttpTokens")
    if tokens != "required":
        yield (
            f"MetadataOptions.HttpTokens={tokens}: any request from the machine could read its credentials (IMDSv1); "
            "set required"
        )
    disks = node.get("BlockDeviceMappings") or []
    if not disks:
        yield "BlockDeviceMappings: missing, so the disk is as the image has it; give one with Ebs.Encrypted: true"
    for index, disk in enumerate(disks):
        encrypted = (disk.get("Ebs") or {}).get("Encrypted")
        if "Ebs" in disk and encrypted is not True:
            yield f"BlockDeviceMappings.{index}.Ebs.Encrypted={encrypted}: disks must be encrypted; set true"
    if not node.get("IamInstanceProfile"):
        what = "Ray gives the head full rights over EC2 and S3" if is_head else "the node cannot reach the object store"
        yield f"IamInstanceProfile: missing: {what}; name a profile with the policies of cluster/iam"
    if is_spot(node):
        yield from _spot_mistakes(node, is_head)


def _network_mistakes(node: dict[str, Any]) -> Iterator[str]:
    interfaces = node.get("NetworkInterfaces") or []
    if not interfaces:
        yield (
            "NetworkInterfaces: missing, so the subnet decides on public addresses; give one with "
            "AssociatePublicIpAddress: false"
        )
    for index, interface in enumerate(interfaces):
        public = interface.get("AssociatePublicIpAddress")
        if public is not False:
            yield f"NetworkInterfaces.{index}.AssociatePublicIpAddress={public}: no node may have one; set false"
        if not interface.get("Groups"):
            yield (
                f"NetworkInterfaces.{index}.Groups: missing: Ray would make a security group that lets the whole world "
                "in on port 22; name one that lets its own members in"
            )


def _spot_mistakes(node: dict[str, Any], is_head: bool) -> Iterator[str]:
    if is_head:
        yield "InstanceMarketOptions.MarketType=spot: the cluster ends with its head node; leave it out"
    options = node["InstanceMarketOptions"].get("SpotOptions") or {}
    if options.get("SpotInstanceType", "one-time") != "one-time":
        yield (
            f"InstanceMarketOptions.SpotOptions.SpotInstanceType={options['SpotInstanceType']}: EC2 would start again "
            "what Ray has ended; use one-time"
        )
    behavior = options.get("InstanceInterruptionBehavior", "terminate")
    if behavior != "terminate":
        yield (
            f"InstanceMarketOptions.SpotOptions.InstanceInterruptionBehavior={behavior}: Ray does not know a node "
            "that comes back, and its disk costs until then; use terminate"
        )


def _unknown(node: dict[str, Any]) -> Iterator[str]:
    """Keys that EC2 does not know, values of another type or none of those that it takes."""
    from botocore.validate import ParamValidator

    shape = _run_instances_shape()
    given = {key: value for key, value in node.items() if key not in RAYS_KEYS}
    lines = ParamValidator().validate(given | REQUIRED, shape).generate_report().splitlines()
    for line in lines:
        problem, _, known = line.partition(", must be one of:")
        near = _nearest(problem, known)
        yield f"{_where(problem)}: {problem}{near}"
    if not lines:  # the shape fits
        yield from _other_values(given, shape, "")


def _where(problem: str) -> str:
    """The field that a line of botocore's speaks of: behind `in` stands its parent, behind `parameter` itself."""
    words = problem.replace(":", " ").replace(",", " ").split()
    for mark in ("in", "parameter"):
        if mark in words and words.index(mark) + 1 < len(words):
            place = words[words.index(mark) + 1].strip('"')
            return _quoted(problem) if place == "input" else place
    return _quoted(problem)


def _quoted(problem: str) -> str:
    return problem.split('"')[1] if '"' in problem else "the node"


def _nearest(problem: str, known: str) -> str:
    if not known:
        return ""
    near = difflib.get_close_matches(_quoted(problem), [name.strip() for name in known.split(",")], 1, 0.6)
    return f"; did you mean {near[0]}?" if near else "; EC2's RunInstances has no such parameter there"


def _other_values(value: Any, shape: Any, field: str) -> Iterator[str]:
    """Values that are none of an enumeration, which botocore leaves to EC2. Instance types are too many and too new."""
    if shape.type_name == "structure":
        for name, part in value.items():
            yield from _other_values(part, shape.members[name], f"{field}.{name}" if field else name)
    elif shape.type_name == "list":
        for index, part in enumerate(value):
            yield from _other_values(part, shape.member, f"{field}.{index}")
    elif getattr(shape, "enum", None) and value not in shape.enum and shape.name != "InstanceType":
        yield f"{field}={value}: is none of {', '.join(shape.enum)}; use one of these"


@lru_cache(maxsize=1)
def _run_instances_shape() -> Any:
    import botocore.session

    return botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
