"""`beats-ray prepare` as a script: turns raw clips into shards.

ray job submit --working-dir . -- python jobs/prepare.py jobs/prepare-esc50.yaml
"""

import sys

from beats_ray.cli import run

if __name__ == "__main__":
    run(["prepare", *sys.argv[1:]])
