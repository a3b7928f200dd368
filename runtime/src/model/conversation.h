#pragma once

#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "model/language.h"
#include "model/sampling.h"
#include "model/stop_strings.h"

namespace qe_edge {

// One message: text, and pictures at byte offsets of it.
struct Message {
  Turn turn;
  std::vector<Picture> pictures;
};

struct AnswerOptions {
  std::optional<int64_t> max_new_tokens;  // as many as fit
  Sampling sampling;
  GenerationSettings rules;
  uint64_t seed = 0;
  std::vector<std::string> stop;
};

struct Timings {
  double pictures = 0, prefill = 0, decode = 0;  // seconds
  int64_t prompt_tokens = 0, cached_tokens = 0, answer_tokens = 0;
};

enum class Finish { kNone, kStop, kLength, kCancelled };

// Turns over one KV cache: only what is new is read, and a picture that comes again is not encoded again.
class Conversation {
 public:
  explicit Conversation(std::shared_ptr<const Core> core) : core_(std::move(core)) {}

 private:
  friend class Answer;

  PicturePointer Encoded(const Picture& picture, size_t count);
  std::vector<float> Read(const Prompt& prompt, int64_t answer);

  std::shared_ptr<const Core> core_;
  std::vector<Turn> turns_;
  std::vector<PicturePointer> pictures_;  // of the turns, in order
  std::vector<Picture> seen_;             // the same with their pixels, where further pictures change what they become
  std::unordered_map<std::string, PicturePointer> known_;
  std::optional<Language> language_;
  std::atomic<bool> busy_{false};
};

// An answer while it is written. `Next` is called by one thread at a time, `Cancel` by any.
class Answer {
 public:
  // Messages that follow those of the conversation; or, with `text`, text that goes through no chat template.
  // Throws InputError if the conversation is being answered already, or an option makes no sense.
  Answer(std::shared_ptr<Conversation> conversation, std::vector<Message> messages, std::optional<std::string> text,
         AnswerOptions options);
  ~Answer();
  Answer(const Answer&) = delete;
  Answer& operator=(const Answer&) = delete;

  // The next piece: new text, which may be empty, and the tokens since the last one. False after the last piece.
  bool Next(std::string& text, std::vector<int64_t>& tokens);
  void Cancel() { cancelled_ = true; }

  Finish finish() const { return finish_; }
  const Timings& timings() const { return timings_; }

 private:
  bool Advance(std::string& text, std::vector<int64_t>& tokens);
  void Start();
  void See();
  bool Step(std::string& text, std::vector<int64_t>& tokens);
  void End(Finish finish, std::string& text);

  std::shared_ptr<Conversation> conversation_;
  const Core& core_;
  std::vector<Message> messages_;
  std::optional<std::string> text_;
  AnswerOptions options_;
  Random random_;
  TextStream stream_;
  StopStrings stops_;
  std::vector<Turn> turns_;  // with the question; they become the conversation's once the answer has ended
  std::vector<PicturePointer> pictures_;
  std::vector<Picture> seen_;
  Prompt prompt_;
  std::vector<int64_t> ids_;  // of prompt and answer
  std::vector<float> logits_;
  std::string answer_;
  int64_t most_ = 0;
  std::atomic<bool> cancelled_{false};
  bool started_ = false, fed_ = true;
  Finish finish_ = Finish::kNone;
  Timings timings_;
};

}  // namespace qe_edge
