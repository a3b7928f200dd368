#pragma once

#include <string>
#include <vector>

namespace qe_edge {

// Ends a text where one of several strings begins, and holds back what may become one.
class StopStrings {
 public:
  explicit StopStrings(std::vector<std::string> stops);  // throws InputError for empty, too long or too many ones

  std::string Add(const std::string& piece);  // what can be given of the text so far
  std::string Finish();                       // what was held back and became none
  bool found() const { return found_; }

 private:
  std::vector<std::string> stops_;
  std::string held_;
  bool found_ = false;
};

}  // namespace qe_edge
