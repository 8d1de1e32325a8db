// Writes small ONNX graphs for tests, and loads them where ONNX Runtime is to be had.
#pragma once

#include <doctest/doctest.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <protozero/pbf_writer.hpp>
#include <string>
#include <utility>
#include <vector>

#include "engine/session.h"

namespace attnserve::engine {

constexpr int kOnnxFloat = 1, kOnnxInt64 = 7, kOnnxHalf = 10, kOnnxBFloat = 16;

struct GraphPort {
  std::string name;
  int type = kOnnxFloat;
  std::vector<std::int64_t> shape;  // -1: any size
};

struct Attribute {
  std::string name;
  bool real = true;
  float number = 0;
  std::int64_t integer = 0;
};

struct Node {
  std::string op, domain;
  std::vector<std::string> inputs, outputs;
  std::vector<Attribute> attributes;
};

struct Graph {
  std::vector<Node> nodes;
  std::vector<GraphPort> inputs, outputs;
  // Inputs [B, S] INT64 that are [[0]] if they are left out.
  std::vector<std::string> optional = {};
};

inline std::string value_info(const GraphPort& port) {
  std::string shape, tensor, type, info;
  for (const std::int64_t size : port.shape) {
    std::string dimension;
    if (size < 0) {
      protozero::pbf_writer(dimension).add_string(2, port.name + std::to_string(shape.size()));
    } else {
      protozero::pbf_writer(dimension).add_int64(1, size);
    }
    protozero::pbf_writer(shape).add_message(1, dimension);
  }
  protozero::pbf_writer(tensor).add_int32(1, port.type);
  protozero::pbf_writer(tensor).add_message(2, shape);
  protozero::pbf_writer(type).add_message(1, tensor);
  protozero::pbf_writer(info).add_string(1, port.name);
  protozero::pbf_writer(info).add_message(2, type);
  return info;
}

// The bytes of a ModelProto.
inline std::string serialized(const Graph& graph) {
  std::string body;
  protozero::pbf_writer writer(body);
  for (const Node& node : graph.nodes) {
    std::string bytes;
    protozero::pbf_writer to(bytes);
    for (const std::string& name : node.inputs) to.add_string(1, name);
    for (const std::string& name : node.outputs) to.add_string(2, name);
    to.add_string(4, node.op);
    for (const Attribute& attribute : node.attributes) {
      std::string value;
      protozero::pbf_writer one(value);
      one.add_string(1, attribute.name);
      if (attribute.real) one.add_float(2, attribute.number);
      if (!attribute.real) one.add_int64(3, attribute.integer);
      one.add_int32(20, attribute.real ? 1 : 2);
      to.add_message(5, value);
    }
    if (!node.domain.empty()) to.add_string(7, node.domain);
    writer.add_message(1, bytes);
  }
  writer.add_string(2, "test");
  for (const GraphPort& port : graph.inputs) writer.add_message(11, value_info(port));
  for (const GraphPort& port : graph.outputs) writer.add_message(12, value_info(port));
  for (const std::string& name : graph.optional) {
    std::string tensor;
    protozero::pbf_writer to(tensor);
    for (int dimension = 0; dimension < 2; ++dimension) to.add_int64(1, 1);
    to.add_int32(2, kOnnxInt64);
    to.add_int64(7, 0);
    to.add_string(8, name);
    writer.add_message(5, tensor);
  }

  std::string model;
  protozero::pbf_writer whole(model);
  whole.add_int64(1, 8);  // IR version
  whole.add_message(7, body);
  for (const auto& [domain, version] : {std::pair{"", 17}, std::pair{"attnserve", 1}}) {
    std::string opset;
    protozero::pbf_writer(opset).add_string(1, domain);
    protozero::pbf_writer(opset).add_int64(2, version);
    whole.add_message(8, opset);
  }
  return model;
}

// A file that is there as long as this.
class GraphFile {
 public:
  explicit GraphFile(const std::string& bytes) {
    static int made = 0;
    path_ = std::filesystem::temp_directory_path() /
            ("attnserve_test_" + std::to_string(getpid()) + "_" + std::to_string(made++) + ".onnx");
    std::ofstream(path_, std::ios::binary) << bytes;
  }
  GraphFile(const GraphFile&) = delete;
  GraphFile& operator=(const GraphFile&) = delete;
  ~GraphFile() { std::filesystem::remove(path_); }
  std::string path() const { return path_.string(); }

 private:
  std::filesystem::path path_;
};

// ONNX Runtime with the operators; nullptr, and a message, where the environment names no
// libraries.
inline std::shared_ptr<Runtime> test_runtime() {
  const char* library = std::getenv("ATTNSERVE_ONNXRUNTIME");
  const char* operators = std::getenv("ATTNSERVE_OPERATORS");
  if (library == nullptr || operators == nullptr) {
    MESSAGE("skipped: ATTNSERVE_ONNXRUNTIME and ATTNSERVE_OPERATORS are not set");
    return nullptr;
  }
  return Runtime::load(library, operators);
}

inline std::unique_ptr<Session> load_graph(const std::shared_ptr<Runtime>& runtime,
                                           const Graph& graph) {
  const GraphFile file(serialized(graph));
  SessionOptions options;
  options.intra_op_threads = 2;
  return Session::load(runtime, file.path(), options);
}

inline std::vector<Attribute> mask_attributes(float scale, bool causal, bool bottom_right = false) {
  return {{"scale", true, scale, 0},
          {"softcap", true, 0, 0},
          {"left", false, 0, -1},
          {"right", false, 0, causal ? 0 : -1},
          {"bottom_right", false, 0, bottom_right}};
}

// One node: output, log_sum_exp = Attention(query, key, value, key_lengths), any number of heads.
inline Graph attention_graph(int type, float scale, bool causal, bool bottom_right = false) {
  return {{{"Attention",
            "attnserve",
            {"query", "key", "value", "key_lengths"},
            {"output", "log_sum_exp"},
            mask_attributes(scale, causal, bottom_right)}},
          {{"query", type, {-1, -1, -1, -1}},
           {"key", type, {-1, -1, -1, -1}},
           {"value", type, {-1, -1, -1, -1}},
           {"key_lengths", kOnnxInt64, {-1}}},
          {{"output", type, {-1, -1, -1, -1}}, {"log_sum_exp", kOnnxFloat, {-1, -1, -1}}}};
}

// One node that says what the weights say.
inline Graph diagnostics_graph(float scale, bool causal, bool bottom_right = false) {
  return {{{"AttentionDiagnostics",
            "attnserve",
            {"query", "key", "key_lengths", "top_k", "distances"},
            {"entropy", "mass_per_key", "mass_by_distance", "top_k_indices", "top_k_weights"},
            mask_attributes(scale, causal, bottom_right)}},
          {{"query", kOnnxFloat, {-1, -1, -1, -1}},
           {"key", kOnnxFloat, {-1, -1, -1, -1}},
           {"key_lengths", kOnnxInt64, {-1}},
           {"top_k", kOnnxInt64, {1}},
           {"distances", kOnnxInt64, {1}}},
          {{"entropy", kOnnxFloat, {-1, -1, -1}},
           {"mass_per_key", kOnnxFloat, {-1, -1, -1}},
           {"mass_by_distance", kOnnxFloat, {-1, -1, -1}},
           {"top_k_indices", kOnnxInt64, {-1, -1, -1, -1}},
           {"top_k_weights", kOnnxFloat, {-1, -1, -1, -1}}}};
}

}  // namespace attnserve::engine
