#include "python/models.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "engine/model.h"

namespace nb = nanobind;

namespace attnserve::python {
namespace {

using engine::Model;
using engine::ModelFacts;
using engine::Pick;
using engine::VariantFacts;

std::vector<std::string> names_of(const std::vector<engine::Port>& ports) {
  std::vector<std::string> names;
  for (const engine::Port& port : ports) names.push_back(port.name);
  return names;
}

using PortTuple = std::tuple<std::string, std::string, std::vector<std::int64_t>>;

// Name, data type and sizes of each; -1 is any size.
std::vector<PortTuple> described(const std::vector<engine::Port>& ports) {
  std::vector<PortTuple> tuples;
  for (const engine::Port& port : ports) {
    tuples.emplace_back(port.name, std::string(name_of(port.dtype)), port.shape);
  }
  return tuples;
}

engine::Kind kind_of(const std::string& name) {
  if (name == "core") return engine::Kind::kCore;
  if (name == "layer") return engine::Kind::kLayer;
  if (name == "transformer") return engine::Kind::kTransformer;
  throw nb::value_error(("kind: " + name).c_str());
}

engine::Mask mask_of(const std::string& name) {
  if (name == "bidirectional") return engine::Mask::kBidirectional;
  if (name == "causal") return engine::Mask::kCausal;
  if (name == "cross") return engine::Mask::kCross;
  throw nb::value_error(("mask: " + name).c_str());
}

}  // namespace

void bind_models(nb::module_& module) {
  nb::class_<ModelFacts>(module, "ModelFacts",
                         "What the control plane has read of a model and checked.")
      .def(nb::init<>())
      .def_rw("name", &ModelFacts::name)
      .def_rw("version", &ModelFacts::version)
      .def_prop_rw(
          "kind", [](const ModelFacts& facts) { return std::string(engine::name_of(facts.kind)); },
          [](ModelFacts& facts, const std::string& name) { facts.kind = kind_of(name); })
      .def_prop_rw(
          "dtype", [](const ModelFacts& facts) { return std::string(name_of(facts.dtype)); },
          [](ModelFacts& facts, const std::string& name) { facts.dtype = data_type_of(name); })
      .def_rw("num_heads", &ModelFacts::num_heads)
      .def_rw("num_kv_heads", &ModelFacts::num_kv_heads)
      .def_rw("head_dim", &ModelFacts::head_dim)
      .def_rw("value_head_dim", &ModelFacts::value_head_dim)
      .def("set_mask",
           [](ModelFacts& facts, const std::string& name) { facts.mask = mask_of(name); })
      .def_rw("window", &ModelFacts::window, nb::arg().none())
      .def_rw("window_right", &ModelFacts::window_right, nb::arg().none())
      .def_rw("bottom_right", &ModelFacts::bottom_right)
      .def_rw("scale", &ModelFacts::scale)
      .def_rw("softcap", &ModelFacts::softcap)
      .def_rw("sinks", &ModelFacts::sinks)
      .def_rw("embed_dim", &ModelFacts::embed_dim)
      .def_rw("context_dim", &ModelFacts::context_dim, nb::arg().none())
      .def_rw("pad_token_id", &ModelFacts::pad_token_id)
      .def_rw("hidden_size", &ModelFacts::hidden_size);

  nb::class_<VariantFacts>(module, "VariantFacts", "One graph of a model, to be loaded.")
      .def(nb::init<std::string, std::string, bool, bool>(), nb::arg("name"), nb::arg("path"),
           nb::arg("quadratic"), nb::arg("native"));

  nb::class_<Pick>(module, "Pick", "Variants to prefer up to a length.")
      .def(nb::init<std::optional<std::int64_t>, std::vector<std::string>>(),
           nb::arg("up_to").none(), nb::arg("variants"));

  nb::class_<Model>(module, "Model", "One version of a model, ready to run. Immutable.")
      .def_prop_ro("name", [](const Model& model) { return model.facts.name; })
      .def_prop_ro("version", [](const Model& model) { return model.facts.version; })
      .def_prop_ro("variants",
                   [](const Model& model) {
                     std::vector<std::string> names;
                     for (const auto& variant : model.variants) names.push_back(variant->name());
                     return names;
                   })
      .def(
          "choose",
          [](const Model& model, const std::string& forced, const std::vector<std::string>& inputs,
             const std::vector<std::string>& outputs, std::int64_t length) {
            const std::vector<std::string_view> taken(inputs.begin(), inputs.end());
            const std::vector<std::string_view> given(outputs.begin(), outputs.end());
            return model.choose(forced, taken, given, length).name();
          },
          nb::arg("forced"), nb::arg("inputs"), nb::arg("outputs"), nb::arg("length"))
      .def(
          "working_bytes",
          [](const Model& model, const std::string& variant, std::int64_t batch,
             std::int64_t num_heads, std::int64_t query_len, std::int64_t key_len,
             std::size_t tensor_bytes) {
            const engine::Variant* found = model.named(variant);
            if (!found) throw nb::key_error(variant.c_str());
            return engine::working_bytes(model, *found, batch, num_heads, query_len, key_len,
                                         tensor_bytes);
          },
          nb::arg("variant"), nb::arg("batch"), nb::arg("num_heads"), nb::arg("query_len"),
          nb::arg("key_len"), nb::arg("tensor_bytes"))
      .def("inputs",
           [](const Model& model, const std::string& variant) {
             const engine::Variant* found = model.named(variant);
             if (!found) throw nb::key_error(variant.c_str());
             return names_of(found->session->inputs());
           })
      .def("outputs",
           [](const Model& model, const std::string& variant) {
             const engine::Variant* found = model.named(variant);
             if (!found) throw nb::key_error(variant.c_str());
             return names_of(found->session->outputs());
           })
      .def("ports", [](const Model& model, const std::string& variant) {
        const engine::Variant* found = model.named(variant);
        if (!found) throw nb::key_error(variant.c_str());
        return std::pair(described(found->session->inputs()), described(found->session->outputs()));
      });
}

}  // namespace attnserve::python
