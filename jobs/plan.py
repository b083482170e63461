"""`beats-ray plan` as a script: hours, nodes and cost of all iterations on a cluster. It needs no cluster itself.

python jobs/plan.py jobs/iterate-base.yaml planned_data.hours=5000 planned_data.num_classes=527
"""

import sys

from beats_ray.cli import run

if __name__ == "__main__":
    run(["plan", *sys.argv[1:]])
