#pragma once

#include <string>

#include "backend/backend.h"
#include "qe_edge/qe_edge.h"

namespace qe_edge {

// A picture as preprocess.onnx reads it: uint8 [height, width, 3], RGB.
struct Picture {
  Tensor rgb;
  std::string key;  // of its content
};

// Copies a caller's picture. Transparent pixels come onto white, as in Python.
// Throws InputError if it is larger or narrower than the model takes, or its rows overlap.
Picture CopyPicture(const qe_image& image, const PictureFile& limits);

}  // namespace qe_edge
