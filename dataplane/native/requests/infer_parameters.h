// Parameters of the Open Inference Protocol: of requests, and of their tensors.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "requests/attend.h"
#include "sessions/shared_memory.h"
#include "wire/open_inference.h"

namespace attnserve::requests {

// What a request's parameters ask for.
struct InferOptions {
  std::optional<float> scale, softcap;            // none: the model's own
  std::uint32_t top_k = 0, mass_by_distance = 0;  // 0: not given
  std::string_view variant;                       // empty: the server picks
  std::uint32_t priority = 0;                     // 1 high, 2 normal, 3 low; 0: normal
  std::uint64_t timeout = 0;                      // microseconds; 0: none
};

// Unknown parameters are ignored. Throws RequestError INVALID_ARGUMENT: a value out of range.
InferOptions options_of(const wire::Parameters& parameters);

// Throws RequestError INVALID_ARGUMENT "parameters['NAME']: given GIVEN; ...".
[[noreturn]] void refuse_parameter(std::string_view name, std::string_view given,
                                   std::string_view allowed);

// The parameters that say where in shared memory a tensor lies.
constexpr std::array<std::string_view, 3> kSharedMemoryParameters{
    "shared_memory_region", "shared_memory_byte_size", "shared_memory_offset"};

const wire::ParameterValue* find(const wire::Parameters& parameters, std::string_view name);

// Looks into the shared memory of one request's caller; what it finds is kept in `views`.
class SharedPlaces {
 public:
  SharedPlaces(sessions::SharedRegions& regions, std::string_view peer,
               std::vector<sessions::RegionView>& views)
      : regions_(regions), peer_(peer), views_(views) {}

  struct Place {
    Region region;
    MutableByteSpan bytes;
  };
  // Where a tensor's parameters say that it lies; none if they do not. Throws RequestError:
  // INVALID_ARGUMENT, or NOT_FOUND or PERMISSION_DENIED for a region that is not the caller's.
  std::optional<Place> find_place(std::string_view tensor, const wire::Parameters& parameters);

 private:
  sessions::SharedRegions& regions_;
  std::string_view peer_;
  std::vector<sessions::RegionView>& views_;
};

}  // namespace attnserve::requests
