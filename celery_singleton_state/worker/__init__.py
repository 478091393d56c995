"""What a worker does for its singletons."""
