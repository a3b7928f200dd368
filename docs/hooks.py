"""What `mkdocs build` does to every page: formulas become MathML, which browsers show without a script."""

from __future__ import annotations

import html
import re

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

# what pymdownx.arithmatex leaves of $...$ and $$...$$
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
TAG = re.compile(r"\\tag\{(\d+)\}")
NO_DEFAULT = "<code>Sentinel.UNSET</code>"  # mkdocs-click 0.9 prints click's mark of an option without a default
UNKNOWN = re.compile(r"\\[a-zA-Z]+")


def on_page_content(content: str, page: object, **_: object) -> str:
    """The page with MathML in place of LaTeX.

    Args:
        content: HTML of the page.
        page: The page, for messages.

    Raises:
        PluginError: If a formula holds a command that latex2mathml does not know.
    """

    def replace(match: re.Match[str]) -> str:
        latex = html.unescape(match[2]).strip()
        number = TAG.search(latex)
        block = match[1] == "div"
        made = convert(TAG.sub("", latex), display="block" if block else "inline")
        unknown = UNKNOWN.search(made)
        if unknown:
            raise PluginError(f"{page}: latex2mathml does not know {unknown[0]}. Write {latex!r} without it.")
        if not block:
            return made
        label = f'<span class="equation-number" id="eq-{number[1]}">({number[1]})</span>' if number else ""
        return f'<div class="equation">{made}{label}</div>'

    return FORMULA.sub(replace, content).replace(NO_DEFAULT, "")
