// F2. One thread per process that looks after all communicators with a device.
#pragma once

namespace meshring {

class Watched {
 public:
  virtual ~Watched() = default;
  virtual void look() = 0;  // never waits
};

// After unwatch() returns, nothing looks any more.
void watch(Watched* backend);
void unwatch(Watched* backend);

}  // namespace meshring
