#include "tokenizer/tokenizer.h"

#include "base/text.h"

namespace qe_edge {
namespace {

constexpr char kRemedy[] = "Copy tokenizer.json from the original model.";
constexpr size_t kMaxAdded = 1 << 17;

const Json& At(const Json& table, const char* key) {
  static const Json null;
  const auto found = table.find(key);
  return found == table.end() ? null : *found;
}

const Json& AddedTable(const Json& table) {
  const Json& added = At(table, "added_tokens");
  if (added.size() > kMaxAdded) throw ArtifactError("The tokenizer has too many added tokens.", kRemedy);
  return added;
}

Json Parsed(std::string_view json, const std::string& where) {
  Json table = ParseJsonTable(json, where, kRemedy);
  if (!At(table, "model").is_object()) throw ArtifactError("'" + where + "' holds no tokenizer.", kRemedy);
  return table;
}

bool HasByteLevel(const Json& step) {
  if (!step.is_object()) return false;
  if (step.value("type", "") == "ByteLevel") return true;
  for (const Json& part : At(step, "decoders")) {
    if (HasByteLevel(part)) return true;
  }
  return false;
}

}  // namespace

// nlohmann's exceptions are about values of another kind than a tokenizer.json has; they become one of ours.
Tokenizer::Tokenizer(std::string_view json, const std::string& where) try : Tokenizer(Parsed(json, where)) {
} catch (const Json::exception&) {
  throw ArtifactError("'" + where + "' is no tokenizer.json: a value in it is missing or of another kind.", kRemedy);
}

Tokenizer::Tokenizer(const Json& table)
    : normalizer_(MakeNormalizer(At(table, "normalizer"))),
      added_(AddedTable(table), normalizer_),
      pre_tokenizer_(MakePreTokenizer(At(table, "pre_tokenizer"))),
      model_(table.at("model")),
      decoder_(MakeDecoder(At(table, "decoder"))),
      frame_(ReadFrame(At(table, "post_processor"), 0)),
      byte_level_(HasByteLevel(At(table, "decoder"))) {}

Tokenizer::Frame Tokenizer::ReadFrame(const Json& step, int depth) {
  Frame frame;
  if (step.is_null()) return frame;
  const auto type = step.at("type").get<std::string>();
  if (type == "ByteLevel") return frame;
  if (type == "Sequence" && depth == 0) {
    for (const Json& part : step.at("processors")) {
      Frame inner = ReadFrame(part, depth + 1);
      frame.before.insert(frame.before.begin(), inner.before.begin(), inner.before.end());
      frame.after.insert(frame.after.end(), inner.after.begin(), inner.after.end());
    }
    return frame;
  }
  if (type != "TemplateProcessing") RefuseStep("post-processor", step);
  bool behind = false;
  for (const Json& part : step.at("single")) {
    if (part.contains("Sequence")) {
      behind = true;
      continue;
    }
    const auto name = part.at("SpecialToken").at("id").get<std::string>();
    for (const Json& id : step.at("special_tokens").at(name).at("ids"))
      (behind ? frame.after : frame.before).push_back(id.get<TokenId>());
  }
  return frame;
}

void Tokenizer::EncodeText(Piece piece, std::vector<TokenId>& ids) const {
  for (const Piece& part : pre_tokenizer_({std::move(piece)})) model_.Encode(part.text, ids);
}

std::vector<TokenId> Tokenizer::Encode(std::string_view text, bool special_as_text, bool frame) const {
  const size_t invalid = FirstInvalid(text);
  if (invalid != std::string_view::npos)
    throw InputError("A text is not UTF-8: byte " + std::to_string(invalid) + " is wrong.", "Write it as UTF-8.");
  std::vector<TokenId> ids;
  if (frame) ids = frame_.before;
  for (const Part& raw : added_.Split(text, false, special_as_text)) {
    if (raw.id >= 0) {
      ids.push_back(raw.id);
      continue;
    }
    const std::string normalized = normalizer_(std::string(text.substr(raw.start, raw.end - raw.start)));
    for (const Part& part : added_.Split(normalized, true, special_as_text)) {
      if (part.id >= 0) ids.push_back(part.id);
      else EncodeText({normalized.substr(part.start, part.end - part.start), raw.start == 0 && part.start == 0}, ids);
    }
  }
  if (frame) ids.insert(ids.end(), frame_.after.begin(), frame_.after.end());
  return ids;
}

const std::string* Tokenizer::Text(TokenId id) const {
  const std::string* added = added_.Text(id);
  return added != nullptr ? added : model_.Text(id);
}

TokenId Tokenizer::Find(const std::string& token) const {
  const TokenId added = added_.Find(token);
  return added >= 0 ? added : model_.Find(token);
}

std::string Tokenizer::Decode(const std::vector<TokenId>& ids) const {
  std::vector<std::string> tokens;
  for (const TokenId id : ids) {
    const std::string* text = Text(id);
    if (text != nullptr && !added_.IsSpecial(*text)) tokens.push_back(*text);
  }
  std::string text;
  for (const std::string& part : decoder_(std::move(tokens))) text += part;
  return text;
}

bool Tokenizer::EndsOpen(const std::vector<TokenId>& ids) const {
  std::string bytes;
  for (size_t index = ids.size(); index-- > 0;) {
    const std::string* text = Text(ids[index]);
    if (text == nullptr || added_.IsSpecial(*text)) continue;
    if (!byte_level_) return ByteOfToken(*text) >= 0;
    std::string part;
    for (size_t offset = 0; offset < text->size();) {
      const int byte = ByteOfCharacter(NextCodePoint(*text, offset));
      if (byte < 0) return false;
      part += static_cast<char>(byte);
    }
    bytes = part + bytes;
    if (bytes.size() >= 4) break;
  }
  return IncompleteTail(bytes) > 0;
}

std::string TextStream::Advance(bool finish) {
  if (!finish && tokenizer_->EndsOpen(ids_)) return "";
  const auto given = ids_.begin() + static_cast<std::ptrdiff_t>(given_);
  const std::string earlier = tokenizer_->Decode({ids_.begin(), given});
  const std::string text = tokenizer_->Decode(ids_);
  if (text.size() <= earlier.size()) return "";
  // the last piece is decoded again with the next one: a decoder may strip the first space of what it gets
  ids_.erase(ids_.begin(), given);
  given_ = ids_.size();
  return text.substr(earlier.size());
}

std::string TextStream::Add(TokenId id) {
  ids_.push_back(id);
  return Advance(false);
}

std::string TextStream::Finish() { return Advance(true); }

}  // namespace qe_edge
