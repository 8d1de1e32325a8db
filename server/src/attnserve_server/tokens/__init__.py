"""Requests of token models: checked, tokenized, run by the data plane, and read."""
