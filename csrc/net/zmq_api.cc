#include "net/zmq_api.h"

#include <dlfcn.h>

#include <cstdlib>
#include <mutex>
#include <optional>
#include <stdexcept>

namespace fastee::net {
namespace {

// The copy at `path` into `api`; the reason when it will not do.
std::string try_load(const std::string& path, ZmqApi* api) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return dlerror();
  std::string missing;
  const auto find = [&](const char* name, auto& pointer) {
    void* found = dlsym(library, name);
    if (found == nullptr) missing += std::string(missing.empty() ? "lacks " : ", ") + name;
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(found);
  };
  find("zmq_version", api->version), find("zmq_errno", api->error), find("zmq_strerror", api->strerror), find("zmq_has", api->has);
  find("zmq_ctx_new", api->ctx_new), find("zmq_ctx_set", api->ctx_set), find("zmq_ctx_term", api->ctx_term);
  find("zmq_socket", api->socket), find("zmq_close", api->close), find("zmq_bind", api->bind), find("zmq_connect", api->connect);
  find("zmq_setsockopt", api->setsockopt), find("zmq_getsockopt", api->getsockopt);
  find("zmq_socket_monitor", api->socket_monitor);
  find("zmq_msg_init", api->msg_init), find("zmq_msg_init_size", api->msg_init_size), find("zmq_msg_init_data", api->msg_init_data);
  find("zmq_msg_data", api->msg_data), find("zmq_msg_size", api->msg_size), find("zmq_msg_more", api->msg_more);
  find("zmq_msg_send", api->msg_send), find("zmq_msg_recv", api->msg_recv), find("zmq_msg_close", api->msg_close);
  find("zmq_curve_keypair", api->curve_keypair), find("zmq_curve_public", api->curve_public);
  if (!missing.empty()) return missing;
  int major = 0, minor = 0, patch = 0;
  api->version(&major, &minor, &patch);
  if (major != 4 || minor < 3)
    return "is version " + std::to_string(major) + "." + std::to_string(minor) + "." + std::to_string(patch) + ", needed is 4.3 or newer, below 5";
  if (!api->has("curve")) return "was built without CURVE";
  Dl_info info{};
  api->path = dladdr(reinterpret_cast<void*>(api->ctx_new), &info) && info.dli_fname ? info.dli_fname : path;
  return "";
}

}  // namespace

const ZmqApi& load_zmq(const std::vector<std::string>& candidates) {
  static std::mutex mutex;
  static std::optional<ZmqApi> loaded;
  const std::lock_guard<std::mutex> lock(mutex);
  if (loaded) return *loaded;
  std::vector<std::string> paths;
  const char* forced = std::getenv("FASTEE_LIBZMQ");
  if (forced != nullptr && *forced) {
    paths = {forced};
  } else {
    paths = candidates;
    paths.push_back("libzmq.so.5");
  }
  std::string tried;
  for (const std::string& path : paths) {
    ZmqApi api{};
    const std::string why = try_load(path, &api);
    if (why.empty()) return loaded.emplace(std::move(api));
    tried += "\n  " + path + ": " + why;
  }
  throw std::runtime_error("cluster: libzmq cannot be loaded; `pip install pyzmq`, or install libzmq5" +
                           std::string(forced && *forced ? ", or unset FASTEE_LIBZMQ" : "") + ". Tried:" + tried);
}

}  // namespace fastee::net
