#include "net/io_thread.h"

#include <poll.h>
#include <sched.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <deque>
#include <functional>
#include <queue>
#include <set>
#include <stdexcept>
#include <unordered_map>
#include <utility>

#include "net/crc32c.h"
#include "net/inbox.h"

namespace fastee::net {

int64_t steady_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

std::string client_peer(uint64_t origin) {
  char name[24];
  std::snprintf(name, sizeof name, "c:%016llx", static_cast<unsigned long long>(origin));
  return name;
}

int node_of(const std::string& peer) {
  const size_t end = std::min(peer.find(':'), peer.size());
  if (end < 2 || end > 5 || peer[0] != 'n') return -1;
  int index = 0;
  for (size_t i = 1; i < end; ++i) {
    if (peer[i] < '0' || peer[i] > '9') return -1;
    index = index * 10 + (peer[i] - '0');
  }
  return index;
}

namespace {

// libzmq's numbers (zmq.h): part of its ABI.
enum Socket { kPair = 0, kRep = 4, kDealer = 5, kRouter = 6 };
enum SendFlag { kDontWait = 1, kSendMore = 2 };
enum PollFlag { kPollIn = 1 };
enum Option {
  kRoutingId = 5, kLinger = 17, kReconnectIvl = 18, kReconnectIvlMax = 21, kMaxMsgSize = 22, kSendHwm = 23, kReceiveHwm = 24, kFd = 14, kEvents = 15, kLastEndpoint = 32,
  kRouterMandatory = 33, kImmediate = 39, kCurveServer = 47, kCurvePublicKey = 48, kCurveSecretKey = 49, kCurveServerKey = 50, kZapDomain = 55,
  kRouterHandover = 56, kHandshakeIvl = 66, kHeartbeatIvl = 75, kHeartbeatTimeout = 77, kConnectTimeout = 79, kZapEnforceDomain = 93,
};
enum MonitorEvent : uint16_t { kDisconnected = 0x200, kHandshakeLost = 0x800, kHandshakeSucceeded = 0x1000, kHandshakeFailed = 0x800 | 0x2000 | 0x4000 };
// A server that does not know this side's view of its key just hangs up, as does a peer that dies, or a proxy whose peer is dead, during the handshake.
constexpr int kHangUps = 3;
constexpr int kMaxSockets = 2;  // context option

constexpr int kBulkWindow = 8, kControlWindow = 1000;
constexpr size_t kControlBytes = 4096;    // frames below it, tasks apart, have the control connection
constexpr size_t kCopiedBytes = 1024;     // a payload below it is cheaper to copy than to keep
constexpr int64_t kRetryNs = 1'000'000, kIdlePieceNs = 5'000'000'000, kListenerGoneNs = 5'000'000'000;
constexpr int64_t kLeaseNs = 2'000'000;  // how long the consumer may be away before the thread drives; a task's way through a node is shorter
constexpr int64_t kArmMarginNs = 500'000;  // a timer's lateness and the way through two processes
constexpr int64_t kFramesOfAPeer = 16384;  // control frames that the consumer has not taken

// libzmq hands a payload to its own thread through its own pipes, which order what was done to it; TSan cannot see them and is told.
#ifdef __SANITIZE_THREAD__
extern "C" void __tsan_acquire(void*);
extern "C" void __tsan_release(void*);
void hand_over(void* payload) { __tsan_release(payload); }
void take_over(void* payload) { __tsan_acquire(payload); }
#else
void hand_over(void*) {}
void take_over(void*) {}
#endif

// A ZeroMQ message that is closed exactly once; a sent one belongs to libzmq.
class Message {
 public:
  explicit Message(const ZmqApi& api) : api_(&api) { api.msg_init(&m_); }
  Message(const ZmqApi& api, const void* data, size_t size) : api_(&api) {
    if (api.msg_init_size(&m_, size) != 0) throw std::bad_alloc();
    if (size) std::memcpy(api.msg_data(&m_), data, size);
  }
  // Part of a payload without a copy: libzmq lets go of it from its own thread when the bytes are in the kernel.
  Message(const ZmqApi& api, Payload* payload, size_t offset, size_t size) : api_(&api) {
    payload->hold();
    hand_over(payload);
    const auto release = [](void*, void* hint) {
      take_over(hint);
      static_cast<Payload*>(hint)->drop();
    };
    if (api.msg_init_data(&m_, const_cast<uint8_t*>(payload->data()) + offset, size, release, payload) != 0) {
      payload->drop();
      throw std::bad_alloc();
    }
  }
  Message(Message&& other) noexcept : api_(other.api_), m_(other.m_) { other.api_->msg_init(&other.m_); }
  ~Message() { api_->msg_close(&m_); }

  bool send(void* socket, int flags) { return api_->msg_send(&m_, socket, flags) >= 0; }
  bool receive(void* socket) { return api_->msg_recv(&m_, socket, kDontWait) >= 0; }
  bool more() const { return api_->msg_more(&m_) != 0; }
  Part part() const { return {static_cast<const uint8_t*>(api_->msg_data(const_cast<ZmqMsg*>(&m_))), api_->msg_size(&m_)}; }
  std::string text() const { return {reinterpret_cast<const char*>(part().data), part().size}; }

