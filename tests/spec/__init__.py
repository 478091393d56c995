"""The lease's protocol: its specification, PROTOCOL.md, and a model that is explored whole."""
