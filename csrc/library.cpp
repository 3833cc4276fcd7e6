#include "library.hpp"

#include <dlfcn.h>
#include <link.h>

namespace meshring {

Library::Library(const std::string& name) : handle_(dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL)) {
  if (!handle_) {
    const char* text = dlerror();
    why_ = text ? text : "dlopen failed";
    return;
  }
  link_map* map = nullptr;
  if (dlinfo(handle_, RTLD_DI_LINKMAP, &map) == 0 && map && map->l_name) path_ = map->l_name;
  if (path_.empty()) path_ = name;
}

void* Library::find(const char* symbol) const { return handle_ ? dlsym(handle_, symbol) : nullptr; }

}  // namespace meshring
