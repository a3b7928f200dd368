"""`preprocess.onnx`: the preparation of one picture as a graph, for programs that have no image processor of Python's.

Input `image`, uint8 `[height, width, 3]`, RGB. Outputs: every input of `visual.onnx` under its name, where a picture's
images have several sizes once more with ".2" at the end of the name, for a second run of `visual.onnx`; then
`placeholder_ids` int64 `[tokens]`, which replace the picture's one token in a prompt, and `placeholder_positions` int64
`[axes, tokens]`, their positions counted from the first of them. It runs in ONNX Runtime on the CPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from qe_edge.export.op import OPSET
from qe_edge.export.signature import tensor_spec
from qe_edge.models.family import Encoded, ModelFamily, Sample
from qe_edge.models.images import MAX_PIXELS
from qe_edge.models.loading import LoadedModel
from qe_edge.models.picture_graphs import PictureGraph
from qe_edge.models.picture_names import IMAGE, PICTURES, PLACEHOLDER_IDS, PLACEHOLDER_POSITIONS
from qe_edge.runtime.folder_prompts import PIXELS, visual_runs
from qe_edge.runtime.graph_specs import PictureEntry, PictureLabel
from qe_edge.runtime.sessions import OrtSession
from qe_edge.system.errors import ModelError, QENotice
from qe_edge.system.version import VERSION

PREPROCESS = "preprocess.onnx"
MAX_SIDE = 1 << 16  # of a picture; JPEG's own limit
PROOFS = ((5, 9), (64, 48), (90, 300), (301, 77))  # heights and widths that every exported graph is tried with
QUESTION = "?"
LABEL = ("before", "digits", "after")


def write_preprocessing(loaded: LoadedModel, folder: Path, ir_version: int) -> PictureEntry | None:
    """Write the graph of a model that reads pictures, and try it against the model's own image processor.

    Args:
        loaded: The model.
        folder: Folder for `preprocess.onnx`.
        ir_version: IR version of the file.

    Returns:
        The graph's entry in the manifest; None, with a notice, if the family has no such graph.

    Raises:
        ModelError: If the graph gives other values than the image processor.

    Example:
        >>> from qe_edge.models.loading import load_model
        >>> entry = write_preprocessing(load_model("demo"), Path(), ir_version=10)
        >>> entry.file, [value.name for value in entry.outputs]
        ('preprocess.onnx', ['pixel_values', 'position_ids', 'placeholder_ids', 'placeholder_positions'])
    """
    if not loaded.family.picture_unit or not loaded.family.writes_text:
        return None
    found = loaded.family.picture_graph(loaded.processor)
    if found is None:
        warnings.warn(
            f"No graph prepares pictures as the image processor of this {loaded.family.model_type} model does, so that "
            f"{PREPROCESS} is not written: Python runs the model, the C++ library answers texts only.",
            QENotice,
            stacklevel=2,
        )
        return None
    entry = write_picture_graph(found, folder, ir_version)
    session = OrtSession(folder, entry, accuracy_level=0, threads=1)
    generator = np.random.default_rng(0)
    for height, width in PROOFS:
        image = generator.integers(0, 256, (height, width, 3), np.uint8)
        for count in (1, 2) if entry.counts_pictures else (1,):
            computed = run_picture_graph(session, entry, image, count)
            encoded = loaded.family.encode(loaded.processor, [Sample([image] * count, QUESTION)])
            differing = first_difference(computed, loaded.family, encoded, count)
            if differing is not None:
                raise ModelError(
                    f"The graph that prepares pictures gives another '{differing}' than the model's image processor "
                    f"for a picture of {width} x {height}.",
                    "Use the versions of pillow, transformers and onnxruntime in constraints.txt.",
                )
    return entry


def run_picture_graph(
    session: OrtSession, entry: PictureEntry, image: np.ndarray, count: int = 1
) -> dict[str, np.ndarray]:
    """Outputs of the graph by name.

    Args:
        session: The graph.
        entry: Its entry in the manifest.
        image: uint8 `[height, width, 3]`.
        count: How many pictures the prompt has.

    Example:
        >>> from qe_edge.models.loading import load_model
        >>> loaded = load_model("demo")
        >>> entry = write_picture_graph(loaded.family.picture_graph(loaded.processor), Path(), ir_version=10)
        >>> session = OrtSession(Path(), entry, accuracy_level=0, threads=1)
        >>> run_picture_graph(session, entry, np.zeros((64, 48, 3), np.uint8))["placeholder_ids"].shape
        (20,)
    """
    feeds = {IMAGE: image, **({PICTURES: np.array(count, np.int64)} if entry.counts_pictures else {})}
    return {name: np.asarray(value) for name, value in session.run(feeds).items()}


def first_difference(
    computed: dict[str, np.ndarray], family: ModelFamily, encoded: Encoded, count: int = 1
) -> str | None:
    """The first output of the graph that differs from the family's own arrays for a prompt with one picture.

    Args:
        computed: Outputs of the graph by name.
        family: The family.
        encoded: The prompt, a batch of 1.
        count: How often the prompt has the picture.

    Returns:
        Its name; None if all are equal to the last bit.

    Example:
        >>> from qe_edge.models.loading import load_model
        >>> loaded = load_model("demo")
        >>> entry = write_picture_graph(loaded.family.picture_graph(loaded.processor), Path(), ir_version=10)
        >>> image = np.zeros((64, 48, 3), np.uint8)
        >>> found = OrtSession(Path(), entry, accuracy_level=0, threads=1).run({IMAGE: image})
        >>> computed = {name: np.asarray(value) for name, value in found.items()}
        >>> encoded = loaded.family.encode(loaded.processor, [Sample(image, QUESTION)])
        >>> first_difference(computed, loaded.family, encoded) is None
        True
    """
    runs, wanted = (joined_runs(found) for found in (visual_runs(computed), own_runs(family, encoded, count)))
    if len(runs) != len(wanted):
        return "pixel_values"
    for one, other in zip(runs, wanted, strict=True):
        for name, array in other.items():
            if one[name].dtype != array.dtype or not np.array_equal(one[name], array):
                return name
    ids, places = computed[PLACEHOLDER_IDS], computed[PLACEHOLDER_POSITIONS]
    features = ids == family.image_token_id
    if count * features.sum() != encoded.image_mask.sum():
        return PLACEHOLDER_IDS
    start = int(encoded.image_mask[0].argmax()) - int(features.argmax())
    stop = start + len(ids)
    if not np.array_equal(encoded.input_ids[0, start:stop], ids):
        return PLACEHOLDER_IDS
    positions = family.position_ids(encoded)[..., 0, :].reshape(-1, encoded.input_ids.shape[1])
    relative = positions[:, start : stop + 1] - positions[:, start : start + 1]
    following = relative[:, -1] == places.max() + 1
    same = places.shape[0] == len(positions) and np.array_equal(relative[:, :-1], places) and following.all()
    return None if same else PLACEHOLDER_POSITIONS


def own_runs(family: ModelFamily, encoded: Encoded, count: int = 1) -> list[dict[str, np.ndarray]]:
    """The family's inputs of the visual encoder for the first of `count` equal pictures, which it runs together.

    Example:
        >>> from qe_edge.models.loading import load_model
        >>> loaded = load_model("demo")
        >>> encoded = loaded.family.encode(loaded.processor, [Sample(np.zeros((64, 48, 3), np.uint8), QUESTION)])
        >>> [run["pixel_values"].shape for run in own_runs(loaded.family, encoded)]
        [(20, 4, 1176)]
    """
    runs = family.visual_feeds(encoded)
    if count == 1:
        return runs
    return [{name: array[: len(array) // count] for name, array in run.items()} for run in runs]


def write_picture_graph(found: PictureGraph, folder: Path, ir_version: int) -> PictureEntry:
    """Write `preprocess.onnx` and check its form; returns the graph's entry in the manifest.

    Example:
        >>> from qe_edge.models.loading import load_model
        >>> loaded = load_model("demo")
        >>> entry = write_picture_graph(loaded.family.picture_graph(loaded.processor), Path(), ir_version=10)
        >>> entry.inputs[0].name, entry.inputs[0].dtype, entry.inputs[0].shape
        ('image', 'uint8', ('height', 'width', 3))
    """
    outputs = list(found.outputs.values())
    inputs = [found.image, *found.further]
    graph = ir.Graph(inputs, outputs, nodes=found.nodes, opset_imports={"": OPSET}, name="preprocess")
    model = ir.Model(graph, ir_version=ir_version, producer_name="qe-edge", producer_version=VERSION)
    ir.save(model, folder / PREPROCESS)
    onnx.checker.check_model(str(folder / PREPROCESS), full_check=True)
    return PictureEntry(
        file=PREPROCESS,
        inputs=tuple(tensor_spec(value) for value in inputs),
        outputs=tuple(tensor_spec(value) for value in outputs),
        placeholder_id=found.placeholder,
        max_pixels=MAX_PIXELS,
        max_side=MAX_SIDE,
        max_aspect=found.max_aspect,
        numbered=found.numbered,
        label=None if found.label is None else PictureLabel(**dict(zip(LABEL, found.label, strict=True))),
        whole=found.whole,
        first_position=found.first_position,
        max_prompt=found.max_prompt,
    )


def joined_runs(runs: Sequence[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    """Runs of the visual encoder, images of one size that follow each other in one run, as families have them.

    Example:
        >>> run = {"pixel_values": np.zeros((1, 4, 3)), "point_weights": np.ones((1, 4, 2))}
        >>> [found["pixel_values"].shape for found in joined_runs([run, run])]
        [(2, 4, 3)]
    """
    found: list[dict[str, np.ndarray]] = []
    for run in runs:
        last = found[-1] if found else {}
        others = [name for name in run if name != PIXELS]
        if (
            last
            and last[PIXELS].shape[1:] == run[PIXELS].shape[1:]
            and all(np.array_equal(last[name], run[name]) for name in others)
        ):
            found[-1] = {**run, PIXELS: np.concatenate([last[PIXELS], run[PIXELS]])}
        else:
            found.append(dict(run))
    return found
