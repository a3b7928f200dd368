// Plays a folder of frames as a camera would, and prints the answer to the latest one:
//   camera FOLDER ONNXRUNTIME FRAMES QUESTION [MILLISECONDS BETWEEN FRAMES]
// With 0 milliseconds the next frame comes when the last one was answered.

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <iostream>

#include "picture.h"
#include "watcher.h"

namespace {

Frame Read(const std::filesystem::path& path) {
  const Picture picture(path.string());
  const qe::Image image = picture.image();
  Frame frame{path.filename().string(), image.width, image.height, {}};
  for (long pixel = 0; pixel < static_cast<long>(image.width) * image.height; ++pixel)
    frame.rgb.insert(frame.rgb.end(), image.data + 4 * pixel, image.data + 4 * pixel + 3);
  return frame;
}

}  // namespace

int main(int count, char** arguments) try {
  if (count < 5) throw std::runtime_error("Usage: camera FOLDER ONNXRUNTIME FRAMES QUESTION [MILLISECONDS]");
  const auto pause = std::chrono::milliseconds(count > 5 ? std::stoi(arguments[5]) : 0);
  std::vector<std::filesystem::path> paths;
  for (const auto& entry : std::filesystem::directory_iterator(arguments[3])) paths.push_back(entry.path());
  std::sort(paths.begin(), paths.end());
  const auto model = qe::Model::load(arguments[1], {arguments[2]});
  qe::Options options;
  options.max_new_tokens = 16;
  std::string text;
  Watcher watcher(
      model, arguments[4], options,
      [&](const Frame& frame, const qe::Piece& piece) {
        text += piece.text;
        if (piece.finish == QE_FINISH_NONE) return;
        std::cout << frame.name << ": " << text << std::endl;
        text.clear();
      },
      [&](const Frame& frame, const qe::Error& error) {
        std::cerr << frame.name << ": " << error.what() << std::endl;
        text.clear();
      });
  for (const auto& path : paths) {
    watcher.Push(Read(path));
    if (pause.count() == 0) watcher.Wait();
    else std::this_thread::sleep_for(pause);
  }
  watcher.Wait();
  std::cout << watcher.dropped() << " of " << paths.size() << " frames were dropped.\n";
} catch (const std::exception& error) {
  std::cerr << error.what() << "\n";
  return 1;
}
