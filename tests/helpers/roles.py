"""Database roles, made with the SQL of ``docs/databases.md``.

A function is for PostgreSQL unless its name says otherwise.
"""

from __future__ import annotations

import re
from pathlib import Path

from sqlalchemy import make_url

from tests.helpers.tables import execute

_PAGE = Path(__file__).parents[2] / "docs" / "databases.md"
#: The SQL of the page: for each database, first the SQL that an administrator runs before the table
#: is made, then the SQL that the table's owner runs after that.
_BEFORE, _AFTER, _BEFORE_ON_MARIADB, _AFTER_ON_MARIADB = re.findall(
    r"^```sql\n(.*?)^```", _PAGE.read_text(), re.MULTILINE | re.DOTALL
)

OWNER, WORKER = "shop_migrate", "shop_worker"
TABLE = "jobs.kv_store"


def of(role: str, url: str) -> str:
    """Return a database's URL with the user replaced by another role."""
    return make_url(url).set(username=role).render_as_string()


def make_roles(url: str) -> None:
    """Create the roles and the schema, without the table."""
    execute(url, _BEFORE)


def grant(url: str) -> None:
    """Grant the worker's role its rights on the table."""
    execute(of(OWNER, url), _AFTER)


def drop_roles(url: str) -> None:
    """Drop the roles with all that they own. Otherwise other tests would find them, because all
    databases of a server share its roles.
    """
    both = f"{OWNER}, {WORKER}"
    execute(url, f"DROP OWNED BY {both} CASCADE", f"DROP ROLE {both}")


def make_roles_on_mariadb(url: str) -> None:
    execute(url, *_statements(_BEFORE_ON_MARIADB))


def grant_on_mariadb(url: str) -> None:
    execute(url, *_statements(_AFTER_ON_MARIADB))


def drop_roles_on_mariadb(url: str) -> None:
    """Drop the roles, and the database that the SQL of the page creates."""
    execute(url, f"DROP USER {OWNER}, {WORKER}", "DROP DATABASE jobs")


def _statements(block: str) -> list[str]:
    return [statement for statement in block.split(";") if statement.strip()]
