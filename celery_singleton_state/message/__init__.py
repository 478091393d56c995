"""Messages of singleton tasks: read, delay, requeue, forward, deduplicate and enqueue them."""
