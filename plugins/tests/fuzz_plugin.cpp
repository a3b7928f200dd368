// Hostile attributes, serialized fields and tensor descriptions against the plugin's own code, under AddressSanitizer and
// UBSan: every call must end in an error or a plugin, never in a crash. Prints how many of each.
//
//   fuzz_plugin [cases] [seed]
#include <NvInferRuntime.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../tensorrt/fields.h"
#include "../tensorrt/qe_linear_plugin.h"

extern "C" nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count);

namespace {

using nvinfer1::DataType;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;
using Random = std::mt19937;

// One field with memory of its own, exactly as long as it claims to be needed, so that a read beyond it is caught.
struct Field {
  std::string name;
  PluginFieldType type = PluginFieldType::kINT32;
  int32_t length = 1;
  std::vector<char> bytes;
  bool null_data = false, null_name = false;
};

int32_t Pick(Random& random, std::initializer_list<int32_t> values) {
  return values.begin()[random() % values.size()];
}

int32_t Odd(Random& random) {
  return Pick(random, {0, 1, -1, 2, 7, 8, 64, 128, 129, 4096, INT32_MAX, INT32_MIN, static_cast<int32_t>(random())});
}

std::vector<Field> Plausible(Random& random) {
  const int experts = Pick(random, {0, 1, 2, 8, 16});
  const std::pair<const char*, int32_t> values[] = {
      {"layout_version", qe::kLayoutVersion},
      {"in_features", Pick(random, {128, 1536, 264, 8960})},
      {"out_features", Pick(random, {8, 256, 1536})},
      {"act_bits", Pick(random, {0, 6, 8})},
      {"group_size", Pick(random, {-1, -1, 64, 128})},
      {"has_zeros", Pick(random, {0, 1})},
      {"has_inv_omega", Pick(random, {0, 1})},
      {"rank_shared", Pick(random, {0, 8, 32, 64})},
      {"rank_routed", experts ? Pick(random, {0, 8, 32}) : 0},
      {"num_experts", experts},
      {"adapter_bits", Pick(random, {4, 8, 16})},
      {"weight_bits", Pick(random, {3, 4})}};
  std::vector<Field> fields;
  for (const auto& [name, value] : values) {
    Field f;
    f.name = name;
    f.bytes.resize(sizeof value);
    memcpy(f.bytes.data(), &value, sizeof value);
    fields.push_back(f);
  }
  return fields;
}

void Mutate(std::vector<Field>& fields, Random& random) {
  for (uint32_t i = random() % 3; i > 0 && !fields.empty(); --i) {
    Field& f = fields[random() % fields.size()];
    switch (random() % 9) {
      case 0:
        f.type = static_cast<PluginFieldType>(static_cast<int32_t>(random() % 14) - 1);
        f.bytes.resize(1);
        break;
      case 1:
        f.length = Odd(random);
        break;
      case 2:
        f.null_data = true;
        break;
      case 3:
        f.null_name = true;
        break;
      case 4:
        f.name.resize(random() % 40, static_cast<char>(random()));
        break;
      case 5:
        fields.push_back(Field(f));
        break;
      case 6:
        fields.erase(fields.begin() + static_cast<long>(random() % fields.size()));
        break;
      default: {
        const int32_t value = Odd(random);
        f.bytes.resize(sizeof value);
        memcpy(f.bytes.data(), &value, sizeof value);
      }
    }
  }
}

nvinfer1::Dims RandomDims(Random& random, int64_t last) {
  nvinfer1::Dims dims{};
  dims.nbDims = random() % 20 ? 1 + static_cast<int32_t>(random() % 4) : Odd(random);
  for (int64_t& d : dims.d) d = random() % 6 ? static_cast<int64_t>(1 + random() % 40) : Odd(random);
  if (dims.nbDims > 0 && dims.nbDims <= 8 && random() % 4) dims.d[dims.nbDims - 1] = last;
  return dims;
}

// Descriptions that are right for the attributes, then spoilt here and there.
std::vector<nvinfer1::DynamicPluginTensorDesc> Tensors(const qe::Attributes& attributes, Random& random) {
  QeProblem problem = attributes.problem;
  problem.dtype = static_cast<int32_t>(random() % 2);
  const qe::Signature signature(problem);
  std::vector<nvinfer1::DynamicPluginTensorDesc> tensors(static_cast<size_t>(signature.count) + 1);
  for (int i = 0; i <= signature.count; ++i) {
    nvinfer1::DynamicPluginTensorDesc& t = tensors[static_cast<size_t>(i)];
    t.desc.format = random() % 30 ? nvinfer1::TensorFormat::kLINEAR : nvinfer1::TensorFormat::kCHW32;
    const bool is_x = i == 0 || i == signature.count;
    t.desc.type = qe::TypeOf(signature.input[is_x ? 0 : i].type);
    t.desc.dims.nbDims = 2;
    t.desc.dims.d[0] = is_x ? 5 : 1;
    t.desc.dims.d[1] = is_x ? (i ? problem.N : problem.K) : signature.input[i].elements;
    if (random() % 12 == 0) t.desc.type = static_cast<DataType>(random() % 12);
    if (random() % 12 == 0) t.desc.dims = RandomDims(random, problem.K);
    t.min = t.opt = t.max = t.desc.dims;
    if (random() % 12 == 0) t.max = RandomDims(random, problem.K);
  }
  return tensors;
}

struct Tally {
  long refused = 0, created = 0, calls = 0, accepted = 0;
};

void Exercise(nvinfer1::IPluginV3* plugin, const qe::Attributes& attributes, Random& random, Tally& tally) {
  using nvinfer1::PluginCapabilityType;
  auto* build = static_cast<nvinfer1::v_1_0::IPluginV3OneBuild*>(plugin->getCapabilityInterface(PluginCapabilityType::kBUILD));
  auto* runtime =
      static_cast<nvinfer1::v_1_0::IPluginV3OneRuntime*>(plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
  auto tensors = Tensors(attributes, random);
  const int32_t inputs =
      random() % 12 ? static_cast<int32_t>(tensors.size()) - 1 : static_cast<int32_t>(random() % tensors.size());
  for (int32_t position = -1; position <= static_cast<int32_t>(tensors.size()); ++position)
    build->supportsFormatCombination(position, tensors.data(), inputs, 1);
  const bool accepted = build->configurePlugin(tensors.data(), inputs, tensors.data() + inputs, 1) == 0;
  tally.accepted += accepted;
  (void)build->getWorkspaceSize(tensors.data(), inputs, tensors.data() + inputs, 1);
  std::vector<DataType> types;
  std::vector<nvinfer1::PluginTensorDesc> fixed;
  for (const auto& t : tensors) types.push_back(t.desc.type), fixed.push_back(t.desc);
  DataType output;
  build->getOutputDataTypes(&output, 1, types.data(), inputs);
  std::vector<int32_t> tactics(static_cast<size_t>(build->getNbTactics()));
  build->getValidTactics(tactics.data(), static_cast<int32_t>(tactics.size()));
  runtime->setTactic(random() % 2 ? tactics[random() % tactics.size()] : Odd(random));
  if (inputs + 1 == static_cast<int32_t>(tensors.size())) {
    runtime->onShapeChange(fixed.data(), inputs, &fixed.back(), 1);
    // No driver here: enqueue plans, then reports that. Addresses are never followed on the host.
    std::vector<const void*> from(tensors.size(), reinterpret_cast<const void*>(random() % 5 ? 4096 : random()));
    void* to[] = {reinterpret_cast<void*>(4096)};
    void* workspace = random() % 5 ? reinterpret_cast<void*>(1 << 20) : nullptr;
    if (runtime->enqueue(fixed.data(), &fixed.back(), from.data(), to, workspace, nullptr) == 0 &&
        qe::TokensOf(fixed[0].dims, attributes.problem.K) != 0)
      abort();  // nothing can have run
  }
  tally.calls += 9;
  std::unique_ptr<nvinfer1::IPluginV3> copy(plugin->clone());
  auto* copied = static_cast<nvinfer1::v_1_0::IPluginV3OneRuntime*>(copy->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
  qe::Attributes again;
  if (qe::ReadFields(copied->getFieldsToSerialize(), again) != nullptr) abort();  // what is written can be read
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? atoi(argv[1]) : 10000;
  Random random(argc > 2 ? static_cast<uint32_t>(atoi(argv[2])) : 1);
  int32_t count = 0;
  auto* creator = static_cast<nvinfer1::IPluginCreatorV3One*>(getCreators(count)[0]);
  Tally tally;
  for (int i = 0; i < cases; ++i) {
    std::vector<Field> fields = Plausible(random);
    Mutate(fields, random);
    std::vector<PluginField> raw;
    for (const Field& f : fields)
      raw.emplace_back(f.null_name ? nullptr : f.name.c_str(), f.null_data ? nullptr : f.bytes.data(), f.type, f.length);
    nvinfer1::PluginFieldCollection collection{static_cast<int32_t>(raw.size()), raw.data()};
    if (random() % 200 == 0) collection.nbFields = -static_cast<int32_t>(random() % 100);
    if (random() % 200 == 0) collection = {3, nullptr};
    const auto phase = random() % 2 ? nvinfer1::TensorRTPhase::kBUILD : nvinfer1::TensorRTPhase::kRUNTIME;
    std::unique_ptr<nvinfer1::IPluginV3> plugin(
        creator->createPlugin("fuzz", random() % 300 ? &collection : nullptr, phase));
    if (!plugin) {
      ++tally.refused;
      continue;
    }
    ++tally.created;
    qe::Attributes attributes;
    if (qe::ReadFields(&collection, attributes) != nullptr) abort();
    Exercise(plugin.get(), attributes, random, tally);
  }
  printf("cases %d, refused %ld, created %ld, then configured %ld, calls %ld\n", cases, tally.refused, tally.created,
         tally.accepted, tally.calls);
  return tally.refused > cases / 10 && tally.accepted > cases / 20 ? 0 : 1;
}
