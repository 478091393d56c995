"""One message of a singleton: what it is, and how it is sent again."""
