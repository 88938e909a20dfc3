"""Training runs: the trainers, checkpoints, tracking."""
