#include "model/picture.h"

#include <algorithm>

#include "base/error.h"
#include "base/sha256.h"

namespace qe_edge {
namespace {

int Channels(int format) {
  switch (format) {
    case QE_PIXEL_RGB:
    case QE_PIXEL_BGR: return 3;
    case QE_PIXEL_RGBA:
    case QE_PIXEL_BGRA: return 4;
    case QE_PIXEL_GRAY: return 1;
  }
  throw InputError("A picture has the pixel format " + std::to_string(format) + ", which does not exist.",
                   "Give one of qe_pixel_format.");
}

// A value over white, rounded as Pillow's alpha_composite does.
uint8_t OnWhite(uint32_t value, uint32_t opacity) {
  if (opacity == 0) return 255;
  const uint32_t front = opacity * 128, back = 255 * 128 - front;
  const uint32_t sum = value * front + 255 * back + (0x80 << 7);
  return static_cast<uint8_t>((((sum >> 8) + sum) >> 8) >> 7);
}

void CopyRow(const uint8_t* in, int64_t width, int format, uint8_t* out) {
  const int channels = Channels(format);
  const bool swapped = format == QE_PIXEL_BGR || format == QE_PIXEL_BGRA;
  for (int64_t column = 0; column < width; ++column, in += channels, out += 3) {
    if (channels == 1) {
      out[0] = out[1] = out[2] = in[0];
      continue;
    }
    for (int colour = 0; colour < 3; ++colour) {
      const uint8_t value = in[swapped ? 2 - colour : colour];
      out[colour] = channels == 4 ? OnWhite(value, in[3]) : value;
    }
  }
}

}  // namespace

Picture CopyPicture(const qe_image& image, const PictureFile& limits) {
  const int64_t width = image.width, height = image.height, channels = Channels(image.format);
  const std::string size = std::to_string(width) + " x " + std::to_string(height);
  if (image.data == nullptr || width < 1 || height < 1)
    throw InputError("A picture of " + size + " pixels holds nothing.", "Give a picture of at least 1 x 1.");
  if (width > limits.max_side || height > limits.max_side || width * height > limits.max_pixels)
    throw InputError("A picture has " + size + " pixels; at most " + std::to_string(limits.max_pixels) + " are read.",
                     "Make it smaller.");
  const int64_t longest = std::max(width, height), shortest = std::min(width, height);
  if (limits.max_aspect && longest > *limits.max_aspect * shortest)
    throw InputError("A picture of " + size + " is too narrow for the model.", "Crop it.");
  const int64_t stride = image.stride == 0 ? width * channels : image.stride;
  if (stride < width * channels)
    throw InputError("A picture's rows are " + std::to_string(stride) + " bytes apart and have " +
                         std::to_string(width * channels) + ".", "Give the stride in bytes, or 0.");
  Picture picture{Zeros("uint8", {height, width, 3}), ""};
  for (int64_t row = 0; row < height; ++row)
    CopyRow(image.data + row * stride, width, image.format, picture.rgb.As<uint8_t>() + row * width * 3);
  Sha256 hash;
  hash.Add(size.data(), size.size());
  hash.Add(picture.rgb.memory.get(), static_cast<size_t>(width * height * 3));
  picture.key = hash.Hex();
  return picture;
}

}  // namespace qe_edge
