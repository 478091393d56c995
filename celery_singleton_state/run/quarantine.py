"""Where a value is kept that cannot be decoded."""

from __future__ import annotations

import hashlib

from celery_singleton_state.keys import row_key


def quarantine_key(key: str, value: str) -> str:
    """The key for a value of this row: the same value always goes to the same place."""
    digest = hashlib.sha256(value.encode()).hexdigest()[:12]
    return row_key(f"quarantine:{digest}:", key)
