"""All that the commands print; nothing of users reaches a terminal by another way.

Their texts are shown as :mod:`celery_singleton_state.text.visible` says, and by escapes also where
the terminal's encoding does not have their characters.
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

#: The width that a column which is folded has at least.
_NARROWEST = 16


def say(text: str, err: bool = False) -> None:
    """Print one line."""
    click.echo(_shown(text, sys.stderr if err else sys.stdout), err=err)


def ask(question: str, err: bool = False) -> None:
    """:raises click.Abort: the operator says no."""
    click.confirm(_shown(question, sys.stderr if err else sys.stdout), abort=True, err=err)


def print_json(value: Any) -> None:
    """Print a value for programs: the JSON that comes back as the same value."""
    text = json.dumps(_strict(value), indent=2, default=datetime.isoformat)
    click.echo(text.replace("\x7f", r"\u007f"))


def table(titles: Sequence[str], rows: Iterable[Sequence[str]], folded: str = "") -> Table:
    """A table of texts, none of which is cut.

    A terminal gets them folded where they are too long. Who reads from a pipe gets them whole.

    :param folded: the title of a column that is folded in a pipe, too.
    """
    made = Table(box=None)
    in_pipe = not sys.stdout.isatty()
    for title in titles:
        made.add_column(title, overflow="fold", no_wrap=in_pipe and title != folded)
    for row in rows:
        made.add_row(*(Text(_shown(cell, sys.stdout)) for cell in row))
    return made


def print_table(made: Table) -> None:
    """Print a table of :func:`table`."""
    console = plain_console()
    if not sys.stdout.isatty():
        console.width = max(console.width, sum(map(_width, made.columns)))
    console.print(made)


def _width(column: Column) -> int:
    """What a column needs, with the spaces on both sides."""
    if not column.no_wrap:
        return _NARROWEST
    texts = [Text(str(column.header)), *(cell for cell in column.cells if isinstance(cell, Text))]
    return max(text.cell_len for text in texts) + 2


def plain_console() -> Console:
    """A console that looks for nothing in a text: no markup, no emoji, nothing to highlight."""
    return Console(markup=False, emoji=False, highlight=False)


def shown_json(document: str) -> str:
    """A JSON document as standard output can show it, and as it can be copied."""
    return as_json(document, _encoding(sys.stdout))


def _shown(text: str, stream: Any) -> str:
    return encodable(visible(text), _encoding(stream))


def _encoding(stream: Any) -> str:
    return getattr(stream, "encoding", None) or "utf-8"


def _strict(value: Any) -> Any:
    """What JSON can hold: it has no infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else math.copysign(sys.float_info.max, value)
    if isinstance(value, dict):
        return {name: _strict(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(each) for each in value]
    return value
