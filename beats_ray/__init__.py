"""beats_ray: pre-train BEATs audio encoders and fine-tune them on a Ray cluster."""

__version__ = "0.1.0"
