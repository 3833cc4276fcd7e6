// F5. The Python classes World, Communicator and Work.
#pragma once

#include <pybind11/pybind11.h>

#include <deque>
#include <memory>
#include <utility>
#include <vector>

#include "bind_arguments.hpp"
#include "bind_python.hpp"
#include "communicator.hpp"

namespace meshring {

class PyWorld {
 public:
  PyWorld(std::shared_ptr<Segment> segment, int rank, bool threads, double timeout);
  ~PyWorld();
  std::shared_ptr<World> world;
};

class PyWork;

// What _core.Communicator holds.
class PyCommunicator {
 public:
  PyCommunicator(const PyWorld& world, double timeout);
  explicit PyCommunicator(std::unique_ptr<Communicator> c) : c(std::move(c)) {}
  ~PyCommunicator();
  Communicator& live() const;  // or Error(usage)

  int64_t packed_bytes = 0;  // copied because inputs were not contiguous
  bool busy = false;         // a thread is inside a call
  int group_depth = 0;
  std::vector<py::object> group;          // PyWork of the open group
  std::vector<py::object> kept;           // arrays that others may still read
  std::vector<Call> device_group;         // sends and receives of the open group that are on a GPU
  std::vector<py::object> device_arrays;  // theirs
  // Arrays on other streams than CuPy's current one, until the GPU is done with them.
  std::deque<std::pair<std::shared_ptr<Pending>, py::object>> lent;
  std::vector<std::pair<void*, py::object>> streams;  // kept alive: the watchdog looks at them
  void* last_stream = nullptr;
  void keep_stream(void* handle, py::object stream);
  void harvest();
  int dropped = 0;                  // Works that were let go before they were done
  int waiting = 0;                  // threads inside Work.wait()
  std::unique_ptr<Communicator> c;  // the last member: its threads end before the arrays go
};

class PyWork {
 public:
  ~PyWork();
  py::object wait(py::object timeout);
  bool done();
  py::object result_now();  // None while it runs

  std::shared_ptr<Pending> pending;
  py::object communicator;
  py::object result;
  py::tuple arrays;
  bool harvested = false;  // somebody has seen how it ended
};

// Python's exception for an Error; the text is complete.
void set_python_error(const Error& error);
// The same for the parts that have no door: `where` is put in front.
void set_python_error(const Error& error, const std::string& where);

void bind_communicator(py::module_& m);

}  // namespace meshring
