"""From an ONNX folder to an engine folder for one target."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import onnxruntime as ort

from qe_edge.export.engine import EngineRequest, build_engine, reads_operator
from qe_edge.export.lowering.cuda import lower_for_cuda
from qe_edge.export.lowering.onnxruntime import lower_for_onnxruntime
from qe_edge.export.lowering.plugin import is_packed, layer_forms
from qe_edge.export.lowering.tensorrt import lower_for_tensorrt
from qe_edge.export.opening import explained, open_graph
from qe_edge.export.plugin_check import check_forms, check_plugin_given, check_plugin_target
from qe_edge.export.saving import save_graph
from qe_edge.export.signature import tensor_spec
from qe_edge.export.targets import CUDA, Target, get_target
from qe_edge.models.vision_encoder import MAX_PICTURES
from qe_edge.prepack.lower import LAYOUT_VERSION
from qe_edge.runtime.engine_info import SIZED, EngineInfo, GraphBuild, PluginBuild
from qe_edge.runtime.graph_files import is_data_of
from qe_edge.runtime.limits import EngineLimits, limits_of, with_capacity, with_limits
from qe_edge.runtime.manifest import (
    AnyManifest,
    EncoderManifest,
    FolderManifest,
    GraphEntry,
    Manifest,
    read_any_manifest,
)
from qe_edge.runtime.plugin_library import digest
from qe_edge.runtime.sessions import check_opens
from qe_edge.system.atomic import atomic_folder
from qe_edge.system.errors import ArtifactError, InputError, TargetError
from qe_edge.system.progress import Progress, Silent, track

AGAIN = "Export the model again."
REFUSED = "Export the model again, or build for the target 'cpu'."


def build_engines(
    onnx: Path,
    out: Path,
    target: str,
    *,
    plugin_library: Path | None = None,
    limits: EngineLimits | None = None,
    progress: Progress | None = None,
) -> Path:
    """Build for a target; the folder appears only when it is complete, and replaces an older one.

    Args:
        onnx: Folder that `qe-edge export` wrote.
        out: Folder to write, for example `engines/<target>`.
        target: Name of a target.
        plugin_library: Build with this plugin library; None builds without the plugin.
        limits: Largest sizes that engines take; None keeps the sizes of the export. Larger sizes need more memory.
        progress: Where to report progress.

    Returns:
        `out`, which holds the engines, all other files that the runtime needs, and `engine.json`.

    Raises:
        UnknownNameError: If there is no such target.
        TargetError: If it cannot be built on this machine, or its library or the plugin refuses the model.
        InputError: If the target takes no plugin or needs one, or the model cannot have such limits.
        ArtifactError: If `onnx` is no ONNX folder, is damaged or was changed.
        ResourceError: If disk or memory do not suffice.

    Example:
        >>> build_engines(Path("out/demo/onnx"), Path("out/demo/engines/cpu"), "cpu")  # doctest: +SKIP
    """
    chosen = get_target(target)
    manifest = _checked_manifest(onnx, chosen, plugin_library, limits)
    manifest, capacity = _with_cache(manifest, chosen)
    sizes = {name: float(_size(onnx, manifest.graphs[name].file)) for name in manifest.graphs}
    with atomic_folder(out) as part, track(progress or Silent(), "Building", sum(sizes.values())) as tracked:
        _copy_runtime_files(onnx, part, manifest)
        entries, builds, versions = {}, {}, set()
        for name in manifest.graphs:
            entries[name], builds[name], library = _build_graph(
                chosen, onnx, part, name, manifest.graphs[name], plugin_library, capacity
            )
            versions.add(library)
            tracked.advance(sizes[name], name)
        written = manifest.model_copy(update={"graphs": entries, "onnx": manifest.digest}).write(part)
        EngineInfo(
            target=chosen.name,
            backend=chosen.backend,
            version=versions.pop(),
            capabilities=tuple(f"{major}.{minor}" for major, minor in chosen.capabilities),
            graphs=builds,
            plugin=_plugin_build(plugin_library),
            manifest=written.digest,
        ).write(part)
    return out


def _checked_manifest(
    onnx: Path, target: Target, plugin_library: Path | None, limits: EngineLimits | None
) -> AnyManifest:
    """The manifest of graphs that can be built for a target, with the limits that their engines get."""
    if plugin_library is not None:
        check_plugin_target(target)
    else:
        check_plugin_given([target.name])
    manifest = read_any_manifest(onnx)
    if isinstance(manifest, Manifest):
        manifest = manifest if limits is None else with_limits(manifest, limits)
    elif limits not in (None, EngineLimits()):
        encoder = isinstance(manifest, EncoderManifest)
        what = f"a vision encoder have no limits to choose: they take {MAX_PICTURES} pictures at a time"
        what = what if encoder else "a model that makes actions have no limits to choose"
        raise InputError(f"Engines of {what}.", "Leave the --max options out.")
    for entry in manifest.graphs.values():
        if not entry.file.endswith(".onnx") or manifest.onnx is not None:
            raise ArtifactError(
                f"'{onnx}' holds engines, not ONNX graphs.", "Give the output folder of 'qe-edge export'."
            )
    if isinstance(manifest, Manifest) and manifest.picture is not None:
        open_graph(onnx, manifest.picture)  # copied as it is, so that its form is looked at here
    target.check()
    if plugin_library is not None:
        graphs = [open_graph(onnx, entry) for entry in manifest.graphs.values()]
        check_forms([target], plugin_library, [form for graph in graphs for form in layer_forms(graph)])
    return manifest


def _with_cache(manifest: AnyManifest, target: Target) -> tuple[AnyManifest, int | None]:
    """The manifest with a KV cache as a target's engines have it, and its capacity where that is a constant.

    TensorRT writes into the cache in place if it knows TensorScatter and the model's masks allow the node. Otherwise it
    writes into a second cache.
    """
    if target.backend not in SIZED or not isinstance(manifest, Manifest):
        return manifest, None
    in_place = manifest.kv.in_place and reads_operator(target.backend, "TensorScatter")
    capacity = limits_of(manifest).context if in_place else None
    if capacity is not None:
        manifest = with_capacity(manifest, capacity)
    return manifest.model_copy(update={"kv": manifest.kv.model_copy(update={"in_place": in_place})}), capacity


def _build_graph(
    target: Target,
    source: Path,
    folder: Path,
    name: str,
    entry: GraphEntry,
    plugin_library: Path | None,
    capacity: int | None,
) -> tuple[GraphEntry, GraphBuild, str]:
    """Build one graph's engine in `folder`; returns its manifest entry, the facts, and the library's version."""
    if target.backend == "onnxruntime":
        return _build_for_onnxruntime(source, folder, entry)
    if target.backend == CUDA:
        return _build_for_cuda(source, folder, entry)
    lowered = folder / ".lowered"
    lowered.mkdir()
    model = open_graph(source, entry)
    with explained(f"The graph '{source / entry.file}' cannot be lowered for {target.backend}", TargetError, REFUSED):
        precision = lower_for_tensorrt(model, plugin=plugin_library is not None, capacity=capacity)
        save_graph(model, lowered / entry.file)
        inputs = tuple(tensor_spec(value) for value in model.graph.inputs)
        outputs = tuple(tensor_spec(value) for value in model.graph.outputs)
    file = f"{name}.engine"
    facts = build_engine(
        EngineRequest(
            backend=target.backend,
            onnx=lowered / entry.file,
            engine=folder / file,
            facts=lowered / "facts.json",
            profiles=entry.profiles,
            capabilities=() if target.built_on_device else target.capabilities,
            plugin_library=plugin_library,
        )
    )
    shutil.rmtree(lowered)
    built = entry.model_copy(update={"file": file, "inputs": inputs, "outputs": outputs})
    build = GraphBuild(
        size=facts.size,
        seconds=facts.seconds,
        layers=facts.layers,
        precision=precision,
        plugin_nodes=tuple(facts.plugin_nodes),
        plugin_layers=tuple(node for node in facts.plugin_nodes if _is_listed(node, facts.engine_layers)),
    )
    return built, build, facts.version


def _build_for_onnxruntime(source: Path, folder: Path, entry: GraphEntry) -> tuple[GraphEntry, GraphBuild, str]:
    """A graph of fewer nodes in `folder`; one that ONNX Runtime cannot open is refused."""
    started = time.perf_counter()
    model = open_graph(source, entry)
    with explained(f"The graph '{source / entry.file}' cannot be lowered for ONNX Runtime", TargetError, AGAIN):
        lower_for_onnxruntime(model)
        save_graph(model, folder / entry.file)
    check_opens(folder, entry)
    build = GraphBuild(size=_size(folder, entry.file), seconds=time.perf_counter() - started)
    return entry, build, ort.__version__


def _build_for_cuda(source: Path, folder: Path, entry: GraphEntry) -> tuple[GraphEntry, GraphBuild, str]:
    """As `_build_graph`, for ONNX Runtime on a GPU: the lowered graph itself, which is made on any machine."""
    started = time.perf_counter()
    model = open_graph(source, entry)
    with explained(f"The graph '{source / entry.file}' cannot be lowered for ONNX Runtime", TargetError, REFUSED):
        precision = lower_for_cuda(model)
        save_graph(model, folder / entry.file)
    built = entry.model_copy(
        update={
            "inputs": tuple(tensor_spec(value) for value in model.graph.inputs),
            "outputs": tuple(tensor_spec(value) for value in model.graph.outputs),
        }
    )
    nodes = tuple(node.name or "" for node in model.graph if is_packed(node))
    build = GraphBuild(
        size=_size(folder, entry.file),
        seconds=time.perf_counter() - started,
        precision=precision,
        plugin_nodes=nodes,
        plugin_layers=nodes,  # the graph runs as it is
    )
    return built, build, ort.__version__


def _plugin_build(library: Path | None) -> PluginBuild | None:
    if library is None:
        return None
    return PluginBuild(sha256=digest(library), layout_version=LAYOUT_VERSION)


def _is_listed(node: str, layers: dict[str, str]) -> bool:
    """Whether an engine's layer list has a node; TensorRT-RTX appends to its name."""
    return any(layer == node or layer.startswith(f"{node}_myl") for layer in layers)


def _files(folder: Path, graph: str) -> list[str]:
    """A graph's file and the files of its external data."""
    return [path.name for path in folder.iterdir() if path.name == graph or is_data_of(path.name, graph)]


def _size(folder: Path, graph: str) -> int:
    return sum((folder / file).stat().st_size for file in _files(folder, graph))


def _copy_runtime_files(source: Path, folder: Path, manifest: FolderManifest) -> None:
    """Everything but the model's graphs and their weights: configuration, tokenizer, embeddings, `preprocess.onnx`."""
    graphs = {entry.file for entry in manifest.graphs.values()}
    for name in manifest.files:
        if not any(name == graph or is_data_of(name, graph) for graph in graphs):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, folder / name)
