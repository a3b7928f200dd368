// The plugin class on the stand-in driver, called as TensorRT calls it: prints what went wrong, and nothing when all is
// right. Compiled with NVIDIA's headers, so it compares host/cuda_driver.h with cuda.h too.
#include <cuda.h>
#include <stdio.h>

#include <initializer_list>
#include <memory>
#include <type_traits>

#include "../host/self_test.h"
#include "../tensorrt/qe_linear_plugin.h"
#include "standin_driver.h"

extern "C" {
extern const unsigned char qe_fatbin_cuda12[1] = {0}, qe_fatbin_cuda13[1] = {0};
extern const unsigned long long qe_fatbin_cuda12_bytes = 1;
}

namespace qe {
// In place of host/self_test.cpp, whose problems need kernels that compute.
const char* const kWrongResults = "wrong";
const char* SelfTest(Device&) { return nullptr; }

static_assert(sizeof(LaunchConfig) == sizeof(CUlaunchConfig) && sizeof(LaunchAttribute) == sizeof(CUlaunchAttribute));
static_assert(offsetof(LaunchConfig, grid_x) == offsetof(CUlaunchConfig, gridDimX));
static_assert(offsetof(LaunchConfig, block_x) == offsetof(CUlaunchConfig, blockDimX));
static_assert(offsetof(LaunchConfig, shared_bytes) == offsetof(CUlaunchConfig, sharedMemBytes));
static_assert(offsetof(LaunchConfig, stream) == offsetof(CUlaunchConfig, hStream));
static_assert(offsetof(LaunchConfig, attributes) == offsetof(CUlaunchConfig, attrs));
static_assert(offsetof(LaunchConfig, attribute_count) == offsetof(CUlaunchConfig, numAttrs));
static_assert(offsetof(LaunchAttribute, value) == offsetof(CUlaunchAttribute, value));
static_assert(alignof(LaunchAttribute) == alignof(CUlaunchAttribute));
static_assert(kProgrammaticStreamSerialization == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION);
static_assert(kMultiprocessorCount == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
static_assert(kMajorVersion == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
static_assert(kMinorVersion == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
static_assert(kMaxDynamicSharedBytes == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES);
static_assert(kPtxVersion == CU_FUNC_ATTRIBUTE_PTX_VERSION && kRelaxedCapture == CU_STREAM_CAPTURE_MODE_RELAXED);
static_assert(kInvalidHandle == CUDA_ERROR_INVALID_HANDLE);
static_assert(std::is_same_v<CUdeviceptr, unsigned long long> && sizeof(CUdeviceptr) == sizeof(uint64_t));
}  // namespace qe

namespace {

int failures = 0;
void Expect(bool right, const char* what, int line) {
  if (!right) ++failures, printf("line %d: %s\n", line, what);
}
#define EXPECT(condition) Expect(condition, #condition, __LINE__)

using Plugin = std::unique_ptr<nvinfer1::IPluginV3>;

nvinfer1::v_1_0::IPluginV3OneRuntime* RuntimeOf(const Plugin& plugin) {
  return static_cast<nvinfer1::v_1_0::IPluginV3OneRuntime*>(
      plugin->getCapabilityInterface(nvinfer1::PluginCapabilityType::kRUNTIME));
}

qe::Attributes Layer() {
  qe::Attributes a;
  a.problem = {QE_F16, 1, 4096, 2048, 8, 128, 0, 0, 32, 8, 4, 4, 4};
  a.layout_version = qe::kLayoutVersion;
  return a;
}

// The tensors of the layer at a number of tokens, and the calls of TensorRT with them.
struct Tensors {
  const qe::Signature signature{Layer().problem};
  nvinfer1::PluginTensorDesc in[qe::kMaxInputs] = {}, out = {};

  explicit Tensors(int tokens) {
    for (int i = 0; i < signature.count; ++i) {
      in[i].type = qe::TypeOf(signature.input[i].type);
      in[i].dims.nbDims = 2;
      in[i].dims.d[0] = i ? 1 : tokens;
      in[i].dims.d[1] = i ? signature.input[i].elements : Layer().problem.K;
    }
    out = in[0];
    out.dims.d[1] = Layer().problem.N;
  }
  int ChangeShape(const Plugin& plugin) const {
    return RuntimeOf(plugin)->onShapeChange(in, signature.count, &out, 1);
  }
  int Enqueue(const Plugin& plugin) const {
    const void* from[qe::kMaxInputs];
    for (const void*& p : from) p = reinterpret_cast<void*>(4096);
    void* to[] = {reinterpret_cast<void*>(4096)};
    return RuntimeOf(plugin)->enqueue(in, &out, from, to, to[0], static_cast<cudaStream_t>(kStream));
  }
  static inline void* const kStream = reinterpret_cast<void*>(64);
};

Plugin Attach(const Plugin& plugin) { return Plugin(RuntimeOf(plugin)->attachToContext(nullptr)); }

}  // namespace

int main() {
  const Plugin layer(new qe::QELinearPlugin(Layer()));
  EXPECT(Tensors(5).ChangeShape(layer) == 0 && Tensors(5).Enqueue(layer) != 0);  // no context
  void* context = standin_create(0);
  standin_make_current(context);

  Plugin one = Attach(layer), two = Attach(layer);
  EXPECT(standin_counts().allocated == 2);
  Plugin copy(one->clone());
  EXPECT(standin_counts().allocated == 2);  // shares none, and has none before it is used
  EXPECT(Tensors(5).ChangeShape(one) == 0 && Tensors(5).Enqueue(one) == 0);
  EXPECT(Tensors(5).ChangeShape(copy) == 0 && Tensors(5).Enqueue(copy) == 0);
  EXPECT(standin_counts().allocated == 3);
  copy.reset();
  EXPECT(standin_counts().allocated == 2);

  // One change of shape loads what every number of tokens needs.
  EXPECT(Tensors(300).ChangeShape(two) == 0);
  standin_capture(Tensors::kStream, 1);
  for (const int tokens : {1, 2, 8, 9, 16, 17, 64, 65, 300, 5000}) {
    EXPECT(Tensors(tokens).ChangeShape(two) == 0);
    EXPECT(Tensors(tokens).Enqueue(two) == 0);
  }
  standin_capture(Tensors::kStream, 0);
  EXPECT(standin_counts().spoilt_captures == 0 && standin_counts().loads == 1 && standin_counts().allocated == 2);

  const StandinCounts before = standin_counts();
  if (standin_has_ids())
    for (int i = 0; i < 1000; ++i)
      if (Tensors(1 + i % 20).Enqueue(two) != 0) EXPECT(false);
  EXPECT(standin_counts().lookups == before.lookups && standin_counts().attributes == before.attributes);

  standin_fail_allocations(2);
  Plugin poor = Attach(layer), poorer = Attach(layer);  // the warning comes once: the test reads standard error
  EXPECT(Tensors(1).ChangeShape(poor) == 0 && Tensors(1).Enqueue(poor) == 0 && Tensors(1).Enqueue(poorer) == 0);
  EXPECT(standin_counts().allocated == 2);

  one.reset();
  EXPECT(standin_counts().allocated == 1);
  standin_destroy(context);
  standin_make_current(standin_create(0));
  EXPECT(Tensors(1).ChangeShape(two) == 0 && Tensors(1).Enqueue(two) == 0 && standin_counts().allocated == 1);
  standin_make_current(nullptr);
  two.reset();
  EXPECT(standin_counts().allocated == (standin_has_ids() ? 0 : 1));  // without ids, no context to ask about
  EXPECT(standin_counts().dead_launches == 0 && standin_counts().dead_memory == 0);
  return failures != 0;
}