 private:
  const ZmqApi* api_;
  ZmqMsg m_;
};

struct Command {
  enum class Type { kConnect, kDisconnect, kSend, kArm, kBeat } type;
  std::string peer, host, key;
  int machine = 0, control_port = 0, bulk_port = 0;
  std::unique_ptr<Outgoing> out;
};

}  // namespace

struct IoThread::Impl {
  struct Peer {
    std::string name, host, server_key;
    int machine = 0, control_port = 0, bulk_port = 0;
    void *control = nullptr, *control_monitor = nullptr, *bulk = nullptr, *bulk_monitor = nullptr;
    bool connected = false, up = false, told = false;
    int hang_ups = 0;
    int64_t seen = 0;
    uint64_t connection = 0;  // grows with every bulk connection
  };
  enum class Source { kRouterControl, kRouterBulk, kControl, kBulk, kControlMonitor, kBulkMonitor, kZap };
  struct Watched {
    void* socket;
    Source source;
    Peer* peer;
    bool look = true;  // poll said so, or it was sent on: a send swallows the signal of a message that came meanwhile
  };
  struct Armed {
    int64_t due;
    std::unique_ptr<Outgoing> out;
  };

  const ZmqApi& api;
  IoThread& io;
  Config& config;
  Counters& counters;
  void* context;
  void *zap = nullptr, *router[2] = {nullptr, nullptr};
  Queue<Command> commands;
  std::mutex work;  // whoever touches a socket or any of the below holds it, and never while asleep
  std::atomic<bool> stopping{false};
  Alarm timer;
  int64_t timer_set = kNever;
  int64_t leased = 0, lease_set = kNever;  // when the thread shall take over (0: somebody drives), when it is woken
  bool started = false;
  bool changed = true;  // the set of sockets: the poll list must be made anew
  std::vector<pollfd> fds;
  std::vector<Watched> watched;
  std::map<std::string, std::unique_ptr<Peer>> peers;
  std::unordered_map<std::string, int64_t> listeners;  // said HELLO to us -> when a beat last got through
  Inbox inbox;
  std::map<int, Lane> lanes;  // by medium
  std::map<std::pair<std::string, bool>, std::deque<Delivery>> stuck;  // peer's queue was full; in order
  std::map<TaskKey, Armed> armed;
  std::priority_queue<std::pair<int64_t, TaskKey>, std::vector<std::pair<int64_t, TaskKey>>, std::greater<>> alarms;
  std::set<TaskKey> answered;
  std::deque<TaskKey> answered_order;
  std::string beat_json;
  int64_t next_beat = 0, last_tick = 0, next_sweep = 0;
  uint64_t monitors = 0;

  Impl(const ZmqApi& z, IoThread& owner)
      : api(z), io(owner), config(owner.config_), counters(owner.counters_), context(z.ctx_new()),
        inbox(config.fingerprint, config.max_payload, config.peer_bytes) {
    if (context == nullptr) throw std::runtime_error("cluster: no ZeroMQ context: " + error());
    api.ctx_set(context, kMaxSockets, 4096);
    if (!config.secret_key.empty()) {
      // Without a handler CURVE encrypts but admits everybody: it stands before any socket can be reached, or nothing starts.
      zap = check(api.socket(context, kRep), "ZAP socket");
      require(api.bind(zap, "inproc://zeromq.zap.01"), "bind the ZAP handler");
      watch();
    }
  }

  ~Impl() {
    for (auto& [name, peer] : peers) close_peer(*peer);
    stuck.clear(), armed.clear(), lanes.clear();
    for (void* s : {router[0], router[1], zap})
      if (s) api.close(s);
    api.ctx_term(context);
  }

  std::string error() const { return api.strerror(api.error()); }
  void* check(void* made, const char* what) const {
    if (made == nullptr) throw std::runtime_error(std::string("cluster: ") + what + ": " + error());
    return made;
  }
  void require(int status, const std::string& what) const {
    if (status != 0) throw std::runtime_error("cluster: " + what + ": " + error());
  }
  void watch() { changed = true; }

  // sockets

  void set(void* s, int option, int value) const { require(api.setsockopt(s, option, &value, sizeof value), "socket option " + std::to_string(option)); }
  void set(void* s, int option, const std::string& value) const {
    require(api.setsockopt(s, option, value.data(), value.size()), "socket option " + std::to_string(option));
  }

  void* open(int type, bool bulk, const std::string& server_key) {
    void* s = check(api.socket(context, type), "socket");
    set(s, kLinger, 0);
    const auto most = static_cast<int64_t>(bulk ? std::max<uint64_t>(config.max_payload, kMaxHeader) : 1 << 20);
    require(api.setsockopt(s, kMaxMsgSize, &most, sizeof most), "MAXMSGSIZE");
    set(s, kSendHwm, bulk ? kBulkWindow : kControlWindow);
    set(s, kReceiveHwm, bulk ? kBulkWindow : kControlWindow);
    set(s, kHandshakeIvl, 2000);  // who connects and says nothing keeps a connection no longer than this
    if (!bulk) {
      set(s, kHeartbeatIvl, 200);
      set(s, kHeartbeatTimeout, 600);
    }
    if (type == kRouter) {
      set(s, kRouterMandatory, 1);
      // A peer that was stopped meets its old connection and the new one at once when it runs again. Without handover the ROUTER
      // may keep the old one for that id and ignore the new one silently, for good (seen in 2 of 4 runs).
      set(s, kRouterHandover, 1);
    } else {
      set(s, kRoutingId, config.name);
      set(s, kImmediate, 1);
      // A connection attempt into a cut link hangs on the first lost packet; a fresh one soon after the heal is what recovers in time.
      set(s, kConnectTimeout, 500);
      set(s, kReconnectIvl, 100);
    }
    if (!config.secret_key.empty()) {
      set(s, kCurveSecretKey, config.secret_key);
      if (type == kRouter) {
        set(s, kCurveServer, 1);
        set(s, kZapDomain, std::string("fastee"));
        set(s, kZapEnforceDomain, 1);
      } else {
        set(s, kCurvePublicKey, config.public_key);
        set(s, kCurveServerKey, server_key);
      }
    }
    return s;
  }

