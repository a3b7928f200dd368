#include "model/chat.h"

#include <algorithm>
#include <random>

#include "base/text.h"
#include "model/folder.h"

namespace qe_edge {
namespace {

constexpr int64_t kVersion = 1;
constexpr char kStart[] = "start", kAnswer[] = "answer", kWithPicture[] = "+picture";

// The text without the characters `taken` at both ends.
std::string Stripped(const std::string& text, const std::string& taken) {
  std::vector<std::string_view> unwanted;
  for (size_t offset = 0; offset < taken.size();) {
    const size_t start = offset;
    NextCodePoint(taken, offset);
    unwanted.push_back(std::string_view(taken).substr(start, offset - start));
  }
  size_t first = text.size(), last = 0;
  for (size_t offset = 0; offset < text.size();) {
    const size_t start = offset;
    NextCodePoint(text, offset);
    const auto character = std::string_view(text).substr(start, offset - start);
    if (std::find(unwanted.begin(), unwanted.end(), character) != unwanted.end()) continue;
    first = std::min(first, start);
    last = offset;
  }
  return first < last ? text.substr(first, last - first) : std::string();
}

// The place and length of the first special token from `from` on, the longest where several begin; npos without any.
std::pair<size_t, size_t> FindSpecial(const Tokenizer& tokenizer, const std::string& text, size_t from) {
  size_t place = std::string::npos, length = 0;
  for (const std::string& word : tokenizer.added().special()) {
    const size_t found = text.find(word, from);
    if (found < place || (found == place && found != std::string::npos && word.size() > length)) {
      place = found;
      length = word.size();
    }
  }
  return {place, length};
}

// A word that no template knows and nobody can guess.
std::string StandIn(std::random_device& source) {
  std::string word = "x";
  for (int digit = 0; digit < 32; ++digit) word += "0123456789abcdef"[source() & 15];
  return word + "x";
}

using StandIns = std::map<std::string, std::string>;  // the words that stand for special tokens of users

// The user's text with words in the place of the special tokens that it spells.
std::string Hidden(const Tokenizer& tokenizer, const std::string& text, StandIns& words, std::random_device& source) {
  std::string out;
  size_t done = 0;
  while (true) {
    const auto [place, length] = FindSpecial(tokenizer, text, done);
    if (place == std::string::npos) return out + text.substr(done);
    const std::string spelled = text.substr(place, length);
    if (words.count(spelled) == 0) words[spelled] = StandIn(source);
    out += text.substr(done, place - done) + words[spelled];
    done = place + length;
  }
}

std::string Replaced(std::string text, const std::string& what, const std::string& by) {
  for (size_t at = text.find(what); at != std::string::npos; at = text.find(what, at + by.size()))
    text.replace(at, what.size(), by);
  return text;
}

// Ids of a prompt cut at its special tokens; in the pieces between, words become the special tokens that they hide.
std::vector<TokenId> InPieces(const Tokenizer& tokenizer, const std::string& prompt, const StandIns& words) {
  std::vector<TokenId> ids;
  size_t done = 0;
  while (done <= prompt.size()) {
    const auto [place, length] = FindSpecial(tokenizer, prompt, done);
    std::string piece = prompt.substr(done, place == std::string::npos ? place : place - done);
    for (const auto& [spelled, word] : words) piece = Replaced(piece, word, spelled);
    for (const TokenId id : tokenizer.Encode(piece, true)) ids.push_back(id);
    if (place == std::string::npos) break;
    ids.push_back(tokenizer.Find(prompt.substr(place, length)));
    done = place + length;
  }
  return ids;
}

size_t CountSpecial(const Tokenizer& tokenizer, const std::vector<TokenId>& ids) {
  return static_cast<size_t>(std::count_if(ids.begin(), ids.end(), [&](TokenId id) {
    const std::string* text = tokenizer.added().Text(id);
    return text != nullptr && tokenizer.added().IsSpecial(*text);
  }));
}

}  // namespace

// nlohmann's exceptions are about values of another kind than a chat.json has.
Chat::Chat(const std::string& json, const std::string& where) {
  const Json table = ParseJsonTable(json, where, kAgain);
  try {
    if (table.at("format_version") != kVersion) throw ArtifactError("'" + where + "' is of another version.", kAgain);
    if (!table.at("problem").is_null()) problem_ = table.at("problem").get<std::string>();
    joints_ = table.at("joints").get<decltype(joints_)>();
    picture_ = table.at("picture").get<std::string>();
    pictures_first_ = table.at("pictures_first").get<bool>();
    last_ = table.value("last", "");
    strip_ = table.at("strip").get<decltype(strip_)>();
    refused_ = table.at("refused").get<std::vector<std::string>>();
  } catch (const Json::exception&) {
    throw ArtifactError("'" + where + "' is damaged: a value is missing or of another kind.", kAgain);
  }
}

std::vector<ChatPiece> Chat::Pieces(const std::vector<Turn>& turns) const {
  if (!problem_.empty()) throw InputError(problem_, "Give running text, or use Python, which runs the template itself.");
  std::vector<ChatPiece> pieces;
  std::string before = kStart;
  for (const Turn& turn : turns) {
    for (const std::string& word : refused_) {
      if (turn.text.find(word) != std::string::npos)
        throw InputError("The chat template treats '" + Shown(word) + "' in a turn in a way of its own.", "Leave it out.");
    }
    const bool begins = !turn.marks.empty() && (pictures_first_ || turn.marks[0] == 0);
    pieces.push_back({Joint(before, turn.role + (begins ? kWithPicture : "")), true});
    AddContent(turn, pieces);
    before = turn.role;
  }
  pieces.push_back({Joint(before, kAnswer), true});
  return pieces;
}

void Chat::AddContent(const Turn& turn, std::vector<ChatPiece>& pieces) const {
  if (!turn.marks.empty() && picture_.empty())
    throw InputError("This model's chat template has no pictures.", "Leave the pictures out.");
  if (pictures_first_) pieces.insert(pieces.end(), turn.marks.size(), {picture_, true});
  const auto taken = strip_.find(turn.role);
  size_t start = 0;
  for (size_t number = 0; number <= turn.marks.size(); ++number) {
    const size_t end = number < turn.marks.size() ? turn.marks[number] : turn.text.size();
    if (number > 0 && !pictures_first_) pieces.push_back({picture_, true});
    if (number == turn.marks.size()) pieces.push_back({last_, true});
    pieces.push_back({Stripped(turn.text.substr(start, end - start), taken == strip_.end() ? "" : taken->second), false});
    start = end;
  }
}

const std::string& Chat::Joint(const std::string& before, const std::string& after) const {
  if (const auto from = joints_.find(before); from != joints_.end()) {
    if (const auto found = from->second.find(after); found != from->second.end()) return found->second;
  }
  const size_t plus = after.find(kWithPicture);
  const std::string what = after == kAnswer ? "the answer" : "a turn of the " + after.substr(0, plus);
  throw InputError("The model's chat template has no place for " + Shown(what) +
                       (plus == std::string::npos ? "" : " that begins with a picture") +
                       (before == kStart ? " first." : " after a turn of the " + Shown(before) + "."),
                   "Give turns of user and assistant in alternation, or one question.");
}

std::vector<TokenId> ChatIds(const Tokenizer& tokenizer, const std::vector<ChatPiece>& pieces) {
  std::string prompt, hidden;
  std::random_device source;
  StandIns words;
  for (const ChatPiece& piece : pieces) {
    prompt += piece.text;
    hidden += piece.trusted ? piece.text : Hidden(tokenizer, piece.text, words, source);
  }
  if (words.empty()) return tokenizer.Encode(prompt);
  const std::vector<TokenId> whole = tokenizer.Encode(hidden), ids = InPieces(tokenizer, hidden, words);
  if (InPieces(tokenizer, hidden, {}) != whole || CountSpecial(tokenizer, ids) != CountSpecial(tokenizer, whole)) {
    throw InputError("A text spells the special token '" + words.begin()->first +
                         "', which this tokenizer cannot read as text.",
                     "Leave it out, or put a space into it.");
  }
  return ids;
}

}  // namespace qe_edge
