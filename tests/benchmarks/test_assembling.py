"""What the assembled models' data are made with: files out of wheels, and text out of wiki markup."""

from __future__ import annotations

import bz2
import hashlib
import zipfile
from pathlib import Path

import pytest

from benchmarks.real_vlm.listing import write_list
from benchmarks.real_vlm.packages import PackagedFile
from benchmarks.real_vlm.wikipedia import SHORTEST, plain_text, read_articles
from qe_edge.quantization.quantizer import quantize
from qe_edge.recipes.recipe import make_recipe
from qe_edge.system.atomic import atomic_folder
from qe_edge.system.errors import ArtifactError, InputError
from tests.small_models import write_small_llama

SENTENCE = "A paragraph has to be long enough, or it is taken for a heading, a list or what is left of a table. " * 3
MARKUP = f"""{{{{Infobox|name={{{{nested}}}}|text=gone}}}}
'''Bold''' and [[target|shown]] and [[plain]]<ref name="a">a source {{{{cite}}}}</ref><ref name="a"/>, {SENTENCE}
== Heading that is long enough to be taken for a paragraph, were it not for its marks {SENTENCE} ==
* A list item, {SENTENCE}
{{| class="table"
| a cell with {SENTENCE}
|}}
[[File:picture.jpg|thumb|A caption with a [[link]] in it, {SENTENCE}]]
<!-- a comment, {SENTENCE} -->See [http://example.org the site], &amp; {SENTENCE}
short
"""


def test_markup_is_removed() -> None:
    first, second = plain_text(MARKUP).splitlines()
    assert first == f"Bold and shown and plain, {SENTENCE}".strip()
    assert second == f"See the site, & {SENTENCE}".strip()


def test_short_articles_are_left_out(tmp_path: Path) -> None:
    long = (SENTENCE + "\n") * (SHORTEST // len(SENTENCE) + 1)
    pages = "".join(f"<page><title>{len(text)}</title><text x='y'>{text}</text></page>" for text in (SENTENCE, long))
    dump = tmp_path / "dump.bz2"
    dump.write_bytes(bz2.compress(pages.encode()))
    (article,) = read_articles(dump)
    assert len(article) >= SHORTEST


def test_a_wheel_is_downloaded_once_and_its_file_checked(tmp_path: Path) -> None:
    wheels = tmp_path / "nowhere-1.0"  # where an earlier fetch of another file left the wheel
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "nowhere-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("folder/file.txt", "content")
    sha256 = hashlib.sha256(b"content").hexdigest()
    assert PackagedFile("nowhere==1.0", "folder/file.txt", sha256).fetch(tmp_path).read_text() == "content"
    with pytest.raises(ArtifactError, match="not the file"):
        PackagedFile("nowhere==1.0", "folder/file.txt", "0" * 64).fetch(tmp_path)
    with pytest.raises(ArtifactError, match="does not hold"):
        PackagedFile("nowhere==1.0", "folder/other.txt", sha256).fetch(tmp_path)


def assemble(folder: Path, words: str) -> None:
    with atomic_folder(folder) as part:
        write_small_llama(part)
        (part / "data").mkdir()
        (part / "data" / "texts.jsonl").write_text(f'{{"text": "{words}"}}\n', encoding="utf-8")
        write_list(part, "a_script")


def test_a_second_run_replaces_what_the_first_has_made_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    assemble(folder, "one")
    assemble(folder, "a red circle and a blue square")
    assert "circle" in (folder / "data" / "texts.jsonl").read_text(encoding="utf-8")
    data = str(folder / "data" / "texts.jsonl")
    quantize(str(folder), make_recipe(method="rtn", calibration={"samples": 1, "source": data}))  # a model like others
    (folder / "data" / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match=r"notes\.txt' was not written by QE-Edge"):
        assemble(folder, "three")
    assert "circle" in (folder / "data" / "texts.jsonl").read_text(encoding="utf-8")
