"""`ray job submit` against a head with token authentication: who is refused, and jobs that are stopped and go on.

A head of `ray start` on loopback, and every job of the chain on sample clips, as the README submits them.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.token_cluster import ROOT, TokenCluster, node_address

from beats_ray.data.sample import make_sample_set
from beats_ray.models import BeatsEncoder, RandomProjectionTokenizer, encoder_config, save_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SMALL: dict[str, Any] = {"num_layers": 1, "conv_pos_kernel": 16}
ENCODER = ("encoder.preset=tiny", *(f"encoder.overrides.{name}={value}" for name, value in SMALL.items()))
TRAIN = {
    "warmup_steps": 2, "global_batch_size": 8, "num_workers": 1, "cpus_per_worker": 1, "log_every_steps": 2,
    "loggers": "[]",
}  # fmt: skip
STEPS = 600
"""Of the pre-training that is stopped: a minute or more, in which it would make one checkpoint alone, at its end."""


def train(steps: int, section: str = "") -> list[str]:
    return [f"{section}train.{name}={value}" for name, value in {**TRAIN, "steps": steps}.items()]


def pretraining(folder: Path, output: Path, steps: int, checkpoint_every_steps: int) -> list[str]:
    return [
        "jobs/pretrain.py", f"data.path={folder / 'data'}", "data.clip_seconds=2", f"tokenizer={folder / 'tokenizer'}",
        f"output={output}", "predictor.num_layers=1", *ENCODER, *train(steps),
        f"train.checkpoint_every_steps={checkpoint_every_steps}",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TokenCluster]:
    with tempfile.TemporaryDirectory(prefix="br-", dir="/tmp", ignore_cleanup_errors=True) as sockets:
        cluster = TokenCluster(tmp_path_factory.mktemp("head"))
        with cluster.running(Path(sockets)):
            yield cluster


def submit(head: TokenCluster, name: str, *command: str) -> "subprocess.CompletedProcess[str]":
    return head.run(sys.executable, "jobs/submit.py", name, "--", *command, timeout=1200)


@pytest.fixture(scope="module")
def folder(head: TokenCluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`data`, prepared by a job, an untrained `encoder`, and a `tokenizer`."""
    found = tmp_path_factory.mktemp("jobs")
    make_sample_set(found / "raw", num_clips=40, clip_seconds=2)
    done = submit(head, "prepare", "jobs/prepare.py", "esc50", str(found / "raw"), str(found / "data"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert job(head, "prepare-1")["status"] == "SUCCEEDED"
    torch.manual_seed(0)
    save_model(RandomProjectionTokenizer(), found / "tokenizer")
    save_model(BeatsEncoder(encoder_config("tiny", **SMALL)), found / "encoder")
    return found


def job(head: TokenCluster, submission: str) -> dict[str, Any]:
    """The job's record, as any program with the token reads it."""
    code = (
        "import dataclasses, json, sys; from ray.job_submission import JobSubmissionClient; "
        "info = JobSubmissionClient().get_job_info(sys.argv[1]); "
        "print(json.dumps({'status': str(info.status.value), 'message': info.message, 'metadata': info.metadata, "
        "'exit': info.driver_exit_code}))"
    )
    found: dict[str, Any] = json.loads(head.run(sys.executable, "-c", code, submission).stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(("token", "status"), [(None, "401"), ("0" * 64, "403")], ids=["none", "wrong"])
def test_without_the_right_token_dashboard_jobs_and_client_are_refused(
    head: TokenCluster, token: str | None, status: str
) -> None:
    asked = head.run(
        "curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", f"{head.dashboard}/api/version", token=token
    )
    assert asked.stdout == "401"  # curl sends no token at all
    header = f"Authorization: Bearer {token or ''}"
    asked = head.run("curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "-H", header, f"{head.dashboard}/api/jobs/")
    assert asked.stdout in ("401", "403")
    jobs = head.run(str(head.ray), "job", "submit", "--", "true", token=token)
    assert jobs.returncode != 0
    assert status in jobs.stdout + jobs.stderr or "uthenticat" in jobs.stdout + jobs.stderr
    submitted = head.run(sys.executable, "jobs/submit.py", "refused", "--", "jobs/prepare.py", token=token)
    assert submitted.returncode == 3, submitted.stderr
    for address in (head.client, head.gcs):  # Ray's client, and a driver that joins by itself
        code = f"import ray; ray.init({address!r}); print('inside')"
        joined = head.run(sys.executable, "-c", code, token=token)
        assert joined.returncode != 0, address
        assert "inside" not in joined.stdout


def test_with_the_token_the_same_requests_are_served(head: TokenCluster) -> None:
    header = f"Authorization: Bearer {head.token_file.read_text()}"
    asked = head.run(
        "curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "-H", header, f"{head.dashboard}/api/version"
    )
    assert asked.stdout == "200"
    for address in (head.client, head.gcs):
        code = f"import ray; ray.init({address!r}); print('inside', ray.get(ray.put(7)))"
        assert "inside 7" in head.run(sys.executable, "-c", code).stdout


def test_the_dashboard_is_not_among_what_listens_beyond_loopback(head: TokenCluster) -> None:
    open_ports = head.open_ports()
    print("listening on other addresses than loopback:", sorted(open_ports))
    ports = {port for _, port in open_ports}
    assert int(head.gcs.rpartition(":")[2]) in ports  # it is these ports that are looked at
    assert int(head.dashboard.rpartition(":")[2]) not in ports


def test_token_and_storage_key_are_in_no_log_no_job_record_and_nothing_that_a_job_wrote(
    head: TokenCluster, folder: Path
) -> None:
    output = folder / "secrets"
    command = pretraining(folder, output, steps=4, checkpoint_every_steps=2)
    done = submit(head, "secrets", *command)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.dumps(job(head, "secrets-1"))
    files = [path for place in (head.logs, output) for path in place.rglob("*") if path.is_file()]
    assert len([path for path in files if path.suffix in (".log", ".out", ".err")]) > 5
    assert [path for path in files if path.suffix == ".safetensors"]
    for secret in (head.token_file.read_text(), head.storage_key):
        assert secret not in record + done.stdout + done.stderr
        assert [path for path in files if secret.encode() in path.read_bytes()] == []


def test_with_tls_a_job_runs_and_a_driver_without_a_certificate_does_not_join(tmp_path: Path) -> None:
    for words in (["authority", str(tmp_path)], ["node", str(tmp_path), node_address()]):
        subprocess.run([str(ROOT / "cluster" / "tls.sh"), *words], check=True)
    cluster = TokenCluster(tmp_path, certificates=tmp_path)
    joins = f"import ray; ray.init({cluster.gcs!r}); print('inside', ray.get(ray.remote(lambda: 7).remote()))"
    with (
        tempfile.TemporaryDirectory(prefix="br-", dir="/tmp", ignore_cleanup_errors=True) as sockets,
        cluster.running(Path(sockets)),
    ):
        done = cluster.run(str(cluster.ray), "job", "submit", "--", sys.executable, "-c", joins)
        assert "inside 7" in done.stdout, done.stdout + done.stderr
        plain = {name: value for name, value in cluster.environment().items() if "TLS" not in name}
        code = f"import ray; ray.init({cluster.gcs!r}); print('inside')"
        within = cluster.run(sys.executable, "-c", code)
        assert "inside" in within.stdout, within.stderr
        driver = subprocess.Popen(
            [sys.executable, "-c", code], env=plain, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        try:
            said, _ = driver.communicate(timeout=60)
            assert driver.returncode != 0
        except subprocess.TimeoutExpired:  # it asks for the cluster again and again
            driver.kill()
            said, _ = driver.communicate()
        assert "inside" not in said


def test_a_job_that_is_stopped_in_mid_training_goes_on_when_it_is_submitted_again(
    head: TokenCluster, folder: Path
) -> None:
    run = folder / "pretrain"
    command = pretraining(folder, run, STEPS, checkpoint_every_steps=100_000)
    wrong = submit(head, "pretrain", *command, "train.sleps=1")
    assert wrong.returncode == 2
    assert "train.sleps: unknown config key" in wrong.stdout
    record = job(head, "pretrain-1")
    assert (record["status"], record["exit"]) == ("FAILED", 2)

    waiting = head.run(sys.executable, "jobs/submit.py", "pretrain", "--no-wait", "--", *command)
    assert "pretrain-2: submitted" in waiting.stdout, waiting.stdout + waiting.stderr
    wait_for(lambda: progress(run) > 8)
    again = head.run(sys.executable, "jobs/submit.py", "pretrain", "--no-wait", "--", *command)
    assert "pretrain-2: running already" in again.stdout
    told = job(head, "pretrain-2")
    assert told["metadata"]["job_name"] == "pretrain"
    assert told["metadata"]["stage"] == "pretrain"
    assert f"/{8 * STEPS:,} clips" in told["metadata"]["progress"]
    shown = head.run(str(head.ray), "job", "status", "pretrain-2").stdout
    assert "RUNNING" in shown
    assert f"/{8 * STEPS:,} clips" in shown
    print(told, shown)

    asked = time.monotonic()
    stopped = head.run(str(head.ray), "job", "stop", "pretrain-2")
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert job(head, "pretrain-2")["status"] == "STOPPED"
    (checkpoint,) = (path.parent for path in run.glob("checkpoints/*/commit.json"))
    step = int(checkpoint.name.partition("-")[2])
    print(f"stopped at step {step} of {STEPS}, {time.monotonic() - asked:.1f} s after it was asked")
    assert 0 < step < STEPS
    assert not (run / "model").exists()

    finished = submit(head, "pretrain", *command)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "pretrain-3: submitted" in finished.stdout
    assert "pretrain-3: succeeded" in finished.stdout
    assert (run / "model" / "config.json").exists()
    assert sorted(losses(run)) == sorted(set(losses(run))), "a step was done twice"
    assert max(losses(run)) == STEPS
    assert json.loads((run / "attempts.json").read_text())["attempts"] == 2
    assert job(head, "pretrain-3")["exit"] == 0

    once_more = submit(head, "pretrain", *command)  # it is complete: nothing is done
    assert once_more.returncode == 0
    assert json.loads((run / "attempts.json").read_text())["attempts"] == 2


def test_each_other_job_succeeds_on_small_data(head: TokenCluster, folder: Path) -> None:
    data, encoder = folder / "data", folder / "encoder"
    where = [f"data.path={data}", "data.clip_seconds=2"]
    sweep = ["sweep.num_trials=2", "sweep.max_concurrent_trials=1", "sweep.grace_validations=2"]
    fine = ["finetune.validate_every_steps=4", *train(8, "finetune.")]
    for name, command in {
        "finetune": [*where, f"encoder={encoder}", *train(8), "validate_every_steps=4"],
        "sweep": [*where, f"encoder={encoder}", *sweep, *fine],
        "evaluate": [*where, f"model={encoder}", "num_workers=1"],
        "embed": [],
        "iterate": [*where, "iterations=1", "inference.num_workers=1", "pretrain.predictor.num_layers=1", *sweep, *fine,
                    *train(8, "pretrain."), *(f"pretrain.{setting}" for setting in ENCODER)],
    }.items():  # fmt: skip
        output = folder / f"of-{name}"
        words = [str(encoder), str(data), str(output)] if name == "embed" else [*command, f"output={output}"]
        begun = time.monotonic()
        done = submit(head, name, f"jobs/{name}.py", *words, *(["num_workers=1"] if name == "embed" else []))
        assert done.returncode == 0, f"{name}: {done.stdout}{done.stderr}"
        record = job(head, f"{name}-1")
        assert (record["status"], record["exit"]) == ("SUCCEEDED", 0), name
        print(f"{name}: {time.monotonic() - begun:.0f} s, last told: {record['metadata']['stage']}")
    for made in ("finetune/model", "sweep/model", "iterate/iteration-1/sweep/model"):
        assert (folder / f"of-{made}" / "config.json").exists(), made
    assert (folder / "of-evaluate/evaluation.json").exists()
    assert (folder / "of-embed/embeddings.json").exists()


def progress(run: Path) -> int:
    """The newest step that is shown: losses are on storage with the next checkpoint."""
    try:
        return int(json.loads((run / "progress.json").read_text())["step"])
    except (FileNotFoundError, json.JSONDecodeError):  # not begun, or half written
        return 0


def losses(run: Path) -> list[int]:
    """The steps whose losses are written down, in their order."""
    try:
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    except (FileNotFoundError, json.JSONDecodeError):  # not begun, or a line half written
        return []
    return [row["step"] for row in rows if "train/loss" in row]


def wait_for(seen: Callable[[], bool], seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not seen():
        assert time.monotonic() < deadline
        time.sleep(0.5)
