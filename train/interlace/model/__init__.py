"""From packed batches to log-probs and losses: loading, tuning, attention, forward."""
