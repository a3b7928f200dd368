#include "model/engine_info.h"

#include "base/files.h"
#include "base/json.h"
#include "base/text.h"
#include "model/folder.h"

namespace qe_edge {
namespace {

constexpr size_t kMaxInfo = 16 << 20;

}  // namespace

// nlohmann's exceptions are about values of another kind than the file has.
EngineInfo ReadEngineInfo(const std::filesystem::path& folder, const std::string& manifest) {
  const std::filesystem::path path = folder / kEngineInfo;
  const std::string where = path.string();
  EngineInfo info;
  try {
    const Json table = ParseJsonTable(ReadFile(path, kMaxInfo, kAgain), where, kAgain);
    CheckSeal(table, where, kAgain);
    if (table.at("manifest").get<std::string>() != manifest)
      throw ArtifactError("'" + where + "' describes other engines than those beside it.", kAgain);
    info.target = Shown(table.at("target").get<std::string>());
    info.backend = table.at("backend").get<std::string>();
    info.version = Shown(table.at("version").get<std::string>());
    if (const Json& plugin = table.at("plugin"); !plugin.is_null()) info.plugin_sha256 = plugin.at("sha256").get<std::string>();
  } catch (const Json::exception&) {
    throw ArtifactError("'" + where + "' is damaged: a value is missing or of another kind.", kAgain);
  }
  if (info.backend != "onnxruntime" && info.backend != "tensorrt" && info.backend != "tensorrt_rtx") {
    throw Error(QE_ERROR_TARGET, "'" + folder.string() + "' holds engines for '" + Shown(info.backend) + "'.",
                "Give the output folder of 'qe-edge export', or engines for TensorRT: this library runs those.");
  }
  return info;
}

}  // namespace qe_edge
