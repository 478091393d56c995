"""Stores: where leases and states live."""
