// The data plane's options as Python gives them: keyword arguments, all of them, none unknown.
#pragma once

#include <nanobind/nanobind.h>

#include "services/dataplane.h"

namespace attnserve::python {

// Throws nanobind::type_error for a name that is missing, unknown, or of another type.
services::DataPlaneOptions options_of(const nanobind::kwargs& given);

}  // namespace attnserve::python