  void* open_monitor(void* s) {
    const std::string at = "inproc://fastee-monitor-" + std::to_string(++monitors);
    require(api.socket_monitor(s, at.c_str(), kDisconnected | kHandshakeSucceeded | kHandshakeFailed), "monitor");
    void* pair = check(api.socket(context, kPair), "monitor socket");
    require(api.connect(pair, at.c_str()), "connect the monitor");
    return pair;
  }

  void close_pair(void*& s, void*& monitor) {
    if (s == nullptr) return;
    api.socket_monitor(s, nullptr, 0);
    api.close(monitor);
    api.close(s);
    s = monitor = nullptr;
    watch();
  }

  static std::string endpoint(const std::string& host, int port) {
    return "tcp://" + (host.find(':') == std::string::npos ? host : "[" + host + "]") + ":" + (port ? std::to_string(port) : "*");
  }

  void open_bulk(Peer& p) {
    p.bulk = open(kDealer, true, p.server_key);
    p.bulk_monitor = open_monitor(p.bulk);
    ++p.connection;
    require(api.connect(p.bulk, endpoint(p.host, p.bulk_port).c_str()), "connect to " + p.name);
    watch();
  }

  void close_peer(Peer& p) {
    close_pair(p.bulk, p.bulk_monitor);
    close_pair(p.control, p.control_monitor);
  }

  // the loop

  // The thread: drives until the consumer wants to, then sleeps until that one has been away for a while.
  void run() {
    try {
      for (bool due = true; !stopping.load(std::memory_order_acquire);) {
        int nobody = kNobody;
        if (due && !io.wanted_.load(std::memory_order_seq_cst) && io.driver_.compare_exchange_strong(nobody, kThread)) {
          drive(kNever, -1, 0, [this] { return io.wanted_.load(std::memory_order_seq_cst); });
          io.driver_.store(kNobody, std::memory_order_seq_cst);
          io.events_bell_.ring();
          continue;  // the consumer may have given up meanwhile
        }
        pollfd lease{io.lease_.fd(), POLLIN, 0};
        ::poll(&lease, 1, -1);
        due = expired();
      }
    } catch (const std::exception& failure) {  // no more file descriptors, no memory
      auto event = std::make_unique<Event>();
      event->type = Event::Type::kFailed, event->text = failure.what();
      emit(std::move(event));
    }
  }

  // Works and sleeps in turn until `enough`, `until`, stop() or something readable on `file`.
  template <typename Enough>
  void drive(int64_t until, int file, int64_t spin_until, Enough enough) {
    const bool consumer = io.driver_.load(std::memory_order_relaxed) == kConsumer;
    std::unique_lock<std::mutex> lock(work);
    lease(kNever);
    for (bool readable = false; !readable;) {
      const bool idle = turn();
      const int64_t now = steady_ns();
      if (enough() || now >= until || stopping.load(std::memory_order_acquire)) break;
      if (!idle) continue;
      fds[kBell].fd = io.driver_bell_.fd(), fds[kConsumerBell].fd = consumer ? io.events_bell_.fd() : -1, fds[kFile].fd = file;
      if (now < spin_until) {
        lock.unlock();
        sched_yield();  // libzmq's thread and the peer need a core too
        const int count = ::poll(fds.data(), fds.size(), 0);
        lock.lock();
        readable = count > 0 && heed_poll();
        continue;
      }
      io.driver_bell_.prepare();
      if (consumer) io.events_bell_.prepare();
      if (commands.empty() && !enough() && !stopping.load(std::memory_order_acquire)) {
        const timespec limit{(until - now) / 1'000'000'000, (until - now) % 1'000'000'000};
        lock.unlock();
        const int count = ppoll(fds.data(), fds.size(), until == kNever ? nullptr : &limit, nullptr);
        lock.lock();
        readable = count > 0 && heed_poll();
      }
      if (consumer) io.events_bell_.finish();
      io.driver_bell_.finish();
    }
    lease(consumer ? std::min(steady_ns() + kLeaseNs, timer_set) : kNever);
  }

  // Notes which sockets poll named; true when the file, too, is readable. Only the driver makes the lists anew, so they fit.
  bool heed_poll() {
    for (size_t i = 0; i < watched.size(); ++i) watched[i].look = watched[i].look || fds[kSockets + i].revents;
    return fds[kFile].fd >= 0 && fds[kFile].revents != 0;
  }

