"""`beats-ray convergence` as a script: whether pre-training helps, over several seeds.

ray job submit --working-dir . -- python jobs/convergence.py jobs/convergence-mini.yaml data.path=s3://bucket/corpus
"""

import sys

from beats_ray.cli import run

if __name__ == "__main__":
    run(["convergence", *sys.argv[1:]])
