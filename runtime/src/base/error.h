#pragma once

#include <stdexcept>
#include <string>
#include <utility>

#include "qe_edge/qe_edge.h"

namespace qe_edge {

// What goes wrong, as a status of the C interface and two sentences: what is wrong, and what to do.
class Error : public std::runtime_error {
 public:
  Error(qe_status status, const std::string& problem, const std::string& remedy)
      : std::runtime_error(problem + " " + remedy), status(status) {}

  const qe_status status;
};

inline Error InputError(const std::string& problem, const std::string& remedy) {
  return Error(QE_ERROR_INPUT, problem, remedy);
}

inline Error ArtifactError(const std::string& problem, const std::string& remedy) {
  return Error(QE_ERROR_ARTIFACT, problem, remedy);
}

}  // namespace qe_edge
