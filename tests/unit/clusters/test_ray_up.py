"""`cluster/*.yaml` and IAM policies: sound as they are, and each way to break one is named with field and remedy."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from beats_ray.cli import main
from beats_ray.clusters import gcp, iam, ray_up
from beats_ray.data.stream import DATA_NODE_LABELS

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[3]
CLUSTER = ROOT / "cluster"
Config = dict[str, Any]


@cache
def _text(name: str) -> str:
    return json.dumps(yaml.safe_load((CLUSTER / name).read_text()))


def load(name: str) -> Config:
    config: Config = json.loads(_text(name))  # without the shared objects of anchors: a change would show elsewhere
    return config


def node(config: Config, name: str) -> Config:
    found: Config = config["available_node_types"][name]["node_config"]
    return found


FILES = ["aws.yaml", "gcp.yaml"]


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_the_repository_is_sound(name: str) -> None:
    config = load(name)
    assert ray_up.find_mistakes(config) == []
    types = config["available_node_types"]
    workers = {key: value for key, value in types.items() if key != config["head_node_type"]}
    assert all(worker.get("min_workers", 0) == 0 for worker in workers.values())
    assert {worker["resources"].get("GPU", 0) for worker in workers.values()} == {0, 1, 8}
    assert all(type_["resources"]["object_store_memory"] > 10**9 for type_ in types.values())


def test_the_label_of_the_files_is_the_one_that_the_data_plane_places_by() -> None:
    assert dict([ray_up.DATA_NODE_LABEL]) == DATA_NODE_LABELS


def drop(config: Config, *path: str) -> None:
    for part in path[:-1]:
        config = config[part]
    del config[path[-1]]


COMMON: list[tuple[str, Callable[[Config], Any], str]] = [
    ("unknown top-level key", lambda c: c.update(idle_minutes=5), "'idle_minutes' was unexpected"),
    ("resources missing", lambda c: drop(c, "available_node_types", "data", "resources"), "'resources' is a required"),
    ("wrong type", lambda c: c.update(max_workers="many"), "max_workers: 'many' is not of type 'integer'"),
    ("no such head", lambda c: c.update(head_node_type="boss"), "head_node_type"),
    ("no docker image", lambda c: drop(c, "docker", "image"), "Ray refuses the file"),
    ("GPUs that no container sees", lambda c: drop(c, "docker", "worker_run_options"), "NVIDIA_VISIBLE_DEVICES=all"),
    ("public", lambda c: c["provider"].update(use_internal_ips=False), "provider.use_internal_ips=False"),
    ("no token file", lambda c: c.update(file_mounts={}), "file_mounts: no node gets the cluster's token"),
    (
        "no token mode",
        lambda c: c.update(worker_start_ray_commands=["ray start --address=$RAY_HEAD_IP:6379"]),
        "starts Ray without tokens",
    ),
    (
        "Ray's own start commands",
        lambda c: [drop(c, f"{kind}_start_ray_commands") for kind in ("head", "worker")],
        "head_start_ray_commands: missing, or has no `ray start`",
    ),
    (
        "Ray's own start command of workers",
        lambda c: drop(c, "worker_start_ray_commands"),
        "worker_start_ray_commands: missing, or has no `ray start`",
    ),
    (
        "no start of Ray",
        lambda c: c.update(head_start_ray_commands=["ray stop"]),
        "head_start_ray_commands: missing, or has no `ray start`",
    ),
    (
        "open dashboard",
        lambda c: c.update(
            head_start_ray_commands=["export RAY_AUTH_MODE=token; ray start --head --dashboard-host=0.0.0.0"]
        ),
        "use --dashboard-host=127.0.0.1",
    ),
    (
        "image without tag",
        lambda c: c["docker"].update(image="registry:5000/beats-ray"),
        "with a tag other than latest",
    ),
    ("training on the head", lambda c: c["available_node_types"]["head"]["resources"].update(CPU=4), "resources.CPU=4"),
    (
        "no data nodes",
        lambda c: [drop(c, "available_node_types", name, "labels") for name in ("data", "data-spot")],
        "none has the label beats-ray/role=data",
    ),
    (
        "no fallback",
        lambda c: drop(c, "available_node_types", "gpu8"),
        "gpu8-spot.priority=1: no on-demand type with the same",
    ),
    (
        "fallback first",
        lambda c: c["available_node_types"]["gpu1"].update(priority=1),
        "gpu1-spot.priority=1: no on-demand type",
    ),
    (
        "key in a command",
        lambda c: c.update(setup_commands=["export AWS_ACCESS_KEY_ID=AKIA" + "A" * 16]),
        "setup_commands.0: holds what looks like a key",
    ),
    (
        "password by its key",
        lambda c: c["provider"].update(redis_password="abc"),
        "provider.redis_password: holds what looks like a key or password",
    ),
]
AWS: list[tuple[str, Callable[[Config], Any], str]] = [
    (
        "misspelt key",
        lambda c: node(c, "gpu1").update(InstanceTyp="g6e.4xlarge"),
        'gpu1.node_config.InstanceTyp: Unknown parameter in input: "InstanceTyp"; did you mean InstanceType?',
    ),
    (
        "misspelt key below",
        lambda c: node(c, "gpu1")["MetadataOptions"].update(HttpToken="required"),
        'MetadataOptions: Unknown parameter in MetadataOptions: "HttpToken"; did you mean HttpTokens?',
    ),
    (
        "wrong type",
        lambda c: node(c, "gpu1").update(InstanceMarketOptions="spot"),
        "parameter InstanceMarketOptions, v",
    ),
    ("unknown value", lambda c: node(c, "gpu1-spot")["InstanceMarketOptions"].update(MarketType="cheap"), "is none of"),
    (
        "public address",
        lambda c: node(c, "gpu1")["NetworkInterfaces"][0].update(AssociatePublicIpAddress=True),
        "gpu1.node_config.NetworkInterfaces.0.AssociatePublicIpAddress=True: no node may have one; set false",
    ),
    (
        "address by default",
        lambda c: node(c, "data").pop("NetworkInterfaces"),
        "the subnet decides on public addresses",
    ),
    ("Ray's security group", lambda c: node(c, "data")["NetworkInterfaces"][0].pop("Groups"), "the whole world in"),
    ("IMDSv1", lambda c: node(c, "data")["MetadataOptions"].update(HttpTokens="optional"), "HttpTokens=optional"),
    ("IMDSv1 by default", lambda c: node(c, "data").pop("MetadataOptions"), "HttpTokens=None"),
    ("plain disk", lambda c: node(c, "data")["BlockDeviceMappings"][0]["Ebs"].pop("Encrypted"), "Ebs.Encrypted=None"),
    ("no disk", lambda c: node(c, "data").pop("BlockDeviceMappings"), "BlockDeviceMappings: missing"),
    ("Ray's role", lambda c: node(c, "head").pop("IamInstanceProfile"), "full rights over EC2 and S3"),
    (
        "spot that comes back",
        lambda c: node(c, "gpu8-spot")["InstanceMarketOptions"]["SpotOptions"].update(SpotInstanceType="persistent"),
        "use one-time",
    ),
    (
        "spot that stops",
        lambda c: node(c, "gpu8-spot")["InstanceMarketOptions"]["SpotOptions"].update(
            InstanceInterruptionBehavior="hibernate"
        ),
        "InstanceInterruptionBehavior=hibernate",
    ),
    ("spot head", lambda c: node(c, "head").update(InstanceMarketOptions={"MarketType": "spot"}), "ends with its head"),
]
GCP: list[tuple[str, Callable[[Config], Any], str]] = [
    (
        "misspelt key",
        lambda c: node(c, "gpu1").update(machinetype="g2"),
        "machinetype: unknown key; did you mean machineT",
    ),
    (
        "misspelt key below",
        lambda c: node(c, "data-spot")["scheduling"].update(provisionModel="SPOT"),
        "scheduling.provisionModel: unknown key; did you mean provisioningModel?",
    ),
    (
        "unknown value",
        lambda c: node(c, "data-spot")["scheduling"].update(provisioningModel="CHEAP"),
        "is none of SPOT",
    ),
    ("wrong type", lambda c: node(c, "data").update(scheduling="spot"), "scheduling=spot: must be an object"),
    (
        "public address",
        lambda c: node(c, "gpu1")["networkInterfaces"][0].update(accessConfigs=[{"type": "ONE_TO_ONE_NAT"}]),
        "networkInterfaces.0.accessConfigs",
    ),
    ("Ray's address", lambda c: node(c, "gpu1").pop("networkInterfaces"), "a public address; name a subnetwork"),
    ("another account", lambda c: node(c, "data").pop("serviceAccounts"), "serviceAccounts: missing"),
    ("no shield", lambda c: node(c, "data")["shieldedInstanceConfig"].pop("enableVtpm"), "enableVtpm=None"),
    ("disk that stays", lambda c: node(c, "data")["disks"][0].update(autoDelete=False), "autoDelete=False"),
    (
        "old spot",
        lambda c: node(c, "gpu1-spot").update(scheduling={"preemptible": True}),
        "use provisioningModel: SPOT",
    ),
    (
        "spot that stops",
        lambda c: node(c, "gpu1-spot")["scheduling"].update(instanceTerminationAction="STOP"),
        "instanceTerminationAction=STOP",
    ),
    (
        "spot that restarts",
        lambda c: node(c, "gpu1-spot")["scheduling"].pop("automaticRestart"),
        "automaticRestart=None",
    ),
    ("router", lambda c: node(c, "data").update(canIpForward=True), "canIpForward=true"),
    (
        "spot head",
        lambda c: node(c, "head").update(scheduling=node(c, "gpu1-spot")["scheduling"]),
        "head.node_config.scheduling.provisioningModel=SPOT",
    ),
    ("credential", lambda c: c["provider"].update(gcp_credentials={"type": "service_account"}), "in a file"),
]
CASES = [
    pytest.param(file, break_it, said, id=f"{file}-{title}")
    for file, cases in (("aws.yaml", COMMON + AWS), ("gcp.yaml", COMMON + GCP))
    for title, break_it, said in cases
]


@pytest.mark.parametrize(("file", "break_it", "said"), CASES)
def test_a_broken_file_is_named_with_field_and_remedy(file: str, break_it: Callable[[Config], Any], said: str) -> None:
    config = load(file)
    break_it(config)
    found = ray_up.find_mistakes(config)
    assert any(said in line for line in found), found


def test_a_digest_and_a_tag_stand_for_one_image_and_latest_does_not() -> None:
    assert ray_up.is_pinned("registry:5000/beats-ray@sha256:" + "0" * 64)
    assert ray_up.is_pinned("registry:5000/beats-ray:0.1.0")
    assert not ray_up.is_pinned("registry:5000/beats-ray")
    assert not ray_up.is_pinned("beats-ray:latest")


def test_the_keys_of_google_s_nodes_are_those_of_its_api() -> None:
    documents = pytest.importorskip(
        "googleapiclient.discovery_cache", reason="google-api-python-client is not installed"
    )
    path = Path(documents.__file__).parent / "documents" / "compute.v1.json"
    schemas = json.loads(path.read_text())["schemas"]

    def compare(keys: Any, schema: dict[str, Any], field: str) -> None:
        properties = schemas[schema["$ref"]]["properties"] if "$ref" in schema else schema["properties"]
        for name, below in keys.items():
            assert name in properties, f"{field}.{name}"
            property_ = properties[name].get("items", properties[name])
            if isinstance(below, dict):
                compare(below, property_, f"{field}.{name}")
            elif below:
                assert set(below) <= set(property_["enum"]), f"{field}.{name}"

    compare(gcp.INSTANCE, {"$ref": "Instance"}, "")


POLICIES = sorted((CLUSTER / "iam").glob("*.json"))


@pytest.mark.parametrize("path", POLICIES, ids=lambda path: path.name)
def test_a_policy_of_the_repository_is_sound(path: Path) -> None:
    assert iam.find_mistakes(json.loads(path.read_text())) == []


def test_the_head_may_start_the_machines_of_the_file_and_give_them_their_profile() -> None:
    config, policy = load("aws.yaml"), json.loads((CLUSTER / "iam" / "aws-head.json").read_text())
    statements = {statement["Sid"]: statement for statement in policy["Statement"]}
    start = statements["StartWorkersThatTakeTokensOnly"]["Condition"]["StringEquals"]
    workers = [name for name in config["available_node_types"] if name != "head"]
    assert set(start["ec2:InstanceType"]) == {node(config, name)["InstanceType"] for name in workers}
    assert start["aws:RequestTag/ray-cluster-name"] == config["cluster_name"]
    passed = statements["GiveWorkersTheirRoleAndNoOther"]["Resource"]
    assert {passed.rpartition("/")[2]} == {node(config, name)["IamInstanceProfile"]["Name"] for name in workers}


def statement(sid: str, name: str = "aws-worker.json") -> tuple[dict[str, Any], dict[str, Any]]:
    policy = json.loads((CLUSTER / "iam" / name).read_text())
    return policy, next(part for part in policy["Statement"] if part["Sid"] == sid)


@pytest.mark.parametrize(
    ("name", "sid", "change", "said"),
    [
        ("aws-worker.json", "ReadTheSources", {"Action": "s3:*"}, "Action=s3:*: allows more"),
        (
            "aws-worker.json",
            "ReadTheSources",
            {"Resource": "arn:aws:s3:::my-bucket/*"},
            "on a whole bucket; end it with",
        ),
        ("aws-worker.json", "ReadTheSources", {"Resource": "*"}, "s3:GetObject on everything in the account"),
        ("aws-worker.json", "ReadTheSources", {"NotAction": "iam:*"}, "NotAction: allows whatever"),
        ("aws-worker.json", "ListThesePrefixes", {"Condition": {}}, "lists the whole bucket"),
        ("aws-head.json", "GiveWorkersTheirRoleAndNoOther", {"Resource": "arn:aws:iam::*:role/*"}, "given any role"),
        ("aws-head.json", "TagAndEndItsOwn", {"Resource": "*"}, "ec2:TerminateInstances on everything"),
    ],
)
def test_a_policy_that_allows_too_much_is_named(name: str, sid: str, change: dict[str, Any], said: str) -> None:
    policy, part = statement(sid, name)
    part.update(change)
    found = iam.find_mistakes(policy)
    assert any(said in line for line in found), found


def test_the_command_says_what_is_sound_and_ends_with_status_2_where_something_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check-cluster", str(CLUSTER / "aws.yaml"), str(CLUSTER / "iam" / "aws-head.json")]) == 0
    assert "`ray up` file, 7 node types: sound" in capsys.readouterr().out
    config = load("aws.yaml")
    node(config, "gpu1")["MetadataOptions"]["HttpTokens"] = "optional"
    node(config, "gpu1")["BlockDeviceMappings"][0]["Ebs"]["Encrypted"] = False
    broken = tmp_path / "mine.yaml"
    broken.write_text(yaml.safe_dump(config))
    assert main(["check-cluster", str(broken)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith(f"beats-ray: error: {broken}: available_node_types.gpu1.") for line in lines] == [
        True,
        True,
    ]
    assert main(["check-cluster", str(tmp_path / "absent.yaml")]) == 2
    assert "does not exist" in capsys.readouterr().err
    (tmp_path / "policy.json").write_text('{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": 5}]}')
    assert main(["check-cluster", str(tmp_path / "policy.json")]) == 2
    assert "a value of another type" in capsys.readouterr().err
    (tmp_path / "list.yaml").write_text("[1, 2")
    assert main(["check-cluster", str(tmp_path / "list.yaml")]) == 2
    assert "is no YAML" in capsys.readouterr().err
