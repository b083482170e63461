"""`beats-ray evaluate` as a script: evaluates a published model.

ray job submit --working-dir . -- python jobs/evaluate.py output=... data.path=... model=...
"""

import sys

from beats_ray.cli import run

if __name__ == "__main__":
    run(["evaluate", *sys.argv[1:]])
