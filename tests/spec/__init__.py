"""The specification of the lease's protocol (PROTOCOL.md), and models of it.

The explorer visits all states of the models.
"""
