"""`beats-ray predict` as a script: names what is heard in audio files.

ray job submit --working-dir . -- python jobs/predict.py MODEL FILE...
"""

import sys

from beats_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["predict", *sys.argv[1:]]))
