"""Loaded models, and loading and unloading them while the server runs."""
