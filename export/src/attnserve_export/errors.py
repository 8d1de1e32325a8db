"""What can go wrong with an export."""


class ExportError(Exception):
    """What was asked for cannot be exported; the message says what was given and is allowed."""


class VerificationError(Exception):
    """An exported graph is further from its reference than its tolerance; nothing is written."""
