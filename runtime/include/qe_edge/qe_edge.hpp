// The C++ face of libqe_edge, over its C interface. Errors are thrown as qe::Error.
//
//   auto model = qe::Model::load("onnx");
//   for (const auto& piece : model.generate({qe::user(image, "What is this?")})) std::cout << piece.text;
#pragma once

#include <cstdint>
#include <iterator>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "qe_edge/qe_edge.h"

namespace qe {

// What went wrong: two sentences, and a status to decide by.
class Error : public std::runtime_error {
 public:
  Error(qe_status status, const std::string& text) : std::runtime_error(text), status(status) {}
  const qe_status status;
};

// A picture in memory; see qe_image. It has to live until the message was given to `generate` or `ask`.
struct Image {
  const std::uint8_t* data;
  int width, height;
  std::int64_t stride = 0;
  int format = QE_PIXEL_RGB;
};

// A text, or a picture.
struct Part {
  Part(std::string text) : text(std::move(text)) {}  // NOLINT: a text is a part
  Part(const char* text) : text(text) {}             // NOLINT
  Part(const Image& image) : image(image) {}         // NOLINT

  std::string text;
  std::optional<Image> image;
};

struct Message {
  std::string role;
  std::vector<Part> parts;
};

inline Message system(std::string text) { return {"system", {std::move(text)}}; }
inline Message user(std::string text) { return {"user", {std::move(text)}}; }
inline Message user(const Image& image, std::string text) { return {"user", {image, std::move(text)}}; }
inline Message user(std::vector<Part> parts) { return {"user", std::move(parts)}; }
inline Message assistant(std::string text) { return {"assistant", {std::move(text)}}; }

// How an answer is made. What is not given comes from the model's generation_config.json.
struct Options {
  std::optional<std::int64_t> max_new_tokens;
  std::optional<double> temperature, top_p, min_p, repetition_penalty;
  std::optional<std::int64_t> top_k;
  std::optional<std::uint64_t> seed;
  std::vector<std::string> stop;
};

struct ModelOptions {
  std::string onnxruntime;  // path of libonnxruntime.so; empty for where the system finds it
  int threads = 0;
  std::int64_t max_context = 0;
  std::string tensorrt;    // path of libnvinfer.so.10, for engines of a GPU; empty likewise
  std::string plugin;      // path of libqe_plugin.so, for engines that need it; empty likewise
  void* stream = nullptr;  // the caller's CUDA stream; null for one of the model's own. See qe_gpu_options
};

struct Piece {
  std::string text;
  std::vector<std::int64_t> token_ids;
  qe_finish finish = QE_FINISH_NONE;
};

namespace detail {

template <typename Call>
qe_status checked(const Call& call) {
  qe_error* error = nullptr;
  const qe_status status = call(&error);
  if (status == QE_OK || status == QE_END) return status;
  const std::unique_ptr<qe_error, void (*)(qe_error*)> held(error, qe_error_free);
  throw Error(status, qe_error_problem(error));
}

// A text as the C interface reads it, which would cut it at a zero byte.
inline const char* whole(const std::string& text) {
  if (text.find('\0') != std::string::npos) throw Error(QE_ERROR_INPUT, "A text holds a zero byte. Leave it out.");
  return text.c_str();
}

// Messages and options as the C interface reads them; it points into what it was made of.
class Request {
 public:
  Request(const std::vector<Message>& messages, const Options& options) {
    for (const Message& message : messages) add(message);
    for (std::size_t index = 0; index < messages.size(); ++index)
      messages_.push_back({messages[index].role.c_str(), parts_[index].data(), parts_[index].size()});
    qe_answer_options_init(&options_);
    options_.max_new_tokens = options.max_new_tokens.value_or(-1);
    options_.temperature = options.temperature.value_or(-1);
    options_.top_k = options.top_k.value_or(-1);
    options_.top_p = options.top_p.value_or(-1);
    options_.min_p = options.min_p.value_or(-1);
    options_.repetition_penalty = options.repetition_penalty.value_or(-1);
    options_.seed = options.seed.value_or(0);
    options_.has_seed = options.seed.has_value();
    for (const std::string& stop : options.stop) stop_.push_back(whole(stop));
    options_.stop = stop_.data();
    options_.stop_count = stop_.size();
  }
  Request(const Request&) = delete;
  Request& operator=(const Request&) = delete;

  const qe_message* messages() const { return messages_.data(); }
  std::size_t count() const { return messages_.size(); }
  const qe_answer_options* options() const { return &options_; }

 private:
  void add(const Message& message) {
    std::vector<qe_part> parts;
    for (const Part& part : message.parts) {
      if (!part.image) {
        parts.push_back({whole(part.text), nullptr});
        continue;
      }
      const Image& image = *part.image;
      images_.push_back(std::make_unique<qe_image>(
          qe_image{image.data, image.width, image.height, image.stride, image.format}));
      parts.push_back({nullptr, images_.back().get()});
    }
    parts_.push_back(std::move(parts));
  }

