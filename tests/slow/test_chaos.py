"""A pre-training run on a small cluster into which a seeded sequence of faults is thrown ends as if there were none.

Real raylets, real workers under DeepSpeed, a real object store; the driver is the command line. Prints a table of what
each fault cost.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.fault_proxy import FaultProxy, FaultRates

from beats_ray.data.sample import make_sample_set
from beats_ray.data.storage import Place, open_place
from beats_ray.models import RandomProjectionTokenizer, save_model
from beats_ray.objectstore import EmbeddedObjectStore
from beats_ray.train.committed import sound_steps

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]

ROOT = Path(__file__).parents[2]
AWAY = "store away for 20 s"
KINDS = (
    "worker killed", "node removed", "node drained, then removed", "driver killed", "driver terminated", AWAY,
    "newest checkpoint truncated",
)  # fmt: skip
NOTICE_SECONDS = 30
CHECKPOINT_STEPS = 10
NUM_FAULTS = int(os.environ.get("BEATS_RAY_CHAOS_FAULTS", "21"))
SEED = int(os.environ.get("BEATS_RAY_CHAOS_SEED", "0"))
STEPS_A_FAULT = 12
STEPS = STEPS_A_FAULT * (NUM_FAULTS + 2)
RECOVERY_SECONDS = 300


class Nodes:
    """A head that reads and decodes, and two nodes with room for one worker each."""

    def __init__(self, scratch: str) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 3,
                "object_store_memory": 300 * 2**20,
                "include_dashboard": False,
                "temp_dir": scratch,
            },
        )
        self._workers = [self._add(), self._add()]
        self.address: str = self._cluster.address

    def _add(self) -> Any:
        return self._cluster.add_node(num_cpus=4, object_store_memory=150 * 2**20)

    def drain(self, index: int) -> None:
        """Announces the end of a node, as a spot machine does."""
        subprocess.run(
            [
                Path(sys.executable).with_name("ray"), "drain-node", f"--address={self.address}",
                f"--node-id={self._workers[index].node_id}", "--reason=DRAIN_NODE_REASON_PREEMPTION",
                "--reason-message=spot", f"--deadline-remaining-seconds={NOTICE_SECONDS}",
            ],
            check=True, timeout=60,
        )  # fmt: skip

    def replace(self, index: int) -> None:
        """Takes a node away without grace and brings another."""
        self.remove(index)
        self._workers.insert(index, self._add())

    def remove(self, index: int) -> None:
        """Takes a node away without grace."""
        self._cluster.remove_node(self._workers.pop(index), allow_graceful=False)

    def add(self) -> None:
        """Brings another node."""
        self._workers.append(self._add())

    def close(self) -> None:
        self._cluster.shutdown()


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[tuple[dict[str, str], EmbeddedObjectStore]]:
    """What the commands and all nodes see: the store behind an address that outlives it."""
    with (
        EmbeddedObjectStore(tmp_path / "store") as store,
        FaultProxy(lambda: store.endpoint, FaultRates()) as proxy,
        pytest.MonkeyPatch.context() as patch,
    ):
        store.make_bucket("beats")
        values = {name: proxy.endpoint if "ENDPOINT" in name else value for name, value in store.environment().items()}
        values |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        for name, value in values.items():
            patch.setenv(name, value)
        yield dict(os.environ), store


@pytest.fixture
def nodes(environment: object) -> Iterator[Nodes]:
    with tempfile.TemporaryDirectory(prefix="br-", dir="/tmp", ignore_cleanup_errors=True) as scratch:
        nodes = Nodes(scratch)
        yield nodes
        nodes.close()


class Run:
    """One pre-training command, started again and again on one cluster."""

    def __init__(
        self, name: str, folder: Path, environment: dict[str, str], address: str, steps: int, workers: str = "2"
    ) -> None:
        self.output: Place = open_place(f"s3://beats/{name}")
        self._log = folder / f"{name}.log"
        self._environment = environment | {"RAY_ADDRESS": address}
        self._command = [
            sys.executable, "-m", "beats_ray", "pretrain", "data.path=s3://beats/data", f"output=s3://beats/{name}",
            "tokenizer=s3://beats/tokenizer", "encoder.preset=tiny",
            "encoder.overrides={num_layers: 1, width: 32, num_heads: 2, ffn_width: 64}",
            "predictor.num_layers=1", "data.clip_seconds=1", "data.retry_seconds=60",
            f"train.steps={steps}", "train.warmup_steps=10", "train.global_batch_size=8", "train.micro_batch_size=2",
            f"train.num_workers={workers}", "train.cpus_per_worker=4", "train.log_every_steps=1",
            f"train.checkpoint_every_steps={CHECKPOINT_STEPS}", "train.keep_checkpoints=3", "train.max_failures=1000",
            "train.learning_rate=1e-3", "train.epsilon=1e-8", "train.collective_timeout_seconds=30",
        ]  # fmt: skip

    def start(self) -> None:
        with self._log.open("ab") as log:
            self.driver = subprocess.Popen(
                self._command, cwd=ROOT, env=self._environment, stdout=log, stderr=log, start_new_session=True
            )

    def step(self) -> int:
        """The newest step that the run has reported; 0 before the first."""
        try:
            return int((self.output / "progress.json").read_json()["step"])
        except (FileNotFoundError, ValueError):
            return 0

    def wait_for_step(self, step: int) -> int:
        """Waits until the run reports `step` or a later one."""
        deadline = time.monotonic() + RECOVERY_SECONDS
        while (found := self.step()) < step:
            assert self.driver.poll() in (None, 0), self.tail()
            assert time.monotonic() < deadline, f"step {step} did not come, only {found}\n{self.tail()}"
            time.sleep(0.2)
        return found

    def attempts(self) -> int:
        """How often the workers have started."""
        return int((self.output / "attempts.json").read_json()["attempts"])

    def wait_for_attempt(self, number: int) -> None:
        """Waits until the workers have started so many times."""
        deadline = time.monotonic() + RECOVERY_SECONDS
        while self.attempts() < number:
            assert self.driver.poll() is None, f"it ended instead of starting again\n{self.tail()}"
            assert time.monotonic() < deadline, f"attempt {number} did not come\n{self.tail()}"
            time.sleep(0.2)

    def wait_for_workers(self, workers: int) -> int:
        """Waits for a new checkpoint of so many workers; returns its step."""
        begun, folder = max(sound_steps(self.output / "checkpoints"), default=0), self.output / "checkpoints"
        deadline = time.monotonic() + RECOVERY_SECONDS
        while True:
            assert self.driver.poll() is None, f"it ended before {workers} workers were there\n{self.tail()}"
            assert time.monotonic() < deadline, f"no checkpoint of {workers} workers came\n{self.tail()}"
            for step in sound_steps(folder)[::-1]:
                commit = (folder / f"step-{step:08d}" / "commit.json").read_json()
                if step > begun and commit["world_size"] == workers:
                    return step
            time.sleep(0.5)

    def losses(self) -> dict[int, float]:
        text = (self.output / "metrics.jsonl").read_bytes().decode()
        records = [json.loads(line) for line in text.splitlines()]
        assert len({record["step"] for record in records}) == len(records), "a step was recorded twice"
        return {record["step"]: record["train/loss"] for record in records}

    def tail(self) -> str:
        return self._log.read_text(errors="replace")[-3000:]


def inflict(kind: str, run: Run, nodes: Nodes, store: EmbeddedObjectStore, chance: random.Random) -> None:
    """One fault; returns when it is over."""
    if kind == "worker killed":
        chance.choice(training_processes()).kill()
    elif kind == "node removed":
        nodes.replace(chance.randrange(2))
    elif kind == "node drained, then removed":
        before, index = unscheduled(run), chance.randrange(2)
        nodes.drain(index)
        deadline = time.monotonic() + NOTICE_SECONDS
        while unscheduled(run) <= before:
            assert time.monotonic() < deadline, "no checkpoint came within the notice"
            time.sleep(0.2)
        nodes.replace(index)
    elif kind == "driver killed":
        os.killpg(run.driver.pid, signal.SIGKILL)
        run.driver.wait()
        run.start()
    elif kind == "driver terminated":
        before = unscheduled(run)
        run.driver.terminate()
        assert run.driver.wait(120) == 143, run.tail()
        assert unscheduled(run) > before, "it ended without a checkpoint"
        run.start()
    elif kind == AWAY:
        store.stop()
        time.sleep(20)
        store.start()
    else:
        while not sound_steps(run.output / "checkpoints"):
            time.sleep(0.2)
        chance.choice(training_processes()).kill()
        truncate_newest(run.output / "checkpoints", chance)


def truncate_newest(checkpoints: Place, chance: random.Random) -> None:
    """Cuts a file of the newest checkpoint short, and of one that a dying worker still commits after it."""
    cut: set[int] = set()
    deadline = time.monotonic() + 3
    while time.monotonic() < deadline:
        newest = max(sound_steps(checkpoints), default=0)
        if newest and (not cut or newest > max(cut)):
            folder = checkpoints / f"step-{newest:08d}"
            part = next(place for place in folder.list() if place.name.endswith(".safetensors"))
            part.write_bytes(part.read_bytes()[: chance.randrange(1000)])
            cut.add(newest)
        time.sleep(0.2)
    assert cut, "there was no checkpoint to be cut short"
    assert max(sound_steps(checkpoints), default=0) < max(cut), "the run can still read what was cut short"


def unscheduled(run: Run) -> int:
    """The newest step with a checkpoint that was made because of a notice; 0 where there is none."""
    return max((step for step in sound_steps(run.output / "checkpoints") if step % CHECKPOINT_STEPS), default=0)


def training_processes() -> list[psutil.Process]:
    """The workers of Ray Train below this process, the nodes' parent."""
    children = psutil.Process().children(recursive=True)
    found = [process for process in children if "RayTrainWorker" in " ".join(process.cmdline() or [process.name()])]
    assert found, "no training process is there to be killed"
    return sorted(found, key=lambda process: process.pid)


