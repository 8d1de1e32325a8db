#include <cstring>

#include "attnserve/v1/attention.pb.h"
#include "inference/open_inference.pb.h"
#include "wire/open_inference.h"
#include "wire_support.h"

namespace attnserve::wire::tests {

namespace {

using TheirParameters = google::protobuf::Map<std::string, inference::InferParameter>;

bool same(const ParameterValue& ours, const inference::InferParameter& theirs) {
  switch (theirs.parameter_choice_case()) {
    case inference::InferParameter::kBoolParam:
      return ours == ParameterValue(theirs.bool_param());
    case inference::InferParameter::kInt64Param:
      return ours == ParameterValue(std::int64_t{theirs.int64_param()});
    case inference::InferParameter::kStringParam:
      return ours == ParameterValue(std::string_view(theirs.string_param()));
    case inference::InferParameter::kDoubleParam: {
      const double value = theirs.double_param();
      const auto* our_value = std::get_if<double>(&ours);
      return our_value != nullptr && std::memcmp(our_value, &value, sizeof(value)) == 0;
    }
    case inference::InferParameter::kUint64Param:
      return ours == ParameterValue(std::uint64_t{theirs.uint64_param()});
    default:
      return ours == ParameterValue();
  }
}

bool same(const Parameters& ours, const TheirParameters& theirs) {
  if (ours.size() != theirs.size()) return false;
  for (const auto& [name, value] : ours) {
    const auto found = theirs.find(std::string(name));
    if (found == theirs.end() || !same(value, found->second)) return false;
  }
  return true;
}

template <class T, class Repeated>
bool same_elements(const Contents& ours, const Repeated& theirs) {
  const std::vector<T> elements(theirs.begin(), theirs.end());
  return ours.count == elements.size() && ours.elements.size() == elements.size() * sizeof(T) &&
         std::memcmp(ours.elements.data(), elements.data(), ours.elements.size()) == 0;
}

bool same(const Contents& ours, const inference::InferTensorContents& theirs) {
  std::vector<const google::protobuf::FieldDescriptor*> fields;
  theirs.GetReflection()->ListFields(theirs, &fields);
  // Unknown fields are not listed; set ones are, by their numbers.
  if (ours.fields.size() != fields.size()) return false;
  for (std::size_t index = 0; index < fields.size(); ++index) {
    if (ours.fields[index] != fields[index]->name()) return false;
  }
  if (fields.size() == 1) {
    switch (fields[0]->number()) {
      case 1:
        return ours.dtype == DataType::kBool &&
               same_elements<std::uint8_t>(ours, theirs.bool_contents());
      case 2:
        return ours.dtype == DataType::kInt32 &&
               same_elements<std::int32_t>(ours, theirs.int_contents());
      case 3:
        return ours.dtype == DataType::kInt64 &&
               same_elements<std::int64_t>(ours, theirs.int64_contents());
      case 6:
        return ours.dtype == DataType::kFp32 && same_elements<float>(ours, theirs.fp32_contents());
      default:
        break;
    }
  }
  return ours.dtype == DataType::kUnspecified && ours.elements.empty();
}

bool same(const InferInput& ours, const inference::ModelInferRequest::InferInputTensor& theirs) {
  return ours.name == theirs.name() && ours.datatype == theirs.datatype() &&
         std::equal(ours.shape.begin(), ours.shape.end(), theirs.shape().begin(),
                    theirs.shape().end()) &&
         same(ours.parameters, theirs.parameters()) &&
         ours.contents.has_value() == theirs.has_contents() &&
         (!ours.contents || same(*ours.contents, theirs.contents()));
}

bool same(const InferOutput& ours,
          const inference::ModelInferRequest::InferRequestedOutputTensor& theirs) {
  return ours.name == theirs.name() && same(ours.parameters, theirs.parameters());
}

bool same(const InferRequest& ours, const inference::ModelInferRequest& theirs) {
  const auto both = [](const auto& a, const auto& b) { return same(a, b); };
  return ours.model_name == theirs.model_name() && ours.model_version == theirs.model_version() &&
         ours.id == theirs.id() && same(ours.parameters, theirs.parameters()) &&
         std::equal(ours.inputs.begin(), ours.inputs.end(), theirs.inputs().begin(),
                    theirs.inputs().end(), both) &&
         std::equal(ours.outputs.begin(), ours.outputs.end(), theirs.outputs().begin(),
                    theirs.outputs().end(), both) &&
         std::equal(ours.raw_input_contents.begin(), ours.raw_input_contents.end(),
                    theirs.raw_input_contents().begin(), theirs.raw_input_contents().end(),
                    [](ByteSpan a, const std::string& b) { return text_of(a) == b; });
}

InferRequest infer(const std::string& message) {
  return decode_infer(bytes_of(message), "ModelInfer");
}

std::string why_refused(const std::string& message) {
  return refusal([&] { infer(message); });
}

// A request of one input with such contents.
std::string with_contents(const std::string& contents) { return field(5, field(5, contents)); }

}  // namespace

TEST_CASE("infer requests are read as protobuf reads them, or refused as it refuses them") {
  using Theirs = inference::ModelInferRequest;
  const auto same_request = [](ByteSpan message, const Theirs& theirs) {
    return same(decode_infer(message, "ModelInfer"), theirs);
  };
  compare_many<Theirs>(11, 100000, same_request);
  // Of what lies deeper there would be little.
  compare_many<Theirs>(12, 60000, same_request, *Theirs::InferInputTensor::descriptor(), {5});
  compare_many<Theirs>(13, 60000, same_request, *inference::InferTensorContents::descriptor(),
                       {5, 5});
  compare_many<Theirs>(14, 60000, same_request, *inference::InferParameter::descriptor(), {2, 4});
}

TEST_CASE("many single elements take little time, and just the memory of the elements") {
  check_in_proportion(std::string("\x18\x07", 2), [](const std::string& singles) {
    const InferRequest request = infer(with_contents(singles));
    CHECK(request.inputs[0].contents->count == singles.size() / 2);
    CHECK(request.inputs[0].contents->elements.size() == singles.size() / 2 * 8);
  });
  const std::string texts = with_contents(repeated(field(8, ""), kLarge));
  CHECK(infer(texts).inputs[0].contents->fields[0] == "bytes_contents");
  const std::string both =
      with_contents(repeated(std::string("\x18\x07", 2), kLarge / 2) + field(1, "\1"));
  CHECK(infer(both).inputs[0].contents->elements.empty());
}

TEST_CASE("typed contents are charged to the budget before they are gathered") {
  ByteBudget budget(100);
  const std::string message = with_contents(field(3, std::string(10, '\1')));
  {
    const InferRequest request = decode_infer(bytes_of(message), "ModelInfer", &budget);
    CHECK(budget.lent() == 80);
    bool refused = false;
    try {
      decode_infer(bytes_of(message), "ModelInfer", &budget);
    } catch (const RequestError& error) {
      refused = error.status().code == Code::kResourceExhausted;
    }
    CHECK(refused);
    CHECK(budget.lent() == 80);
  }
  CHECK(budget.lent() == 0);
}

TEST_CASE("the last value of a parameter holds, at the place of the first") {
  const auto entry = [](const std::string& name, const std::string& value) {
    return field(4, field(1, name) + field(2, value));
  };
  const std::string message =
      entry("a", std::string("\x10\1", 2)) + entry("b", "") + entry("a", std::string("\x10\2", 2));
  const InferRequest request = infer(message);
  REQUIRE(request.parameters.size() == 2);
  CHECK(request.parameters[0] == Parameters::value_type("a", std::int64_t{2}));
  CHECK(request.parameters[1] == Parameters::value_type("b", std::monostate()));
}

TEST_CASE("an infer request of more fields than allowed is refused at once") {
  const std::vector<std::string> parts{
      field(1000, ""),
      field(4, ""),
      field(4, field(1, "a")),
      field(5, ""),
      field(6, ""),
      field(7, ""),
      field(5, field(4, "")),
      field(5, field(3, std::string(9, '\1'))),
      with_contents(field(9, "")),
  };
  for (const std::string& part : parts) {
    std::string why;
    check_ends_early(part, [&](const std::string& message) { why = why_refused(message); });
    CHECK(why.find("more than 4096 fields") != std::string::npos);
    CHECK(why_refused(repeated(part, 1000)) == "");
  }
}

TEST_CASE("long names of parameters that differ at their ends take little time") {
  const std::string same(16000, 'x');
  std::string at_ends, at_once;
  for (int index = 0; index < 1300; ++index) {
    at_ends += field(4, field(1, same + std::to_string(index)));
    at_once += field(4, field(1, std::to_string(index) + same));
  }
  const auto seconds = [](const std::string& message) {
    return processor_seconds_of([&] { CHECK(infer(message).parameters.size() == 1300); });
  };
  // If each were compared with all others, some hundred times as much.
  CHECK(seconds(at_ends) < 16 * seconds(at_once));
}

TEST_CASE("a health check names a service") {
  CHECK(decode_health_check({}) == "");
  const std::string message = field(1, "attnserve.v1.AttentionService");
  CHECK(decode_health_check(bytes_of(message)) == "attnserve.v1.AttentionService");
  CHECK(refusal([] { decode_health_check(bytes_of("\x0a\xff")); }).find("request of Health (") !=
        std::string::npos);
  // A message of the same fields.
  compare_many<v1::DropTensorRequest>(14, 5000,
                                      [](ByteSpan check, const v1::DropTensorRequest& theirs) {
                                        return decode_health_check(check) == theirs.handle();
                                      });
}

}  // namespace attnserve::wire::tests
