// What raw libzmq costs: a ROUTER that answers every message with 64 bytes and a DEALER that sends it, two contexts over loopback, nothing of
// ours between. The benchmark's yardstick for the whole runtime.
#pragma once
#include <cstddef>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "net/zmq_api.h"

namespace fastee::net {

class RawEcho {
 public:
  RawEcho(const ZmqApi& api, size_t bytes) : api_(api), bytes_(bytes, 1), contexts_{api.ctx_new(), api.ctx_new()} {
    router_ = api.socket(contexts_[0], 6), dealer_ = api.socket(contexts_[1], 5);
    char at[128];
    size_t size = sizeof at;
    if (api.bind(router_, "tcp://127.0.0.1:*") != 0 || api.getsockopt(router_, 32, at, &size) != 0 || api.connect(dealer_, at) != 0)
      throw std::runtime_error(std::string("cluster: the raw echo cannot start: ") + api.strerror(api.error()));
    server_ = std::thread([this] { serve(); });
  }
  ~RawEcho() {
    send(dealer_, "q", 1, 0);
    server_.join();
    for (void* s : {dealer_, router_}) api_.close(s);
    for (void* c : contexts_) api_.ctx_term(c);
  }
  RawEcho(const RawEcho&) = delete;
  RawEcho& operator=(const RawEcho&) = delete;

  // One round trip; returns the bytes of the answer.
  size_t trip() {
    ZmqMsg m;
    api_.msg_init_data(&m, bytes_.data(), bytes_.size(), [](void*, void*) {}, nullptr);
    api_.msg_send(&m, dealer_, 0);
    return receive(dealer_);
  }

 private:
  void send(void* socket, const void* data, size_t size, int flags) {
    ZmqMsg m;
    api_.msg_init_size(&m, size);
    std::char_traits<char>::copy(static_cast<char*>(api_.msg_data(&m)), static_cast<const char*>(data), size);
    api_.msg_send(&m, socket, flags);
  }
  size_t receive(void* socket) {
    ZmqMsg m;
    api_.msg_init(&m);
    api_.msg_recv(&m, socket, 0);
    const size_t size = api_.msg_size(&m);
    api_.msg_close(&m);
    return size;
  }
  void serve() {
    const std::string answer(64, 'a');
    for (;;) {
      ZmqMsg id;
      api_.msg_init(&id);
      api_.msg_recv(&id, router_, 0);
      const bool quit = receive(router_) == 1;
      if (quit) {
        api_.msg_close(&id);
        return;
      }
      api_.msg_send(&id, router_, 2);
      send(router_, answer.data(), answer.size(), 0);
    }
  }

  const ZmqApi& api_;
  std::vector<char> bytes_;
  void* contexts_[2];
  void *router_ = nullptr, *dealer_ = nullptr;
  std::thread server_;
};

}  // namespace fastee::net
