"""`beats-ray bench` as a script: speed and memory of the parts, beside what one would use instead.

ray job submit --working-dir . --entrypoint-num-gpus 1 -- python jobs/bench.py encoder device=cuda precision=bf16
"""

import sys

from beats_ray.cli import run

if __name__ == "__main__":
    run(["bench", *sys.argv[1:]])
