"""Read and check the settings of an app and the options of a task."""
