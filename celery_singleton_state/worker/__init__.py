"""The parts of a Celery worker: checks at its start, lease renewal and recovery for its pool."""
