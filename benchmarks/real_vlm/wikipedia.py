"""Running text out of a Wikipedia dump: markup removed as far as a language model would stumble over it."""

from __future__ import annotations

import bz2
import html
import re
from pathlib import Path

SHORTEST = 10_000  # characters of an article that is used
PAGE = re.compile(r"<title>(.*?)</title>.*?<text[^>]*>(.*?)</text>", re.DOTALL)
INNERMOST = re.compile(r"\{\{[^{}]*\}\}|\{\|(?:(?!\{\||\|\}).)*?\|\}", re.DOTALL)
PICTURE = re.compile(r"\[\[(?:File|Image|Category):(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]", re.IGNORECASE)
REFERENCE = re.compile(r"<ref[^>/]*/>|<ref.*?</ref>|<!--.*?-->|<(math|gallery|table|div).*?</\1>|<[^>]*>", re.DOTALL)
LINK = re.compile(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]")
OUTSIDE = re.compile(r"\[https?://\S+ ?([^\]]*)\]")
PARAGRAPH = 200  # characters; shorter lines are headings, lists and remains


def read_articles(dump: Path) -> list[str]:
    """Articles of a bzip2-compressed dump in its order, paragraphs joined by newlines; short articles are left out."""
    pages = PAGE.findall(bz2.decompress(dump.read_bytes()).decode("utf-8"))
    articles = [plain_text(html.unescape(text)) for _, text in pages]
    return [article for article in articles if len(article) >= SHORTEST]


def plain_text(markup: str) -> str:
    """Paragraphs of wiki markup without templates, tables, references, pictures and headings."""
    text = REFERENCE.sub("", markup)
    while (shorter := INNERMOST.sub("", text)) != text:
        text = shorter
    text = LINK.sub(r"\1", PICTURE.sub("", text))
    text = OUTSIDE.sub(r"\1", text).replace("'''", "").replace("''", "")
    paragraphs = (re.sub(r"\s+", " ", html.unescape(line)).strip() for line in text.splitlines())
    return "\n".join(line for line in paragraphs if len(line) >= PARAGRAPH and line[0] not in "=*#:;|!{")
