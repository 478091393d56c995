"""The store that keeps leases in Redis or Valkey, for singletons without state."""
