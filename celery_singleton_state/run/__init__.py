"""One delivery, from its call to the end of its run."""
