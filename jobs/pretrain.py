"""`beats-ray pretrain` as a script: pre-trains an encoder on masked tokenizer labels.

ray job submit --working-dir . -- python jobs/pretrain.py jobs/pretrain-base.yaml
"""

import sys

from beats_ray.cli import run

if __name__ == "__main__":
    run(["pretrain", *sys.argv[1:]])
