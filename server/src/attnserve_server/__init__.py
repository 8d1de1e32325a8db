"""The attnserve server: wire -> validate -> schedule -> run -> wire.

services/    the gRPC methods: decode, call, encode
wire/        messages to requests and results to messages
validation   every check on a request, before anything is queued
scheduler/   which request runs when; deadlines, admission
engine/      ONNX Runtime: providers, sessions, models, diagnostics
repository/  the model repository on disk
"""

__version__ = "0.1.0"
