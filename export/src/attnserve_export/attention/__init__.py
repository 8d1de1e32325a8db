"""Attention as PyTorch modules, made to be exported."""
