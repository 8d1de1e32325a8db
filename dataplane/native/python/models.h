// Models between Python and the engine.
#pragma once

#include <nanobind/nanobind.h>

namespace attnserve::python {

void bind_models(nanobind::module_& module);

}  // namespace attnserve::python
