"""Ray's own autoscaler on one machine: a sweep makes nodes of two types come, one of them is lost, and all go again.

The head has no CPUs, as in `cluster/aws.yaml`. Nodes are processes (`support.loopback_provider`); all else is as on a
cloud: the demand, the choice of a type by CPUs and labels, the idle time-out, a spot machine that is gone at once.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.loopback_provider import node_processes
from support.scaling_cluster import ScalingCluster
from support.token_cluster import ROOT
from support.tones import write_tones

from beats_ray.models import BeatsEncoder, encoder_config, save_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

STORE = 100 * 2**20
NODE_TYPES = {
    "data": {
        "max_workers": 1, "priority": 1, "resources": {"CPU": 2, "object_store_memory": STORE},
        "labels": {"beats-ray/role": "data"},
    },
    "train": {
        "max_workers": 2, "resources": {"CPU": 3, "object_store_memory": STORE}, "labels": {"beats-ray/role": "train"},
    },
}  # fmt: skip
IDLE_SECONDS = 30
WAIT_SECONDS = 1200
SMALL = {"num_layers": 1, "width": 32, "num_heads": 2, "ffn_width": 64}
STEPS, CHECKPOINT_STEPS = 200, 10
SETTINGS = [
    "data.clip_seconds=1", "data.placement=data-nodes", "data.read_tasks=1", "data.decode_cpus=0.5",
    "finetune.augment.mixup=0", "finetune.layer_drop=0", "finetune.validate_every_steps=50",
    f"finetune.train.steps={STEPS}", "finetune.train.warmup_steps=1", "finetune.train.global_batch_size=4",
    "finetune.train.micro_batch_size=4", "finetune.train.cpus_per_worker=3", "finetune.train.log_every_steps=1",
    f"finetune.train.checkpoint_every_steps={CHECKPOINT_STEPS}", "finetune.train.keep_checkpoints=50",
    "finetune.train.loggers=[]", "sweep.num_trials=2", "sweep.max_concurrent_trials=1", "sweep.scheduler=none",
]  # fmt: skip


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[ScalingCluster]:
    with tempfile.TemporaryDirectory(prefix="br-", dir="/tmp", ignore_cleanup_errors=True) as sockets:
        cluster = ScalingCluster(tmp_path, NODE_TYPES, IDLE_SECONDS)
        with cluster.running(Path(sockets)):
            yield cluster


def commits(run: Path) -> dict[int, int]:
    """When each checkpoint of a run was committed, by its step."""
    found = run.glob("checkpoints/*/commit.json")
    return {int(path.parent.name.removeprefix("step-")): path.stat().st_mtime_ns for path in found}


@pytest.mark.parametrize("cache", ["always", "never"], ids=["cached, in Tune's actor", "streamed, on Ray Train"])
def test_nodes_of_two_types_come_for_a_sweep_one_is_lost_and_all_go(
    cluster: ScalingCluster, tmp_path: Path, cache: str
) -> None:
    write_tones(tmp_path / "data", clips=9)
    torch.manual_seed(0)
    save_model(BeatsEncoder(encoder_config("tiny", **SMALL)), tmp_path / "encoder")
    output = tmp_path / "sweep"
    assert cluster.events() == []
    begun = time.time()

    def say(what: str) -> None:
        print(f"{time.time() - begun:5.0f} s  {what}", flush=True)

    with (tmp_path / "sweep.log").open("wb") as log:
        sweep = subprocess.Popen(
            [
                sys.executable, "-m", "beats_ray", "sweep", f"data.path={tmp_path / 'data'}",
                f"encoder={tmp_path / 'encoder'}", f"output={output}", f"data.cache={cache}", *SETTINGS,
            ],
            cwd=ROOT, env=cluster.environment(), stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    cluster.wait_for(lambda: bool(cluster.nodes("data")), WAIT_SECONDS, sweep)
    say("a data node is started")
    cluster.wait_for(lambda: bool(cluster.nodes("train")), WAIT_SECONDS, sweep)
    say("a training node is started")

    def in_progress() -> list[Path]:
        return [run for run in output.glob("trials/*") if max(commits(run), default=0) >= 2 * CHECKPOINT_STEPS]

    cluster.wait_for(lambda: bool(in_progress()), WAIT_SECONDS, sweep)
    (run,) = in_progress()
    (lost_node,) = cluster.nodes("train")
    cluster.take_away(lost_node)
    step, kept = int(json.loads((run / "progress.json").read_text())["step"]), commits(run)
    say(f"{lost_node} is taken away at step {step}, the last checkpoint is of step {max(kept)}")
    assert 0 <= step - max(kept) <= CHECKPOINT_STEPS
    assert step < STEPS, "it came too late: the trial was done"

    cluster.wait_for(lambda: max(commits(run)) > max(kept), WAIT_SECONDS, sweep)
    say(f"the trial goes on, on {cluster.nodes('train')}, with a checkpoint of step {max(commits(run))}")
    assert {at: commits(run)[at] for at in kept} == kept, "steps were done again that a checkpoint had"
    assert json.loads((run / "attempts.json").read_text())["attempts"] == 2
    assert lost_node not in cluster.nodes("train")

    assert sweep.wait(WAIT_SECONDS) == 0, cluster.tail()
    say("the sweep is done")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if "train/loss" in row]
    assert steps == list(range(1, STEPS + 1)), "a step is missing or was written down twice"
    board = json.loads((output / "leaderboard.json").read_text())
    assert [(trial["status"], trial["steps"]) for trial in board["trials"]] == [("complete", STEPS)] * 2

    cluster.wait_for(lambda: not cluster.nodes("train") and not cluster.nodes("data"), WAIT_SECONDS)
    say("all nodes are gone")
    events = cluster.events()
    started = [event["node"] for event in events if event["event"] == "started"]
    if (
        cache == "always"
    ):  # where clips are streamed the node goes between two streams that are far apart, and comes again
        assert [node for node in started if node.startswith("data")] == ["data-1"], "nothing asked for others"
    cluster.wait_for(lambda: not any(node_processes(node) for node in started), WAIT_SECONDS)
    for event in events:
        say(f"{event['node']}: {event['event']} at {event['at'] - begun:.0f} s")


READS_ON_A_DATA_NODE = """
import sys

