"""Interlace: fine-tuning of interleaved vision-language models. DESIGN: data <- model <- inference <- training."""

__version__ = "0.1.0"
