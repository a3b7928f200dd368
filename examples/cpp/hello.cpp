// Asks one question about a picture: hello FOLDER ONNXRUNTIME PICTURE QUESTION

#include <iostream>
#include <qe_edge/qe_edge.hpp>

#include "picture.h"

int main(int count, char** arguments) try {
  if (count != 5) throw std::runtime_error("Usage: hello FOLDER ONNXRUNTIME PICTURE QUESTION");
  const auto model = qe::Model::load(arguments[1], {arguments[2]});
  const Picture picture(arguments[3]);
  for (const auto& piece : model.generate({qe::user(picture.image(), arguments[4])})) std::cout << piece.text << std::flush;
  std::cout << "\n";
} catch (const std::exception& error) {
  std::cerr << error.what() << "\n";
  return 1;
}
