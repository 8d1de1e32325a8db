"""ONNX Runtime: providers, sessions, loaded models, running them."""
