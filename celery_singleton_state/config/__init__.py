"""Settings of an app and options of a task: read and checked."""