import ray

from beats_ray.config import RaySettings, StreamSettings
from beats_ray.data.manifest import read_manifest
from beats_ray.data.storage import open_place
from beats_ray.data.stream import build_eval_stream, start_bookkeepers
from beats_ray.launch import ray_cluster


@ray.remote(num_cpus=1, label_selector={"beats-ray/role": "data"})
def read(path):
    settings = StreamSettings(clip_seconds=1, placement="data-nodes", read_tasks=1, decode_cpus=0.5)
    stream = build_eval_stream(open_place(path), read_manifest(open_place(path)), settings, 4)
    return sum(len(batch["position"]) for batch in stream.iter_batches())


with ray_cluster(RaySettings()):
    if "bookkeepers" in sys.argv:
        start_bookkeepers()
    print("clips read:", ray.get(read.remote(sys.argv[1])))
"""


def test_a_data_node_goes_though_a_stream_was_started_on_it(cluster: ScalingCluster, tmp_path: Path) -> None:
    """As the streams of trials are, whose processes Tune puts anywhere; see `start_bookkeepers`."""
    write_tones(tmp_path / "data", clips=9)
    command = [sys.executable, "-c", READS_ON_A_DATA_NODE, str(tmp_path / "data"), "bookkeepers"]
    done = subprocess.run(
        command, cwd=ROOT, env=cluster.environment(), capture_output=True, text=True, timeout=600, check=False
    )
    assert "clips read: 27" in done.stdout, done.stdout[-2000:] + done.stderr[-3000:]
    assert cluster.nodes("data")
    cluster.wait_for(lambda: not cluster.nodes("data"), 10 * IDLE_SECONDS)
