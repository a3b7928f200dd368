// One layer for programs that hold its tensors on the GPU themselves, such as PyTorch and ONNX Runtime; without TensorRT.
#pragma once
#include "plan.h"

extern "C" {

// Compares the kernels with known answers in the current context, once per context. Null when all is well, else what is
// wrong and what to do. Not while a stream is captured.
const char* QeCheckKernels();

// Bytes of `workspace` and `counters` of the problem's QeBuffers. Null, or why the kernels cannot run it and what to do.
const char* QeLayerMemory(const QeProblem* problem, size_t* workspace_bytes, size_t* counter_bytes);

// Queues a layer in the current context. Kernels that are not loaded yet are loaded first, which no stream may be
// captured for: run a layer once before a capture. May be called by several threads. Null, or what is wrong and what to
// do.
const char* QeRunLayer(const QeProblem* problem, const QeBuffers* buffers, void* stream);

// Version of the prepacked tensors that the kernels read.
int32_t QeLayoutVersion();

// A layer with counters of its own on the GPU, for any number of tokens (problem->M is not read). It serves one stream and
// one thread at a time; several layers may run at once. Null, and why, if the kernels cannot run it.
struct QeLayer;
QeLayer* QeOpenLayer(const QeProblem* problem, const char** why);

// As QeRunLayer, with the layer's own counters instead of those of `buffers`. Its first run in a context allocates them,
// which no stream may be captured for.
const char* QeRunOpenLayer(QeLayer* layer, const QeProblem* problem, const QeBuffers* buffers, void* stream);

void QeCloseLayer(QeLayer* layer);

}  // extern "C"
