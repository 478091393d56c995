"""How texts, times and URLs are stored and shown."""
