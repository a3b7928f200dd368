// Part of tensorrt.cpp, which is compiled for two libraries whose classes are not the same: each has a logger of its own.
#pragma once

#include <NvInferRuntime.h>

#include <algorithm>
#include <mutex>
#include <new>
#include <string>

#include "base/text.h"

namespace qe_edge {
namespace {

constexpr size_t kReason = 300;  // characters of what TensorRT says

// Keeps what TensorRT said last. TensorRT may keep a logger for as long as the process lives, so that it is never freed.
class Log : public nvinfer1::ILogger {
 public:
  static Log& Only() {
    static auto* log = new Log;
    return *log;
  }

  void log(Severity severity, const char* text) noexcept override {
    if (severity > Severity::kERROR || text == nullptr) return;
    try {
      const std::lock_guard<std::mutex> lock(mutex_);
      said_ = text;
    } catch (const std::bad_alloc&) {  // then an error has no reason
    }
  }

  // ": " and the first line of what was said since the last call; empty if nothing was.
  std::string Reason() {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::string text = Lossy(said_.substr(0, std::min(said_.find('\n'), kReason)));
    said_.clear();
    for (char& c : text) c = static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
    while (!text.empty() && (text.back() == '.' || text.back() == ' ')) text.pop_back();
    return text.empty() ? "" : ": " + text;
  }

 private:
  std::mutex mutex_;
  std::string said_;
};

}  // namespace
}  // namespace qe_edge
