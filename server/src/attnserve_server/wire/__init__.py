"""Messages to arrays and arrays to messages."""
