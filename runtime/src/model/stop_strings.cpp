#include "model/stop_strings.h"

#include <algorithm>

#include "base/error.h"
#include "base/text.h"

namespace qe_edge {
namespace {

constexpr size_t kMaxStops = 16, kMaxStop = 4096;  // strings, and bytes of one

// How many bytes at the end of a text begin a stop string.
size_t Overlap(const std::string& text, const std::string& stop) {
  for (size_t size = std::min(text.size(), stop.size() - 1); size > 0; --size) {
    if (text.compare(text.size() - size, size, stop, 0, size) == 0) return size;
  }
  return 0;
}

}  // namespace

StopStrings::StopStrings(std::vector<std::string> stops) : stops_(std::move(stops)) {
  if (stops_.size() > kMaxStops)
    throw InputError("There are " + std::to_string(stops_.size()) + " stop strings.", "Give at most 16.");
  for (const std::string& stop : stops_) {
    if (stop.empty() || stop.size() > kMaxStop || FirstInvalid(stop) != std::string::npos)
      throw InputError("A stop string is empty, too long or not UTF-8.", "Give 1 to 4096 bytes of UTF-8.");
  }
}

std::string StopStrings::Add(const std::string& piece) {
  if (found_) return "";
  std::string text = held_ + piece;
  size_t place = std::string::npos, kept = 0;
  for (const std::string& stop : stops_) {
    place = std::min(place, text.find(stop));
    kept = std::max(kept, Overlap(text, stop));
  }
  found_ = place != std::string::npos;
  held_ = found_ ? "" : text.substr(text.size() - kept);
  text.resize(found_ ? place : text.size() - kept);
  return text;
}

std::string StopStrings::Finish() {
  std::string held;
  std::swap(held, held_);
  return held;
}

}  // namespace qe_edge
