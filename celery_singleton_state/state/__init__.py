"""The typed state."""
