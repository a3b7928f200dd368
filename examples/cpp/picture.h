// A picture from a PNG or JPEG file, with stb_image (Debian's libstb-dev). A camera has its pixels in memory already.
#pragma once

#define STB_IMAGE_IMPLEMENTATION
#define STB_IMAGE_STATIC
#define STBI_ONLY_JPEG
#define STBI_ONLY_PNG
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"
#include <stb/stb_image.h>
#pragma GCC diagnostic pop

#include <memory>
#include <qe_edge/qe_edge.hpp>
#include <string>

class Picture {
 public:
  explicit Picture(const std::string& path)
      : pixels_(stbi_load(path.c_str(), &width_, &height_, nullptr, 4), stbi_image_free) {
    if (!pixels_) throw std::runtime_error("'" + path + "' is no PNG or JPEG. Give a picture.");
  }

  qe::Image image() const { return {pixels_.get(), width_, height_, 0, QE_PIXEL_RGBA}; }

 private:
  int width_ = 0, height_ = 0;
  std::unique_ptr<unsigned char, void (*)(void*)> pixels_;
};
