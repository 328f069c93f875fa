// The one thread of a process that moves transfers on whose own threads are busy elsewhere.
#pragma once

#include <memory>

#include "lane/channel.h"

namespace genie {

// Look after this channel until nothing of it is half done. Starts the thread when it is first needed. In any thread.
void assist(const std::shared_ptr<Channel>& channel);
// Of a channel that is going: returns once nobody looks at its lane's descriptor any more.
void no_longer_assist(int lane_fd);

}  // namespace genie
