#include "python/moving.h"

#include <nanobind/stl/string.h>

#include <string>
#include <string_view>

#include "services/departures.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace attnserve::python {

using services::Departure;

void bind_moving(nb::module_& module) {
  nb::class_<Departure>(module, "Departure", "See services/departures.h.")
      .def_prop_ro("owner",
                   [](const Departure& self) { return std::string(self.session().owner()); })
      .def_prop_ro("length", [](const Departure& self) { return self.session().length(); })
      .def_prop_ro("lease", [](const Departure& self) { return self.session().lease().count(); })
      .def_prop_ro("prefix_hashes",
                   [](const Departure& self) {
                     std::string all;
                     for (const sessions::PageHash& hash : self.session().prefix_hashes()) {
                       all.append(reinterpret_cast<const char*>(hash.data()), hash.size());
                     }
                     return nb::bytes(all.data(), all.size());
                   })
      .def_prop_ro("ended", &Departure::ended)
      .def("again", &Departure::again)
      .def("next",
           [](Departure& self) {
             Bytes chunk;
             {
               const nb::gil_scoped_release released;
               chunk = self.next();
             }
             return nb::bytes(reinterpret_cast<const char*>(chunk.data()), chunk.size());
           })
      .def("moved", &Departure::moved, "address"_a, "authority"_a, "new_session_id"_a,
           nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace attnserve::python
