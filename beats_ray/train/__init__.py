"""Training: one loop and three tasks under DeepSpeed ZeRO and Ray Train."""
