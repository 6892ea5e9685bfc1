"""What every model card that gptcli writes begins with."""

from __future__ import annotations

from collections.abc import Sequence


def card_head(title: str, about: str, rows: Sequence[tuple[str, str]]) -> str:
    """A model card (Markdown with the Hub's YAML head): a title, a sentence and a table of names and values."""
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [gptcli]
---

# {title}

{about}

| | |
| --- | --- |
{table}
"""
