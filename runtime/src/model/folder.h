#pragma once

#include <filesystem>

#include "base/json.h"

namespace qe_edge {

constexpr char kAgain[] = "Export or build the model again.";

// Compares the files of a folder with its table {name: {size, sha256}}: place, size and content; nothing is added.
// Throws ArtifactError if a file is missing, lies outside the folder, is another one, or was added.
void CheckFiles(const std::filesystem::path& folder, const Json& table);

}  // namespace qe_edge
