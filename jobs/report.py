"""`beats-ray report` as a script: writes the report of a run.

ray job submit --working-dir . -- python jobs/report.py RUN
"""

import sys

from beats_ray.cli import run

if __name__ == "__main__":
    run(["report", *sys.argv[1:]])
