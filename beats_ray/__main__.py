"""`python -m beats_ray`: the same as the `beats-ray` command."""

from beats_ray.cli import run

run()
