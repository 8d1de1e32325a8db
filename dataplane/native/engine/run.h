// One attention on its graphs. Private to engine/.
#pragma once

#include "engine/attend.h"

namespace attnserve::engine {

// Computes what a work wants into its results. Throws as Session::run.
void attend(const AttendWork& work, Stop* stop);

}  // namespace attnserve::engine
