"""Pages that scripts write a part of."""

from __future__ import annotations

import re


def replaced(text: str, name: str, section: str) -> str:
    """The text with ``section`` between ``<!-- name -->`` and ``<!-- /name -->``."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"the page has no {begin} ... {end} to write into")
    return pattern.sub(lambda _: f"{begin}\n{section}\n{end}", text)
