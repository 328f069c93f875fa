// Channels and listeners for Python. Everything that can wait lets go of the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <functional>
#include <map>
#include <utility>

#include "bindings/bindings.h"
#include "bindings/stencil.h"
#include "gpu/driver.h"
#include "lane/channel.h"
#include "lane/fork.h"
#include "lane/inproc.h"
#include "lane/shm.h"
#include "lane/tcp.h"

namespace py = pybind11;

namespace genie {
namespace {

[[nodiscard]] Deadline deadline_in(double seconds) {
  if (std::isinf(seconds)) return kNoDeadline;
  return Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
}

[[nodiscard]] const char* name_of(Posted posted) {
  switch (posted) {
    case Posted::kAccepted: return "accepted";
    case Posted::kBusy: return "its queue is full";
    case Posted::kRefused: return "the transfer is beyond its limits";
    case Posted::kClosed: return "it is closed";
  }
  return "unknown";
}

[[noreturn]] void raise_closed(const Channel& channel) {
  throw LaneError(std::string("the ") + std::string(channel.capabilities().name) + " lane is closed (" +
                  genie::name_of(channel.close_end()) + "): " + channel.close_reason());
}

py::object to_python(Channel& self, Message&& message, bool whole) {
  py::list frames;
  for (std::size_t i = whole ? 0 : 1; i < message.buffers.size(); ++i) frames.append(py::cast(std::move(message.buffers[i])));
  if (whole) return py::make_tuple(message.id, message.epoch, std::move(frames));
  if (message.buffers.empty()) return py::make_tuple(py::bytes(), std::move(frames));
  const Buffer& head = message.buffers.front();
  self.copied_in(head.size_bytes);
  return py::make_tuple(py::bytes(reinterpret_cast<const char*>(head.data), head.size_bytes), std::move(frames));
}

std::uint64_t post(Channel& self, std::vector<Slice>& slices, const SendOptions& options, double timeout_s) {
  Posted posted = Posted::kAccepted;
  std::uint64_t id = 0;
  {
    const py::gil_scoped_release release;
    id = self.send(slices, options, deadline_in(timeout_s), posted);
    slices.clear();
  }
  HeldBuffers::sweep();
  if (posted == Posted::kClosed) raise_closed(self);
  if (posted == Posted::kRefused) {
    throw LaneError(std::string("the ") + std::string(self.capabilities().name) + " lane took nothing: " +
                    name_of(posted));
  }
  return id;
}

py::object receive(Channel& self, double timeout_s, double spin_s, bool whole) {
  Message message;
  Channel::Got got = Channel::Got::kNothing;
  {
    const py::gil_scoped_release release;
    got = self.receive(message, deadline_in(timeout_s),
                       std::chrono::microseconds(static_cast<std::int64_t>(spin_s * 1e6)));
  }
  HeldBuffers::sweep();
  if (got == Channel::Got::kClosed) raise_closed(self);
  return got == Channel::Got::kNothing ? py::none() : to_python(self, std::move(message), whole);
}

py::dict to_dict(const Statistics& facts) {
  py::dict row;
  row["posted"] = facts.posted;
  row["ended_ok"] = facts.ended_ok;
  row["ended_badly"] = facts.ended_badly;
  row["arrived"] = facts.arrived;
  row["bytes_sent"] = facts.bytes_sent;
  row["bytes_arrived"] = facts.bytes_arrived;
  row["bytes_copied_out"] = facts.bytes_copied_out;
  row["bytes_copied_in"] = facts.bytes_copied_in;
  row["bytes_shared"] = facts.bytes_shared;
  row["bytes_open"] = facts.bytes_open;
  row["wakeups"] = facts.wakeups;
  return row;
}

class PyListener {
 public:
  explicit PyListener(std::unique_ptr<Listener> listener) : listener_(std::move(listener)) {}

