#include "model/conversation.h"

#include <algorithm>
#include <chrono>

namespace qe_edge {
namespace {

constexpr int64_t kStep = 256;    // caches have multiples of it, so that they are of few sizes
constexpr int64_t kAtFirst = 8192;  // tokens of a cache for an answer of any length

// Adds the seconds of its life to a number.
class Stopwatch {
 public:
  explicit Stopwatch(double& seconds) : seconds_(seconds), start_(std::chrono::steady_clock::now()) {}
  ~Stopwatch() { seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count(); }
  Stopwatch(const Stopwatch&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;

 private:
  double& seconds_;
  std::chrono::steady_clock::time_point start_;
};

void CheckFits(int64_t prompt, std::optional<int64_t> fresh, int64_t context) {
  const int64_t wanted = fresh.value_or(1);
  if (prompt + wanted <= context) return;
  const int64_t room = context - prompt;
  throw InputError("The prompt has " + std::to_string(prompt) + " tokens and the answer up to " + std::to_string(wanted) +
                       "; together at most " + std::to_string(context) + " fit.",
                   (room > 0 ? "Ask for at most " + std::to_string(room) + " tokens, or shorten" : std::string("Shorten")) +
                       " the prompt, or use a smaller picture.");
}

}  // namespace

PicturePointer Conversation::Encoded(const Picture& picture, size_t count) {
  PicturePointer& known = known_[core_->PictureKey(picture, count)];
  if (known == nullptr) known = std::make_shared<const PictureTokens>(core_->Encode(picture, count));
  return known;
}

std::vector<float> Conversation::Read(const Prompt& prompt, int64_t answer) {
  const int64_t wanted = static_cast<int64_t>(prompt.size()) + answer;
  if (!language_ || language_->capacity() < wanted) {
    const int64_t grown = answer == 0 && language_ ? 2 * language_->capacity() : wanted;  // seldom read again
    language_.emplace(core_, core_->Capacity((std::max(grown, wanted) + kStep - 1) / kStep * kStep));
  }
  return language_->Read(prompt);
}

Answer::Answer(std::shared_ptr<Conversation> conversation, std::vector<Message> messages, std::optional<std::string> text,
               AnswerOptions options)
    : conversation_(std::move(conversation)),
      core_(*conversation_->core_),
      messages_(std::move(messages)),
      text_(std::move(text)),
      options_(std::move(options)),
      random_(options_.seed),
      stream_(core_.tokenizer),
      stops_(options_.stop) {
  if (conversation_->busy_.exchange(true)) {
    throw InputError("The conversation is being answered already.",
                     "Free the answer before, or use a conversation for each thread.");
  }
}

Answer::~Answer() { conversation_->busy_ = false; }

// Encodes the messages' pictures; and those of earlier turns again where they become something else beside others.
void Answer::See() {
  const Stopwatch watch(timings_.pictures);
  pictures_ = conversation_->pictures_;
  seen_ = conversation_->seen_;
  size_t count = pictures_.size();
  for (const Message& message : messages_) count += message.pictures.size();
  if (core_.counts_pictures()) pictures_.clear();
  for (Message& message : messages_) {
    turns_.push_back(message.turn);
    for (const Picture& picture : message.pictures) {
      if (core_.counts_pictures()) seen_.push_back(picture);
      else pictures_.push_back(conversation_->Encoded(picture, count));
    }
    message.pictures.clear();  // else the features are kept, not the pixels
  }
  for (const Picture& picture : seen_) pictures_.push_back(conversation_->Encoded(picture, count));
}

void Answer::Start() {
  turns_ = conversation_->turns_;
  See();
  const std::vector<TokenId> ids = text_ ? core_.tokenizer->Encode(*text_, true, true)
                                         : ChatIds(*core_.tokenizer, core_.chat.Pieces(turns_));
  prompt_ = MakePrompt(core_, ids, pictures_);
  for (const PromptToken& token : prompt_) ids_.push_back(token.id);
  const auto size = static_cast<int64_t>(prompt_.size());
  CheckFits(size, options_.max_new_tokens, core_.max_context);
  const int64_t room = core_.max_context - size;
  most_ = options_.max_new_tokens.value_or(room);
  const Stopwatch watch(timings_.prefill);
  logits_ = conversation_->Read(prompt_, options_.max_new_tokens ? most_ : std::min(room, std::max(kStep, kAtFirst - size)));
  timings_.prompt_tokens = size;
  timings_.cached_tokens = static_cast<int64_t>(conversation_->language_->reused());
}

bool Answer::Next(std::string& text, std::vector<int64_t>& tokens) {
  text.clear();
  tokens.clear();
  if (finish_ != Finish::kNone) return false;
  try {
    return Advance(text, tokens);
  } catch (...) {
    finish_ = Finish::kCancelled;  // an error ends the answer
    throw;
  }
}

bool Answer::Advance(std::string& text, std::vector<int64_t>& tokens) {
  if (!started_) {
    if (cancelled_) {
      End(Finish::kCancelled, text);
      return true;
    }
    Start();
    started_ = true;
  }
  while (finish_ == Finish::kNone && text.empty()) {
    if (cancelled_) {
      End(Finish::kCancelled, text);
    } else if (!Step(text, tokens)) {
      break;
    }
  }
  return true;
}

// Takes a token. False if that ended the answer.
bool Answer::Step(std::string& text, std::vector<int64_t>& tokens) {
  if (!fed_) {
    const Stopwatch watch(timings_.decode);
    logits_ = conversation_->Read(prompt_, 0);
    fed_ = true;
  }
  AdjustLogits(options_.rules, ids_, timings_.answer_tokens, logits_);
  const int64_t token = ChooseToken(logits_, options_.sampling, random_);
  const auto& ends = options_.rules.eos_token_ids;
  if (std::find(ends.begin(), ends.end(), token) != ends.end()) {
    End(Finish::kStop, text);
    return false;
  }
  tokens.push_back(token);
  ids_.push_back(token);
  prompt_.push_back(NextToken(prompt_, token));
  ++timings_.answer_tokens;
  fed_ = false;
  text += stops_.Add(stream_.Add(static_cast<TokenId>(token)));
  answer_ += text;
  if (stops_.found() || timings_.answer_tokens == most_) {
    answer_.resize(answer_.size() - text.size());
    End(stops_.found() ? Finish::kStop : Finish::kLength, text);
    return false;
  }
  return true;
}

void Answer::End(Finish finish, std::string& text) {
  text += stops_.Add(stream_.Finish()) + stops_.Finish();
  answer_ += text;
  if (started_ && !text_ && (finish != Finish::kCancelled || !answer_.empty())) {
    turns_.push_back({"assistant", answer_, {}});
    conversation_->turns_ = std::move(turns_);
    conversation_->pictures_ = std::move(pictures_);
    conversation_->seen_ = std::move(seen_);
  }
  finish_ = finish;
}

}  // namespace qe_edge
