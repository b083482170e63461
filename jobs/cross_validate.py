"""`beats-ray cross-validate` as a script: k-fold fine-tuning, and comparisons of encoders.

ray job submit --working-dir . -- python jobs/cross_validate.py jobs/cross-validate-esc50.yaml output=... data.path=...
"""

import sys

from beats_ray.cli import run

if __name__ == "__main__":
    run(["cross-validate", *sys.argv[1:]])
