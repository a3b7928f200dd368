"""`manifest.json`: the content of an ONNX or engine folder, checked before any file of it is opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, ValidationError, model_validator

from qe_edge.checkpoint.integrity import Digest, FileTable, Sealed, check_files, check_sizes, describe
from qe_edge.runtime.cache_tensors import cache_inputs, check_cache
from qe_edge.runtime.embedding import EMBEDDING
from qe_edge.runtime.generation import GenerationSettings
from qe_edge.runtime.graph_specs import GraphFile, PictureEntry, Strict, TensorSpec
from qe_edge.system.errors import ArtifactError, shown
from qe_edge.system.json_files import read_json_table

MANIFEST = "manifest.json"
ENGINE_INFO = "engine.json"  # of an engine folder; it seals itself and names the manifest
FORMAT_VERSION = 3
REMEDY = "Export or build the model again."
GRAPHS = ("visual", "merger", "language")
TEXT_ONLY = ("language",)
PICTURES_ONLY = ("visual",)
ACTING = ("visual", "merger", "prefix", "action")

Size = tuple[int, ...]


class GraphEntry(GraphFile):
    """One graph of the model.

    Attributes:
        profiles: By profile name and input, the smallest, typical and largest shape that engines are built for.
    """

    profiles: dict[str, dict[str, tuple[Size, Size, Size]]] = Field(min_length=1)

    @model_validator(mode="after")
    def _profiles_fit(self) -> GraphEntry:
        names = {spec.name: len(spec.shape) for spec in self.inputs}
        for profile, shapes in self.profiles.items():
            if shapes.keys() != names.keys():
                raise ValueError(f"profile '{profile}' does not list the graph's inputs")
            for name, triple in shapes.items():
                if any(len(shape) != names[name] or min(shape, default=0) < 0 for shape in triple):
                    raise ValueError(f"profile '{profile}' has a wrong shape for '{name}'")
        return self


class KVLayout(Strict):
    """Keys and values: inputs `past_key_values.{layer}.key|value`, outputs `present.{layer}.key|value`.

    Every tensor is `[batch, heads, capacity, head_dim]`. A layer of another kind has inputs and outputs with other last
    names, for example `past_key_values.{layer}.conv`. Their sizes behind the batch's are fixed, the graph's entry has
    them, and input and output must be two buffers.

    Attributes:
        layers: Layers of the language model that keep keys and values.
        heads: Heads of keys and values in the first layer; the graph's entry has the shapes of all.
        head_dim: Width of a head there.
        in_place: Whether a key's or value's input and output may be one buffer; if not, they must be two.
    """

    layers: int = Field(ge=1, le=4096)
    heads: int = Field(ge=1, le=4096)
    head_dim: int = Field(ge=1, le=4096)
    in_place: bool


Written = TypeVar("Written", bound="FolderManifest")


class FolderManifest(Sealed):
    """The manifest of any folder of graphs or engines. Its digest stands for the whole folder.

    Attributes:
        format_version: Version of this file.
        model_type: Model family, as in config.json.
        quantization: Method and scheme such as "qe w4a8", or "none".
        graphs: By name.
        checkpoint: Digest of the checkpoint that the graphs were exported from; None for a model in memory.
        onnx: Digest of the ONNX folder that engines were built from; None in an ONNX folder.
        files: Size and hash of every file but the manifest and `engine.json`.
    """

    format_version: int
    model_type: str
    quantization: str
    graphs: dict[str, GraphEntry]
    checkpoint: Digest | None = None
    onnx: Digest | None = None
    files: FileTable = Field(default_factory=dict)

    def further_files(self) -> tuple[str, ...]:
        """Files besides the graphs that have to be there."""
        return ("config.json",)

    def write(self: Written, folder: Path) -> Written:
        """Describe the files of `folder` and write `manifest.json` into it; returns the manifest as written."""
        files = describe(folder, lambda name: name not in (MANIFEST, ENGINE_INFO))
        return self.model_copy(update={"files": files}).write_sealed(folder / MANIFEST)


class EncoderManifest(FolderManifest):
    """The manifest of a vision encoder alone: it has the one graph "visual"."""

    @model_validator(mode="after")
    def _complete(self) -> EncoderManifest:
        if set(self.graphs) != set(PICTURES_ONLY):
            raise ValueError(f"it must list the graph {PICTURES_ONLY[0]}")
        return self


class ActionManifest(FolderManifest):
    """The manifest of a model that makes actions.

    Attributes:
        graphs: "visual", "merger", "prefix" and "action".
        hidden_size: Width of the language model.
        vocab_size: Rows of the token embedding.
    """

    hidden_size: int = Field(ge=1, le=1 << 20)
    vocab_size: int = Field(ge=1, le=1 << 24)

    @model_validator(mode="after")
    def _complete(self) -> ActionManifest:
        if set(self.graphs) != set(ACTING):
            raise ValueError(f"it must list the graphs {', '.join(ACTING)}")
        return self

    def further_files(self) -> tuple[str, ...]:
        """Files besides the graphs that have to be there."""
        return (EMBEDDING, "config.json")


class Manifest(FolderManifest):
    """The manifest of a model that writes text.

    Attributes:
        hidden_size: Width of the language model.
        vocab_size: Number of logits.
        image_token_id: Token at whose places image features stand; None in a language model without pictures.
        max_context: Tokens that the model can attend to, prompt and answer together.
        generation: Settings of decoding.
        kv: Layout of the KV cache.
        graphs: "visual", "merger" and "language", or "language" alone.
        picture: The graph that prepares pictures, for programs without Python; None where the family has none.
    """

    hidden_size: int = Field(ge=1, le=1 << 20)
    vocab_size: int = Field(ge=1, le=1 << 24)
    image_token_id: int | None = Field(None, ge=0)
    max_context: int = Field(ge=1, le=1 << 31)
    generation: GenerationSettings
    kv: KVLayout
    picture: PictureEntry | None = None

    @model_validator(mode="after")
    def _complete(self) -> Manifest:
        wanted = TEXT_ONLY if self.image_token_id is None else GRAPHS
        if set(self.graphs) != set(wanted):
            raise ValueError(f"it must list the graphs {', '.join(wanted)}")
        if self.picture is not None and self.picture.largest_id >= self.vocab_size:
            raise ValueError(f"pictures stand at token {self.picture.largest_id} of {self.vocab_size}")
        rules = self.generation
        ids = (rules.pad_token_id, *rules.eos_token_ids, *rules.suppress_tokens, *rules.begin_suppress_tokens)
        if max(ids) >= self.vocab_size:
            raise ValueError(f"generation names token {max(ids)} of a vocabulary of {self.vocab_size}")
        language, kv = self.graphs["language"], self.kv
        check_cache(language.inputs, language.outputs, kv.layers)
        return self

    @property
    def cache(self) -> tuple[TensorSpec, ...]:
        """The language graph's inputs that are tensors of its cache."""
        return cache_inputs(self.graphs["language"].inputs)

    @property
    def embeds_width(self) -> int:
        """Width of the language graph's `inputs_embeds`: `hidden_size`, or more where deeper layers see pictures."""
        width = self.graphs["language"].inputs[0].shape[-1]
        return width if isinstance(width, int) else self.hidden_size

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        return self.generation.eos_token_ids

    @property
    def pad_token_id(self) -> int:
        """Token that fills up finished rows."""
        return self.generation.pad_token_id

    def further_files(self) -> tuple[str, ...]:
        """Files besides the graphs that have to be there."""
        return (*([] if self.picture is None else [self.picture.file]), EMBEDDING, "config.json")


