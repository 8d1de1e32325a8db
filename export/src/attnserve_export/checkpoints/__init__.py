"""Hugging Face checkpoints to models of kind `transformer`."""
