"""What a submitted job takes along, how it is told of, and how `jobs/submit.py` numbers and follows its tries."""

import importlib.util
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from ray.dashboard.modules.job.common import JobInfo, JobInfoStorageClient
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobType
from ray.job_submission import JobStatus as Status

from beats_ray import job_status
from beats_ray.console import Console
from beats_ray.job_status import JobStatus
from beats_ray.launch import _RAY_ENVIRONMENT, most_resources

pytestmark = pytest.mark.unit

JOBS = Path(__file__).parents[2] / "jobs"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("submit", JOBS / "submit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_runtime_environment_is_that_of_a_private_cluster_and_holds_no_secret() -> None:
    from beats_ray.clusters.kubernetes import SECRET_NAME
    from beats_ray.train.jobs import NOTICE_SECONDS

    environment = yaml.safe_load((JOBS / "runtime-env.yaml").read_text())
    variables = environment["env_vars"]
    assert float(variables.pop("RAY_JOB_STOP_WAIT_TIME_S")) > NOTICE_SECONDS + 10
    assert variables == {name: _RAY_ENVIRONMENT[name] for name in variables}
    assert {name for name in _RAY_ENVIRONMENT if name.startswith("MALLOC")} <= set(variables)
    assert not [name for name in variables if SECRET_NAME.search(name)]


class Record:
    """Ray's record of a job, in place of the one that its head keeps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.info: JobInfo | None = JobInfo(Status.RUNNING, "python jobs/x.py", metadata={"job_name": "x"})
        self.writes = 0
        monkeypatch.setattr(JobInfoStorageClient, "__init__", lambda *_: None)
        monkeypatch.setattr(JobInfoStorageClient, "get_info", self._get)
        monkeypatch.setattr(JobInfoStorageClient, "put_info", self._put)

    async def _get(self, _job: str, timeout: int) -> JobInfo | None:
        return self.info

    async def _put(self, _job: str, info: JobInfo, timeout: int) -> bool:
        self.info = info
        self.writes += 1
        return True


def test_stages_are_told_at_once_and_progress_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    record, now = Record(monkeypatch), [100.0]
    monkeypatch.setattr(job_status.time, "monotonic", lambda: now[0])
    console = Console()
    console.follow(JobStatus("x-1").tell, "pretrain")
    assert record.info is not None
    assert (record.info.message, record.info.metadata) == (
        "pretrain", {"job_name": "x", "stage": "pretrain", "progress": ""}
    )  # fmt: skip
    console.progress(1, 100)
    console.progress(2, 100)
    assert record.writes == 1
    now[0] += job_status.SECONDS_BETWEEN
    console.progress(50, 100, loss=5.0)
    assert record.writes == 2
    assert record.info.message is not None
    assert record.info.message.startswith("pretrain: 50/100 clips ")
    assert record.info.message.endswith("loss 5.000")
    console.stage("probe")
    assert record.info.message == "probe"


def test_the_record_of_a_job_that_has_ended_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    record = Record(monkeypatch)
    assert record.info is not None
    record.info = ended = replace(record.info, status=Status.STOPPED)
    JobStatus("x-1").tell("pretrain", "")
    assert record.info is ended
    record.info = None  # deleted
    JobStatus("x-1").tell("pretrain", "")
    assert record.writes == 0


def test_a_job_server_that_is_away_does_not_end_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.exceptions import RpcError

    record = Record(monkeypatch)

    async def away(*_: object, **__: object) -> None:
        raise RpcError("unavailable")

    monkeypatch.setattr(JobInfoStorageClient, "get_info", away)
    JobStatus("x-1").tell("pretrain", "")
    assert record.writes == 0


def test_a_process_knows_whether_it_was_submitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(job_status.JOB_VARIABLE, raising=False)
    assert job_status.submission_id() is None
    monkeypatch.setenv(job_status.JOB_VARIABLE, json.dumps({"metadata": {"job_submission_id": "x-1"}}))
    assert job_status.submission_id() == "x-1"


class Server:
    """A job server with what was submitted before; every job ends with `exit_code` while it is followed."""

    def __init__(self, *before: tuple[str, str, Status], exit_code: int | None = 0) -> None:
        self.jobs = [
            JobDetails(type=JobType.SUBMISSION, submission_id=job, status=status, entrypoint="e", job_id=None,
                       metadata={"job_name": name})
            for job, name, status in before
        ]  # fmt: skip
        self.submitted: list[dict[str, Any]] = []
        self.exit_code = exit_code
        self.end = Status.STOPPED if exit_code is None else Status.FAILED if exit_code else Status.SUCCEEDED

    def list_jobs(self) -> list[JobDetails]:
        return self.jobs

    def submit_job(self, **job: Any) -> str:
        self.submitted.append(job)
        name: str = job["submission_id"]
        return name

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        yield f"log of {job}\n"

    def get_job_info(self, _job: str) -> JobInfo:
        return JobInfo(self.end, "e", driver_exit_code=self.exit_code)


@pytest.mark.parametrize(("exit_code", "status"), [(0, 0), (1, 1), (2, 2), (None, 143)])
def test_the_next_try_is_numbered_and_its_exit_status_is_the_job_s(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    exit_code: int | None, status: int,
) -> None:  # fmt: skip
    before = [("x-10", "x", Status.FAILED), ("x-9", "x", Status.STOPPED), ("y-1", "y", Status.RUNNING)]
    before += [("mine", "x", Status.FAILED)]  # by somebody else's hand; and x-1 to x-8 were deleted
    server = Server(*before, exit_code=exit_code)
    monkeypatch.setattr(script, "JobSubmissionClient", lambda _address: server)
    assert script.main(["x", "--", "jobs/pretrain.py", "jobs/pretrain-base.yaml", "data.path=s3://a b"]) == status
    (job,) = server.submitted
    assert (job["submission_id"], job["metadata"]) == ("x-11", {"job_name": "x"})
    assert job["entrypoint"] == "python jobs/pretrain.py jobs/pretrain-base.yaml 'data.path=s3://a b'"
    assert job["runtime_env"]["working_dir"] == str(JOBS.parent)
    assert job["runtime_env"]["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == "60"
    assert "log of x-11" in capsys.readouterr().out


@pytest.mark.parametrize("state", [Status.RUNNING, Status.PENDING])
def test_a_try_that_has_not_ended_is_followed_and_none_is_started_beside_it(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], state: Status
) -> None:
    server = Server(("x-1", "x", Status.FAILED), ("x-2", "x", state))
    monkeypatch.setattr(script, "JobSubmissionClient", lambda _address: server)
    assert script.main(["x", "--", "jobs/pretrain.py"]) == 0
    assert server.submitted == []
    assert "log of x-2" in capsys.readouterr().out


@pytest.mark.parametrize("breaks", [RuntimeError("Connection closed\n 1006"), None])
@pytest.mark.parametrize(("times", "status"), [(2, 1), (99, 3)])
def test_a_connection_that_breaks_is_opened_again_and_given_up_at_last(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    breaks: RuntimeError | None, times: int, status: int,
) -> None:  # fmt: skip
    class Unsteady(Server):
        tails = 0

        async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
            self.tails += 1
            yield f"log {self.tails}\n"
            if breaks and self.tails <= times:
                raise breaks

        def get_job_info(self, job: str) -> JobInfo:
            return JobInfo(Status.RUNNING, "e") if self.tails <= times else super().get_job_info(job)

    pauses: list[float] = []
    monkeypatch.setattr("time.sleep", pauses.append)
    server = Unsteady(("x-1", "x", Status.RUNNING), exit_code=1)
    monkeypatch.setattr(script, "JobSubmissionClient", lambda _address: server)
    assert script.main(["x", "--", "jobs/pretrain.py"]) == status
    shown = capsys.readouterr()
    if status == 3:
        assert shown.err.startswith("submit: error: the connection to x-1 broke")
        assert server.tails == script.CONNECTIONS
    else:
        assert "log 3\nx-1: failed" in shown.out
        assert pauses == [script.PAUSE_SECONDS] * 2


def test_of_two_who_submit_at_one_moment_the_second_follows_the_first(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Raced(Server):
        def submit_job(self, **job: Any) -> str:
            self.jobs = Server((job["submission_id"], "x", Status.PENDING)).jobs
            raise RuntimeError("Request failed with status code 500: Job with submission_id x-1 already exists")

    monkeypatch.setattr(script, "JobSubmissionClient", lambda _address: Raced())
    assert script.main(["x", "--", "jobs/pretrain.py"]) == 0
    assert "log of x-1" in capsys.readouterr().out


def test_a_cluster_that_does_not_answer_is_said_in_one_line(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(_address: str) -> None:
        raise AuthenticationError("Authentication required:\n no token")

    monkeypatch.setattr(script, "JobSubmissionClient", refuse)
    assert script.main(["x", "--", "jobs/pretrain.py"]) == 3
    assert capsys.readouterr().err.startswith("submit: error: Authentication required: no token")


def test_a_cluster_that_scales_counts_with_the_nodes_that_it_may_start(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    from ray._private.state import GlobalState

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0, "memory": 7.0})
    monkeypatch.setattr(GlobalState, "get_max_resources_from_cluster_config", lambda _self: {"CPU": 64, "GPU": 8})
    assert most_resources() == {"CPU": 64, "GPU": 8, "memory": 7.0}
    monkeypatch.setattr(GlobalState, "get_max_resources_from_cluster_config", lambda _self: None)
    assert most_resources() == {"CPU": 4.0, "memory": 7.0}
