"""`engine.json`: the build of an engine folder."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qe_edge.checkpoint.integrity import Digest, Sealed
from qe_edge.runtime.manifest import ENGINE_INFO, FolderManifest
from qe_edge.system.errors import ArtifactError
from qe_edge.system.json_files import read_json_table

REMEDY = "Build it again."
Backend = Literal["onnxruntime", "onnxruntime_cuda", "tensorrt", "tensorrt_rtx"]
SIZED: tuple[Backend, ...] = ("tensorrt", "tensorrt_rtx")  # whose engines are built for largest sizes


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Precision(_Strict):
    """Precisions of a graph.

    Attributes:
        products: For every matrix product its weights' storage and its arithmetic, by node name.
        others: Number of other nodes by operator and arithmetic, for example "Softmax float16".
    """

    products: dict[str, str]
    others: dict[str, int]


class GraphBuild(_Strict):
    """One built graph.

    Attributes:
        size: Bytes of its files.
        seconds: Time of the build.
        layers: Layers of the backend's network, 0 where it does not tell.
        precision: Precisions of the graph; None where the canonical graph runs as it is, in float32.
        plugin_nodes: Names of the nodes that the plugin runs.
        plugin_layers: The plugin's nodes that the built engine's layer list shows; fewer where the builder does not
            list its layers.
    """

    size: int = Field(ge=0)
    seconds: float = Field(ge=0)
    layers: int = Field(0, ge=0)
    precision: Precision | None = None
    plugin_nodes: tuple[str, ...] = ()
    plugin_layers: tuple[str, ...] = ()


class PluginBuild(_Strict):
    """The plugin that engines need to be loaded.

    Attributes:
        sha256: Hash of the library that they were built with; another build of the same layout works too.
        layout_version: Layout of the packed weights; the plugin refuses another one.
    """

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    layout_version: int = Field(ge=1)


class EngineInfo(Sealed):
    """Everything about a build.

    Attributes:
        target: Name of the target.
        backend: What runs the engines: a Python module, or "onnxruntime_cuda" for ONNX Runtime on a GPU.
        version: Version of the backend at build time.
        capabilities: Compute capabilities that the engines were built for, for example "8.6".
        graphs: The graphs by name.
        plugin: The plugin that they need, None if none.
        manifest: Digest of the manifest beside it, which names the ONNX folder and the checkpoint.
    """

    target: str
    backend: Backend
    version: str
    capabilities: tuple[str, ...] = ()
    graphs: dict[str, GraphBuild]
    plugin: PluginBuild | None = None
    manifest: Digest

    @property
    def sized(self) -> bool:
        """Whether the engines were built for largest sizes."""
        return self.backend in SIZED

    def write(self, folder: Path) -> None:
        """Write `engine.json` into `folder`."""
        self.write_sealed(folder / ENGINE_INFO)

    def check_belongs(self, manifest: FolderManifest, folder: Path) -> None:
        """Refuse the description of other engines.

        Raises:
            ArtifactError: If this was not written with the manifest of the folder.
        """
        if self.manifest != manifest.digest:
            raise ArtifactError(f"'{folder / ENGINE_INFO}' describes other engines than those beside it.", REMEDY)


def read_engine_info(folder: Path) -> EngineInfo | None:
    """The build of a folder, None for an ONNX folder.

    Raises:
        ArtifactError: If the file is damaged, was changed, or is of an earlier version.

    Example:
        >>> read_engine_info(Path("onnx")) is None
        True
    """
    path = folder / ENGINE_INFO
    if not (path.exists() or path.is_symlink()):
        return None
    values = read_json_table(path, remedy=REMEDY)
    if values and "digest" not in values:
        raise ArtifactError(
            f"The folder '{folder}' is of an earlier version, or damaged: {ENGINE_INFO} is wrong, it has no digest.",
            "Export and build again.",
        )
    try:
        info = EngineInfo.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ArtifactError(
            f"The folder '{folder}' is damaged: {ENGINE_INFO} is wrong: {where}: {first['msg'].lower()}.", REMEDY
        ) from error
    info.check_seal(values, path, REMEDY)
    return info