  std::vector<std::unique_ptr<qe_image>> images_;
  std::vector<std::vector<qe_part>> parts_;
  std::vector<qe_message> messages_;
  std::vector<const char*> stop_;
  qe_answer_options options_{};
};

}  // namespace detail

// An answer that is being written: iterate over its pieces, or ask for them.
class Answer {
 public:
  explicit Answer(qe_answer* answer) : answer_(answer, qe_answer_free) {}

  // The next piece; false after the last one.
  bool next(Piece& piece) {
    qe_piece found{};
    const auto call = [&](qe_error** error) { return qe_answer_next(answer_.get(), &found, error); };
    if (detail::checked(call) == QE_END) return false;
    piece.text = found.text;
    piece.token_ids.assign(found.token_ids, found.token_ids + found.token_count);
    piece.finish = found.finish;
    return true;
  }

  // All that is left of the answer.
  std::string text() {
    std::string whole;
    for (const Piece& piece : *this) whole += piece.text;
    return whole;
  }

  // Ends the answer; from any thread.
  void cancel() { qe_answer_cancel(answer_.get()); }

  qe_timings timings() const {
    qe_timings timings{};
    qe_answer_timings(answer_.get(), &timings);
    return timings;
  }

  class Iterator {
   public:
    using iterator_category = std::input_iterator_tag;
    using value_type = Piece;
    using difference_type = std::ptrdiff_t;
    using pointer = const Piece*;
    using reference = const Piece&;

    Iterator() = default;
    explicit Iterator(Answer* answer) : answer_(answer) { ++*this; }
    reference operator*() const { return piece_; }
    pointer operator->() const { return &piece_; }
    Iterator& operator++() {
      if (!answer_->next(piece_)) answer_ = nullptr;
      return *this;
    }
    bool operator==(const Iterator& other) const { return answer_ == other.answer_; }
    bool operator!=(const Iterator& other) const { return !(*this == other); }

   private:
    Answer* answer_ = nullptr;
    Piece piece_;
  };

  Iterator begin() { return Iterator(this); }
  Iterator end() { return Iterator(); }

 private:
  std::unique_ptr<qe_answer, void (*)(qe_answer*)> answer_;
};

// An opened folder. Threads may share it.
class Model {
 public:
  static Model load(const std::string& folder, const ModelOptions& options = {}) {
    qe_model_options given;
    qe_model_options_init(&given);
    given.onnxruntime = options.onnxruntime.empty() ? nullptr : options.onnxruntime.c_str();
    given.threads = options.threads;
    given.max_context = options.max_context;
    qe_gpu_options gpu;
    qe_gpu_options_init(&gpu);
    gpu.tensorrt = options.tensorrt.empty() ? nullptr : options.tensorrt.c_str();
    gpu.plugin = options.plugin.empty() ? nullptr : options.plugin.c_str();
    gpu.stream = options.stream;
    qe_model* model = nullptr;
    detail::checked([&](qe_error** error) { return qe_model_load_gpu(folder.c_str(), &given, &gpu, &model, error); });
    return Model(model);
  }

  Answer generate(const std::vector<Message>& messages, const Options& options = {}) const {
    const detail::Request request(messages, options);
    qe_answer* answer = nullptr;
    detail::checked([&](qe_error** error) {
      return qe_generate(model_.get(), request.messages(), request.count(), request.options(), &answer, error);
    });
    return Answer(answer);
  }

  // Continues a text that goes through no chat template.
  Answer complete(const std::string& text, const Options& options = {}) const {
    const detail::Request request({}, options);
    qe_answer* answer = nullptr;
    detail::checked([&](qe_error** error) {
      return qe_complete(model_.get(), detail::whole(text), request.options(), &answer, error);
    });
    return Answer(answer);
  }

  const qe_model* get() const { return model_.get(); }

 private:
  explicit Model(qe_model* model) : model_(model, qe_model_free) {}

  std::unique_ptr<qe_model, void (*)(qe_model*)> model_;
};

// Several turns on one KV cache. One answer at a time: destroy it before the next question.
class Conversation {
 public:
  explicit Conversation(const Model& model) : conversation_(nullptr, qe_conversation_free) {
    qe_conversation* made = nullptr;
    detail::checked([&](qe_error** error) { return qe_conversation_new(model.get(), &made, error); });
    conversation_.reset(made);
  }

  Answer ask(const std::vector<Message>& messages, const Options& options = {}) {
    const detail::Request request(messages, options);
    qe_answer* answer = nullptr;
    detail::checked([&](qe_error** error) {
      return qe_conversation_ask(conversation_.get(), request.messages(), request.count(), request.options(), &answer,
                                 error);
    });
    return Answer(answer);
  }

 private:
  std::unique_ptr<qe_conversation, void (*)(qe_conversation*)> conversation_;
};

}  // namespace qe
