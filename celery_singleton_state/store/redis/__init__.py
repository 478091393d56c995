"""Leases without state in Redis or Valkey."""
