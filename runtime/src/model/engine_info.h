#pragma once

#include <filesystem>
#include <optional>
#include <string>

namespace qe_edge {

constexpr char kEngineInfo[] = "engine.json";

// engine.json: the build of an engine folder.
struct EngineInfo {
  std::string target;   // of 'qe-edge build --target'
  std::string backend;  // "onnxruntime", "tensorrt" or "tensorrt_rtx"
  std::string version;  // of the backend, when they were built
  std::optional<std::string> plugin_sha256;  // of the plugin's library, where the engines need it

  // Whether the engines were built for largest sizes, by a TensorRT.
  bool HasLimits() const { return backend != "onnxruntime"; }
};

// Reads a folder's engine.json, its seal checked, and that it belongs to the manifest with this digest.
// Throws ArtifactError if it does not, and an Error of QE_ERROR_TARGET for a backend that this library does not have.
EngineInfo ReadEngineInfo(const std::filesystem::path& folder, const std::string& manifest);

}  // namespace qe_edge
