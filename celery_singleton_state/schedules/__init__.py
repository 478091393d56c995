"""Compute when a schedule is due, for the schedules of Celery and those of users."""
