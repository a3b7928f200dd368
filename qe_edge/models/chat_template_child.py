"""Child process: renders a stranger's chat template once, within bounds of memory and time; imports jinja2 only.

Standard input: JSON with `template`, `content` (of one question), `tokens` (special tokens by name), `bytes` and
`seconds`. Exit code 0 if it is rendered; what it writes is the number of characters. Otherwise standard error says why.
"""

from __future__ import annotations

import json
import sys
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

if sys.platform != "win32":
    import resource

REFUSALS = (TemplateError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class Generation(Extension):
    """transformers' block around the assistant's words; here it renders its content alone.

    Example:
        >>> environment = ImmutableSandboxedEnvironment(extensions=[Generation])
        >>> environment.from_string("{% generation %}yes{% endgeneration %}").render()
        'yes'
    """

    tags = {"generation"}  # noqa: RUF012 - jinja2's own form

    def parse(self, parser: Parser) -> nodes.Node:
        """The block as a scope."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def main() -> None:
    """Render what standard input says.

    Example:
        >>> import subprocess
        >>> template = "{% for turn in messages %}{{ turn.content }}{% endfor %}"
        >>> limits = {"bytes": 1 << 30, "seconds": 5}
        >>> request = json.dumps({"template": template, "content": "is it red?", "tokens": {}, **limits})
        >>> command = [sys.executable, "-I", __file__]
        >>> subprocess.run(command, input=request, capture_output=True, text=True, check=True).stdout  # characters
        '10'
    """
    question = json.load(sys.stdin)
    _limit(question["bytes"], question["seconds"])
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _refuse, "strftime_now": datetime.now().strftime}
    message = {"role": "user", "content": question["content"]}
    template = environment.from_string(question["template"])
    text = template.render(messages=[message], add_generation_prompt=True, **question["tokens"])
    sys.stdout.write(str(len(text)))


def _limit(size: int, seconds: int) -> None:
    if sys.platform != "win32":  # there the parent's clock is the only limit
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:  # noqa: ANN401 - jinja2's values
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


if __name__ == "__main__":
    try:
        main()
    except REFUSALS as error:
        name = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
        sys.exit(name + " ".join(str(error).split()))
