"""Odd texts and numbers for hypothesis, as users or other programs may have stored them."""

from __future__ import annotations

from hypothesis import strategies as st

#: Texts that have a special meaning for a terminal, rich, HTML, format strings or metrics.
PIECES = (
    *("[/acme]", "[red]", "[bold]b[/bold]", "[link=https://a.example]l[/link]", "[", "]"),
    *(":smile:", "http://a.example", "True None 1.5"),
    *(
        "\x1b]0;title\x07",
        "\x1b[31m",
        "\x1b[2J",
        "\x9b2J",
        "\x1b",
        "\x07",
        "\b\b",
        "\r",
        "\n",
        "\t",
    ),
    *("\x85", "\u2028", "\x00", "\x7f", "\u202e", "\u2066", "\u200b", "\u200d", "\ufeff", "\xad"),
    *("\u3164", "\ufe0f", "\U000e0041", "\xa0", " ", "  "),
    *(
        "<script>alert(1)</script>",
        "</title></style>",
        "<img src=x onerror=x()>",
        "&amp;",
        "'",
        '"',
    ),
    *("%s", "%(name)d", "{0}", "{name!r}", "$HOME", "`id`", "~"),
    *("\\", "\\\\", "\\n", "\\x1b", "\\x5c", "\\u202e", "\\u0142", "\\U0001f600", "\\ud800"),
    *("ł", "é", "漢字", "😀", "e\u0301", "\U000e0001", "x" * 90),
)
SURROGATES = ("\ud800", "\udce9", "\ud83d\ude00")


def texts(*more: str, min_size: int = 0) -> st.SearchStrategy[str]:
    """Draw texts that consist of odd pieces and any characters.

    :param more: pieces besides ``PIECES``.
    """
    pieces = st.sampled_from((*PIECES, *more)) | st.characters(exclude_categories=("Cs",))
    return st.lists(pieces, min_size=min_size, max_size=6).map("".join)


#: Times in seconds since 1970 that JSON and Redis can hold, within and beyond the range of Python's
#: dates.
EPOCHS = st.sampled_from((
    *(0.0, -1.0, 1.7e9, 253402300799.999999, 253402300800.0, 3.2e11, 9.2e12),
    *(-62135596801.0, -2.1e11, 1e18, -1e18, 1.7e308, -1.7e308),
))  # fmt: skip

#: Values that another program may have stored in a column for a time.
SQL_MOMENTS = st.sampled_from((
    *("infinity", "-infinity", "12000-01-01 00:00:00+00:00", "9999-12-31 23:59:59.999+00:00"),
    *("0000-00-00 00:00:00", "-4712-01-01 00:00:00", "", "soon", "1e308", b"\xff", 0, -1, 1e308),
    *(float("inf"), float("-inf"), 2**62, 2460000.5),
))  # fmt: skip

#: Values that another program may have stored in a column for a number.
SQL_NUMBERS = st.sampled_from(
    (0, -1, 2**63 - 1, -(2**63), 1.5, 1e308, float("inf"), "", "many", b"\xff", "9" * 5000)
)

#: Values that another program may have stored in a column for a JSON document, such as a state or a
#: history.
DOCUMENTS = st.sampled_from((
    *("", "null", "not JSON", "{", "[]", "[[]]", "[null]", "{}", "0", "NaN", "[Infinity]", "1e400"),
    *("[" * 20_000, "9" * 5000, '"\\ud800"', '"\x1b[31m"', '{"a": "\u202e"}', b"\xff", 7),
))  # fmt: skip
