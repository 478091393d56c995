"""Running a singleton: one delivery, from the call of its task to the end of its run."""
