"""Submits a job under a name. The same line again follows it while it runs, and goes on with it where it stopped.

    python jobs/submit.py sweep-esc50 -- jobs/sweep.py jobs/sweep-esc50.yaml output=s3://my-bucket/runs/sweep

Tries are numbered (sweep-esc50-1, -2, ...): Ray takes no submission id twice. A run is what its `output` holds, so each
try continues the last one, and at most one runs at a time. Address and token come from `RAY_ADDRESS` (or
`RAY_API_SERVER_ADDRESS`), `RAY_AUTH_MODE` and `~/.ray/auth_token`. Ctrl-C ends the following, not the job.

Exit status: that of the job (0 done, 1 failed, 2 a mistake in its settings); 143 where it was stopped; 3 where no
cluster answers or takes the token, or where the connection to the job breaks again and again.
"""

import argparse
import asyncio
import re
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from ray.exceptions import RayError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient, JobType

ROOT = Path(__file__).parents[1]
STOPPED = 143
NO_CLUSTER = 3
CONNECTIONS, PAUSE_SECONDS = 5, 5.0
"""To follow a job over: how many at most, and how long to wait before the next one."""


def main(arguments: list[str] | None = None) -> int:
    """Submits or follows; returns the exit status."""
    options = _parse(arguments)
    try:
        client = JobSubmissionClient(options.address)
        job = attach(client, options.name) or submit_or_attach(client, options.name, options.command)
    except (ConnectionError, RuntimeError, RayError) as error:
        return _no_cluster(error)
    if options.no_wait:
        return 0
    try:
        return follow(client, job)
    except (ConnectionError, RuntimeError, RayError) as error:
        return _no_cluster(error)
    except KeyboardInterrupt:
        print(f"\n{job} goes on; the same line follows it again, `ray job stop {job}` ends it", file=sys.stderr)
        return 130


def attach(client: JobSubmissionClient, name: str) -> str | None:
    """The try that has not ended yet, or None."""
    going = [job for job in tries(client, name) if not job.status.is_terminal()]
    if not going:
        return None
    job: str = going[0].submission_id
    print(f"{job}: {going[0].status.lower()} already; following it", flush=True)
    return job


def submit(client: JobSubmissionClient, name: str, command: list[str]) -> str:
    """Starts the next try and returns its submission id."""
    numbers = [int(job.submission_id.rpartition("-")[2]) for job in tries(client, name)]
    environment = yaml.safe_load((ROOT / "jobs" / "runtime-env.yaml").read_text())
    job: str = client.submit_job(
        entrypoint=shlex.join(["python", *command]),
        submission_id=f"{name}-{max(numbers, default=0) + 1}",
        runtime_env=environment | {"working_dir": str(ROOT)},
        metadata={"job_name": name},
    )
    print(f"{job}: submitted", flush=True)
    return job


def submit_or_attach(client: JobSubmissionClient, name: str, command: list[str]) -> str:
    """Starts the next try, or follows the one that somebody else has started under its number at the same moment."""
    try:
        return submit(client, name, command)
    except RuntimeError as error:
        job = attach(client, name) if "already exists" in str(error) else None
        if job is None:
            raise
        return job


def tries(client: JobSubmissionClient, name: str) -> list[JobDetails]:
    """What was submitted under the name by this script, in any order."""
    jobs = [job for job in client.list_jobs() if job.type == JobType.SUBMISSION]
    mine = [job for job in jobs if (job.metadata or {}).get("job_name") == name]
    return [job for job in mine if re.fullmatch(re.escape(name) + r"-\d+", job.submission_id)]


def follow(client: JobSubmissionClient, job: str) -> int:
    """Prints the job's output until it ends; its exit status.

    A connection that closes before is opened again, which prints the output from its start. RuntimeError where
    CONNECTIONS of them have closed.
    """

    async def tail() -> None:
        async for lines in client.tail_job_logs(job):
            print(lines, end="", flush=True)

    for attempt in range(CONNECTIONS):
        if attempt:
            time.sleep(PAUSE_SECONDS)
        reason = "it was closed"
        try:
            asyncio.run(tail())
            info: Any = client.get_job_info(job)
        except (ConnectionError, RuntimeError, RayError) as error:
            reason = " ".join(str(error).split())
            continue
        if info.status.is_terminal():
            break
    else:
        raise RuntimeError(f"the connection to {job} broke {CONNECTIONS} times ({reason}); the same line follows it")
    print(f"{job}: {info.status.lower()}", flush=True)
    if info.status == JobStatus.STOPPED:
        return STOPPED
    return info.driver_exit_code if info.driver_exit_code is not None else int(info.status != JobStatus.SUCCEEDED)


def _no_cluster(error: Exception) -> int:
    print(f"submit: error: {' '.join(str(error).split())}", file=sys.stderr)
    return NO_CLUSTER


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", metavar="NAME", help="of the job, over all its tries")
    parser.add_argument("--address", metavar="http://HOST:8265", help="of the cluster's dashboard [RAY_ADDRESS]")
    parser.add_argument("--no-wait", action="store_true", help="submit and return")
    parser.add_argument(
        "command", metavar="-- SCRIPT ARGUMENT...", nargs="+", help="a script of jobs/ and its arguments"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