  // Does what can be done now; true when nothing is left. Not more than some rounds: the driver may have something else to do.
  bool turn() {
    for (int round = 0; round < 4; ++round) {
      obey_all();
      if (changed) list_sockets();
      bool idle = true;
      for (size_t i = 0; i < watched.size() && !changed; ++i) {  // a handler may close sockets: then all is listed and looked at anew
        if (!std::exchange(watched[i].look, false) || !readable(watched[i].socket)) continue;
        const Watched w = watched[i];
        watched[i].look = true;  // it may have more than one visit takes
        drain(w.socket, w), idle = false;
      }
      if (idle && !changed && commands.empty()) return true;
    }
    return false;
  }

  void obey_all() {
    while (auto command = commands.pop()) obey(*command);
    set_timer(tick(steady_ns()));
  }

  // From any thread: done here if nobody is at work just now, else left to who is; so is what came meanwhile.
  void submit(std::unique_ptr<Command> c) {
    commands.push(std::move(c));
    const std::unique_lock<std::mutex> lock(work, std::try_to_lock);
    if (lock && started) {
      obey_all();
      if (!changed && std::none_of(watched.begin(), watched.end(), [this](const Watched& w) { return w.look && readable(w.socket); })) return;
    }
    io.driver_bell_.ring();
  }

  bool readable(void* s) const {
    int events = 0;
    size_t size = sizeof events;
    require(api.getsockopt(s, kEvents, &events, &size), "EVENTS");
    return events & kPollIn;
  }

  enum Place { kBell, kTimer, kConsumerBell, kFile, kSockets };  // in `fds`
  void list_sockets() {
    changed = false;
    fds.assign(kSockets, {-1, POLLIN, 0});
    fds[kTimer].fd = timer.fd();
    watched.clear();
    const auto add = [&](void* s, Source source, Peer* peer) {
      if (s == nullptr) return;
      int fd = -1;
      size_t size = sizeof fd;
      require(api.getsockopt(s, kFd, &fd, &size), "FD");
      fds.push_back({fd, POLLIN, 0});
      watched.push_back({s, source, peer});
    };
    add(zap, Source::kZap, nullptr);
    add(router[0], Source::kRouterControl, nullptr);
    for (auto& [name, p] : peers) {
      add(p->control_monitor, Source::kControlMonitor, p.get());
      add(p->control, Source::kControl, p.get());
    }
    for (auto& [name, p] : peers) {
      add(p->bulk_monitor, Source::kBulkMonitor, p.get());
      add(p->bulk, Source::kBulk, p.get());
    }
    add(router[1], Source::kRouterBulk, nullptr);
  }

  void set_timer(int64_t due) {
    if (due < leased) lease(due);
    if (due == timer_set && due > steady_ns()) return;
    timer_set = due;
    timer.set(due);
  }

  // When the thread shall take over: kNever while somebody drives. The timer is not put off with every visit, which costs 3 to 5 us on a virtual
  // machine (2026-11): a thread that is woken too early sees that and sleeps on.
  void lease(int64_t due) {
    leased = due == kNever ? 0 : due;
    if (due < lease_set) io.lease_.set(lease_set = due);
  }
  void lease_now() {
    const std::lock_guard<std::mutex> lock(work);
    lease(1);
  }
  // For the thread: whether it is to take over now. If not, it will be woken.
  bool expired() {
    const std::lock_guard<std::mutex> lock(work);
    const bool now = leased && leased <= steady_ns();
    io.lease_.set(lease_set = now || !leased ? kNever : leased);
    return now;
  }

  // Does what is due and returns when it must be called again.
  int64_t tick(int64_t now) {
    if (now - last_tick > config.down_ns / 2)
      for (auto& [name, p] : peers) p->seen = now;  // this process itself stood still: the others' silence proves nothing
    last_tick = now;
    int64_t next = kNever;
    while (!alarms.empty() && alarms.top().first <= now) {
      const auto [due, key] = alarms.top();
      alarms.pop();
      const auto found = armed.find(key);
      if (found == armed.end() || found->second.due != due) continue;
      remember_answered(key);
      ++counters.answered;
      auto event = std::make_unique<Event>();
      event->type = Event::Type::kAnswered, event->key = key;
      emit(std::move(event));
      put(std::move(found->second.out), now);
      armed.erase(found);
    }
    if (!alarms.empty()) next = alarms.top().first;
    if (now >= next_beat) {
      next_beat = now + config.beat_ns;
      beat(now);
    }
    for (auto& [name, p] : peers) {
      judge(*p, now);
      if (p->up) next = std::min(next, p->seen + config.down_ns);
    }
    for (auto& [machine, lane] : lanes) lane.advance(now, [&](Delivery d) { deliver(std::move(d), now); });
    for (auto at = stuck.begin(); at != stuck.end();) {
      auto& queue = at->second;
      while (!queue.empty() && try_deliver(queue.front(), now)) queue.pop_front();
      at = queue.empty() ? stuck.erase(at) : std::next(at);
    }
    if (!stuck.empty()) next = std::min(next, now + kRetryNs);
    if (now >= next_sweep) {
      next_sweep = now + 1'000'000'000;
      if (const int gone = inbox.expire(now, kIdlePieceNs)) bad("", "frame: " + std::to_string(gone) + " frames stopped half-way and were forgotten");
    }
    for (auto& [machine, lane] : lanes) next = std::min(next, lane.next());
    return std::min({next, next_beat, next_sweep});
  }

