"""Training: one loop, three tasks (pre-training, tokenizer distillation, fine-tuning), DeepSpeed ZeRO under Ray Train."""
