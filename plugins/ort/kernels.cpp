#include "kernels.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#include "../host/attributes.h"

namespace qe {
namespace {

constexpr char kPlugin[] = "libqe_plugin.so";

template <class F>
bool Symbol(void* library, const char* name, F& function) {
  function = reinterpret_cast<F>(dlsym(library, name));
  return function != nullptr;
}

}  // namespace

bool Kernels::Find(void* library) {
  decltype(&QeLayoutVersion) layout = nullptr;
  return Symbol(library, "QeLayoutVersion", layout) && layout() == kLayoutVersion &&
         Symbol(library, "QeCheckKernels", check) && Symbol(library, "QeLayerMemory", memory) &&
         Symbol(library, "QeOpenLayer", open) && Symbol(library, "QeRunOpenLayer", run) &&
         Symbol(library, "QeCloseLayer", close);
}

Kernels::Kernels() {
  Dl_info own{};
  char path[4096];
  const bool known = dladdr(reinterpret_cast<void*>(&TheKernels), &own) && own.dli_fname;
  const char* end = known ? strrchr(own.dli_fname, '/') : nullptr;
  const int folder = end ? static_cast<int>(end - own.dli_fname) + 1 : 0;
  const int length = snprintf(path, sizeof path, "%.*s%s", folder, known ? own.dli_fname : "", kPlugin);
  void* library = length < static_cast<int>(sizeof path) ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : nullptr;
  if (!library) {
    const char* reason = dlerror();
    snprintf(why, sizeof why, "%s does not load from beside libqe_ort.so: %.300s. Build both with qe-edge build-plugin.",
             kPlugin, reason ? reason : "its path is too long");
  } else if (!Find(library)) {
    snprintf(why, sizeof why, "%s beside libqe_ort.so is of another version. Build both with qe-edge build-plugin.", kPlugin);
  }
}

const Kernels& TheKernels() {
  static const Kernels kernels;
  return kernels;
}

}  // namespace qe