  void obey(Command& c) {
    const int64_t now = steady_ns();
    switch (c.type) {
      case Command::Type::kConnect: {
        if (peers.count(c.peer)) break;
        auto p = std::make_unique<Peer>();
        p->name = c.peer, p->host = c.host, p->server_key = c.key;
        p->machine = c.machine, p->control_port = c.control_port, p->bulk_port = c.bulk_port;
        p->control = open(kDealer, false, p->server_key);
        p->control_monitor = open_monitor(p->control);
        if (api.connect(p->control, endpoint(p->host, p->control_port).c_str()) != 0) bad(c.peer, "cluster: cannot connect to " + p->host + ": " + error());
        peers.emplace(c.peer, std::move(p));
        watch();
        break;
      }
      case Command::Type::kDisconnect:
        if (const auto found = peers.find(c.peer); found != peers.end()) {
          close_peer(*found->second);
          inbox.forget(c.peer);
          peers.erase(found);
          watch();
        }
        break;
      case Command::Type::kSend:
        if (c.out->keyed) {
          const TaskKey key = attempt_of(c.out->frame);
          if (answered.count(key)) {
            if (c.out->frame.kind == Kind::kTask) lose(*c.out);  // its credit with the peer is free again
            break;
          }
          armed.erase(key);
        }
        put(std::move(c.out), now);
        break;
      case Command::Type::kArm: {
        const TaskKey key = attempt_of(c.out->frame);
        if (answered.count(key)) break;
        const Link& link = link_to(c.out->machine);
        const int64_t due = c.out->deadline - link.delay_ns() - link.spend(c.out->frame.bytes()) - kArmMarginNs;
        alarms.push({due, key});
        armed[key] = {due, std::move(c.out)};
        break;
      }
      case Command::Type::kBeat:
        beat_json = std::move(c.peer);
        break;
    }
  }

  void remember_answered(const TaskKey& key) {
    answered.insert(key);
    answered_order.push_back(key);
    if (answered_order.size() > 4096) {  // by then its task has long been settled
      answered.erase(answered_order.front());
      answered_order.pop_front();
    }
  }

  void emit(std::unique_ptr<Event> event) {
    io.events_.push(std::move(event));
    io.events_bell_.ring();
  }

  void bad(const std::string& peer, std::string why) {
    if (++counters.bad > 100) return;  // a flood of them must not become a flood of messages
    auto event = std::make_unique<Event>();
    event->type = Event::Type::kBad, event->peer = peer, event->text = std::move(why);
    emit(std::move(event));
  }

  // out

  const Link& link_to(int machine) const {
    static const Link unshaped;
    const auto found = config.links.find(machine);
    return found == config.links.end() ? unshaped : found->second;
  }

  void put(std::unique_ptr<Outgoing> out, int64_t now) {
    Frame& f = out->frame;
    f.sender = config.incarnation;
    f.fingerprint = config.fingerprint;
    out->urgent = f.bytes() < kControlBytes && f.kind != Kind::kTask;
    out->bulk = !out->urgent;
    if (out->machine != config.machine) f.wire_bytes += f.bytes();
    const Link& link = link_to(out->machine);
    Lane& lane = lanes[link.medium < 0 ? out->machine : link.medium];
    lane.push(std::move(out), link, now);
    lane.advance(now, [&](Delivery d) { deliver(std::move(d), now); });
  }

  // A small control frame made here.
  void put_json(Kind kind, const std::string& peer, int machine, const std::string& json, const Frame* about, int64_t now) {
    auto out = std::make_unique<Outgoing>();
    out->peer = peer, out->machine = machine;
    if (about) out->frame.task = about->task, out->frame.origin = about->origin, out->frame.hops = about->hops;
    out->frame.kind = kind;
    out->frame.payload_bytes = json.size();
    out->payload = copied(json.data(), json.size());
    out->payload_crc = crc32c(0, json.data(), json.size());
    put(std::move(out), now);
  }

  void deliver(Delivery d, int64_t now) {
    const auto found = stuck.find({d.out->peer, d.out->bulk});
    if (found != stuck.end()) {  // what follows to the same full peer must not overtake it
      d.give_up = now + config.give_up_ns;
      found->second.push_back(std::move(d));
    } else if (!try_deliver(d, now)) {
      auto key = std::make_pair(d.out->peer, d.out->bulk);
      d.give_up = now + config.give_up_ns;
      stuck[std::move(key)].push_back(std::move(d));
    }
  }