AnyManifest = Manifest | EncoderManifest | ActionManifest
OPENERS: dict[type[AnyManifest], tuple[str, str]] = {
    Manifest: ("a model that writes text", "engine.VisionLanguage"),
    EncoderManifest: ("a vision encoder that writes no text", "encoder.Encoder"),
    ActionManifest: ("a model that makes actions and writes no text", "actions.Action"),
}


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a folder and compare all files with it; costs about half a second for a gigabyte.

    Raises:
        ArtifactError: If the folder is not ours, is damaged or changed, or has another version.

    Example:
        >>> read_manifest(Path("out/demo/onnx")).quantization  # doctest: +SKIP
    """
    manifest = read_description(folder)
    check_files(folder, manifest.files, REMEDY)
    return manifest


def read_any_manifest(folder: Path) -> AnyManifest:
    """The manifest of a folder of any model, compared with all files.

    Raises:
        ArtifactError: As `read_manifest`.

    Example:
        >>> Path("photos").mkdir()
        >>> read_any_manifest(Path("photos"))
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.ArtifactError: 'photos' is not an ONNX or engine folder: manifest.json is missing.
        Give the output folder of 'qe-edge export' or 'qe-edge build'.
    """
    manifest = read_any_description(folder)
    check_files(folder, manifest.files, REMEDY)
    return manifest


def read_encoder_manifest(folder: Path) -> EncoderManifest:
    """As `read_manifest`, of a vision encoder alone.

    Raises:
        ArtifactError: As `read_manifest`, or if the folder holds a model that writes text.

    Example:
        >>> read_encoder_manifest(Path("out/dinov2/onnx")).graphs["visual"].inputs  # doctest: +SKIP
    """
    manifest = _described(folder, EncoderManifest)
    check_files(folder, manifest.files, REMEDY)
    return manifest


def read_action_manifest(folder: Path) -> ActionManifest:
    """As `read_manifest`, of a model that makes actions.

    Raises:
        ArtifactError: As `read_manifest`, or if the folder holds a model of another kind.

    Example:
        >>> read_action_manifest(Path("out/pi0/onnx")).graphs["action"].outputs  # doctest: +SKIP
    """
    manifest = _described(folder, ActionManifest)
    check_files(folder, manifest.files, REMEDY)
    return manifest


def read_any_description(folder: Path) -> AnyManifest:
    """As `read_description`, of a model of any kind.

    Raises:
        ArtifactError: As `read_description`.

    Example:
        >>> isinstance(read_any_description(Path("out/demo/onnx")), ActionManifest)  # doctest: +SKIP
        False
    """
    manifest: AnyManifest = _described(folder, _kind(_table(folder)))
    return manifest


def read_description(folder: Path) -> Manifest:
    """The manifest of a folder alone: its files are there with their sizes, and their content is not read.

    Raises:
        ArtifactError: If the folder is none of ours, is damaged, or is of another version.

    Example:
        >>> read_description(Path("out/demo/onnx")).max_context  # doctest: +SKIP
    """
    return _described(folder, Manifest)


def _table(folder: Path) -> dict[str, Any]:
    """The table of a manifest of this version, not checked further."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ArtifactError(
            f"'{folder}' is not an ONNX or engine folder: {MANIFEST} is missing.",
            "Give the output folder of 'qe-edge export' or 'qe-edge build'.",
        )
    values = read_json_table(path, remedy=REMEDY)
    version = values.get("format_version")
    if version != FORMAT_VERSION:
        raise ArtifactError(
            f"'{folder}' has format version {shown(version)}; this QE-Edge reads {FORMAT_VERSION}.",
            "Export the model again, or install the version that wrote it.",
        )
    return values


