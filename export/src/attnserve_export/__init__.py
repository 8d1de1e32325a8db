"""Exports attention from PyTorch to ONNX, and verifies every export before it is written.

attention/     the PyTorch modules: masks, core attention, layers with projections
transformers   Hugging Face checkpoints
graphs         PyTorch modules to ONNX graphs
reference      the independent float64 reference
verification   graphs against the reference
repository     the model repository on disk
"""

import os

# ONNX Runtime counts its use otherwise, in a database under HOME with a device's id.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