  // True when the piece is through or lost, false when it must be offered again.
  bool try_deliver(Delivery& d, int64_t now) {
    Outgoing& out = *d.out;
    if (out.lost) return true;
    void* s;
    const auto found = peers.find(out.peer);
    if (found != peers.end()) {
      Peer& p = *found->second;
      const bool greeting = out.frame.kind == Kind::kHello || out.frame.kind == Kind::kHeartbeat;
      if (!p.connected || (!p.up && !greeting) || (!d.first && out.connection != p.connection)) return lose(out);
      s = out.bulk ? p.bulk : p.control;
      if (d.first) out.connection = p.connection;
    } else {
      s = router[out.bulk];
      if (s == nullptr) return lose(out);
      Message id(api, out.peer.data(), out.peer.size());
      if (!id.send(s, kDontWait | kSendMore)) return now > d.give_up ? lose(out) : false;
    }
    for (Watched& w : watched) w.look = w.look || w.socket == s;
    uint8_t head[kMaxHeader + kCopiedBytes];
    size_t head_bytes = kChunkBytes;
    if (d.first) {
      if (out.frame.kind == Kind::kTask) out.frame.time_left = out.deadline == kNoDeadline ? kNoDeadline : out.deadline - now;
      head_bytes = encode(out.frame, out.payload_crc, head);
    } else {
      write_chunk_header(head, d.offset);
    }
    // A small frame is one message: a second one costs more than the copy.
    const bool joined = d.first && d.last && d.size < kCopiedBytes;
    if (joined && d.size) std::memcpy(head + head_bytes, out.payload.data(), d.size);
    if (!Message(api, head, head_bytes + (joined ? d.size : 0)).send(s, kDontWait | (joined ? 0 : kSendMore))) return now > d.give_up ? lose(out) : false;
    if (!joined)
      (d.size < kCopiedBytes ? Message(api, out.payload.data() + d.offset, d.size) : Message(api, out.payload.get(), d.offset, d.size)).send(s, kDontWait);
    ++counters.chunks_out;
    counters.bytes_out += static_cast<int64_t>(head_bytes + d.size);
    if (!d.last) return true;
    if (out.frame.kind == Kind::kHeartbeat)
      if (const auto listener = listeners.find(out.peer); listener != listeners.end()) listener->second = now;
    ++counters.frames_out;
    const Link& link = link_to(out.machine);
    if (out.frame.kind == Kind::kTask && link.shaped()) {
      auto event = std::make_unique<Event>();
      event->type = Event::Type::kSent, event->machine = out.machine, event->bytes = static_cast<int64_t>(out.frame.bytes());
      event->ns = link.spend(out.frame.bytes()) + link.delay_ns() + (now - d.due);
      event->at = now, event->key = key_of(out.frame);
      emit(std::move(event));
    }
    return true;
  }

  bool lose(Outgoing& out) {
    out.lost = true;
    ++counters.lost;
    if (out.ticket) {
      auto event = std::make_unique<Event>();
      event->type = Event::Type::kLost, event->peer = out.peer, event->ticket = out.ticket, event->key = key_of(out.frame);
      emit(std::move(event));
    }
    return true;
  }

  // membership

  void beat(int64_t now) {
    if (beat_json.empty()) return;
    for (auto& [name, p] : peers)
      if (p->connected) put_json(Kind::kHeartbeat, name, p->machine, beat_json, nullptr, now), ++counters.beats;
    for (auto at = listeners.begin(); at != listeners.end();) {
      // Whether a listener is still there is known only by trying (try_deliver notes it); for a silent one nothing may pile up.
      if (!stuck.count({at->first, false})) put_json(Kind::kHeartbeat, at->first, 0, beat_json, nullptr, now), ++counters.beats;
      at = now - at->second > kListenerGoneNs ? listeners.erase(at) : std::next(at);
    }
  }

  void judge(Peer& p, int64_t now) {
    const bool up = p.connected && p.seen && now - p.seen < config.down_ns;
    if (up == p.up) return;
    p.up = up;
    if (!up) {
      for (const bool bulk : {false, true})
        if (const auto found = stuck.find({p.name, bulk}); found != stuck.end())
          for (Delivery& d : found->second)
            if (!d.out->lost) lose(*d.out);
    }
    auto event = std::make_unique<Event>();
    event->type = up ? Event::Type::kUp : Event::Type::kDown, event->peer = p.name;
    emit(std::move(event));
  }

  void monitor(Peer& p, bool bulk, uint16_t what, int64_t now) {
    if (what == kHandshakeLost && (config.public_key.empty() || ++p.hang_ups < kHangUps)) return;
    if (what & kHandshakeFailed) {
      ++counters.keys_refused;
      if (std::exchange(p.told, true)) return;  // it tries again ten times a second
      auto event = std::make_unique<Event>();
      event->type = Event::Type::kKeyRefused, event->peer = p.name;
      event->text = what == 0x4000 ? "this process's key is not on its list" : "the keys do not fit, or one side has none";
      emit(std::move(event));
    } else if (what == kHandshakeSucceeded && !bulk) {
      close_pair(p.bulk, p.bulk_monitor);
      open_bulk(p);
    } else if (what == kHandshakeSucceeded) {
      p.connected = true, p.told = false, p.hang_ups = 0, p.seen = 0;
      if (!config.hello.empty()) put_json(Kind::kHello, p.name, p.machine, config.hello, nullptr, now);
      if (!beat_json.empty()) put_json(Kind::kHeartbeat, p.name, p.machine, beat_json, nullptr, now);
    } else if (what == kDisconnected) {
      // A lost bulk connection takes its queued messages with it, so the peer counts as down even when control lives.
      close_pair(p.bulk, p.bulk_monitor);
      inbox.forget(p.name);
      p.connected = false, p.seen = 0;
      judge(p, now);
      if (bulk) open_bulk(p);
    }
  }

  // in

