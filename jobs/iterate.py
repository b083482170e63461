"""`beats-ray iterate` as a script: runs whole BEATs iterations.

ray job submit --working-dir . -- python jobs/iterate.py jobs/iterate-tiny.yaml
"""

import sys

from beats_ray.cli import run

if __name__ == "__main__":
    run(["iterate", *sys.argv[1:]])
