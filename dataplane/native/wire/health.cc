// grpc.health.v1.
#include "wire/fields.h"
#include "wire/layout.h"
#include "wire/open_inference.h"

namespace attnserve::wire {

std::string_view decode_health_check(ByteSpan message) {
  Decoding decoding("Health");
  std::string_view service;
  for (FieldReader reader(message, decoding); reader.next();) {
    if (reader.key() == bytes_field(1)) service = reader.text();
  }
  return service;
}

Bytes encode_health(int serving_status) {
  std::string message;
  protozero::pbf_writer writer(message);
  if (serving_status != 0) writer.add_enum(1, serving_status);
  return bytes_of(message);
}

}  // namespace attnserve::wire