  [[nodiscard]] Listener& get() const {
    if (generation_ != fork_generation()) throw LaneError("the listener belongs to the process that this one was forked from");
    if (listener_ == nullptr) throw LaneError("the listener is closed");
    return *listener_;
  }
  void close() { listener_.reset(); }

 private:
  const unsigned generation_ = fork_generation();
  std::unique_ptr<Listener> listener_;
};

template <typename T>
std::unique_ptr<T> unwrap(const py::capsule& capsule, const char* name) {
  if (capsule.name() == nullptr || std::string_view(capsule.name()) != name) throw LaneError("not a capsule of ours");
  auto* made = static_cast<std::unique_ptr<T>*>(capsule.get_pointer());
  if (*made == nullptr) throw LaneError("what was in this capsule has been taken");
  return std::move(*made);
}

ShmOptions shm_options(std::size_t limit_bytes) {
  ShmOptions options;
  if (limit_bytes != 0) options.pool.limit_bytes = limit_bytes;
  return options;
}

}  // namespace

void bind_lanes(py::module_& module) {
  py::class_<Channel, std::shared_ptr<Channel>>(module, "Channel", "One end of a lane: see native/lane/channel.h.")
      .def(
          "send",
          [](Channel& self, const py::sequence& parts, double timeout_s, std::uint64_t epoch, bool digest,
             int priority, double deadline_s, bool watch) {
            HeldBuffers::sweep();
            std::vector<Slice> slices = HeldBuffers::hold(parts);
            const SendOptions options{epoch, digest, static_cast<Priority>(std::clamp(priority, 0, 2)),
                                      deadline_in(deadline_s), watch};
            return post(self, slices, options, timeout_s);
          },
          py::arg("parts"), py::arg("timeout_s") = 30.0, py::arg("epoch") = 0, py::arg("digest") = false,
          py::arg("priority") = 1, py::arg("deadline_s") = std::numeric_limits<double>::infinity(),
          py::arg("watch") = false,
          "Post buffers as one message; they must not change until it has ended. Returns its id, or 0 where there was no "
          "room in the queue in time. Raises: LaneError.")
      .def("receive", [](Channel& self, double timeout_s, double spin_s) { return receive(self, timeout_s, spin_s, false); },
           py::arg("timeout_s"), py::arg("spin_s") = 0.0,
           "(first buffer as bytes, [Memory, ...]), or None in vain. Raises: LaneError once the lane is closed.")
      .def("receive_whole", [](Channel& self, double timeout_s) { return receive(self, timeout_s, 0.0, true); },
           py::arg("timeout_s"), "(id, epoch, [Memory, ...]), or None. Raises: LaneError.")
      .def(
          "try_receive",
          [](Channel& self) -> py::object {
            HeldBuffers::sweep();
            Message message;
            Channel::Got got = Channel::Got::kNothing;
            {
              const py::gil_scoped_release release;
              got = self.try_receive(message);
            }
            if (got == Channel::Got::kClosed) raise_closed(self);
            return got == Channel::Got::kNothing ? py::none() : to_python(self, std::move(message), false);
          },
          "As receive, without waiting.")
      .def(
          "send_stencil",
          [](Channel& self, const Stencil& stencil, const py::sequence& values, const py::sequence& frames,
             double timeout_s, bool digest) {
            HeldBuffers::sweep();
            std::vector<Slice> slices = frames.empty() ? std::vector<Slice>() : HeldBuffers::hold(frames);
            slices.insert(slices.begin(), filled_slice(stencil, values));
            self.copied_out(stencil.memory_bytes());
            SendOptions options;
            options.digest = digest;
            return post(self, slices, options, timeout_s) != 0;
          },
          py::arg("stencil"), py::arg("values"), py::arg("frames"), py::arg("timeout_s"), py::arg("digest"),
          "Post a filled stencil, and buffers as in send. False where there was no room in time. Raises: LaneError.")
      .def(
          "receive_stencil",
          [](Channel& self, const Stencil& stencil, const py::sequence& into, std::uint64_t first,
             const py::sequence& frames, double timeout_s, double spin_s) -> py::object {
            const Landing landing(stencil, into, first, frames);
            Message message;
            Channel::Got got = Channel::Got::kNothing;
            bool landed = false;
            {
              const py::gil_scoped_release release;
              got = timeout_s < 0 ? self.try_receive(message)
                                  : self.receive(message, deadline_in(timeout_s),
                                                 std::chrono::microseconds(static_cast<std::int64_t>(spin_s * 1e6)));
              if (got == Channel::Got::kMessage) landed = landing.land(message);
            }
            HeldBuffers::sweep();
            if (got == Channel::Got::kClosed) raise_closed(self);
            if (got == Channel::Got::kNothing) return py::none();
            if (!landed) return to_python(self, std::move(message), false);
            self.copied_in(landing.copied_bytes());
            py::tuple values = landing.values(message);
            return py::make_tuple(std::move(values), landing.frames(std::move(message)));
          },
          py::arg("stencil"), py::arg("into"), py::arg("first"), py::arg("frames"), py::arg("timeout_s"),
          py::arg("spin_s") = 0.0,
          "As receive (as try_receive with a timeout below 0), and where the message is the stencil's, with `first` as "
          "its first number unless that is 0: its memory goes to the addresses `into`, its frames to `frames`, (address "
          "or 0, size in bytes) each, and the result is (numbers and reals, frames that had no address).")
      .def(
          "wait_ended",
          [](Channel& self, std::uint64_t id, double timeout_s) {
            std::optional<End> end;
            {
              const py::gil_scoped_release release;
              end = self.wait_ended(id, deadline_in(timeout_s));
            }
            HeldBuffers::sweep();
            return end ? py::object(py::str(genie::name_of(*end))) : py::object(py::none());
          },
          py::arg("id"), py::arg("timeout_s"),
          "How a watched transfer ended; PENDING where it has not, None for one that is not watched.")
      .def("forget", &Channel::forget, py::arg("id"), py::call_guard<py::gil_scoped_release>(),
           "Watch a transfer no longer.")
      .def("bytes_moved", &Channel::bytes_moved, py::call_guard<py::gil_scoped_release>(),
           "How many bytes of an open transfer have left this side.")
      .def("cancel", &Channel::cancel, py::call_guard<py::gil_scoped_release>())
      .def(
          "quiesce", [](Channel& self, double timeout_s) { return self.quiesce(deadline_in(timeout_s)); },
          py::arg("timeout_s"), py::call_guard<py::gil_scoped_release>(), "Whether all that was sent has ended.")
      .def("arm", &Channel::arm, py::call_guard<py::gil_scoped_release>(),
           "Before sleeping on fileno(): False where something is there already.")
      .def("fileno", &Channel::fd)
      .def(
          "allocate",
          [](Channel& self, std::size_t size_bytes) -> py::object {
            Buffer buffer = self.allocate(size_bytes);
            return buffer.data == nullptr ? py::object(py::none()) : py::cast(std::move(buffer));
          },
          "Memory that this lane sends from without a copy; None where there is none now.")
      .def("reserve", &Channel::reserve, py::arg("size_bytes"), py::arg("count"),
           py::call_guard<py::gil_scoped_release>(),
           "Have that many slabs of this size ready. False where they cannot be, or the lane has no pool of its own.")
      .def("memory", [](const Channel& self) -> py::object {
        const auto facts = self.memory();
        return facts ? py::object(to_dict(*facts)) : py::object(py::none());
      }, "The numbers of the pool that `allocate` lends from; None where the lane has none of its own.")
      .def("tidy", &Channel::tidy, py::call_guard<py::gil_scoped_release>(),
           "Give back memory that nothing has needed for a while. What has come meanwhile is not told of by fileno().")
      .def("close", &Channel::close, py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("closed", &Channel::closed)
      .def_property_readonly("close_reason", &Channel::close_reason)
      .def_property_readonly("close_end", [](const Channel& self) { return genie::name_of(self.close_end()); })
      .def_property_readonly("name", [](const Channel& self) { return std::string(self.capabilities().name); })
      .def_property_readonly("shares_pages",
                             [](const Channel& self) { return self.capabilities().zero_copy_receive; },
                             "What `allocate` lends is read by the other end where it lies.")
      .def_property_readonly("off_host", [](const Channel& self) { return self.capabilities().off_host; })
      .def("statistics", [](const Channel& self) {
        py::dict row = to_dict(self.statistics());
        for (const auto& [name, value] : self.details()) row[name.c_str()] = value;
        return row;
      }, "What the lane has counted; a dpdk lane adds its session's and its port's counters.");

  bind_stencil(module);
  py::class_<PyListener>(module, "Listener")
      .def("accept",
           [](const PyListener& self) -> py::object {
             auto lane = self.get().accept();
             if (lane == nullptr) return py::none();
             return py::cast(std::make_shared<Channel>(std::move(lane)));
           },
           "The next Channel, or None. Raises: LaneError for an end that was refused.")
      .def("fileno", [](const PyListener& self) { return self.get().wait_fd(); })
      .def_property_readonly("address", [](const PyListener& self) { return self.get().address(); })
      .def("close", &PyListener::close);

  module.def("probe", [] {
    std::map<std::string, std::pair<bool, std::string>> found;
    for (const auto& [name, probe] :
         {std::pair{"shm", probe_shm()}, std::pair{"tcp", probe_tcp()}, std::pair{"cuda_staging", gpu::probe_staging()},
          std::pair{"gpudirect", gpu::probe_gpudirect()}}) {
      found[name] = {probe.usable, probe.reason};
    }
    return found;
  }, "{name: (usable, reason)} of the lanes in this module.");
  module.def(
      "listen",
      [](const std::string& kind, const std::string& address, std::size_t limit_bytes) {
        if (kind == "shm") return std::make_unique<PyListener>(listen_shm(address, shm_options(limit_bytes)));
        if (kind == "tcp") return std::make_unique<PyListener>(listen_tcp(address));
        throw LaneError("no lane is named " + kind);
      },
      py::arg("kind"), py::arg("address"), py::arg("limit_bytes") = 0);
  module.def(
      "connect",
      [](const std::string& kind, const std::string& address, double timeout_s, std::size_t limit_bytes) {
        const std::chrono::milliseconds timeout(static_cast<std::int64_t>(timeout_s * 1e3));
        const py::gil_scoped_release release;
        if (kind == "shm") return std::make_shared<Channel>(connect_shm(address, timeout, shm_options(limit_bytes)));
        if (kind == "tcp") return std::make_shared<Channel>(connect_tcp(address, timeout));
        throw LaneError("no lane is named " + kind);
      },
      py::arg("kind"), py::arg("address"), py::arg("timeout_s"), py::arg("limit_bytes") = 0);
  // Lanes of other modules (genie_dynamo._dpdk) come in capsules, which are empty from then on.
  module.def("adopt_lane", [](const py::capsule& capsule) {
    return std::make_shared<Channel>(unwrap<Lane>(capsule, "genie.Lane"));
  }, py::arg("capsule"));
  module.def("adopt_listener", [](const py::capsule& capsule) {
    return std::make_unique<PyListener>(unwrap<Listener>(capsule, "genie.Listener"));
  }, py::arg("capsule"));
  module.def("inproc", [] {
    auto [left, right] = make_inproc();
    return py::make_tuple(std::make_shared<Channel>(std::move(left)), std::make_shared<Channel>(std::move(right)));
  }, "Both ends of an inproc lane.");
}

}  // namespace genie