def _kind(values: dict[str, Any]) -> type[AnyManifest]:
    """The kind of a manifest, which may be damaged."""
    graphs = values.get("graphs")
    names = set(graphs) if isinstance(graphs, dict) else set()
    return EncoderManifest if names == set(PICTURES_ONLY) else ActionManifest if "action" in names else Manifest


def _described(folder: Path, kind: type[Written]) -> Written:
    """A manifest of one kind, its files there with their sizes."""
    path, values = folder / MANIFEST, _table(folder)
    found = _kind(values)
    if found is not kind:
        what, opener = OPENERS[found]
        raise ArtifactError(f"'{folder}' holds {what}.", f"Open it with qe_edge.runtime.{opener}Engine.")
    try:
        manifest = kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise _damaged(folder, f"{MANIFEST} {where} {first['msg'].lower()}") from error
    manifest.check_seal(values, path, REMEDY)
    for name in (*(entry.file for entry in manifest.graphs.values()), *manifest.further_files()):
        if name not in manifest.files:
            raise _damaged(folder, f"{MANIFEST} lists no file '{name}'")
    if manifest.onnx is not None and not (folder / ENGINE_INFO).is_file():
        raise _damaged(folder, f"'{ENGINE_INFO}' is missing")
    check_sizes(folder, manifest.files, REMEDY)
    return manifest


def _damaged(folder: Path, reason: str) -> ArtifactError:
    return ArtifactError(f"The folder '{folder}' is damaged: {reason}.", REMEDY)
