"""The image, the certificates and the scripts of `cluster/`: they agree with the pins and the package, and work."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from beats_ray.launch import _RAY_ENVIRONMENT

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[3]
CLUSTER = ROOT / "cluster"


def pins(path: Path) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==(\S+)$", path.read_text(), re.MULTILINE))


def test_the_image_is_built_with_the_versions_of_the_repository() -> None:
    dockerfile = (CLUSTER / "Dockerfile").read_text()
    (version,) = re.findall(r"^ARG UV_VERSION=(\S+)$", dockerfile, re.MULTILINE)
    assert f"UV_VERSION := {version}\n" in (ROOT / "Makefile").read_text()
    cloud, packages = pins(CLUSTER / "requirements-cloud.txt"), pins(ROOT / "constraints.txt")
    assert cloud["boto3"] == packages["botocore"]
    assert not set(cloud) & set(packages)


def test_the_image_sets_what_a_private_cluster_has_and_demands_tokens() -> None:
    (block,) = re.findall(r"^ENV PATH=(.*?[^\\])$", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE | re.DOTALL)
    variables = dict(re.findall(r"(\w+)=(\S+)", block))
    assert variables.pop("RAY_AUTH_MODE") == "token"
    assert variables.pop("HOME") == "/home/ray"  # below which `ray up` mounts the token
    assert variables.pop("RAY_USAGE_STATS_ENABLED") == "0"
    assert variables == {name: _RAY_ENVIRONMENT[name] for name in variables}
    assert {name for name in _RAY_ENVIRONMENT if name.startswith("MALLOC")} <= set(variables)


def test_the_image_runs_as_a_user_and_takes_neither_history_nor_runs_along() -> None:
    lines = (CLUSTER / "Dockerfile").read_text().splitlines()
    assert [line for line in lines if line.startswith("USER ")] == ["USER 1000"]
    assert lines.index("USER 1000") > max(number for number, line in enumerate(lines) if line.startswith("RUN "))
    assert {".git", ".venv", "runs"} <= set((CLUSTER / "Dockerfile.dockerignore").read_text().split())


@pytest.mark.parametrize("address", ["10.0.0.7", "head.example.com"])
def test_a_node_s_certificate_is_the_authority_s_and_for_its_address(tmp_path: Path, address: str) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    script = str(CLUSTER / "tls.sh")
    folder = tmp_path / "tls"
    early = subprocess.run([script, "node", str(folder), address], capture_output=True, text=True, check=False)
    assert (early.returncode, "ca.key: missing" in early.stderr) == (2, True)
    for words in (["authority"], ["node", address]):
        subprocess.run([script, words[0], str(folder), *words[1:]], check=True)
    authority, certificate = folder / "ca.crt", folder / f"{address}.crt"
    usages = (["-purpose", "sslserver"], ["-purpose", "sslclient"])  # Ray's nodes are both to one another
    kind = "-verify_ip" if address[0].isdigit() else "-verify_hostname"
    for usage in usages:
        subprocess.run(["openssl", "verify", "-CAfile", authority, *usage, kind, address, certificate], check=True)
    other = ["openssl", "verify", "-CAfile", authority, "-verify_ip", "10.9.9.9", certificate]
    assert subprocess.run(other, capture_output=True, check=False).returncode != 0
    assert all(path.stat().st_mode & 0o077 == 0 for path in folder.glob("*.key"))
    again = subprocess.run([script, "authority", str(folder)], capture_output=True, check=False)
    assert again.returncode == 2


def test_the_slurm_script_is_bash_and_names_a_preset() -> None:
    (script,) = re.findall(r"```\n(#!/bin/bash.*?)```", (CLUSTER / "on-prem.md").read_text(), re.DOTALL)
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert all((ROOT / name).exists() for name in re.findall(r"jobs/\S+\.yaml", script))
