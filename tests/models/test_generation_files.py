"""generation_config.json is read, absent or refused; never skipped."""

from __future__ import annotations

from pathlib import Path

import pytest

from qe_edge.models.generation_files import read_generation_config
from qe_edge.system.errors import ArtifactError, ModelError


def test_its_end_tokens_are_read_and_absence_is_none(tmp_path: Path) -> None:
    assert read_generation_config(str(tmp_path)) is None
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 3], "num_beams": 4}')
    found = read_generation_config(str(tmp_path))
    assert found is not None
    assert (found.eos_token_id, found.num_beams) == ([2, 3], 4)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "is not valid JSON"),
        ("7", "holds no JSON table"),
        ('{"eos_token_id": "2"}', "Key 'eos_token_id' of"),
        ('{"eos_token_id": []}', "Key 'eos_token_id' of"),
        ('{"num_beams": 10000000}', "Key 'num_beams' of"),
        ('{"do_sample": "yes"}', "Key 'do_sample' of"),
        ('{"validate": 1}', "Key 'validate' of .* is no setting"),
        ('{"cache_implementation": "somewhere"}', "cannot be read"),
    ],
)
def test_a_broken_one_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ModelError, match=complaint) as caught:
        read_generation_config(str(tmp_path))
    assert "generation_config.json" in caught.value.remedy
    with pytest.raises(ArtifactError):
        read_generation_config(str(tmp_path), ArtifactError)


def test_a_dangling_link_is_not_absence(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").symlink_to(tmp_path / "gone")
    with pytest.raises(ModelError, match="points at a missing file"):
        read_generation_config(str(tmp_path))
