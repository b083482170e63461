"""`beats-ray train-tokenizer` as a script: distils an encoder into the next iteration's tokenizer.

ray job submit --working-dir . -- python jobs/train_tokenizer.py jobs/tokenizer-base.yaml
"""

import sys

from beats_ray.cli import run

if __name__ == "__main__":
    run(["train-tokenizer", *sys.argv[1:]])
