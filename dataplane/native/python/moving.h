// Sessions that leave for other servers, as Python sees them.
#pragma once

#include <nanobind/nanobind.h>

namespace attnserve::python {

void bind_moving(nanobind::module_& module);

}  // namespace attnserve::python
