"""`beats-ray finetune` as a script: fine-tunes an encoder into a classifier.

ray job submit --working-dir . -- python jobs/finetune.py jobs/finetune-esc50.yaml
"""

import sys

from beats_ray.cli import run

if __name__ == "__main__":
    run(["finetune", *sys.argv[1:]])
