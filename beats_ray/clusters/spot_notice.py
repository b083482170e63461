"""Tells Ray that a spot machine is about to be taken, as soon as its cloud says so: runs on it make a checkpoint.

    python -m beats_ray.clusters.spot_notice aws  # or gcp; beside Ray on each worker of `ray up`

AWS announces the end two minutes before, Google Cloud 30 s. A pod needs nothing of this.
"""

import fcntl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

POLL_SECONDS = 5.0
TIMEOUT_SECONDS = 2.0
LOCK_FILE = "beats-ray-spot-notice.lock"


@dataclass(frozen=True)
class Cloud:
    """Where a cloud's machines ask, what about, and how long they have from then on."""

    metadata: str
    is_announced: Callable[[str], bool]
    seconds_left: int


def aws_announces(metadata: str) -> bool:
    """Whether EC2 has given a spot interruption notice, asked for as IMDSv2 demands."""
    token = _ask(f"{metadata}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, "PUT")
    action = f"{metadata}/latest/meta-data/spot/instance-action"
    return token is not None and _ask(action, {"X-aws-ec2-metadata-token": token}) is not None


def gcp_announces(metadata: str) -> bool:
    """Whether Compute Engine has begun to preempt the machine."""
    return _ask(f"{metadata}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"}) == "TRUE"


CLOUDS = {
    "aws": Cloud("http://169.254.169.254", aws_announces, 120),
    "gcp": Cloud("http://metadata.google.internal", gcp_announces, 30),
}


def _ask(url: str, headers: dict[str, str], method: str = "GET") -> str | None:
    """The answer; None where there is none: a service that is away for a moment is asked again."""
    request = urllib.request.Request(url, headers=headers, method=method)  # noqa: S310  an address of ours
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:  # noqa: S310
            return str(answer.read().decode()).strip()
    except (urllib.error.URLError, TimeoutError):
        return None


def drain(seconds_left: int) -> None:
    """Asks Ray to end the work on this node. CalledProcessError where the cluster refuses."""
    import ray

    ray.init(address="auto", log_to_driver=False)
    try:
        node_id = ray.get_runtime_context().get_node_id()
        subprocess.run(
            [
                Path(sys.executable).with_name("ray"), "drain-node",
                f"--address={ray.get_runtime_context().gcs_address}", f"--node-id={node_id}",
                "--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=the cloud takes this spot machine",
                f"--deadline-remaining-seconds={seconds_left}",
            ],
            check=True,
        )  # fmt: skip
    finally:
        ray.shutdown()


def main(arguments: Sequence[str]) -> int:
    """Waits for the notice and passes it on. A second watcher of one machine ends at once.

    arguments: the cloud, then, for trials, the address of its metadata.
    """
    if not arguments or arguments[0] not in CLOUDS:
        print(f"spot_notice: cloud={arguments[0] if arguments else ''!r} is unknown; use aws or gcp", file=sys.stderr)
        return 2
    cloud = CLOUDS[arguments[0]]
    metadata = arguments[1] if len(arguments) > 1 else cloud.metadata
    with (Path(tempfile.gettempdir()) / LOCK_FILE).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return 0
        while not cloud.is_announced(metadata):
            time.sleep(POLL_SECONDS)
        print("the cloud takes this machine: Ray drains the node", flush=True)
        drain(cloud.seconds_left)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
