"""The stores: the databases in which leases and states are kept."""
