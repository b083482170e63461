"""What a submitted job is doing, told to Ray's job server: the message of `ray job status`, and the job's metadata.

    $ ray job status pretrain-1
    Status message: masked pre-training: 1,200/6,400 clips  35.1 clips/s  2:28 left  loss 5.100

Ray has no call for a running job to say this, so the job's record is changed where Ray keeps it. Its supervisor writes
that record before the job's process starts and after it has ended, never in between.
"""

import asyncio
import json
import logging
import os
import time
from dataclasses import replace

logger = logging.getLogger(__name__)

SECONDS_BETWEEN = 5.0
"""A record at most this often; the start of a stage is told at once."""
TIMEOUT_SECONDS = 5
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # which Ray sets for the process of a job; the name is the variable's own


def submission_id() -> str | None:
    """The id under which this process was submitted; None where it is no process of `ray job submit`."""
    found: str | None = json.loads(os.environ.get(JOB_VARIABLE, "{}")).get("metadata", {}).get("job_submission_id")
    return found


class JobStatus:
    """Tells the job server of stages and progress. What cannot be told is left out: it never ends a job."""

    def __init__(self, job: str) -> None:
        """job: the submission id. Ray must be initialised when something is told."""
        self._job = job
        self._stage = ""
        self._last = float("-inf")

    def tell(self, stage: str, line: str) -> None:
        """stage: what the job is at. line: how far, empty at its start."""
        now = time.monotonic()
        if stage == self._stage and now - self._last < SECONDS_BETWEEN:
            return
        self._stage, self._last = stage, now
        from ray.exceptions import RayError

        try:
            asyncio.run(self._record({"stage": stage, "progress": " ".join(line.split())}))
        except (RayError, RuntimeError, OSError, ValueError) as error:
            logger.debug("no progress told of %s: %s", self._job, error)

    async def _record(self, told: dict[str, str]) -> None:
        from ray.dashboard.modules.job.common import JobInfoStorageClient
        from ray.experimental.internal_kv import internal_kv_get_gcs_client

        client = JobInfoStorageClient(internal_kv_get_gcs_client())
        info = await client.get_info(self._job, timeout=TIMEOUT_SECONDS)
        if info is None or info.status.is_terminal():
            return
        message = ": ".join(part for part in told.values() if part)
        changed = replace(info, message=message, metadata=(info.metadata or {}) | told)
        await client.put_info(self._job, changed, timeout=TIMEOUT_SECONDS)
