// The inproc lane: two ends in one process. Slices arrive as they are, by reference.
#pragma once

#include <memory>
#include <utility>

#include "lane/lane.h"

namespace genie {

[[nodiscard]] std::pair<std::unique_ptr<Lane>, std::unique_ptr<Lane>> make_inproc();

}  // namespace genie
