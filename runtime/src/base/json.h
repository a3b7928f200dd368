#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "base/error.h"

namespace qe_edge {

using Json = nlohmann::json;

// The table that a JSON text describes. `where` names it in messages.
// Throws ArtifactError if it is not JSON, nested too deeply, or no table.
Json ParseJsonTable(std::string_view text, const std::string& where, const std::string& remedy);

// As Python's json.dumps(sort_keys=True, separators=(",", ":")) writes a value: what a seal is made of.
std::string CanonicalJson(const Json& value);

// Throws ArtifactError if a table's "digest" is not that of its other values. `where` names it in messages.
void CheckSeal(const Json& table, const std::string& where, const std::string& remedy);

}  // namespace qe_edge
