"""The typed state of a singleton: its schema, its JSON, and the checks of every save."""
