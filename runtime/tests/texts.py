"""Texts that tokenizers disagree on: scripts, emoji, spaces, code, special tokens, characters of every plane."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Sequence

SURROGATES = range(0xD800, 0xE000)
WORDS = (
    *("the", "Hello", "WORLD", "don't", "I'LL", "we've", "it'S", "'\u017f", "'\u212a", "x1", "12345", "3.14", "a_b"),
    *(" ", "  ", "\n", "\r\n", "\t", "\x85", "\u00a0", "\u1680", "\u180e", "\u200b", "\u2028", "\u3000", "\ufeff"),
    *("\u00e9", "e\u0301", "\u212b", "\ufb01", "\u1e9e", "\u0130", "\uac01", "\u1100\u1161\u11a8", "a\u0323\u0307"),
    *("\ud55c\uad6d\uc5b4", "\u4e2d\u6587", "\u65e5\u672c", "\u3072\u3089", "\u0639\u0631\u0628", "\u05e2\u05d1"),
    *("\u0e44\u0e17\u0e22", "\u0939\u093f\u0928\u094d\u0926\u0940", "\U0001f642", "\U0001f469\u200d\U0001f467"),
    *("\U0001f1e9\U0001f1ea", "\U0001f44d\U0001f3fd", "\u00bd", "\u2167", "\u2460", "\u00b2", "\u0663", "\U0001d518"),
    *("def f(x):", "{", "}", "()", "->", "//", "<|", "|>", "\u2581", "\u2581\u2581", "<0x0A>", "\u0120", "!", "?!"),
    *("...", "\u2014", "\u00ab", "\u2019s", "\ue000", "\ufffd", "\U000e0041", "\U0010ffff", "\x01", "\x7f"),
)


def odd_texts(count: int, special: Sequence[str], seed: int = 0) -> list[str]:
    """Texts put together from `WORDS`, special tokens, runs of spaces and any characters."""
    source = random.Random(seed)
    return ["", " ", "a", "'\u017f", *(_text(source, special) for _ in range(count))]


def every_character() -> list[str]:
    """Every character that Unicode knows and some others, between letters, digits and spaces."""
    codes = [code for code in range(1, 0x110000) if code not in SURROGATES]
    kept = [code for code in codes if code % 97 == 0 or unicodedata.category(chr(code)) not in ("Cn", "Co")]
    texts = [f"a{chr(code)}b 1{chr(code)} {chr(code)}" for code in kept]
    return ["".join(texts[start : start + 32]) for start in range(0, len(texts), 32)]


def _text(source: random.Random, special: Sequence[str]) -> str:
    parts = []
    for _ in range(source.randint(1, 12)):
        kind = source.random()
        if kind < 0.6:
            parts.append(source.choice(WORDS))
        elif kind < 0.7 and special:
            parts.append(source.choice(special))
        elif kind < 0.8:
            code = source.randrange(1, 0x110000)
            parts.append(chr(code) if code not in SURROGATES else "?")
        elif kind < 0.9:
            parts.append(chr(source.randrange(32, 0x3000)))
        else:
            parts.append(source.choice(" \n\t") * source.randint(1, 5))
    return "".join(parts)
