"""Print the output of all commands, so that users' texts in it are safe for a terminal.

A name or an error can contain control characters, which a terminal would obey. Control characters,
and characters that the terminal's encoding does not have, are printed as escapes (see
:mod:`celery_singleton_state.text.visible`).
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

import click
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from celery_singleton_state.text.visible import as_json, encodable, visible

#: The smallest width, in characters, of a column whose texts may be folded.
_NARROWEST = 16


def say(text: str, err: bool = False) -> None:
    """Print one line that may contain users' texts.

    :param err: true: print on standard error. Default: on standard output.
    """
    click.echo(_shown(text, sys.stderr if err else sys.stdout), err=err)


def ask(question: str, err: bool = False) -> None:
    """Ask the operator a yes-or-no question.

    :param err: true: print the question on standard error. Default: on standard output.
    :raises click.Abort: the operator has answered no.
    """
    click.confirm(_shown(question, sys.stderr if err else sys.stdout), abort=True, err=err)


def print_json(value: Any) -> None:
    """Print a value as JSON for programs, without the escapes that texts for people get."""
    text = json.dumps(_strict(value), indent=2, default=datetime.isoformat)
    click.echo(text.replace("\x7f", r"\u007f"))


def table(titles: Sequence[str], rows: Iterable[Sequence[str]], folded: str = "") -> Table:
    """Make a table whose texts are never cut.

    On a terminal, a text that is too long is folded into several lines. In a pipe, the text stays
    on one line, so that programs can read the table.

    :param folded: the title of a column that is folded in a pipe, too. Default: none.
    """
    made = Table(box=None)
    in_pipe = not sys.stdout.isatty()
    for title in titles:
        made.add_column(title, overflow="fold", no_wrap=in_pipe and title != folded)
    for row in rows:
        made.add_row(*(Text(_shown(cell, sys.stdout)) for cell in row))
    return made


def print_table(made: Table) -> None:
    """Print a table that :func:`table` has made."""
    console = plain_console()
    if not sys.stdout.isatty():
        console.width = max(console.width, sum(map(_width, made.columns)))
    console.print(made)


def _width(column: Column) -> int:
    """Return the width that a table's column needs, in characters, with the space on each side."""
    if not column.no_wrap:
        return _NARROWEST
    texts = [Text(str(column.header)), *(cell for cell in column.cells if isinstance(cell, Text))]
    return max(text.cell_len for text in texts) + 2


def plain_console() -> Console:
    """Return a console that prints texts unchanged: no markup, no emoji codes, no highlighting."""
    return Console(markup=False, emoji=False, highlight=False)


def shown_json(document: str) -> str:
    """Return a JSON document with escapes for the characters that standard output cannot show.

    The result is the same JSON value, so an operator can copy it.
    """
    return as_json(document, _encoding(sys.stdout))


def _shown(text: str, stream: Any) -> str:
    """Return a text with escapes in place of characters that must not or cannot be printed.

    Control characters must not be printed. Characters that the stream's encoding lacks cannot be
    printed.
    """
    return encodable(visible(text), _encoding(stream))


def _encoding(stream: Any) -> str:
    return getattr(stream, "encoding", None) or "utf-8"


def _strict(value: Any) -> Any:
    """Return a value without the floats that JSON cannot represent.

    NaN becomes ``None``. Infinity becomes the largest float of the same sign.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else math.copysign(sys.float_info.max, value)
    if isinstance(value, dict):
        return {name: _strict(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(each) for each in value]
    return value
