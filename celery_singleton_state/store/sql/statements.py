"""A database's statements, from the ``.sql`` file beside its module, and what else differs between
databases.

``docs/adding-a-database.md`` says how a database is added.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from importlib.resources import files
from operator import methodcaller
from typing import Any, ClassVar

from sqlalchemy import Dialect, Table

#: What each statement of a file begins with, followed by its name.
NAME = "\n-- name: "


class Statements:
    """The statements for one table on one database, in its driver's parameter style.

    The file has each of them under its name, with a sentence that says what it does.
    """

    # A run's own lease.
    acquire: str
    #: Waits for a row that somebody has locked; ``renew_unlocked`` passes over it.
    renew: str
    renew_unlocked: str | None = None
    save: str
    written: str
    release: str
    save_and_release: str
    give_back: str

    # What others ask of a row.
    request_handoff: str
    release_early: str
    request_run: str
    wanted: str
    pending_run_sent: str
    queued: str
    claim: str
    dequeue: str
    expect: str
    put: str
    set_aside: str

    # Looking and tidying up.
    peek: str
    list: str
    contents: str
    ticks: str
    unused: str
    prune: str

    # The rows of a schedule's entries.
    entries: str
    record: str
    #: Statements for a transaction, of which the first that answers rows says whether the write is
    #: in order.
    forget: str

    # Whether the database can be used.
    check: str
    #: Asks which privileges on the table the role lacks, if an error does not say so.
    lacking: str | None = None
    #: Asks whether row-level security can hide rows from the role.
    hiding: str | None = None
    #: Asks what of the database or the table does not have all characters.
    encodings: str | None = None
    #: What mends that.
    encoding_advice = ""

    #: The database's time now, which does not stand still in a transaction.
    now: ClassVar[str]
    #: The isolation level that SQLAlchemy is to set for a transaction, and what begins one if the
    #: driver does not.
    level: ClassVar[str]
    begin: ClassVar[str | None] = None
    #: SQLAlchemy's INSERT for this database, if :meth:`upsert` is not its own.
    insert: ClassVar[Any]
    #: Bytes of the largest text, if the server can answer a larger one by closing the connection.
    largest: ClassVar[int | None] = None
    #: The rows that a statement answers, of its cursor.
    rows: Callable[[Any], Sequence[tuple[Any, ...]]] = staticmethod(methodcaller("fetchall"))

    def __init__(self, table: Table, dialect: Dialect) -> None:
        preparer = dialect.identifier_preparer
        #: Names, quoted where they must be.
        self.table = preparer.format_table(table)
        self.key, self.write = preparer.quote("key"), preparer.quote("write")
        for name, statement in statements_in(dialect.name).items():
            setattr(self, name, statement.replace("{table}", self.table))

    def parts(self, statement: str) -> Sequence[str]:
        """The parts of a statement, to be sent one by one within a transaction that is open."""
        return [stripped for part in statement.split(";") if (stripped := part.strip())]

    def upsert(self, table: Table, row: dict[str, Any], change: dict[str, Any] | None) -> Any:
        """Insert a row, or change the one that has its key; ``None``: leave that as it is."""
        insert = self.insert(table).values(row)
        if change is None:
            return insert.on_conflict_do_nothing()
        return insert.on_conflict_do_update(index_elements=["key"], set_=change)

    def length_of(self, text: str) -> Any:
        """The length of a text as the database's ``substr`` counts."""
        return len(text)

    def is_too_large(self, parameters: Mapping[str, Any]) -> bool:
        """Whether one of a statement's parameters is larger than the database can hold."""
        largest = self.largest
        texts = (each for each in parameters.values() if isinstance(each, str))
        return largest is not None and any(
            len(text) * 4 > largest and len(text.encode()) > largest for text in texts
        )


@lru_cache
def statements_in(file: str) -> Mapping[str, str]:
    """The statements of a database's ``.sql`` file, by name and without comments.

    :param file: its name, without ``.sql``.
    """
    text = files(__package__).joinpath(f"{file}.sql").read_text(encoding="utf-8")
    found = {}
    for part in text.split(NAME)[1:]:
        name, *lines = part.splitlines()
        statement = "\n".join(line for line in lines if not line.startswith("--"))
        found[name] = statement.strip().removesuffix(";")
    return found
