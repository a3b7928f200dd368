from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from PIL import Image

from qe_edge.models.graph_nodes import OPSET, Nodes
from qe_edge.models.picture_graphs import output, picture_input
from qe_edge.models.pillow_resize import BICUBIC, BILINEAR, LANCZOS, resize, resize_as_torch
from qe_edge.models.torch_resize import scale_frames

SIZES = (1, 2, 3, 15, 16, 17, 31, 64, 100, 257, 640)


def session(resample: int, scale: Callable[..., ir.Value] = resize) -> ort.InferenceSession:
    write, image = Nodes(), picture_input()
    height, width = (
        ir.Value(name=name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([])) for name in ("down", "across")
    )
    scaled = output(scale(write, image, height, width, resample), ir.DataType.UINT8, "new_height", "new_width", 3)
    graph = ir.Graph([image, height, width], [scaled], nodes=write.nodes, opset_imports={"": OPSET}, name="resize")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    data = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("resample", [LANCZOS, BILINEAR, BICUBIC])
def test_every_pixel_is_pillows(resample: int) -> None:
    """Noise tells filters, the order of the two passes and the rounding of weights apart."""
    run = session(resample).run
    generator = np.random.default_rng(resample)
    for _ in range(60):
        height, width, down, across = (int(size) for size in generator.choice(SIZES, 4))
        image = generator.integers(0, 256, (height, width, 3), np.uint8)
        (found,) = run(None, {"image": image, "down": np.array(down), "across": np.array(across)})
        wanted = np.asarray(Image.fromarray(image).resize((across, down), resample=resample))
        assert np.array_equal(found, wanted), (height, width, down, across)


@pytest.mark.parametrize("resample", [LANCZOS, BILINEAR, BICUBIC])
def test_every_pixel_is_torchs(resample: int) -> None:
    """Its weights have as many bits as the largest of them leaves room for, and columns are always scaled first."""
    run = session(resample, resize_as_torch).run
    generator = np.random.default_rng(resample)
    for _ in range(60):
        height, width, down, across = (int(size) for size in generator.choice(SIZES, 4))
        image = generator.integers(0, 256, (height, width, 3), np.uint8)
        (found,) = run(None, {"image": image, "down": np.array(down), "across": np.array(across)})
        wanted = scale_frames(image[None], down, across, resample)[0]
        assert np.array_equal(found, wanted), (height, width, down, across)


def test_black_and_white_edges_are_clipped_as_pillow_does() -> None:
    """Lanczos overshoots on both sides of an edge."""
    image = np.zeros((40, 40, 3), np.uint8)
    image[:, 20:] = 255
    feeds = {"image": image, "down": np.array(97), "across": np.array(131)}
    (found,) = session(LANCZOS).run(None, feeds)
    assert np.array_equal(found, np.asarray(Image.fromarray(image).resize((131, 97), resample=LANCZOS)))
