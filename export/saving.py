"""Writes graphs: weights lie beside the graph, in files that any file system holds."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from qe_edge.runtime.graph_files import DATA

SHARD_BYTES = 4_000_000_000  # FAT32, as SD cards have it, ends at 4 GiB; one larger tensor is a file of its own


def save_graph(model: ir.Model, path: Path, *, kept_inline: int = 256) -> None:
    """Write a graph, and its external data to one or more files, each tensor when its turn has come.

    Args:
        model: The graph.
        path: Its file; the data is `<path>.data`, or `<stem>-00001-of-0000N.onnx.data` where there are N shards.
        kept_inline: Bytes up to which a constant stays in the graph's file.

    Raises:
        OSError: If the disk is full.

    Example:
        >>> text = '<ir_version: 10, opset_import: ["": 21]> g (float[2] x) => (float[2] y) { y = Abs (x) }'
        >>> save_graph(ir.from_onnx_text(text), Path("abs.onnx"))
        >>> Path("abs.onnx").is_file()
        True
    """
    ir.save(
        model,
        path,
        external_data=f"{path.name}{DATA}",
        size_threshold_bytes=kept_inline,
        max_shard_size_bytes=SHARD_BYTES,
    )
