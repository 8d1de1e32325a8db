"""What ONNX Runtime is asked for, by the names and numbers that it knows."""

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"

# Opset 23 is the first with an Attention operator: https://onnx.ai/onnx/operators/onnx__Attention.html
MIN_OPSET = 23
# The newest that these modules are exported and verified at.
MAX_OPSET = 24