  void drain(void* s, const Watched& w) {
    const int64_t now = steady_ns();
    // A bounded number per socket, so that a flood on one connection cannot starve the others.
    for (int round = 0; round < 64 && !changed; ++round) {
      std::vector<Message> parts;
      parts.reserve(4);
      for (bool more = true; more;) {
        Message m(api);
        if (!m.receive(s)) return;
        more = m.more();
        if (parts.size() < 16) parts.push_back(std::move(m));
      }
      switch (w.source) {
        case Source::kZap:
          answer_zap(parts);
          break;
        case Source::kControlMonitor:
        case Source::kBulkMonitor: {
          uint16_t what = 0;
          if (parts[0].part().size >= 2) std::memcpy(&what, parts[0].part().data, 2);
          monitor(*w.peer, w.source == Source::kBulkMonitor, what, now);
          break;
        }
        case Source::kRouterControl:
        case Source::kRouterBulk:
          take(parts[0].text(), nullptr, w.source == Source::kRouterBulk, parts, 1, now);
          break;
        default:
          take(w.peer->name, w.peer, w.source == Source::kBulk, parts, 0, now);
      }
    }
  }

  void take(const std::string& peer, Peer* own, bool bulk, const std::vector<Message>& messages, size_t skip, int64_t now) {
    Part parts[2] = {};
    const size_t count = messages.size() - skip;
    for (size_t i = 0; i < std::min<size_t>(count, 2); ++i) parts[i] = messages[skip + i].part();
    Arrival arrival;
    std::string why;
    const Inbox::Result result = inbox.take(peer, bulk, parts, count, now, &arrival, &why);
    const Frame& f = arrival.frame;
    if (result == Inbox::Result::kIncomplete) return;
    if (result == Inbox::Result::kBad) return bad(peer, std::move(why));
    if (result == Inbox::Result::kForeign && f.kind != Kind::kRefused) {
      ++counters.foreign;
      if (!config.node) return bad(peer, std::move(why));
      return put_json(Kind::kRefused, peer, machine_of(own, peer), R"({"code":"fingerprint","reason":")" + why + "\"}", &f, now);
    }
    if (result == Inbox::Result::kForeign) arrival.frame.tensor_count = arrival.frame.route_bytes = 0;  // its table was not read
    ++counters.frames_in;
    if (own && (f.kind == Kind::kHello || f.kind == Kind::kHeartbeat)) {
      own->seen = now;
      judge(*own, now);
    }
    const int from = node_of(peer);
    if (config.node && f.kind == Kind::kHello && from < 0) {
      if (listeners.size() < 1024 || listeners.count(peer)) listeners[peer] = now;
      put_json(Kind::kHello, peer, 0, config.hello, nullptr, now);
      if (!beat_json.empty()) put_json(Kind::kHeartbeat, peer, 0, beat_json, nullptr, now);
    }
    if (f.kind == Kind::kHeartbeat && !own && from >= 0) {  // nodes beat over the connection that they opened themselves
      if (const auto found = peers.find("n" + std::to_string(from)); found != peers.end()) {
        found->second->seen = now;
        judge(*found->second, now);
      }
    }
    if (config.node && f.kind == Kind::kTask && !admits(from, arrival, now)) return;
    if (arrival.account->frames.load(std::memory_order_relaxed) > kFramesOfAPeer) return bad(peer, "frame: its sender does not wait for anything");
    auto event = std::make_unique<Event>();
    event->peer = peer;
    event->frame = f;
    event->payload = std::move(arrival.payload);
    event->account = std::move(arrival.account);
    event->account->frames.fetch_add(1, std::memory_order_relaxed);
    if (f.kind == Kind::kTask) event->account->tasks.fetch_add(1, std::memory_order_relaxed);
    emit(std::move(event));
  }

  static int machine_of(const Peer* own, const std::string& peer) { return own ? own->machine : std::max(0, node_of(peer)); }

  // Whether a task is worth handing over: one that is late already is refused here, whatever the compute thread does just now.
  bool admits(int from, const Arrival& a, int64_t now) {
    const Frame& f = a.frame;
    std::string refusal;
    if (f.time_left <= 0 && !(f.flags & kExitsOff)) {
      ++counters.late;
      refusal = R"({"code":"late","reason":"the time was up on arrival"})";
    } else if (a.account->tasks.load(std::memory_order_relaxed) >= config.peer_tasks) {
      ++counters.over_credit;
      refusal = R"({"code":"rejected","reason":"its sender has )" + std::to_string(config.peer_tasks) + R"( tasks here already, more than any credit"})";
    } else {
      return true;
    }
    if (from >= 0 && !beat_json.empty()) put_json(Kind::kCredit, "n" + std::to_string(from), from, beat_json, &f, now);
    put_json(Kind::kRefused, client_peer(f.origin), 0, refusal, &f, now);
    return false;
  }

  // RFC 27: version, request id, domain, address, identity, mechanism, credentials (CURVE: the 32 bytes of the key).
  void answer_zap(const std::vector<Message>& request) {
    std::string status = "400", text = "not on the list", name;
    if (request.size() >= 7 && request[5].text() == "CURVE" && request[6].part().size == 32) {
      std::array<uint8_t, 32> key;
      std::memcpy(key.data(), request[6].part().data, 32);
      if (const auto found = config.allowed.find(key); found != config.allowed.end()) status = "200", text = "OK", name = found->second;
    }
    if (status == "400") ++counters.keys_refused;
    const std::string id = request.size() > 1 ? request[1].text() : "";
    const std::string reply[] = {"1.0", id, status, text, name, ""};
    for (size_t i = 0; i < 6; ++i) Message(api, reply[i].data(), reply[i].size()).send(zap, i < 5 ? kSendMore : 0);
  }
};

