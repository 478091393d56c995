"""The base class of a database's SQL statements. It reads the statements from the database's
``.sql`` file, and has the few other attributes in which databases differ.

``docs/adding-a-database.md`` explains how to add a database.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from importlib.resources import files
from operator import methodcaller
from typing import Any, ClassVar

from sqlalchemy import Dialect, Table

#: The marker before each statement in a ``.sql`` file. The statement's name follows it.
NAME = "\n-- name: "


class Statements:
    """The statements for one table of one database, with parameters in the driver's style.

    Most attributes are statements. The ``.sql`` file has each statement under the attribute's name,
    with a comment that says what the statement does.
    """

    # Statements of the lease's holder, and of a process that wants to become it.
    acquire: str
    #: The statement that renews leases. It waits if another transaction has locked a row;
    #: ``renew_unlocked`` skips such rows, or is ``None`` on a database without locks on rows.
    renew: str
    renew_unlocked: str | None = None
    save: str
    written: str
    release: str
    save_and_release: str
    give_back: str

    # Requests of processes other than the lease's holder.
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

    # Statements for reading rows and for removing unused ones.
    peek: str
    list: str
    contents: str
    ticks: str
    unused: str
    prune: str

    # Statements for the rows of the entries of a beat schedule.
    entries: str
    record: str
    #: The statements that remove entries. They run in one transaction. If the first result set is
    #: empty, the write is refused, and the statements after this result set are not run.
    forget: str

    # Statements that check whether the database can be used.
    check: str
    #: The statement that returns the privileges on the table that the role lacks. ``None`` for a
    #: database whose errors name the missing privilege.
    lacking: str | None = None
    #: The statement that returns the role if row-level security can hide rows from this role.
    #: ``None`` for a database without row-level security.
    hiding: str | None = None
    #: The statement that returns the columns whose encoding lacks characters, or the encoding of
    #: the whole database. ``None`` for a database that can always store all characters.
    encodings: str | None = None
    #: Advice for the operator of a database whose encoding lacks characters.
    encoding_advice = ""

    #: An SQL expression for the present time by the database's clock. It must advance within a
    #: transaction.
    now: ClassVar[str]
    #: The isolation level that SQLAlchemy sets for a transaction.
    level: ClassVar[str]
    #: The statement that begins a transaction; ``None`` if the driver begins it by itself.
    begin: ClassVar[str | None] = None
    #: SQLAlchemy's INSERT construct for this database, which :meth:`upsert` uses. A subclass that
    #: overrides :meth:`upsert` needs none.
    insert: ClassVar[Any]
    #: The size, in bytes, of the largest text that the server accepts, if the server may close the
    #: connection when it gets a larger text. ``None`` if the server then answers with an error.
    largest: ClassVar[int | None] = None
    #: A function that takes the cursor of an executed statement, and returns the statement's rows.
    rows: Callable[[Any], Sequence[tuple[Any, ...]]] = staticmethod(methodcaller("fetchall"))

    def __init__(self, table: Table, dialect: Dialect) -> None:
        preparer = dialect.identifier_preparer
        #: The names of the table and of two of its columns, quoted if the database needs that.
        self.table = preparer.format_table(table)
        self.key, self.write = preparer.quote("key"), preparer.quote("write")
        for name, statement in statements_in(dialect.name).items():
            setattr(self, name, statement.replace("{table}", self.table))

    def parts(self, statement: str) -> Sequence[str]:
        """Split a text into its SQL statements, so that they can be sent one by one within an open
        transaction.
        """
        return [stripped for part in statement.split(";") if (stripped := part.strip())]

    def upsert(self, table: Table, row: dict[str, Any], change: dict[str, Any] | None) -> Any:
        """Return a statement that inserts a row, or changes the existing row with the same key.

        :param row: the values of a new row, by column.
        :param change: the new values of an existing row, by column. ``None``: an existing row stays
            as it is.
        """
        insert = self.insert(table).values(row)
        if change is None:
            return insert.on_conflict_do_nothing()
        return insert.on_conflict_do_update(index_elements=["key"], set_=change)

    def length_of(self, text: str) -> Any:
        """Return the length of a text as the database's ``substr`` counts it: in characters or in
        bytes.
        """
        return len(text)

    def is_too_large(self, parameters: Mapping[str, Any]) -> bool:
        """Return whether one of a statement's parameters is larger than the database can hold."""
        largest = self.largest
        texts = (each for each in parameters.values() if isinstance(each, str))
        return largest is not None and any(
            len(text) * 4 > largest and len(text.encode()) > largest for text in texts
        )


@lru_cache
def statements_in(file: str) -> Mapping[str, str]:
    """Read a database's ``.sql`` file. Return its statements, without comments, by their names.

    :param file: the file's name, without ``.sql``.
    """
    text = files(__package__).joinpath(f"{file}.sql").read_text(encoding="utf-8")
    found = {}
    for part in text.split(NAME)[1:]:
        name, *lines = part.splitlines()
        statement = "\n".join(line for line in lines if not line.startswith("--"))
        found[name] = statement.strip().removesuffix(";")
    return found
