// The functions of include/qe_edge/layer.h. They come from the libqe_plugin.so beside this library, so that its 20 MB of
// kernels are stored once.
#pragma once
#include "../include/qe_edge/layer.h"

namespace qe {

struct Kernels {
  decltype(&QeCheckKernels) check = nullptr;
  decltype(&QeLayerMemory) memory = nullptr;
  decltype(&QeOpenLayer) open = nullptr;
  decltype(&QeRunOpenLayer) run = nullptr;
  decltype(&QeCloseLayer) close = nullptr;
  char why[512] = "";  // there are none: one sentence that says why, and one that says what to do

  Kernels();

 private:
  bool Find(void* library);
};

// Loaded when they are first asked for.
const Kernels& TheKernels();

}  // namespace qe
