// The C interface: handles, checks of what a caller gives, and exceptions as status codes.

#include <cmath>
#include <cstring>
#include <new>
#include <random>
#include <sstream>

#include "base/text.h"
#include "model/conversation.h"
#include "qe_edge/qe_edge.h"

struct qe_error {
  std::string text;
};

struct qe_model {
  std::shared_ptr<const qe_edge::Core> core;
};

struct qe_conversation {
  std::shared_ptr<qe_edge::Conversation> held;
  std::shared_ptr<const qe_edge::Core> core;
};

struct qe_answer {
  std::unique_ptr<qe_edge::Answer> held;
  std::string text;
  std::vector<int64_t> tokens;
};

namespace {

using namespace qe_edge;

constexpr double kMaxTemperature = 100;
constexpr int64_t kMaxCount = int64_t{1} << 31;

qe_status Fail(qe_status status, const char* text, qe_error** error) {
  if (error != nullptr) {
    *error = new (std::nothrow) qe_error;
    try {
      if (*error != nullptr) (*error)->text = text;
    } catch (const std::bad_alloc&) {  // the status alone says it
    }
  }
  return status;
}

// Runs what may throw; nothing leaves the library but a status.
template <typename Action>
qe_status Guarded(qe_error** error, const Action& action) noexcept {
  if (error != nullptr) *error = nullptr;
  try {
    return action();
  } catch (const Error& problem) {
    return Fail(problem.status, problem.what(), error);
  } catch (const std::bad_alloc&) {
    return Fail(QE_ERROR_RESOURCE, "There is too little memory. Choose a smaller max_context, or smaller pictures.", error);
  } catch (const std::exception& problem) {
    return Fail(QE_ERROR_INTERNAL, problem.what(), error);
  }
}

template <typename Type>
Type& Given(Type* pointer, const char* name) {
  if (pointer == nullptr) throw InputError(std::string("'") + name + "' is null.", "Give a pointer.");
  return *pointer;
}

std::string GivenText(const char* text, const char* what) {
  const std::string found = &Given(text, what);
  if (const size_t invalid = FirstInvalid(found); invalid != std::string::npos)
    throw InputError(std::string("'") + what + "' is not UTF-8: byte " + std::to_string(invalid) + " is wrong.", "Write it as UTF-8.");
  return found;
}

void CheckNumber(const char* name, double value, double least, double most) {
  if (!(value >= least && value <= most)) {
    std::ostringstream remedy;
    remedy << "Give a number from " << least << " to " << most << ".";
    throw InputError(std::string(name) + " is " + std::to_string(value) + ".", remedy.str());
  }
}

// A field of options: what a caller gives, or the model's own value where it is negative. NaN is refused later.
template <typename Number>
bool Choose(Number given, Number& value) {
  if (given < 0) return false;
  value = given;
  return true;
}

AnswerOptions ReadOptions(const Manifest& manifest, const qe_answer_options* given) {
  qe_answer_options values;
  qe_answer_options_init(&values);
  if (given != nullptr) {
    if (given->size != sizeof(values))
      throw InputError("The answer's options are of another version.", "Initialise them with qe_answer_options_init.");
    values = *given;
  }
  AnswerOptions options;
  options.rules = manifest.generation;
  Sampling sampling{options.rules.temperature, options.rules.top_k, options.rules.top_p, options.rules.min_p};
  const bool any = int{Choose(values.temperature, sampling.temperature)} + int{Choose(values.top_k, sampling.top_k)} +
                       int{Choose(values.top_p, sampling.top_p)} + int{Choose(values.min_p, sampling.min_p)} > 0;
  if (any || options.rules.do_sample || std::isnan(values.temperature)) options.sampling = sampling;
  Choose(values.repetition_penalty, options.rules.repetition_penalty);
  CheckNumber("temperature", std::isnan(values.temperature) ? NAN : sampling.temperature, 0, kMaxTemperature);
  CheckNumber("top_p", std::isnan(values.top_p) ? NAN : sampling.top_p, 0, 1);
  CheckNumber("min_p", std::isnan(values.min_p) ? NAN : sampling.min_p, 0, 1);
  CheckNumber("repetition_penalty", std::isnan(values.repetition_penalty) ? NAN : options.rules.repetition_penalty,
              kMinPenalty, kMaxPenalty);
  if (values.max_new_tokens == 0 || values.max_new_tokens > kMaxCount)
    throw InputError("An answer cannot have " + std::to_string(values.max_new_tokens) + " tokens.", "Ask for at least 1.");
  if (values.max_new_tokens > 0) options.max_new_tokens = values.max_new_tokens;
  std::random_device source;
  options.seed = values.has_seed ? values.seed : uint64_t{source()} << 32 | source();
  for (size_t index = 0; index < values.stop_count; ++index)
    options.stop.push_back(GivenText((&Given(values.stop, "stop"))[index], "stop"));
  return options;
}

Message ReadMessage(const Manifest& manifest, const qe_message& given) {
  Message message;
  message.turn.role = GivenText(given.role, "role");
  for (size_t index = 0; index < given.part_count; ++index) {
    const qe_part& part = (&Given(given.parts, "parts"))[index];
    if (part.image == nullptr) {
      message.turn.text += GivenText(part.text, "text");
      continue;
    }
    if (!manifest.picture) throw InputError("This model reads no pictures in C++.", "Leave the pictures out, or use Python.");
    message.turn.marks.push_back(message.turn.text.size());
    message.pictures.push_back(CopyPicture(*part.image, *manifest.picture));
  }
  return message;
}

std::vector<Message> ReadMessages(const Manifest& manifest, const qe_message* messages, size_t count) {
  std::vector<Message> found;
  for (size_t index = 0; index < count; ++index)
    found.push_back(ReadMessage(manifest, (&Given(messages, "messages"))[index]));
  if (found.empty()) throw InputError("There is nothing to answer.", "Give at least one message.");
  return found;
}

void Begin(std::shared_ptr<Conversation> conversation, std::vector<Message> messages, std::optional<std::string> text,
           AnswerOptions options, qe_answer** answer) {
  auto made = std::make_unique<qe_answer>();
  made->held = std::make_unique<Answer>(std::move(conversation), std::move(messages), std::move(text), std::move(options));
  *answer = made.release();
}

qe_finish FinishOf(Finish finish) { return static_cast<qe_finish>(static_cast<int>(finish)); }

}  // namespace

