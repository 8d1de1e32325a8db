"""The attnserve server: wire -> validate -> schedule -> run -> wire.

services/    the gRPC methods: decode, call, encode
wire/        messages to requests and results to messages
validation/  every check on a request, before anything is queued
scheduler/   which request runs when; deadlines, admission
engine/      ONNX Runtime: providers, sessions, models, diagnostics
repository/  the model repository on disk
"""

import os

# NumPy's products take one thread. Those of its BLAS spin for a while after each product, on the
# cores that ONNX Runtime's next run needs: a transformer's run was measured to take 1.4 times as
# long. It reads this as it is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

__version__ = "0.1.0"
