// Lanes do not survive a fork: the child has the same rings and sockets, and both would speak with one voice.
#pragma once

namespace genie {

// Rises in a forked child. What was made under another number belongs to a process that this one was forked from.
[[nodiscard]] unsigned fork_generation() noexcept;

}  // namespace genie
