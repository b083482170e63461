"""`beats-ray iterate` as a script: runs whole BEATs iterations.

ray job submit --working-dir . -- python jobs/iterate.py jobs/iterate-tiny.yaml
"""

import sys

from beats_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["iterate", *sys.argv[1:]]))