def prepare_inputs(folder: Path, environment: dict[str, str], address: str) -> None:
    """A small data set and a tokenizer in the store."""
    make_sample_set(folder / "clips", num_clips=120)
    command = [sys.executable, "-m", "beats_ray", "prepare", "esc50", str(folder / "clips"), "s3://beats/data"]
    subprocess.run(command, cwd=ROOT, env=environment | {"RAY_ADDRESS": address}, check=True, timeout=300)
    save_model(RandomProjectionTokenizer(), folder / "tokenizer")
    open_place("s3://beats/tokenizer").upload(folder / "tokenizer")


def test_workers_come_and_go_with_their_nodes_in_one_run(
    tmp_path: Path, environment: tuple[dict[str, str], EmbeddedObjectStore], nodes: Nodes
) -> None:
    values, _ = environment
    prepare_inputs(tmp_path, values, nodes.address)
    steps = 300
    run = Run("elastic", tmp_path, values, nodes.address, steps, workers="[1,2]")
    run.start()
    sizes = [(2, run.wait_for_workers(2))]
    nodes.remove(0)
    sizes.append((1, run.wait_for_workers(1)))
    nodes.add()
    sizes.append((2, run.wait_for_workers(2)))
    print(f"workers and the first step of theirs that was saved: {sizes}", flush=True)
    assert run.driver.wait(1200) == 0, run.tail()
    undisturbed = Run("undisturbed", tmp_path, values, nodes.address, steps)
    undisturbed.start()
    assert undisturbed.driver.wait(1200) == 0, undisturbed.tail()
    losses, expected = run.losses(), undisturbed.losses()
    assert losses.keys() == expected.keys()
    assert max(abs(losses[step] / expected[step] - 1) for step in expected) < 0.01


