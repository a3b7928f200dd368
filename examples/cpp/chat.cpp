// Talks about a picture, one question a line: chat FOLDER ONNXRUNTIME [PICTURE]
// The first question has the picture. Ctrl-C ends an answer; at the prompt it ends the program.

#include <atomic>
#include <csignal>
#include <iostream>
#include <optional>
#include <qe_edge/qe_edge.hpp>

#include "picture.h"

namespace {

volatile std::sig_atomic_t stop_answer = 0, answering = 0;

void Interrupted(int) {
  stop_answer = 1;
  if (!answering) std::_Exit(130);
}

}  // namespace

int main(int count, char** arguments) try {
  if (count < 3) throw std::runtime_error("Usage: chat FOLDER ONNXRUNTIME [PICTURE]");
  std::signal(SIGINT, Interrupted);
  const auto model = qe::Model::load(arguments[1], {arguments[2]});
  std::optional<Picture> picture;
  if (count > 3) picture.emplace(arguments[3]);
  qe::Conversation conversation(model);
  for (std::string line; std::cout << "> " << std::flush && std::getline(std::cin, line);) {
    if (line.empty()) continue;
    stop_answer = 0;
    answering = 1;
    auto answer = conversation.ask({picture ? qe::user(picture->image(), line) : qe::user(line)});
    picture.reset();  // the conversation remembers it
    for (const auto& piece : answer) {
      std::cout << piece.text << std::flush;
      if (stop_answer) answer.cancel();
    }
    answering = 0;
    std::cout << "\n";
  }
} catch (const std::exception& error) {
  std::cerr << error.what() << "\n";
  return 1;
}
