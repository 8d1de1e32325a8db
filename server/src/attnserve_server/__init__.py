"""The attnserve server: the control plane over the data plane (attnserve_dataplane).

app          a whole server, built from settings, started and drained
handlers/    the gRPC methods that are answered in Python, and the threads that answer them
tokens/      requests of token models: checks, the run, weights, answers
oip/         the Open Inference Protocol: metadata, and requests of token models
models/      what is loaded: providers, tokenizers, loading and unloading
repository/  the model repository on disk
metrics      the data plane's counts, for Prometheus
"""

import os

# NumPy's products take one thread. Those of its BLAS spin for a while after each product, on the
# cores that ONNX Runtime's next run needs: a transformer's run was measured to take 1.4 times as
# long. It reads this as it is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# ONNX Runtime counts its use otherwise, in a database under HOME with a device's id.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
