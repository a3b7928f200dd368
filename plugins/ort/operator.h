// QELinear for ONNX Runtime's CUDA provider. Not yet run on a GPU: tests run it on ONNX Runtime's CPU provider, with the
// kernels on the source emulator.
//
// A node has the inputs and attributes of the TensorRT plugin's node, x in float16, and one output more: bytes of scratch
// memory. So ONNX Runtime itself plans that memory, which may be used again as soon as its stream has come that far.
#pragma once
#include <onnxruntime_c_api.h>

#include <atomic>
#include <mutex>
#include <utility>
#include <vector>

#include "../host/attributes.h"
#include "../host/signature.h"
#include "kernels.h"

namespace qe {

// One node of a session. Runs of the session may overlap; those of different streams have counters of their own.
class LayerNode {
 public:
  // Reads and checks the node. Null, and `made` is set; else what is wrong and what to do.
  static OrtStatus* Make(const OrtApi& api, const OrtKernelInfo& info, void** made);
  ~LayerNode();
  LayerNode(const LayerNode&) = delete;
  LayerNode& operator=(const LayerNode&) = delete;

  // Queues the layer on the stream of the call.
  OrtStatus* Compute(OrtKernelContext& context);

 private:
  LayerNode(const OrtApi& api, const Attributes& attributes)
      : api_(api), problem_(attributes.problem), signature_(attributes.problem) {}

  OrtStatus* CheckWeights(const OrtKernelInfo& info) const;
  // The dimensions of x, whose last becomes that of y, and its tokens, which are then those of `problem`.
  OrtStatus* ReadShape(const OrtKernelContext& context, QeProblem& problem, int64_t* dims, size_t& count) const;
  OrtStatus* ReadAddresses(const OrtKernelContext& context, QeBuffers& buffers) const;
  OrtStatus* Queue(const QeProblem& problem, const QeBuffers& buffers, void* stream);

  const OrtApi& api_;
  const QeProblem problem_;
  const Signature signature_;
  std::atomic<bool> checked_{false};  // whether the kernels were compared with known answers
  std::mutex mutex_;                  // of what follows
  std::vector<std::pair<void*, QeLayer*>> layers_;  // by stream; one or two
};

// The operator, which lives as long as the library.
const OrtCustomOp& TheOperator();

}  // namespace qe
