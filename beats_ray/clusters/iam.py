"""What must hold of an IAM policy of a node: no right over everything, and objects below a prefix only."""

from collections.abc import Iterator
from typing import Any

UNSCOPED = ("ec2:Describe", "ecr:GetAuthorizationToken")
"""Actions that AWS offers for all resources only."""


def find_mistakes(policy: Any) -> list[str]:
    """Every mistake as `field=value: rule; remedy`."""
    if not isinstance(policy, dict) or policy.get("Version") != "2012-10-17" or not policy.get("Statement"):
        return ["Version, Statement: missing or another version; a policy has both, of 2012-10-17"]
    found: list[str] = []
    for index, statement in enumerate(_several(policy["Statement"])):
        name = f"Statement.{statement.get('Sid', index)}"
        if statement.get("Effect") == "Allow" and "Principal" not in statement:  # a trust policy has no resources
            found += [f"{name}.{mistake}" for mistake in _statement_mistakes(statement)]
    return found


def _statement_mistakes(statement: dict[str, Any]) -> Iterator[str]:
    actions, resources = _several(statement.get("Action", [])), _several(statement.get("Resource", []))
    for key in ("NotAction", "NotResource"):
        if key in statement:
            yield f"{key}: allows whatever it does not name; say what is allowed"
    for action in actions:
        if "*" in action.replace("Describe*", ""):
            yield f"Action={action}: allows more than anybody has looked at; name the actions"
        if "*" in resources and not action.startswith(UNSCOPED):
            yield f"Resource=*: {action} on everything in the account; name the resources"
    buckets = [action for action in actions if action.startswith("s3:List") and action != "s3:ListMultipartUploadParts"]
    if buckets and "s3:prefix" not in str(statement.get("Condition", {})):
        yield f"Condition: {buckets[0]} without s3:prefix lists the whole bucket; add StringLike with the prefixes"
    objects = [action for action in actions if action.startswith("s3:") and action not in buckets]
    for resource in resources if objects else []:
        bucket, _, key = resource.rpartition(":::")[2].partition("/")
        if "*" in bucket or not key.strip("*"):
            yield f"Resource={resource}: {objects[0]} on a whole bucket; end it with /prefix/*"
    if "iam:PassRole" in actions and any(resource.rpartition("/")[2] in ("", "*") for resource in resources):
        yield f"Resource={resources[0]}: a machine could be given any role; name the workers' role"


def _several(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