def test_a_run_ends_as_if_there_had_been_no_faults(
    tmp_path: Path, environment: tuple[dict[str, str], EmbeddedObjectStore], nodes: Nodes
) -> None:
    values, store = environment
    prepare_inputs(tmp_path, values, nodes.address)
    undisturbed = Run("undisturbed", tmp_path, values, nodes.address, STEPS)
    undisturbed.start()
    assert undisturbed.driver.wait(1200) == 0, undisturbed.tail()

    chance = random.Random(SEED)
    kinds = [KINDS[index % len(KINDS)] for index in range(NUM_FAULTS)]
    chance.shuffle(kinds)
    run = Run("chaos", tmp_path, values, nodes.address, STEPS)
    run.start()
    for number, kind in enumerate(kinds):
        before, attempts = run.wait_for_step(number * STEPS_A_FAULT + chance.randrange(STEPS_A_FAULT)), run.attempts()
        begun = time.monotonic()
        inflict(kind, run, nodes, store, chance)
        kept = max(sound_steps(run.output / "checkpoints"), default=0)
        if kind != AWAY:
            run.wait_for_attempt(attempts + 1)
        run.wait_for_step(max(run.step(), before) + 5)
        restarts = run.attempts() - attempts
        lost = max(0, before - kept) if restarts else 0
        print(
            f"{kind:30} step {before:5d}  lost {lost:3d}  restarts {restarts}  {time.monotonic() - begun:6.1f} s",
            flush=True,
        )
    assert run.driver.wait(1200) == 0, run.tail()

    assert run.losses() == undisturbed.losses()
    weights = [(place / "model/model.safetensors").read_bytes() for place in (run.output, undisturbed.output)]
    assert weights[0] == weights[1]
