"""Using a model: generation, evaluation, metrics, chat."""
