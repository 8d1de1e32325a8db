"""Traces: records of the data plane, as spans of OpenTelemetry and as exemplars."""
