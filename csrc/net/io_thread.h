// Everything of the cluster that has a socket or a timer: connections, heartbeats and membership, emulated or paced links, arrival checks and
// deadlines. It is driven by whoever has time: the consumer while it waits, else a thread of its own, so that a busy interpreter delays none of
// it and an answer wakes nobody but the one who waits for it (over loopback each switch of threads costs 20 to 50 us, 2026-11).
#pragma once
#include <array>
#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "net/buffers.h"
#include "net/frame.h"
#include "net/lane.h"
#include "net/queue.h"
#include "net/zmq_api.h"

namespace fastee::net {

struct Config {
  std::string name;                        // this process's id at its peers
  std::array<uint8_t, 16> fingerprint{};   // of the model; frames of another one are answered with the reason
  uint64_t incarnation = 0;                // the `sender` of everything that leaves
  int machine = 0;
  bool node = false;                       // judges arriving tasks; greets and heartbeats whoever said HELLO
  std::string hello;                       // JSON said on every connection made, and in answer to a HELLO
  uint64_t max_payload = kMaxPayload;
  uint64_t peer_bytes = 2 * kMaxPayload;   // what one peer may have here unreleased
  int peer_tasks = 256;                    // tasks of one peer that the consumer has not released
  int64_t beat_ns = 100'000'000, down_ns = 800'000'000, give_up_ns = 1'000'000'000;
  std::map<int, Link> links;               // from this machine to the others; missing: unshaped
  std::string public_key, secret_key;      // Z85; empty: no CURVE
  std::map<std::array<uint8_t, 32>, std::string> allowed;  // public keys that may connect, with a name for messages
};

// One hop of one attempt of a task.
struct TaskKey {
  uint64_t task = 0, origin = 0;
  uint16_t hops = 0;
  auto operator<=>(const TaskKey&) const = default;
};
inline TaskKey key_of(const Frame& f) { return {f.task, f.origin, f.hops}; }
// One attempt of a task: the high byte of its hops counts them.
inline TaskKey attempt_of(const Frame& f) { return {f.task, f.origin, static_cast<uint16_t>(f.hops >> 8)}; }

struct Event {
  enum class Type {
    kFrame,      // frame, payload
    kUp, kDown,  // a peer that this side connected to
    kLost,       // ticket, key: not delivered, its peer is down or stayed full
    kSent,       // machine, bytes, ns, at, key: a task crossed a shaped link and was there
    kAnswered,   // key (an attempt): its deadline came first, the armed answer is on its way
    kBad,        // text: bytes that were ignored
    kKeyRefused, // text: this side's handshake failed
    kFailed,     // text: the thread ended
  };
  Type type = Type::kFrame;
  std::string peer, text;
  Frame frame;
  Buffer payload;
  std::shared_ptr<Account> account;
  TaskKey key;
  uint64_t ticket = 0;
  int machine = 0;
  int64_t bytes = 0, ns = 0, at = 0;
  ~Event() { settle(); }
  // The consumer is done with the task (or dropped the event): its peer may send another.
  void settle() {
    if (account && type == Type::kFrame) {
      account->frames.fetch_sub(1, std::memory_order_relaxed);
      if (frame.kind == Kind::kTask) account->tasks.fetch_sub(1, std::memory_order_relaxed);
    }
    account.reset();
  }
};

struct Counters {
  std::atomic<int64_t> frames_in{0}, frames_out{0}, chunks_out{0}, bytes_out{0}, bad{0}, foreign{0}, late{0}, over_credit{0}, answered{0}, lost{0},
      beats{0}, keys_refused{0};
};

class IoThread {
 public:
  // Opens the context and, with keys, the handler that admits only `allowed` ones, before any socket can be reached. Throws
  // std::runtime_error when libzmq refuses.
  IoThread(const ZmqApi& api, Config config);
  ~IoThread();  // stop()

  // Listens on two free ports of `host` (control, bulk) and returns them; before start() only.
  std::array<int, 2> bind(const std::string& host, std::array<int, 2> wanted = {});
  void start();
  // Ends the thread and closes everything without lingering; undelivered payloads are let go. Repeatable.
  void stop();

  // From any thread, never waiting. A machine without a link is reached unshaped.
  void connect(std::string peer, int machine, std::string host, int control_port, int bulk_port, std::string server_key);
  void disconnect(std::string peer);
  // Puts a frame on the way. The sender, the time left at departure (from `deadline`, this machine's steady clock) and the checksum are
  // filled in when it leaves. `keyed`: not sent when an armed answer for its task was; it settles that task.
  void send(std::unique_ptr<Outgoing> out);
  // Keeps an answer ready: it is sent when waiting longer would bring it too late over its link, unless the task is settled before.
  void arm(std::unique_ptr<Outgoing> out);
  void set_beat(std::string json);

  // For one consumer thread. The next event; null when there is none.
  std::unique_ptr<Event> next() { return events_.pop(); }
  bool idle() const { return events_.empty(); }  // no event waits
  // Does the thread's work until there is an event, `wake`, something readable on `watched` (-1: none) or `timeout_ns` passed. For the first
  // `spin_ns` it looks again and again, because waking a sleeper on an idle core takes longer than an answer.
  void wait(int64_t timeout_ns, int watched, int64_t spin_ns = 0);
  void wake();

  const Counters& counters() const { return counters_; }
  const Config& config() const { return config_; }

 private:
  struct Impl;
  Config config_;
  Counters counters_;
  Queue<Event> events_;
  Bell events_bell_;
  std::atomic<bool> woken_{false};
  // Who sleeps on the sockets. Whoever touches one holds `Impl::work`; kClosed is final.
  enum Driver { kNobody, kThread, kConsumer, kClosed };
  std::atomic<int> driver_{kNobody};
  std::atomic<bool> wanted_{false};  // the consumer waits for the seat
  Bell driver_bell_;
  Alarm lease_;  // wakes the thread, to drive
  std::unique_ptr<Impl> impl_;
  std::thread thread_;
};

int64_t steady_ns();

std::string client_peer(uint64_t origin);  // the name of the client with that incarnation
int node_of(const std::string& peer);      // the index in a node's name ("n3", "n3:<incarnation>"), -1 for anybody else

}  // namespace fastee::net
