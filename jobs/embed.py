"""`beats-ray embed` as a script: embeddings of a prepared data set, as Parquet.

ray job submit --working-dir . -- python jobs/embed.py MODEL SRC DST
"""

import sys

from beats_ray.cli import run

if __name__ == "__main__":
    run(["embed", *sys.argv[1:]])
