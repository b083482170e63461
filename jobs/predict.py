"""`beats-ray predict` as a script: names what is heard in audio files.

ray job submit --working-dir . -- python jobs/predict.py MODEL FILE...
"""

import sys

from beats_ray.cli import run

if __name__ == "__main__":
    run(["predict", *sys.argv[1:]])
