// A libqe_plugin.so whose GPU is the source emulator, for libqe_ort.so on ONNX Runtime's CPU provider: memory is the host's,
// and a layer has run when its call returns. Every tensor has its exact size, so a kernel that reads or writes beyond one is
// an error. Without QE_EMULATOR, its library, nothing is computed: every byte of the inputs is read, and every byte of y
// and of the workspace written, which is what AddressSanitizer looks at.
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <vector>

#include "../host/attributes.h"
#include "../host/signature.h"
#include "../host/token_classes.h"
#include "../include/qe_edge/layer.h"

#define QE_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

int64_t open_layers = 0, checks = 0;

size_t BytesOf(const qe::Input& input) {
  const size_t each = input.type == qe::Element::kInt8 ? 1 : input.type == qe::Element::kFloat32 ? 4 : 2;
  return static_cast<size_t>(input.elements) * each;
}

struct Piece {
  uint64_t address;
  size_t bytes;
  int writable;  // 2: it has contents
};

std::vector<Piece> Pieces(const QeProblem& problem, QeBuffers buffers) {
  std::vector<Piece> pieces;
  const qe::Signature signature(problem);
  const auto tokens = static_cast<size_t>(problem.M);
  for (int i = 0; i < signature.count; ++i) {
    const size_t bytes = i ? BytesOf(signature.input[i]) : tokens * static_cast<size_t>(problem.K) * 2;
    pieces.push_back({AddressOf(buffers, signature.input[i].role), bytes, 0});
  }
  pieces.push_back({buffers.y, tokens * static_cast<size_t>(problem.N) * 2, 1});
  pieces.push_back({buffers.workspace, QeWorkspaceBytes(&problem), 1});
  return pieces;
}

#ifdef QE_EMULATOR
template <class F>
F Symbol(const char* name) {
  static void* library = dlopen(QE_EMULATOR, RTLD_NOW | RTLD_LOCAL);
  void* found = library ? dlsym(library, name) : nullptr;
  if (!found) fprintf(stderr, "the emulator has no %s\n", name), exit(3);
  return reinterpret_cast<F>(found);
}

const char* Emulate(const QePlan& plan, const std::vector<Piece>& pieces) {
  static char why[4200], errors[4096];
  static const auto clear = Symbol<void (*)()>("qe_emu_clear_buffers");
  static const auto add = Symbol<void (*)(const void*, size_t, int, const char*)>("qe_emu_add_buffer");
  static const auto launch = Symbol<int (*)(const QeLaunch*, uint64_t, int, char*, size_t)>("qe_emu_launch");
  clear();
  for (const Piece& piece : pieces) add(reinterpret_cast<void*>(piece.address), piece.bytes, piece.writable, "tensor");
  for (int i = 0; i < plan.count; ++i)
    if (launch(&plan.launch[i], 1, 0, errors, sizeof errors))
      return snprintf(why, sizeof why, "%s: %s", plan.launch[i].kernel, errors), why;
  return nullptr;
}
#else
const char* Touch(const std::vector<Piece>& pieces) {
  unsigned sum = 0;
  for (const Piece& piece : pieces) {
    auto* bytes = reinterpret_cast<unsigned char*>(piece.address);
    for (size_t i = 0; i < piece.bytes; ++i) piece.writable ? bytes[i] = 0 : sum += bytes[i];
  }
  return sum == 1 ? "Impossible. So that the sum is used." : nullptr;
}
#endif

}  // namespace

struct QeLayer {
  std::vector<unsigned char> counters;
};

QE_EXPORT int32_t QeLayoutVersion() { return qe::kLayoutVersion; }
QE_EXPORT const char* QeCheckKernels() { return ++checks, nullptr; }
QE_EXPORT int64_t QeOpenLayers() { return open_layers; }
QE_EXPORT int64_t QeChecks() { return checks; }

QE_EXPORT const char* QeLayerMemory(const QeProblem* problem, size_t* workspace, size_t* counters) {
  if (const char* why = QeRefuse(problem)) return why;
  *workspace = QeWorkspaceBytes(problem), *counters = QeCounterBytes(problem);
  return nullptr;
}

QE_EXPORT QeLayer* QeOpenLayer(const QeProblem* problem, const char**) {
  ++open_layers;
  return new QeLayer{std::vector<unsigned char>(qe::MostCounterBytes(*problem))};
}

QE_EXPORT const char* QeRunOpenLayer(QeLayer* layer, const QeProblem* problem, const QeBuffers* buffers, void*) {
  QeBuffers with_counters = *buffers;
  with_counters.counters = reinterpret_cast<uint64_t>(layer->counters.data());
  QeTactic tactic{};
  tactic.multiprocessors = 132;
  QePlan plan;
  if (const char* why = QeMakePlan(problem, &with_counters, &tactic, &plan)) return why;
  std::vector<Piece> pieces = Pieces(*problem, with_counters);
#ifdef QE_EMULATOR
  pieces.push_back({with_counters.counters, layer->counters.size(), 2});
  if (const char* why = Emulate(plan, pieces)) return why;
  for (const unsigned char byte : layer->counters)
    if (byte) return "Counters are left that are not zero. Mend the kernels.";
  return nullptr;
#else
  return Touch(pieces);
#endif
}

QE_EXPORT void QeCloseLayer(QeLayer* layer) { --open_layers, delete layer; }
