"""`ray job submit` against a head with token authentication: who is refused, and jobs that are stopped and go on.

A head of `ray start` on loopback, and every job of the chain on sample clips, as the README submits them.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.token_cluster import ROOT, TokenCluster

from beats_ray.data.sample import make_sample_set

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

TRAIN = {
    "warmup_steps": 2, "global_batch_size": 8, "num_workers": 1, "cpus_per_worker": 1, "log_every_steps": 2,
    "loggers": "[]",
}  # fmt: skip
ENCODER = ("encoder.preset=tiny", "encoder.overrides.num_layers=1", "encoder.overrides.conv_pos_kernel=16")
SMALL = [
    "iterations=1", "data.clip_seconds=2", "pretrain.predictor.num_layers=1", "inference.num_workers=1",
    "finetune.validate_every_steps=4", "sweep.num_trials=2", "sweep.max_concurrent_trials=1",
    "sweep.grace_validations=2", *(f"pretrain.{setting}" for setting in ENCODER),
    *(f"{part}.train.{name}={value}" for part in ("pretrain", "finetune") for name, value in TRAIN.items()),
    "pretrain.train.steps=400", "pretrain.train.checkpoint_every_steps=100000", "finetune.train.steps=8",
]  # fmt: skip
"""A pre-training of some minutes that would make one checkpoint alone, at its end."""


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TokenCluster]:
    with tempfile.TemporaryDirectory(prefix="br-", dir="/tmp", ignore_cleanup_errors=True) as sockets:
        cluster = TokenCluster(tmp_path_factory.mktemp("head"))
        with cluster.running(Path(sockets)):
            yield cluster


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("jobs")
    make_sample_set(found / "raw", num_clips=40, clip_seconds=2)
    return found


def submit(head: TokenCluster, name: str, *command: str) -> "subprocess.CompletedProcess[str]":
    return head.run(sys.executable, "jobs/submit.py", name, "--", *command, timeout=1200)


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


def test_nothing_of_the_head_listens_beyond_loopback_but_what_the_documentation_names(head: TokenCluster) -> None:
    open_ports = {
        (process.name(), connection.laddr.port)
        for process in head.processes()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.ip not in ("127.0.0.1", "::1")
    }
    print("listening on all addresses:", sorted(open_ports))
    dashboard = int(head.dashboard.rpartition(":")[2])
    assert dashboard not in {port for _, port in open_ports}


def test_the_token_is_in_no_log_and_no_job_record(head: TokenCluster) -> None:
    assert "SUCCEEDED" in head.run(str(head.ray), "job", "submit", "--", "env").stdout.upper()
    token = head.token_file.read_text()
    logs = [path for path in head.logs.rglob("*") if path.is_file() and path.suffix in (".log", ".out", ".err")]
    assert len(logs) > 5
    assert [path for path in logs if token in path.read_text(errors="replace")] == []


def test_with_tls_a_job_runs_and_a_driver_without_a_certificate_does_not_join(tmp_path: Path) -> None:
    for words in (["authority", str(tmp_path)], ["node", str(tmp_path), "127.0.0.1"]):
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
        joined = subprocess.run(
            [sys.executable, "-c", code], env=plain, capture_output=True, text=True, timeout=200, check=False
        )
        assert joined.returncode != 0
        assert "inside" not in joined.stdout


def test_jobs_of_the_chain_are_stopped_and_go_on(head: TokenCluster, folder: Path) -> None:
    data, run = folder / "data", folder / "run"
    done = submit(head, "prepare", "jobs/prepare.py", "esc50", str(folder / "raw"), str(data))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (data / "dataset.json").exists()

    wrong = submit(head, "iterate", "jobs/iterate.py", f"data.path={data}", f"output={run}", "iterationz=1")
    assert wrong.returncode == 2
    assert "iterationz: unknown config key" in wrong.stdout
    assert (job(head, "iterate-1")["status"], job(head, "iterate-1")["exit"]) == ("FAILED", 2)

    command = ["jobs/iterate.py", f"data.path={data}", f"output={run}", *SMALL]
    waiting = head.run(sys.executable, "jobs/submit.py", "iterate", "--no-wait", "--", *command)
    assert "iterate-2: submitted" in waiting.stdout
    told = wait_for(lambda: _progress_of_training(job(head, "iterate-2")))
    assert told["stage"] == "iteration 1: masked pre-training"
    shown = head.run(str(head.ray), "job", "status", "iterate-2").stdout
    assert "masked pre-training: " in shown
    again = head.run(sys.executable, "jobs/submit.py", "iterate", "--no-wait", "--", *command)
    assert "iterate-2: running already" in again.stdout

    stopped = head.run(str(head.ray), "job", "stop", "iterate-2")
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert job(head, "iterate-2")["status"] == "STOPPED"
    pretraining = run / "iteration-1" / "pretrain"
    (checkpoint,) = (path.parent for path in pretraining.glob("checkpoints/*/commit.json"))
    step = int(checkpoint.name.partition("-")[2])
    assert 0 < step < 400
    assert json.loads((pretraining / "stage.json").read_text())["status"] == "running"

    finished = submit(head, "iterate", *command)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "iterate-3: submitted" in finished.stdout
    assert "iterate-3: succeeded" in finished.stdout
    rows = [json.loads(line) for line in (pretraining / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if "train/loss" in row]
    assert steps == sorted(set(steps))  # none was done twice
    assert json.loads((pretraining / "attempts.json").read_text())["attempts"] == 2
    assert job(head, "iterate-3")["exit"] == 0


def test_the_other_jobs_succeed_on_what_the_chain_made(head: TokenCluster, folder: Path) -> None:
    data, run = folder / "data", folder / "run"
    encoder, classifier = run / "iteration-1/pretrain/model", run / "iteration-1/sweep/model"
    train = [f"train.{name}={value}" for name, value in (TRAIN | {"steps": 8}).items()]
    where = [f"data.path={data}", "data.clip_seconds=2"]
    for name, command in {
        "finetune": ["jobs/finetune.py", *where, f"encoder={encoder}", f"output={folder / 'finetune'}", *train,
                     "validate_every_steps=4"],
        "evaluate": ["jobs/evaluate.py", *where, f"model={classifier}", f"output={folder / 'evaluation'}",
                     "num_workers=1"],
        "embed": ["jobs/embed.py", str(encoder), str(data), str(folder / "embeddings"), "num_workers=1"],
    }.items():  # fmt: skip
        done = submit(head, name, *command)
        assert done.returncode == 0, done.stdout + done.stderr
        assert job(head, f"{name}-1")["status"] == "SUCCEEDED"
    assert (folder / "finetune/model/config.json").exists()
    assert (folder / "evaluation/evaluation.json").exists()
    assert (folder / "embeddings/embeddings.json").exists()


def _progress_of_training(record: dict[str, Any]) -> dict[str, str] | None:
    assert record["status"] in ("PENDING", "RUNNING"), record
    told: dict[str, str] = record["metadata"]
    return told if "pre-training" in told.get("stage", "") and "clips/s" in told.get("progress", "") else None


def wait_for(ask: Any, seconds: float = 600) -> Any:
    deadline = time.monotonic() + seconds
    while (found := ask()) is None:
        assert time.monotonic() < deadline
        time.sleep(1)
    return found
