// Records of calls between the data plane and Python.
#pragma once

#include <nanobind/nanobind.h>

namespace attnserve::python {

void bind_records(nanobind::module_& module);

}  // namespace attnserve::python
