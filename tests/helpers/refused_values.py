"""Values that some stores cannot hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tests.helpers.mariadb import MariaDB

#: A task id that some stores cannot hold, and that a sender may choose all the same.
ODD = "a\0b\udc80 Łódź\\x00 \U0001f389"
LARGEST = 2**63 - 1
PACKET = 1 << 17


@contextmanager
def with_small_packets(mariadb: MariaDB) -> Iterator[None]:
    def set_to(size: int) -> None:
        with mariadb.connect() as connection, connection.cursor() as cursor:
            cursor.execute(f"SET GLOBAL max_allowed_packet = {size}")

    set_to(PACKET)
    try:
        yield
    finally:
        set_to(1 << 26)
