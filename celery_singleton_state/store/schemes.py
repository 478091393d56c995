"""What a URL for leases may begin with; without the client library, which not everybody has."""

#: What Celery's brokers call a socket, and what the client library does.
CELERYS_SOCKET, CLIENTS_SOCKET = "redis+socket", "unix"
LEASE_SCHEMES = ("redis", "rediss", CELERYS_SOCKET, CLIENTS_SOCKET, "sentinel")