extern "C" {

const char* qe_version(void) { return QE_EDGE_VERSION; }

int qe_abi_version(void) { return QE_ABI_VERSION; }

const char* qe_error_problem(const qe_error* error) { return error == nullptr ? "" : error->text.c_str(); }

void qe_error_free(qe_error* error) { delete error; }

void qe_model_options_init(qe_model_options* options) {
  if (options == nullptr) return;
  *options = {};
  options->size = sizeof(*options);
}

qe_status qe_model_load(const char* folder, const qe_model_options* options, qe_model** model, qe_error** error) {
  return qe_model_load_gpu(folder, options, nullptr, model, error);
}

void qe_gpu_options_init(qe_gpu_options* options) {
  if (options == nullptr) return;
  *options = {};
  options->size = sizeof(*options);
}

qe_status qe_model_load_gpu(const char* folder, const qe_model_options* options, const qe_gpu_options* gpu,
                            qe_model** model, qe_error** error) {
  return Guarded(error, [&] {
    Given(model, "model") = nullptr;
    LoadOptions chosen;
    if (options != nullptr) {
      if (options->size != sizeof(*options))
        throw InputError("The model's options are of another version.", "Initialise them with qe_model_options_init.");
      if (options->onnxruntime != nullptr) chosen.onnxruntime = options->onnxruntime;
      chosen.threads = options->threads;
      chosen.max_context = options->max_context;
    }
    if (gpu != nullptr) {
      if (gpu->size != sizeof(*gpu))
        throw InputError("The options for a GPU are of another version.", "Initialise them with qe_gpu_options_init.");
      if (gpu->tensorrt != nullptr) chosen.gpu.tensorrt = gpu->tensorrt;
      if (gpu->plugin != nullptr) chosen.gpu.plugin = gpu->plugin;
      chosen.gpu.stream = gpu->stream;
    }
    *model = new qe_model{std::make_shared<const Core>(std::filesystem::path(&Given(folder, "folder")), chosen)};
    return QE_OK;
  });
}

void qe_model_free(qe_model* model) { delete model; }

void qe_answer_options_init(qe_answer_options* options) {
  if (options == nullptr) return;
  *options = {};
  options->size = sizeof(*options);
  options->max_new_tokens = options->top_k = -1;
  options->temperature = options->top_p = options->min_p = options->repetition_penalty = -1;
}

qe_status qe_generate(const qe_model* model, const qe_message* messages, size_t count, const qe_answer_options* options,
                      qe_answer** answer, qe_error** error) {
  return Guarded(error, [&] {
    Given(answer, "answer") = nullptr;
    const auto& core = Given(model, "model").core;
    Begin(std::make_shared<Conversation>(core), ReadMessages(core->manifest, messages, count), {},
          ReadOptions(core->manifest, options), answer);
    return QE_OK;
  });
}

qe_status qe_complete(const qe_model* model, const char* text, const qe_answer_options* options, qe_answer** answer,
                      qe_error** error) {
  return Guarded(error, [&] {
    Given(answer, "answer") = nullptr;
    const auto& core = Given(model, "model").core;
    Begin(std::make_shared<Conversation>(core), {}, GivenText(text, "text"), ReadOptions(core->manifest, options), answer);
    return QE_OK;
  });
}

qe_status qe_answer_next(qe_answer* answer, qe_piece* piece, qe_error** error) {
  return Guarded(error, [&] {
    Given(piece, "piece") = {};
    qe_answer& held = Given(answer, "answer");
    if (!held.held->Next(held.text, held.tokens)) return QE_END;
    *piece = {held.text.c_str(), held.tokens.data(), held.tokens.size(), FinishOf(held.held->finish())};
    return QE_OK;
  });
}

qe_status qe_answer_run(qe_answer* answer, qe_piece_callback callback, void* user, qe_error** error) {
  if (callback == nullptr) return Fail(QE_ERROR_INPUT, "'callback' is null. Give a function.", error);
  for (bool wanted = true;;) {
    qe_piece piece;
    const qe_status status = qe_answer_next(answer, &piece, error);
    if (status != QE_OK) return status == QE_END ? QE_OK : status;
    if (!wanted || callback(&piece, user) == 0) continue;
    wanted = false;  // `user` may be gone
    qe_answer_cancel(answer);
  }
}

void qe_answer_cancel(qe_answer* answer) {
  if (answer != nullptr) answer->held->Cancel();
}

void qe_answer_timings(const qe_answer* answer, qe_timings* timings) {
  if (answer == nullptr || timings == nullptr) return;
  const Timings& found = answer->held->timings();
  *timings = {found.pictures, found.prefill, found.decode, found.prompt_tokens, found.cached_tokens, found.answer_tokens};
}

void qe_answer_free(qe_answer* answer) { delete answer; }

qe_status qe_conversation_new(const qe_model* model, qe_conversation** conversation, qe_error** error) {
  return Guarded(error, [&] {
    Given(conversation, "conversation") = nullptr;
    const auto& core = Given(model, "model").core;
    *conversation = new qe_conversation{std::make_shared<Conversation>(core), core};
    return QE_OK;
  });
}

qe_status qe_conversation_ask(qe_conversation* conversation, const qe_message* messages, size_t count,
                              const qe_answer_options* options, qe_answer** answer, qe_error** error) {
  return Guarded(error, [&] {
    Given(answer, "answer") = nullptr;
    const qe_conversation& held = Given(conversation, "conversation");
    const Manifest& manifest = held.core->manifest;
    Begin(held.held, ReadMessages(manifest, messages, count), {}, ReadOptions(manifest, options), answer);
    return QE_OK;
  });
}

void qe_conversation_free(qe_conversation* conversation) { delete conversation; }

}  // extern "C"
