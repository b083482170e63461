"""`beats-ray simulate` as a script: a large run on spot nodes. It needs no cluster itself.

python jobs/simulate.py workers=1000 hourly_preemption=0.05
"""

import sys

from beats_ray.cli import run

if __name__ == "__main__":
    run(["simulate", *sys.argv[1:]])