IoThread::IoThread(const ZmqApi& api, Config config) : config_(std::move(config)), impl_(std::make_unique<Impl>(api, *this)) {}

IoThread::~IoThread() { stop(); }

std::array<int, 2> IoThread::bind(const std::string& host, std::array<int, 2> wanted) {
  if (thread_.joinable() || impl_ == nullptr) throw std::logic_error("cluster: bind before start");
  std::array<int, 2> ports{};
  for (const bool bulk : {false, true}) {
    void* s = impl_->router[bulk] = impl_->open(kRouter, bulk, "");
    impl_->require(impl_->api.bind(s, Impl::endpoint(host, wanted[bulk]).c_str()), "bind to " + Impl::endpoint(host, wanted[bulk]));
    char at[256];
    size_t size = sizeof at;
    impl_->require(impl_->api.getsockopt(s, kLastEndpoint, at, &size), "LAST_ENDPOINT");
    ports[bulk] = std::stoi(std::string(at).substr(std::string(at).rfind(':') + 1));
  }
  impl_->watch();
  return ports;
}

void IoThread::start() {
  if (thread_.joinable()) return;
  {
    const std::lock_guard<std::mutex> lock(impl_->work);
    impl_->started = true;
  }
  thread_ = std::thread([impl = impl_.get()] { impl->run(); });
}

void IoThread::stop() {
  if (impl_ == nullptr) return;
  impl_->stopping.store(true, std::memory_order_seq_cst);
  driver_bell_.ring();
  impl_->lease_now();
  if (thread_.joinable()) thread_.join();
  for (int nobody = kNobody; !driver_.compare_exchange_weak(nobody, kClosed); nobody = kNobody) sched_yield();  // the consumer leaves at once
  impl_.reset();
}

void IoThread::connect(std::string peer, int machine, std::string host, int control_port, int bulk_port, std::string server_key) {
  auto c = std::make_unique<Command>();
  c->type = Command::Type::kConnect;
  c->peer = std::move(peer), c->host = std::move(host), c->key = std::move(server_key);
  c->machine = machine, c->control_port = control_port, c->bulk_port = bulk_port;
  impl_->submit(std::move(c));
}

void IoThread::disconnect(std::string peer) {
  auto c = std::make_unique<Command>();
  c->type = Command::Type::kDisconnect, c->peer = std::move(peer);
  impl_->submit(std::move(c));
}

void IoThread::send(std::unique_ptr<Outgoing> out) {
  auto c = std::make_unique<Command>();
  c->type = Command::Type::kSend, c->out = std::move(out);
  impl_->submit(std::move(c));
}

void IoThread::arm(std::unique_ptr<Outgoing> out) {
  auto c = std::make_unique<Command>();
  c->type = Command::Type::kArm, c->out = std::move(out);
  impl_->submit(std::move(c));
}

void IoThread::set_beat(std::string json) {
  auto c = std::make_unique<Command>();
  c->type = Command::Type::kBeat, c->peer = std::move(json);
  impl_->submit(std::move(c));
}

void IoThread::wait(int64_t timeout_ns, int watched, int64_t spin_ns) {
  const auto enough = [this] { return !events_.empty() || woken_.load(std::memory_order_seq_cst); };
  const int64_t began = steady_ns(), end = began + timeout_ns;
  while (!enough()) {
    int driver = kNobody;
    if (driver_.compare_exchange_strong(driver, kConsumer)) {
      wanted_.store(false, std::memory_order_relaxed);
      struct Leave {
        std::atomic<int>& driver;
        ~Leave() { driver.store(kNobody, std::memory_order_seq_cst); }
      } leave{driver_};
      impl_->drive(end, watched, began + spin_ns, enough);
      break;
    }
    if (driver == kClosed || steady_ns() >= end) break;
    // The thread sleeps on the sockets: it is asked to leave, and rings when it has.
    wanted_.store(true, std::memory_order_seq_cst);
    driver_bell_.ring();
    events_bell_.prepare();
    bool readable = false;
    if (!enough() && driver_.load(std::memory_order_seq_cst) == kThread) {
      pollfd fds[2] = {{events_bell_.fd(), POLLIN, 0}, {watched, POLLIN, 0}};
      const int64_t left = std::max<int64_t>(0, end - steady_ns());
      const timespec limit{left / 1'000'000'000, left % 1'000'000'000};
      readable = ppoll(fds, 2, &limit, nullptr) > 0 && fds[1].revents != 0;
    }
    events_bell_.finish();
    if (readable) break;
  }
  if (wanted_.exchange(false, std::memory_order_seq_cst)) impl_->lease_now();  // it need not leave any more, or has left already
  woken_.store(false, std::memory_order_relaxed);
}

void IoThread::wake() {
  woken_.store(true, std::memory_order_seq_cst);
  events_bell_.ring();
}

}  // namespace fastee::net
