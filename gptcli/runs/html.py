"""Pages that need nothing else, neither script nor network nor font: their frame, tables and legends.

Whatever a page shows of others goes through `plain`; a content security policy forbids what were to slip through.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources

from gptcli import __version__
from gptcli.reporting import one_line

_TURNS = {code: f"[U+{code:04X}]" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}


def document(title: str, sections: Iterable[str], style: str = "") -> str:
    """A page of sections (those that are empty are left out); `style` is added to the style sheet of all pages."""
    sheet = resources.files("gptcli.runs").joinpath("report.css").read_text(encoding="utf-8") + style
    body = "\n".join(section for section in sections if section)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)} · gptcli</title>
<style>{sheet}</style>
</head>
<body>
<main>
{body}
<footer>gptcli {escape(__version__)}</footer>
</main>
</body>
</html>
"""


def steady(text: str) -> str:
    """The text with the characters that turn the direction of writing, of what follows too, as their codes."""
    return text.translate(_TURNS)


def plain(text: str) -> str:
    """A text of others as HTML on one line: escaped, control characters as pictures."""
    return escape(steady(one_line(text)))


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str = "") -> str:
    """A table of texts, whose first column heads its rows; one that is wider than the page scrolls by itself."""
    head = "".join(f'<th scope="col">{plain(column)}</th>' for column in columns)
    lines = "".join(
        f'<tr><th scope="row">{plain(row[0])}</th>{"".join(f"<td>{plain(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    named = f"<caption>{plain(caption)}</caption>" if caption else ""
    return (
        f'<div class="scroll" tabindex="0"><table class="grid-table">{named}'
        f"<thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def legend(entries: Iterable[tuple[str, str]]) -> str:
    """What the lines of a chart are: (class, name)."""
    keys = "".join(f'<span class="key {style}">{plain(name)}</span>' for style, name in entries)
    return f'<span class="legend">{keys}</span>'
