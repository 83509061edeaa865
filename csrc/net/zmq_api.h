// libzmq through its stable C ABI, found at run time: no header, no package and none of its code at build time.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace fastee::net {

struct alignas(void*) ZmqMsg {  // zmq_msg_t: 64 opaque bytes, fixed by the ABI
  unsigned char opaque[64];
};

struct ZmqApi {
  void (*version)(int*, int*, int*);
  int (*error)();
  const char* (*strerror)(int);
  int (*has)(const char*);
  void* (*ctx_new)();
  int (*ctx_set)(void*, int, int);
  int (*ctx_term)(void*);
  void* (*socket)(void*, int);
  int (*close)(void*);
  int (*bind)(void*, const char*);
  int (*connect)(void*, const char*);
  int (*setsockopt)(void*, int, const void*, size_t);
  int (*getsockopt)(void*, int, void*, size_t*);
  int (*socket_monitor)(void*, const char*, int);
  int (*msg_init)(ZmqMsg*);
  int (*msg_init_size)(ZmqMsg*, size_t);
  int (*msg_init_data)(ZmqMsg*, void*, size_t, void (*)(void*, void*), void*);
  void* (*msg_data)(ZmqMsg*);
  size_t (*msg_size)(const ZmqMsg*);
  int (*msg_more)(const ZmqMsg*);
  int (*msg_send)(ZmqMsg*, void*, int);
  int (*msg_recv)(ZmqMsg*, void*, int);
  int (*msg_close)(ZmqMsg*);
  int (*curve_keypair)(char*, char*);
  int (*curve_public)(char*, const char*);
  std::string path;  // of the copy that serves
};

// The library that serves this process, loaded once and never unloaded: FASTEE_LIBZMQ (set but unusable is an error, not a step down),
// then `candidates` (the pyzmq wheel's copy), then the system's libzmq.so.5. Needs 4.3 <= version < 5 with CURVE. Throws
// std::runtime_error with what was tried and why each failed.
const ZmqApi& load_zmq(const std::vector<std::string>& candidates);

}  // namespace fastee::net
