"""Texts, moments and URLs, as they are stored and as they are shown."""
