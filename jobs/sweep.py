"""`beats-ray sweep` as a script: searches fine-tuning settings.

ray job submit --working-dir . -- python jobs/sweep.py jobs/sweep-esc50.yaml
"""

import sys

from beats_ray.cli import run

if __name__ == "__main__":
    run(["sweep", *sys.argv[1:]])
