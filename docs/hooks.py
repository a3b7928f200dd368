"""What `mkdocs build` adds: a page for every room of the code, and formulas as MathML, which needs no script."""

from __future__ import annotations

import ast
import html
import re
from collections.abc import Iterator
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

PACKAGE = Path(__file__).parent.parent / "qe_edge"
NO_PAGE = ("plugin_sources", "demo")  # C++, and data

# what pymdownx.arithmatex leaves of $...$ and $$...$$
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
TAG = re.compile(r"\\tag\{(\d+)\}")
NO_DEFAULT = "<code>Sentinel.UNSET</code>"  # mkdocs-click 0.9 prints click's mark of an option without a default
UNKNOWN = re.compile(r"\\[a-zA-Z]+")


def rooms() -> Iterator[tuple[str, list[Path]]]:
    """Every room of the code with its modules; the first is that of the modules that stand alone."""
    yield "qe_edge", [path for path in sorted(PACKAGE.glob("*.py")) if path.name != "__init__.py"]
    for folder in sorted(path.parent for path in PACKAGE.glob("*/__init__.py")):
        if folder.name not in NO_PAGE:
            modules = sorted(path for path in folder.rglob("*.py") if "lib" not in path.parts)
            yield folder.name, modules


def on_config(config: MkDocsConfig) -> None:
    """Put the rooms into the navigation, below the page of the Python API."""
    (section,) = (part["Reference"] for part in config.nav or [] if "Reference" in part)
    section.append({"Rooms of the code": [{name: f"api/{name}.md"} for name, _ in rooms()]})


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Write the page of every room."""
    for name, modules in rooms():
        lines = [f"# {name}", ""]
        for path in modules:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            if path.name == "__init__.py" and path.parent.parent == PACKAGE:
                lines += [ast.get_docstring(tree) or "", ""]
                continue
            dotted = ".".join(("qe_edge", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
            lines += [f"::: {dotted}", ""]
        files.append(File.generated(config, f"api/{name}.md", content="\n".join(lines)))
    return files


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
