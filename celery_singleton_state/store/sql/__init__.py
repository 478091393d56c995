"""Leases and states in one table of an SQL database."""
