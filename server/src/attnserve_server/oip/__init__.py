"""The Open Inference Protocol, as far as the control plane speaks it."""
