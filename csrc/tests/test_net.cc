// The I/O thread: its parts without sockets, then two of them in one process over loopback. Exits with 77 (skipped) where no libzmq is.
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "net/crc32c.h"
#include "net/inbox.h"
#include "net/io_thread.h"

using namespace fastee::net;

namespace {

constexpr int64_t kMs = 1'000'000;

std::unique_ptr<Outgoing> outgoing(const std::string& peer, int machine, Kind kind, size_t bytes, uint64_t task = 1) {
  auto out = std::make_unique<Outgoing>();
  out->peer = peer, out->machine = machine;
  out->frame.kind = kind, out->frame.task = task, out->frame.payload_bytes = bytes;
  std::vector<uint8_t> data(bytes);
  for (size_t i = 0; i < bytes; ++i) data[i] = static_cast<uint8_t>(i * 7 + task);
  out->payload = copied(data.data(), bytes);
  out->payload_crc = crc32c(0, data.data(), bytes);
  out->ticket = task;
  return out;
}

bool is_sample(const uint8_t* data, size_t bytes, uint64_t task) {
  for (size_t i = 0; i < bytes; ++i)
    if (data[i] != static_cast<uint8_t>(i * 7 + task)) return false;
  return true;
}

// parts

void queue_keeps_order_under_producers() {
  Queue<std::pair<int, int>> queue;
  constexpr int kThreads = 4, kItems = 5000;
  std::vector<std::thread> producers;
  for (int t = 0; t < kThreads; ++t)
    producers.emplace_back([&, t] {
      for (int i = 0; i < kItems; ++i) queue.push(std::make_unique<std::pair<int, int>>(t, i));
    });
  std::vector<int> next(kThreads);
  for (int got = 0; got < kThreads * kItems;)
    if (auto item = queue.pop()) {
      CHECK(item->second == next[item->first]);
      next[item->first] = item->second + 1;
      ++got;
    }
  for (auto& p : producers) p.join();
  CHECK(queue.empty() && !queue.pop());
}

void pool_reuses_what_came_back_from_another_thread() {
  auto pool = std::make_shared<BufferPool>(1 << 20);
  auto account = std::make_shared<Account>();
  Buffer a = pool->take(5000, account);
  const uint8_t* at = a.data();
  CHECK(reinterpret_cast<uintptr_t>(at) % BufferPool::kAlign == 0 && a.size() == 5000 && account->bytes == 5000);
  std::thread([&] { a.reset(); }).join();
  CHECK(account->bytes == 0 && pool->kept_bytes() == 8192);
  Buffer b = pool->take(8192, account);
  CHECK(b.data() == at && pool->kept_bytes() == 0);
  Buffer big = pool->take(3 << 20, account);
  big.reset();  // more than the pool keeps
  CHECK(pool->kept_bytes() == 0);
  pool.reset();
  std::memset(b.data(), 1, 8192);  // a buffer outlives its pool
}

// The bar of the design: a heartbeat behind 4 MB at 20 Mbit/s waits for one piece of it, and the 4 MB take bytes / rate + delay.
void lane_lets_heartbeats_pass_between_pieces() {
  const Link link{20e6, 0.010};
  Lane lane;
  auto big = std::shared_ptr<Outgoing>(outgoing("n1", 1, Kind::kTask, 4 << 20));
  const size_t bytes = big->frame.header_bytes() + (4 << 20);
  lane.push(std::move(big), link, 0);
  int64_t worst = 0, end = 0, sent = 0, arrived = -1, offset = 0;
  for (int64_t now = 0, beat = 0; end == 0 || arrived < sent; now = std::min(lane.next(), beat)) {
    if (now >= beat) {
      auto out = std::shared_ptr<Outgoing>(outgoing("n1", 1, Kind::kHeartbeat, 60, now));
      out->urgent = true;
      lane.push(std::move(out), link, now);
      sent = now, beat = end ? kNever : now + 100 * kMs;
    }
    lane.advance(now, [&](Delivery d) {
      if (d.out->frame.kind == Kind::kHeartbeat) {
        arrived = static_cast<int64_t>(d.out->frame.task);
        worst = std::max(worst, d.due - arrived);
      } else {
        CHECK(static_cast<int64_t>(d.offset) == offset && d.first == (offset == 0));
        offset += static_cast<int64_t>(d.size);
        if (d.last) end = d.due;
      }
    });
  }
  CHECK(offset == 4 << 20);
  CHECK(worst >= 10 * kMs && worst < 16 * kMs);  // the link's 10 ms, at most 5 ms of one piece, its own 0.06
  const double ideal = static_cast<double>(bytes) * 8e9 / 20e6 + 10e6;
  CHECK(static_cast<double>(end) >= ideal && static_cast<double>(end) < 1.01 * ideal);
}

constexpr Link kByteAMicrosecond{8e6, 0};

void lane_loses_no_time_when_the_clock_jumps() {
  Lane lane;
  for (int i = 0; i < 10; ++i) lane.push(std::shared_ptr<Outgoing>(outgoing("n1", 1, Kind::kTask, 908)), kByteAMicrosecond, 0);
  int64_t last = 0;
  for (int64_t now : {int64_t{0}, 3 * kMs + 700'000, 9 * kMs, 11 * kMs}) lane.advance(now, [&](Delivery d) { last = d.due; });
  CHECK(last == 10 * kMs && lane.next() == kNever);
}

// Two links of one radio: each message waits for the one before it, whichever of them that takes, and arrives after its own link's delay.
void links_of_a_medium_send_one_after_the_other() {
  Lane lane;
  const Link slow{8e6, 0.010}, fast{16e6, 0.001};
  std::vector<std::pair<std::string, int64_t>> there;
  lane.push(std::shared_ptr<Outgoing>(outgoing("n1", 1, Kind::kTask, 908)), slow, 0);
  lane.push(std::shared_ptr<Outgoing>(outgoing("n2", 2, Kind::kTask, 1908)), fast, 0);
  lane.push(std::shared_ptr<Outgoing>(outgoing("n1", 1, Kind::kTask, 908)), slow, 0);
  for (int64_t now = 0; now != kNever; now = lane.next()) lane.advance(now, [&](Delivery d) { there.emplace_back(d.out->peer, d.due); });
  const std::vector<std::pair<std::string, int64_t>> wanted = {{"n2", 1 * kMs + 1 * kMs + 1 * kMs}, {"n1", 1 * kMs + 10 * kMs}, {"n1", 3 * kMs + 10 * kMs}};
  CHECK(there == wanted);
}

struct Wire {
  std::vector<uint8_t> head, body;
  std::vector<std::vector<uint8_t>> pieces;  // chunk headers
};

Wire wire_of(size_t bytes, uint64_t task) {
  auto out = outgoing("", 0, Kind::kTask, bytes, task);
  Wire w;
  w.head.resize(kMaxHeader);
  w.head.resize(encode(out->frame, out->payload_crc, w.head.data()));
  w.body.assign(out->payload.data(), out->payload.data() + bytes);
  return w;
}

Inbox::Result feed(Inbox& inbox, const Wire& w, size_t from, size_t to, Arrival* out, std::string* why, int64_t now = 0, bool bulk = true) {
  uint8_t head[kChunkBytes];
  write_chunk_header(head, from);
  const Part parts[] = {from ? Part{head, kChunkBytes} : Part{w.head.data(), w.head.size()}, {w.body.data() + from, to - from}};
  return inbox.take("n1", bulk, parts, 2, now, out, why);
}

void inbox_joins_pieces_and_refuses_what_does_not_fit() {
  using R = Inbox::Result;
  Inbox inbox({}, 1 << 20, 100'000);
  const Wire w = wire_of(60'000, 3);
  Arrival a;
  std::string why;
  CHECK(feed(inbox, w, 0, 60'000, &a, &why, 0, false) == R::kFrame && is_sample(a.payload.data(), 60'000, 3));
  a = {};
  CHECK(feed(inbox, w, 0, 20'000, &a, &why) == R::kIncomplete);
  CHECK(feed(inbox, w, 20'000, 50'000, &a, &why) == R::kIncomplete);
  CHECK(feed(inbox, w, 50'000, 60'000, &a, &why) == R::kFrame && is_sample(a.payload.data(), 60'000, 3));
  const auto account = a.account;
  CHECK(account->bytes == 60'000);
  // With 60,000 of 100,000 bytes unreleased the same peer gets no second such frame.
  Arrival b;
  CHECK(feed(inbox, w, 0, 20'000, &b, &why) == R::kBad && why.find("it would exceed its 100000") != std::string::npos);
  a = {}, b = {};
  CHECK(account->bytes == 0);
  CHECK(feed(inbox, w, 0, 20'000, &a, &why, 0, false) == R::kBad);  // control connections carry whole frames
  CHECK(feed(inbox, w, 20'000, 50'000, &a, &why) == R::kBad);       // nobody waits for it
  CHECK(feed(inbox, w, 0, 20'000, &a, &why) == R::kIncomplete);
  CHECK(feed(inbox, w, 20'001, 50'000, &a, &why) == R::kBad);
  CHECK(feed(inbox, w, 20'000, 50'000, &a, &why) == R::kBad && account->bytes == 0);
  CHECK(feed(inbox, w, 0, 20'000, &a, &why) == R::kIncomplete);
  Wire damaged = w;
  damaged.body[59'999] ^= 1;
  CHECK(feed(inbox, damaged, 20'000, 60'000, &a, &why) == R::kBad && why.find("CRC32C") != std::string::npos);
  a = {};
  // Slow loris: a frame that stops half-way is forgotten and its memory released.
  CHECK(feed(inbox, w, 0, 20'000, &a, &why, 1000) == R::kIncomplete && account->bytes == 60'000);
  CHECK(inbox.expire(5001, 5000) == 0 && inbox.expire(6002, 5000) == 1 && account->bytes == 0);
  const Part three[3] = {};
  CHECK(inbox.take("n1", true, three, 3, 0, &a, &why) == R::kBad);
}

// two threads over loopback

struct End {
  std::unique_ptr<IoThread> io;
  std::vector<std::unique_ptr<Event>> seen;
  Event* until(const std::function<bool(const Event&)>& wanted, double seconds = 5) {
    const int64_t end = steady_ns() + static_cast<int64_t>(seconds * 1e9);
    for (size_t i = 0; i < seen.size(); ++i)
      if (seen[i] && wanted(*seen[i])) return seen[i].get();
    while (steady_ns() < end) {
      while (auto event = io->next()) {
        seen.push_back(std::move(event));
        if (wanted(*seen.back())) return seen.back().get();
      }
      io->wait(20 * kMs, -1);
    }
    return nullptr;
  }
  Event* type(Event::Type t, double seconds = 5) {
    return until([t](const Event& e) { return e.type == t; }, seconds);
  }
  Event* frame(Kind kind, uint64_t task, double seconds = 5) {
    return until([=](const Event& e) { return e.type == Event::Type::kFrame && e.frame.kind == kind && e.frame.task == task; }, seconds);
  }
};

Config config(const std::string& name, bool node) {
  Config c;
  c.name = name, c.node = node, c.hello = "{\"name\":\"" + name + "\"}";
  c.fingerprint[0] = 9, c.incarnation = node ? 100 : 7;
  return c;
}

struct Pair {
  End server, client;
  std::array<int, 2> ports;
  Pair(const ZmqApi& api, Config s, Config c, const std::string& key = "") {
    server.io = std::make_unique<IoThread>(api, std::move(s));
    ports = server.io->bind("127.0.0.1");
    server.io->start();
    server.io->set_beat("{\"queue\":0}");
    client.io = std::make_unique<IoThread>(api, std::move(c));
    client.io->start();
    client.io->connect("n1", 1, "127.0.0.1", ports[0], ports[1], key);
  }
};

void frames_cross_whole_and_in_pieces(const ZmqApi& api) {
  Pair p(api, config("n1:64", true), config("c:0000000000000007", false));
  CHECK(p.client.type(Event::Type::kUp));
  for (const size_t bytes : {size_t{0}, size_t{100}, size_t{65536}, size_t{262144}, size_t{262145}, size_t{3} << 20}) {
    p.client.io->send(outgoing("n1", 1, Kind::kTask, bytes, bytes + 1));
    const Event* e = p.server.frame(Kind::kTask, bytes + 1);
    CHECK(e && e->peer == "c:0000000000000007" && e->frame.sender == 7 && e->payload.size() == bytes && is_sample(e->payload.data(), bytes, bytes + 1));
    p.server.io->send(outgoing("c:0000000000000007", 0, Kind::kAnswer, bytes, bytes + 1));
    e = p.client.frame(Kind::kAnswer, bytes + 1);
    CHECK(e && e->peer == "n1" && e->payload.size() == bytes && is_sample(e->payload.data(), bytes, bytes + 1));
  }
  CHECK(p.server.io->counters().bad == 0 && p.client.io->counters().bad == 0);
  // Late on arrival: refused by the I/O thread, nobody above is asked.
  auto late = outgoing("n1", 1, Kind::kTask, 10, 77);
  late->deadline = steady_ns() - kMs, late->frame.origin = 7;
  p.client.io->send(std::move(late));
  const Event* refused = p.client.frame(Kind::kRefused, 77);
  CHECK(refused && std::string(reinterpret_cast<char*>(refused->payload.data()), refused->payload.size()).find("late") != std::string::npos);
  CHECK(!p.server.frame(Kind::kTask, 77, 0.05) && p.server.io->counters().late == 1);
  // Nobody of that name: reported, not silent.
  p.server.io->send(outgoing("c:99", 0, Kind::kAnswer, 10, 55));
  const Event* lost = p.server.type(Event::Type::kLost);
  CHECK(lost && lost->ticket == 55);
  // The server goes: the client knows at once, and what it sends is reported lost.
  const int64_t began = steady_ns();
  p.server.io->stop();
  CHECK(p.client.type(Event::Type::kDown) && steady_ns() - began < 300 * kMs);
  p.client.io->send(outgoing("n1", 1, Kind::kTask, 10, 66));
  lost = p.client.type(Event::Type::kLost);
  CHECK(lost && lost->ticket == 66);
}

// The consumer drives while it waits, the thread when it is away, senders send for themselves: nothing is lost, doubled or late between them.
void whoever_has_time_drives(const ZmqApi& api) {
  Pair p(api, config("n1:64", true), config("c:0000000000000007", false));
  CHECK(p.client.type(Event::Type::kUp));
  constexpr uint64_t kThreads = 3, kEach = 150;
  std::vector<std::thread> senders;
  for (uint64_t t = 1; t <= kThreads; ++t)
    senders.emplace_back([&, t] {
      for (uint64_t i = 0; i < kEach; ++i) {
        auto out = outgoing("n1", 1, Kind::kTask, i % 3 ? 100 : 20'000, t * 1000 + i);
        out->frame.origin = 7;
        p.client.io->send(std::move(out));
        if (i % 16 == t) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      }
    });
  std::vector<uint64_t> next(kThreads + 1);
  uint64_t got = 0, refused = 0;
  const int64_t end = steady_ns() + 20'000 * kMs;
  while (got + refused < kThreads * kEach && steady_ns() < end) {
    p.server.io->wait(5 * kMs, -1);
    while (auto event = p.server.io->next()) {
      if (event->type != Event::Type::kFrame || event->frame.kind != Kind::kTask) continue;
      const uint64_t t = event->frame.task / 1000, i = event->frame.task % 1000;
      CHECK(t >= 1 && t <= kThreads && i >= next[t] && is_sample(event->payload.data(), event->payload.size(), event->frame.task));
      next[t] = i + 1;
      ++got;
    }
    if (got % 7 == 3) std::this_thread::sleep_for(std::chrono::milliseconds(2));  // away: the thread takes over
    p.client.io->wait(0, -1);
    while (auto event = p.client.io->next()) {  // a full queue for a second would be a loss; more tasks than any credit are refused
      CHECK(event->type != Event::Type::kLost && event->type != Event::Type::kDown);
      refused += event->type == Event::Type::kFrame && event->frame.kind == Kind::kRefused;
    }
  }
  for (auto& sender : senders) sender.join();
  CHECK(got + refused == kThreads * kEach && p.server.io->counters().bad == 0);
  // Nobody waits anywhere: heartbeats go on, and nobody is called down.
  const int64_t before = p.server.io->counters().beats;
  std::this_thread::sleep_for(std::chrono::milliseconds(1000));
  CHECK(p.server.io->counters().beats - before >= 5);
  CHECK(!p.client.type(Event::Type::kDown, 0.05));
  // wake() and stop() reach a consumer that drives.
  for (const bool stopping : {false, true}) {
    std::thread consumer([&] { p.client.io->wait(20'000 * kMs, -1); });
    std::this_thread::sleep_for(std::chrono::milliseconds(30));
    const int64_t began = steady_ns();
    if (stopping) p.client.io->stop();
    else p.client.io->wake();
    consumer.join();
    CHECK(steady_ns() - began < 2'000 * kMs);
    if (!stopping)
      while (p.client.io->next()) {
      }
  }
}

void a_greedy_peer_is_refused(const ZmqApi& api) {
  Config s = config("n1:64", true);
  s.peer_tasks = 3;
  Pair p(api, std::move(s), config("c:0000000000000007", false));
  CHECK(p.client.type(Event::Type::kUp));
  for (uint64_t i = 1; i <= 5; ++i) {
    auto out = outgoing("n1", 1, Kind::kTask, 10, i);
    out->frame.origin = 7;
    p.client.io->send(std::move(out));
  }
  CHECK(p.client.frame(Kind::kRefused, 4) && p.client.frame(Kind::kRefused, 5) && p.server.frame(Kind::kTask, 3));
  p.server.seen.clear();  // released: its sender may send again
  p.client.io->send(outgoing("n1", 1, Kind::kTask, 10, 6));
  CHECK(p.server.frame(Kind::kTask, 6) && p.server.io->counters().over_credit == 2);
}

void another_model_is_told_so(const ZmqApi& api) {
  Config c = config("c:0000000000000007", false);
  c.fingerprint[0] = 8;
  Pair p(api, config("n1:64", true), std::move(c));
  const Event* e = p.client.until([](const Event& e) { return e.type == Event::Type::kFrame && e.frame.kind == Kind::kRefused; });
  CHECK(e && std::string(reinterpret_cast<char*>(e->payload.data()), e->payload.size()).find("load the same net") != std::string::npos);
  CHECK(p.server.io->counters().foreign >= 1 && !p.client.type(Event::Type::kUp, 0.1));
}

void an_armed_answer_leaves_in_time_and_once(const ZmqApi& api) {
  Config s = config("n1:64", true);
  s.links[0] = Link{1e9, 0.020};
  Pair p(api, std::move(s), config("c:0000000000000007", false));
  CHECK(p.client.type(Event::Type::kUp));
  const int64_t deadline = steady_ns() + 100 * kMs;
  for (uint64_t task : {1, 2}) {
    auto out = outgoing("c:0000000000000007", 0, Kind::kAnswer, 64, task);
    out->deadline = deadline;
    p.server.io->arm(std::move(out));
  }
  auto done = outgoing("c:0000000000000007", 0, Kind::kAnswer, 65, 2);  // task 2 is settled before its time
  done->keyed = true;
  p.server.io->send(std::move(done));
  const Event* e = p.client.frame(Kind::kAnswer, 1);
  const int64_t at = steady_ns();
  CHECK(e && e->payload.size() == 64 && at > deadline - 20 * kMs);
  CHECK(at < deadline + 60 * kMs);  // a busy test machine may wake late; the timer itself aims 0.5 ms before the deadline
  CHECK(p.server.type(Event::Type::kAnswered) && p.server.io->counters().answered == 1);
  e = p.client.frame(Kind::kAnswer, 2);
  CHECK(e && e->payload.size() == 65);
  auto late = outgoing("c:0000000000000007", 0, Kind::kAnswer, 66, 1);  // the compute thread's answer comes second
  late->keyed = true;
  p.server.io->send(std::move(late));
  p.client.seen.clear();
  CHECK(!p.client.until([](const Event& e) { return e.frame.kind == Kind::kAnswer; }, 0.1));
}

void a_silent_peer_is_down_within_a_second(const ZmqApi& api) {
  Config s = config("n1:64", true);
  Pair p(api, std::move(s), config("c:0000000000000007", false));
  CHECK(p.client.type(Event::Type::kUp));
  p.server.io->set_beat("");  // connections stay, nothing is said any more
  const int64_t began = steady_ns();
  CHECK(p.client.type(Event::Type::kDown));
  const int64_t took = steady_ns() - began;
  CHECK(took > 600 * kMs && took < 1000 * kMs);
  p.client.seen.clear();
  p.server.io->set_beat("{\"queue\":0}");
  CHECK(p.client.type(Event::Type::kUp, 1.0));
}

std::array<uint8_t, 32> raw_key(const std::string& z85) {
  static const std::string kAlphabet = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#";
  std::array<uint8_t, 32> out{};
  for (size_t i = 0; i < 8; ++i) {
    uint32_t value = 0;
    for (size_t k = 0; k < 5; ++k) value = value * 85 + static_cast<uint32_t>(kAlphabet.find(z85[5 * i + k]));
    for (size_t k = 0; k < 4; ++k) out[4 * i + k] = static_cast<uint8_t>(value >> (24 - 8 * k));
  }
  return out;
}

void keys_decide_who_is_admitted(const ZmqApi& api) {
  char server[2][41], client[2][41], stranger[2][41];
  for (auto& pair : {server, client, stranger}) CHECK(api.curve_keypair(pair[0], pair[1]) == 0);
  const auto with = [](Config c, char (&keys)[2][41]) {
    c.public_key = keys[0], c.secret_key = keys[1];
    return c;
  };
  const auto served = [&] {
    Config s = with(config("n1:64", true), server);
    s.allowed[raw_key(client[0])] = "client";
    return s;
  };
  {
    Pair p(api, served(), with(config("c:0000000000000007", false), client), server[0]);
    CHECK(p.client.type(Event::Type::kUp));
    p.client.io->send(outgoing("n1", 1, Kind::kTask, 300'000, 5));
    const Event* e = p.server.frame(Kind::kTask, 5);
    CHECK(e && is_sample(e->payload.data(), 300'000, 5));
  }
  const auto refused = [&](Config c, const std::string& key) {
    Pair p(api, served(), std::move(c), key);
    const Event* e = p.client.type(Event::Type::kKeyRefused, 3);
    CHECK(!p.client.type(Event::Type::kUp, 0.3));
    return e != nullptr;
  };
  CHECK(refused(with(config("c:0000000000000008", false), stranger), server[0]));    // not on the list
  CHECK(refused(with(config("c:0000000000000008", false), client), stranger[0]));    // the server is not who it should be
  refused(config("c:0000000000000008", false), "");                                  // no key at all: no UP, whatever libzmq calls it
}

}  // namespace

int main() {
  queue_keeps_order_under_producers();
  pool_reuses_what_came_back_from_another_thread();
  lane_lets_heartbeats_pass_between_pieces();
  lane_loses_no_time_when_the_clock_jumps();
  links_of_a_medium_send_one_after_the_other();
  inbox_joins_pieces_and_refuses_what_does_not_fit();
  const ZmqApi* api = nullptr;
  try {
    api = &load_zmq({});
  } catch (const std::exception& why) {
    std::printf("net: the parts that need libzmq are skipped: %s\n", why.what());
    return failures ? report("net") : 77;
  }
  frames_cross_whole_and_in_pieces(*api);
  whoever_has_time_drives(*api);
  a_greedy_peer_is_refused(*api);
  another_model_is_told_so(*api);
  an_armed_answer_leaves_in_time_and_once(*api);
  a_silent_peer_is_down_within_a_second(*api);
  keys_decide_who_is_admitted(*api);
  return report("net");
}
