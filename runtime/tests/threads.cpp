// Two threads on one model, and a third that cancels: for ThreadSanitizer, and to see that answers stay the same.
//
//   threads FOLDER ONNXRUNTIME

#include <cstdlib>
#include <iostream>
#include <qe_edge/qe_edge.hpp>
#include <thread>

namespace {

std::vector<std::uint8_t> Pixels(int seed) {
  std::vector<std::uint8_t> pixels(64 * 64 * 3);
  for (std::size_t index = 0; index < pixels.size(); ++index)
    pixels[index] = static_cast<std::uint8_t>(index * 7 + static_cast<std::size_t>(seed) * 31);
  return pixels;
}

std::string Ask(const qe::Model& model, int seed) {
  const auto pixels = Pixels(seed);
  qe::Options options;
  options.max_new_tokens = 6;
  options.temperature = 1.0;
  options.seed = static_cast<std::uint64_t>(seed);
  return model.generate({qe::user(qe::Image{pixels.data(), 64, 64}, "what shape is in the image?")}, options).text();
}

int Run(const char* folder, const char* onnxruntime) {
  const qe::Model model = qe::Model::load(folder, {onnxruntime, 1, 0});
  std::string alone[2], together[2];
  for (int seed = 0; seed < 2; ++seed) alone[seed] = Ask(model, seed);
  std::thread other([&] { together[1] = Ask(model, 1); });
  together[0] = Ask(model, 0);
  other.join();
  if (alone[0] != together[0] || alone[1] != together[1]) {
    std::cerr << "Answers of two threads differ from answers one after the other.\n";
    return 1;
  }
  qe::Options endless;
  endless.temperature = 2.0;
  endless.seed = 1;
  qe::Answer answer = model.generate({qe::user("what is this?")}, endless);
  qe::Piece piece;
  answer.next(piece);
  std::thread canceller([&] { answer.cancel(); });
  canceller.join();
  while (answer.next(piece)) {
  }
  if (piece.finish != QE_FINISH_CANCELLED) {
    std::cerr << "A cancelled answer went on.\n";
    return 1;
  }
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) return 2;
  std::_Exit(Run(arguments[1], arguments[2]));  // ThreadSanitizer reads ONNX Runtime's handlers at exit wrongly
}
