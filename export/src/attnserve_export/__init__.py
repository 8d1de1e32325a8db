"""Exports attention from PyTorch to ONNX, and verifies every export before it is written.

attention/     the PyTorch modules: masks, core attention, layers with projections
transformers   Hugging Face checkpoints
graphs         PyTorch modules to ONNX graphs
reference      the independent float64 reference
verification   graphs against the reference
repository     the model repository on disk
"""

__version__ = "0.1.0"
