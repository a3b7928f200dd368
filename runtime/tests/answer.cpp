// Answers requests, one JSON a line, as tests/test_answers.py writes them; through the C++ face alone.
//
//   answer FOLDER ONNXRUNTIME [TENSORRT PLUGIN STREAM MAX_CONTEXT] < REQUESTS
//
// "-" is a path that is not given. STREAM is "given" for one that this program makes in CUDA's driver, or "wrong" for an address that is none.
// A request has "turns", each a list of messages {"role", "parts"} that goes to one conversation; a part is a text, or a
// picture {"file", "width", "height", "format", "stride"} of raw bytes. "options" are those of qe::Options. With "text"
// it continues that text. "pieces" frees every answer after so many. "stopped" is a question for `qe_answer_run`, whose
// callback wants one piece. Writes {"answers": [{"text", "ids", "finish", "cached", "prompt"}]}, {"answers": [calls]}
// or {"error", "status"}.

#include <dlfcn.h>

#include <fstream>
#include <iostream>
#include <iterator>
#include <list>
#include <nlohmann/json.hpp>
#include <qe_edge/qe_edge.hpp>

using Json = nlohmann::json;

namespace {

std::list<std::string> held;  // bytes of pictures

qe::Part ReadPart(const Json& part) {
  if (part.is_string()) return part.get<std::string>();
  std::ifstream file(part.at("file").get<std::string>(), std::ios::binary);
  held.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  return qe::Image{reinterpret_cast<const std::uint8_t*>(held.back().data()), part.at("width"), part.at("height"),
                   part.value("stride", std::int64_t{0}), part.value("format", 0)};
}

template <typename Value>
void Read(const Json& options, const char* name, std::optional<Value>& value) {
  if (options.contains(name)) value = options.at(name).get<Value>();
}

qe::Options ReadOptions(const Json& given) {
  qe::Options options;
  Read(given, "max_new_tokens", options.max_new_tokens);
  Read(given, "temperature", options.temperature);
  Read(given, "top_k", options.top_k);
  Read(given, "top_p", options.top_p);
  Read(given, "min_p", options.min_p);
  Read(given, "repetition_penalty", options.repetition_penalty);
  Read(given, "seed", options.seed);
  options.stop = given.value("stop", std::vector<std::string>());
  return options;
}

Json Drain(qe::Answer answer, std::size_t pieces) {
  std::string text;
  std::vector<std::int64_t> ids;
  qe_finish finish = QE_FINISH_NONE;
  for (const qe::Piece& piece : answer) {
    text += piece.text;
    ids.insert(ids.end(), piece.token_ids.begin(), piece.token_ids.end());
    finish = piece.finish;
    if (--pieces == 0) break;
  }
  const qe_timings timings = answer.timings();
  return {{"text", text}, {"ids", ids}, {"finish", finish}, {"cached", timings.cached_tokens}, {"prompt", timings.prompt_tokens}};
}

// How often `qe_answer_run` calls a function that wants one piece.
int CallsOfStopped(const qe::Model& model, const std::string& text) {
  const qe_part part{text.c_str(), nullptr};
  const qe_message message{"user", &part, 1};
  qe_answer* made = nullptr;
  if (qe_generate(model.get(), &message, 1, nullptr, &made, nullptr) != QE_OK) return -1;
  const std::unique_ptr<qe_answer, void (*)(qe_answer*)> answer(made, qe_answer_free);
  int calls = 0;
  const auto count = [](const qe_piece*, void* user) { return ++*static_cast<int*>(user); };
  return qe_answer_run(made, count, &calls, nullptr) == QE_OK ? calls : -1;
}

Json Answers(const qe::Model& model, const Json& request) {
  const qe::Options options = ReadOptions(request.value("options", Json::object()));
  const std::size_t pieces = request.value("pieces", std::size_t{0});  // 0: all
  if (request.contains("stopped")) return Json::array({CallsOfStopped(model, request.at("stopped"))});
  if (request.contains("text")) return {Drain(model.complete(request.at("text"), options), pieces)};
  Json answers = Json::array();
  qe::Conversation conversation(model);
  for (const Json& turn : request.at("turns")) {
    std::vector<qe::Message> messages;
    for (const Json& given : turn) {
      qe::Message message{given.at("role"), {}};
      for (const Json& part : given.at("parts")) message.parts.push_back(ReadPart(part));
      messages.push_back(std::move(message));
    }
    answers.push_back(Drain(conversation.ask(messages, options), pieces));
  }
  return answers;
}

// The caller's own CUDA stream, as a program has one that does more on the GPU. It stays: the process ends after the model.
void* MakeStream() {
  void* library = dlopen("libcuda.so.1", RTLD_NOW);
  const auto call = [&](const char* name) { return dlsym(library, name); };
  void *context = nullptr, *stream = nullptr;
  reinterpret_cast<int (*)(unsigned)>(call("cuInit"))(0);
  reinterpret_cast<int (*)(void**, int)>(call("cuDevicePrimaryCtxRetain"))(&context, 0);
  reinterpret_cast<int (*)(void*)>(call("cuCtxPushCurrent_v2"))(context);
  reinterpret_cast<int (*)(void**, unsigned)>(call("cuStreamCreate"))(&stream, 0);
  reinterpret_cast<int (*)(void**)>(call("cuCtxPopCurrent_v2"))(&context);
  return stream;
}

qe::ModelOptions ReadModelOptions(int count, char** arguments) {
  const auto given = [&](int index) { return std::string(index < count ? arguments[index] : "-"); };
  const auto path = [&](int index) { return given(index) == "-" ? std::string() : given(index); };
  qe::ModelOptions options{path(2), 1, given(6) == "-" ? 0 : std::stoll(given(6))};
  options.tensorrt = path(3);
  options.plugin = path(4);
  if (given(5) == "given") options.stream = MakeStream();
  if (given(5) == "wrong") options.stream = &options;
  return options;
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 3) return 2;
  try {
    const qe::Model model = qe::Model::load(arguments[1], ReadModelOptions(count, arguments));
    std::string line;
    while (std::getline(std::cin, line)) {
      held.clear();
      try {
        std::cout << Json{{"answers", Answers(model, Json::parse(line))}}.dump() << std::endl;
      } catch (const qe::Error& error) {
        std::cout << Json{{"error", error.what()}, {"status", error.status}}.dump() << std::endl;
      }
    }
  } catch (const qe::Error& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
  return 0;
}
