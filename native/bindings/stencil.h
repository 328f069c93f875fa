// Stencils for Python: values and addresses in, values and buffers out.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "lane/channel.h"
#include "message/stencil.h"

namespace genie {

void bind_stencil(pybind11::module_& module);

// The message: one value for each hole, in order; an int for a number, a float for a real, an address for memory, which
// is read now. Throws std::invalid_argument for another number of values.
[[nodiscard]] Slice filled_slice(const Stencil& stencil, const pybind11::sequence& values);

// Where a message that fits goes. Made and asked for values with the GIL; `land` needs none.
class Landing {
 public:
  // into: an address for each hole of memory.  first: what the first number must be; 0: anything.  frames: (address,
  // size in bytes) for each further buffer; those without an address are not copied.
  Landing(const Stencil& stencil, const pybind11::sequence& into, std::uint64_t first, const pybind11::sequence& frames);

  // Copies what came to where it goes; false, and nothing is copied, where the message is another one.
  [[nodiscard]] bool land(const Message& message) const noexcept;
  // How many bytes that is.
  [[nodiscard]] std::size_t copied_bytes() const noexcept;
  [[nodiscard]] pybind11::tuple values(const Message& message) const;
  // The buffers that were not copied.
  [[nodiscard]] pybind11::list frames(Message&& message) const;

 private:
  const Stencil& stencil_;
  std::vector<std::byte*> into_;
  std::uint64_t first_;
  std::vector<std::pair<std::byte*, std::size_t>> frames_;
};

}  // namespace genie
