"""The store that keeps leases and states in one table of an SQL database."""
