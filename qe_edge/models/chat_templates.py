"""Chat templates of strangers: the choice among a model's files, and checks of their cost."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

from qe_edge.models.guard import Guard
from qe_edge.models.model_files import find_file
from qe_edge.system.errors import ModelError, QENotice, printable
from qe_edge.system.json_files import read_bounded_text, read_json_table

REMEDY = "Copy chat_template.jinja, tokenizer.json and tokenizer_config.json from the original model."
MAX_TEMPLATE = 2**18  # bytes; the longest known has 20 thousand
MAX_PROMPT = 2**18  # characters around one question of a character
MEMORY = 2**29  # bytes that one question may take
SECONDS = 3  # of processor time
PATIENCE = 60  # seconds until a child that waits for its turn is given up
CHILD = Path(__file__).with_name("chat_template_child.py")
PICTURE_QUESTION = [{"type": "image"}, {"type": "text", "text": "?"}]


def take_processor_template(tokenizer: Any, source: str) -> None:  # noqa: ANN401 - tokenizers share no typed base
    """Give a tokenizer the template that transformers' combined processor would use.

    Older models have it in chat_template.json, some in processor_config.json; both count before the tokenizer's own.

    Raises:
        ModelError: If such a file is broken.

    Example:
        >>> from qe_edge.demo import model_path
        >>> from qe_edge.models.tokenizers import load_tokenizer
        >>> tokenizer = load_tokenizer(str(model_path()), vocabulary=10_000)
        >>> before = tokenizer.chat_template
        >>> take_processor_template(tokenizer, str(model_path()))  # this model has no template of a processor
        >>> tokenizer.chat_template == before
        True
    """
    for name in ("processor_config.json", "chat_template.json"):
        path = find_file(source, name)
        if path is None:
            continue
        template = read_json_table(path, error=ModelError, remedy=REMEDY).get("chat_template")
        if template is None and name == "processor_config.json":
            continue
        if not isinstance(template, str):
            raise ModelError(f"Key 'chat_template' of '{path}' is no text.", REMEDY)
        if tokenizer.chat_template not in (None, template):
            warnings.warn(
                f"'{source}' has several chat templates; that of {name} is used, as transformers' processors do.",
                QENotice,
                stacklevel=2,
            )
        tokenizer.chat_template = template
        return


def check_template_files(source: str) -> None:
    """Check the size and the encoding of template files before they are read.

    Raises:
        ModelError: For one that cannot be used.

    Example:
        >>> from qe_edge.demo import model_path
        >>> check_template_files(str(model_path()))  # fine
    """
    folder = Path(source) / "additional_chat_templates"
    more = sorted(folder.glob("*.jinja")) if folder.is_dir() else []
    for path in [find_file(source, "chat_template.jinja"), *more]:
        if path is not None:
            read_bounded_text(path, error=ModelError, remedy=REMEDY, limit=MAX_TEMPLATE)


def check_template(tokenizer: Any, source: str, content: object) -> None:  # noqa: ANN401
    """Render a tokenizer's template for a question in a child process, within bounds of memory and time.

    Args:
        tokenizer: A tokenizer of transformers.
        source: Where it came from, for messages.
        content: Of the question: a text, or a list of parts.

    Raises:
        ModelError: If no template is the one for chats, or it refuses the question, or takes more than its share.

    Example:
        >>> from qe_edge.demo import model_path
        >>> from qe_edge.models.tokenizers import load_tokenizer
        >>> tokenizer = load_tokenizer(str(model_path()), vocabulary=10_000)
        >>> check_template(tokenizer, "demo", "is it red?")  # fine
        >>> tokenizer.chat_template = "{{ raise_exception('no') }}"
        >>> check_template(tokenizer, "demo", "is it red?")
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.ModelError: The chat template of 'demo' refuses a question: no. Copy
        chat_template.jinja, tokenizer.json and tokenizer_config.json from the original model.
    """
    named = tokenizer.chat_template
    if isinstance(named, dict) and "default" not in named:
        names = printable(", ".join(f"'{name}'" for name in named)[:200])
        raise ModelError(
            f"The chat templates of '{source}' are named {names or 'nothing'}, and none is 'default'.",
            "Name the one for chats 'default' in tokenizer_config.json.",
        )
    template = named["default"] if isinstance(named, dict) else named
    if not isinstance(template, str) or len(template) > MAX_TEMPLATE:
        raise ModelError(f"The chat template of '{source}' is no text of up to {MAX_TEMPLATE} characters.", REMEDY)
    if any("\ud800" <= char <= "\udfff" for char in template):
        raise ModelError(f"The chat template of '{source}' holds half a character.", REMEDY)
    tokens = {str(name): str(token) for name, token in tokenizer.special_tokens_map.items()}
    problem = _rendering(json.dumps({"template": template, "content": content, "tokens": tokens}))
    problem = problem.replace("refuses a question", "takes no pictures") if isinstance(content, list) else problem
    if problem:
        raise ModelError(f"The chat template of '{source}' {problem}.", REMEDY)


def render_question(tokenizer: Any, content: object) -> str:  # noqa: ANN401 - tokenizers share no typed base
    r"""The prompt of one question, up to where the answer begins.

    Raises:
        ModelError: If the template refuses it.

    Example:
        >>> from qe_edge.demo import model_path
        >>> from qe_edge.models.tokenizers import load_tokenizer
        >>> tokenizer = load_tokenizer(str(model_path()), vocabulary=10_000)
        >>> render_question(tokenizer, "is it red?")[-50:]
        '|>user\nis it red?<|im_end|>\n<|im_start|>assistant\n'
    """
    turn = [{"role": "user", "content": content}]
    with Guard("The model's chat template refuses a question", REMEDY):
        return str(tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False))


@lru_cache(maxsize=64)
def _rendering(question: str) -> str:
    """What is wrong with rendering a question, as the end of a sentence; empty if nothing is."""
    request = json.dumps({**json.loads(question), "bytes": MEMORY, "seconds": SECONDS})
    command = [sys.executable, "-I", str(CHILD)]
    share = f"takes more than {SECONDS} seconds or {MEMORY >> 20} MiB for one short question"
    try:
        done = subprocess.run(command, input=request, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        return share
    if done.returncode == 0:
        return "" if int(done.stdout) <= MAX_PROMPT else f"writes {done.stdout} characters around one short question"
    last = (done.stderr.strip().splitlines() or [""])[-1]
    if done.returncode < 0 or last.startswith("MemoryError"):
        return share
    return f"refuses a question: {printable(last)[:300].rstrip('.')}"
