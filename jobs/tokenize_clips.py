"""`beats-ray tokenize` as a script: computes the patch labels of a data set.

ray job submit --working-dir . -- python jobs/tokenize_clips.py output=... data.path=... tokenizer=...
"""

import sys

from beats_ray.cli import run

if __name__ == "__main__":
    run(["tokenize", *sys.argv[1:]])
