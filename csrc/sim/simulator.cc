#include "sim/simulator.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <stdexcept>

#include "sim/link_clock.h"

namespace fastee::sim {

using sched::Action;
using sched::Decision;
using sched::kNever;
using sched::kNs;

namespace {

constexpr double kRoot3 = 1.7320508075688772;
constexpr double kLeastJitter = 0.05;
constexpr int64_t kMs = 1'000'000;

const World& checked(const World& world, size_t schedulers) {
  world.check();
  if (static_cast<int>(schedulers) != world.nodes) throw std::invalid_argument("Simulator: one scheduler per node");
  return world;
}

}  // namespace

Simulator::Simulator(const World& w, std::vector<sched::Scheduler*> schedulers)
    : world(checked(w, schedulers.size())), nodes_(w.nodes), links_(w.links.size()), medium_free_(w.media.size(), 0),
      link_at_(static_cast<size_t>(w.nodes) * w.nodes, -1), observers_(w.nodes), exits_(w.segments - 1) {
  const size_t tasks = world.arrival.size();
  results.latency.assign(tasks, -1);
  results.wire.assign(tasks, 0);
  results.compute.assign(tasks, 0);
  results.cost.assign(tasks, 0.0);
  results.node.assign(tasks, -1);
  results.exit.assign(tasks, -1);
  for (auto* column : {&results.outcome, &results.attempts, &results.forced, &results.hops, &attempt_}) column->assign(tasks, 0);
  for (auto* column : {&busy, &ran, &sent}) column->assign(world.nodes, 0);
  said_.resize(static_cast<size_t>(world.rows) * world.segments);
  for (size_t row = 0; row < static_cast<size_t>(world.rows); ++row)
    for (int e = 0; e <= exits_; ++e) {
      Said& one = said_[row * world.segments + e];
      const size_t cell = row * exits_ + e;
      if (!world.pool.empty()) one.pool = static_cast<int32_t>(world.pool[row]);
      if (e == exits_) break;
      one.confidence = world.confidence[cell];
      if (!world.gate.empty()) one.gate = world.gate[cell];
      if (!world.delta.empty()) one.delta = world.delta[cell];
      if (!world.label.empty()) one.label = static_cast<int32_t>(world.label[cell]);
    }
  for (int n = 0; n < world.nodes; ++n) {
    Node& node = nodes_[n];
    const auto& members = world.members[n];
    node.scheduler = schedulers[n];
    if (node.scheduler->model().nodes != static_cast<int>(members.size()) || node.scheduler->model().segments != world.segments)
      throw std::invalid_argument("Simulator: scheduler " + std::to_string(n) + " has another number of nodes or segments than its place");
    node.credit.assign(members.size(), world.credit);
    node.link.assign(members.size(), -1);
    node.by_slot.assign(node.scheduler->capacity(), kNone);
    node.stream = Stream(world.seed, 1, n);
    for (size_t i = 0; i < members.size(); ++i) {
      if (members[i] == n)
        node.me = static_cast<int>(i);
      else
        observers_[members[i]].push_back({n, static_cast<int>(i)});
    }
    if (world.report > 0) events_.push(world.report, EventKind::kReport, n, 0);
    arm_tick(n);
  }
  for (size_t i = 0; i < world.links.size(); ++i) {
    const Link& link = world.links[i];
    const auto& members = world.members[link.source];
    const auto found = std::lower_bound(members.begin(), members.end(), link.target);
    link_at_[static_cast<size_t>(link.source) * world.nodes + link.target] = static_cast<int>(i);
    if (found != members.end() && *found == link.target) {
      links_[i].place = static_cast<int>(found - members.begin());
      nodes_[link.source].link[links_[i].place] = static_cast<int>(i);
    }
    links_[i].loss = link.loss;
    links_[i].duplicate = link.duplicate;
    links_[i].stream = Stream(world.seed, 2, static_cast<uint64_t>(link.source) << 32 | static_cast<uint64_t>(link.target));
  }
  std::map<std::pair<int, int>, int> first;
  for (size_t i = 0; i < world.links.size(); ++i) {
    links_[i].back = link_between(world.links[i].target, world.links[i].source);
    links_[i].first = first.try_emplace({world.links[i].source, world.links[i].medium}, static_cast<int>(i)).first->second;
  }
}

// Faults go before arrivals, arrivals before everything else of the same moment.
bool Simulator::run(int64_t most) {
  const int64_t tasks = static_cast<int64_t>(world.arrival.size());
  for (int64_t i = 0; i < most; ++i) {
    if (totals.ended == tasks) return false;
    const int64_t soonest = events_.empty() ? kNever : events_.top().time;
    const int64_t arrival = next_arrival_ < world.arrival.size() ? world.arrival[next_arrival_] : kNever;
    const int64_t wrong = next_fault_ < world.faults.size() ? world.faults[next_fault_].time : kNever;
    ++totals.events;
    if (wrong <= arrival && wrong <= soonest && wrong != kNever) {
      totals.now = wrong;
      fault(world.faults[next_fault_++]);
    } else if (arrival <= soonest && arrival != kNever) {
      totals.now = arrival;
      arrive(static_cast<uint32_t>(next_arrival_++));
    } else {
      const Event event = events_.pop();
      totals.now = event.time;
      handle(event);
    }
  }
  return totals.ended < tasks;
}

void Simulator::handle(const Event& e) {
  switch (e.kind()) {
    case EventKind::kDone:
      if (nodes_[e.a].epoch == e.b) done(static_cast<int>(e.a));
      break;
    case EventKind::kDeliver:
      deliver(e.a);
      break;
    case EventKind::kAnswer:
      answered(e.a);
      break;
    case EventKind::kCredit: {
      Node& node = nodes_[e.a];
      if (!node.alive) break;
      const int place = static_cast<int>(e.b & 0xFFFF);
      node.credit[place] = std::min(world.credit, node.credit[place] + 1);
      node.scheduler->observe_queue(place, e.b >> 16, 0);
      pump(static_cast<int>(e.a));
      break;
    }
    case EventKind::kExpire:
      if (results.outcome[e.a] == 0) settle(e.a, Outcome::kExpired, -1, -1, false);
      break;
    case EventKind::kLost:
      lost(e.a);
      break;
    case EventKind::kRetry:
      if (results.outcome[e.a] == 0 && attempt_[e.a] == e.b) start(e.a);
      break;
    case EventKind::kReport:
      report(static_cast<int>(e.a));
      break;
    case EventKind::kDetect: {
      Node& node = nodes_[e.a];
      if (node.epoch != e.b || !node.known_up || (node.alive && node.thaw_at <= totals.now)) break;
      set_known(static_cast<int>(e.a), false);
      for (uint32_t w : works_on(static_cast<int>(e.a))) start_over(works_[w].task, works_[w].attempt);
      break;
    }
    case EventKind::kThaw: {
      Node& node = nodes_[e.a];
      if (node.epoch != e.b || node.thaw_at > totals.now) break;
      write(What::kThaw, -1, -1, e.a, 0, 0);
      if (!node.known_up) set_known(static_cast<int>(e.a), true);
      std::vector<uint32_t> inbox;
      inbox.swap(node.inbox);
      for (uint32_t w : inbox) deliver(w);
      pump(static_cast<int>(e.a));
      dispatch(static_cast<int>(e.a));
      break;
    }
    case EventKind::kLinkDetect: {
      LinkState& state = links_[e.a];
      const Link& link = world.links[e.a];
      if (state.up || state.epoch != e.b) break;
      if (state.place >= 0) nodes_[link.source].scheduler->set_link_up(nodes_[link.source].me, state.place, false);
      break;
    }
    case EventKind::kTick: {
      Node& node = nodes_[e.a];
      if (node.epoch != e.b || node.tick_at != e.time) break;
      node.tick_at = kNever;
      if (!node.alive) break;
      if (node.thaw_at > totals.now) break;  // the thaw asks again
      node.scheduler->tick(local(node));
      pump(static_cast<int>(e.a));
      break;
    }
    case EventKind::kRelease:
      start(e.a);
      break;
  }
}

// -- tasks ----------------------------------------------------------------------------------------------------------------

void Simulator::arrive(uint32_t task) {
  const int source = static_cast<int>(world.source[task]);
  const int64_t deadline = world.deadline[task], now = totals.now;
  write(What::kArrive, task, 0, source, world.row[task], deadline);
  const int64_t expiry = deadline == kNoDeadline ? now + world.timeout : now + deadline + world.grace;
  events_.push(expiry, EventKind::kExpire, task, 0);
  Node& node = nodes_[source];
  const double interval = node.scheduler->admit_interval();
  if (interval > 0) {
    const int64_t release = std::max(now, node.release);
    node.release = release + static_cast<int64_t>(interval * kNs);
    if (release > now) {
      events_.push(release, EventKind::kRelease, task, 0);
      return;
    }
  }
  start(task);
}

// Hands the task to the source's own node, or to the first neighbour that is up where that one is known to be down.
void Simulator::start(uint32_t task) {
  if (results.outcome[task] != 0) return;
  const int source = static_cast<int>(world.source[task]);
  int entry = nodes_[source].known_up ? source : -1;
  if (entry < 0)
    for (int member : world.members[source])
      if (member != source && nodes_[member].known_up && link_between(source, member) >= 0) {
        entry = member;
        break;
      }
  write(What::kStart, task, attempt_[task], entry, 0, 0);
  if (entry < 0) {
    settle(task, Outcome::kLost, -1, -1, false);
    return;
  }
  const uint32_t w = new_work();
  Work& work = works_[w];
  work.task = task;
  work.attempt = attempt_[task];
  work.node = entry;
  if (entry == source)
    deliver(w);
  else
    transmit(w, link_between(source, entry), 0);
}

void Simulator::start_over(uint32_t task, int attempt) {
  if (results.outcome[task] != 0 || attempt_[task] != attempt) return;
  const int next = ++attempt_[task];
  if (next >= world.attempts) {
    settle(task, Outcome::kLost, -1, -1, false);
    return;
  }
  ++totals.retries;
  // The first retry is at once; later ones wait, or two nodes that lost each other would be asked in a tight loop.
  if (next == 1)
    start(task);
  else
    events_.push(totals.now + std::min<int64_t>(200 * kMs, (10 * kMs) << std::min(next, 8)), EventKind::kRetry, task, next);
}

void Simulator::settle(uint32_t task, Outcome outcome, int exit, int node, bool forced) {
  results.outcome[task] = static_cast<uint8_t>(outcome);
  results.latency[task] = totals.now - world.arrival[task];
  results.exit[task] = static_cast<int16_t>(exit);
  results.node[task] = node;
  results.forced[task] = forced;
  results.attempts[task] = static_cast<uint8_t>(attempt_[task] + 1);
  ++totals.ended;
  write(What::kEnd, task, attempt_[task], node, static_cast<int64_t>(outcome), exit);
}

// -- messages -------------------------------------------------------------------------------------------------------------

void Simulator::transmit(uint32_t w, int index, int codec) {
  Work& work = works_[w];
  LinkState& state = links_[index];
  const Link& link = world.links[index];
  const int from = link.source, to = link.target;
  const size_t cell = static_cast<size_t>(work.segment) * world.codecs + codec;
  const int64_t bytes = world.wire_bytes[cell], now = totals.now;
  work.sender = from;
  work.node = to;
  work.link = index;
  work.credited = 0;
  work.wire_bytes = bytes;
  results.wire[work.task] += bytes;
  results.cost[work.task] += static_cast<double>(bytes) * world.byte_price;
  sent[from] += bytes;
  ++totals.messages;
  write(What::kSend, work.task, work.attempt, from, to, bytes);
  if (!state.up) {
    vanish(w, now);
    return;
  }
  int64_t& free_at = medium_free_[link.medium];
  const int64_t ready = now + world.codec_ns[cell];
  const int64_t left = leave_at(world.media[link.medium], world.traces, std::max(ready, free_at), bytes);
  int64_t& own_free_at = links_[state.first].free_at;
  work.wire_ns = left - std::max(ready, own_free_at) + link.delay;
  free_at = own_free_at = left;
  const int64_t due = left + link.delay;
  if (state.loss > 0 && state.stream.uniform() < state.loss) {
    vanish(w, due);
    return;
  }
  events_.push(due, EventKind::kDeliver, w, 0);
  if (state.duplicate > 0 && state.stream.uniform() < state.duplicate) {
    const uint32_t copy = new_work();
    works_[copy] = works_[w];
    works_[copy].credited = 1;
    events_.push(due, EventKind::kDeliver, copy, 0);
  }
}

// A copy that is gone is noticed `detect` after `when`; then its task starts over, unless that attempt is history.
void Simulator::vanish(uint32_t w, int64_t when) {
  write(What::kVanish, works_[w].task, works_[w].attempt, works_[w].node, works_[w].segment, 0);
  events_.push(when + world.detect, EventKind::kLost, w, 0);
}

void Simulator::lost(uint32_t w) {
  const Work work = works_[w];
  write(What::kLost, work.task, work.attempt, work.node, work.segment, 0);
  ++totals.lost;
  if (!work.credited && work.sender >= 0) {
    const int place = links_[work.link].place;
    if (place >= 0) nodes_[work.sender].credit[place] = std::min(world.credit, nodes_[work.sender].credit[place] + 1);
  }
  free_work(w);
  start_over(work.task, work.attempt);
}

void Simulator::deliver(uint32_t w) {
  const int to = works_[w].node, from = works_[w].sender;
  Node& node = nodes_[to];
  const int64_t now = totals.now;
  if (!node.alive || (from >= 0 && !links_[works_[w].link].up)) {
    vanish(w, now);
    return;
  }
  if (node.thaw_at > now) {
    node.inbox.push_back(w);
    return;
  }
  {
    Work& work = works_[w];
    write(What::kDeliver, work.task, work.attempt, to, from, work.segment);
    if (from >= 0 && nodes_[from].alive && work.wire_ns > 0 && work.wire_bytes > 0)
      nodes_[from].scheduler->observe_link(nodes_[from].me, links_[work.link].place, work.wire_bytes, work.wire_ns, local(nodes_[from]));
    // The way so far, so that an answer finds home over links that exist; a node met again closes the loop.
    int depth = work.depth;
    for (int i = 0; i < work.depth; ++i)
      if (work.path[i] == to) depth = i;
    if (depth < kPath) {
      work.path[depth] = static_cast<uint16_t>(to);
      work.depth = static_cast<uint8_t>(depth + 1);
    }
    if (from >= 0) {
      ++work.hops;
      if (results.hops[work.task] < 255) ++results.hops[work.task];
    }
    work.order = order_++;
    const int64_t deadline = world.deadline[work.task], clock = local(node);
    const int source = static_cast<int>(world.source[work.task]);
    work.deadline = kNoDeadline;
    if (deadline != kNoDeadline) {
      int64_t time_left = world.arrival[work.task] + deadline - now;
      if (world.home[to] != source) time_left -= home_ns(work, to, source, nullptr, nullptr);
      work.deadline = clock + time_left;
    }
    work.handle = depth >= kPath ? -1 : node.scheduler->admit(clock, work.deadline, work.segment);
    if (work.handle < 0) {
      write(What::kRefuse, work.task, work.attempt, to, work.segment, 0);
      send_home(w, Outcome::kRefused, false);
      pump(to);
      return;
    }
    node.by_slot[work.handle & 0xFFFFFFFF] = w;
    write(What::kAdmit, work.task, work.attempt, to, work.segment, work.handle);
  }
  follow(w);
  pump(to);
  dispatch(to);
}

// Time of an answer from `node` to `to`: a small urgent message that does not queue. Over the direct link, else back along the
// way that the task came. Without `open` the state of the links is not looked at.
int64_t Simulator::home_ns(const Work& work, int node, int to, int64_t* sent_bytes, bool* open) const {
  if (node == to) return 0;
  int64_t time = 0, bytes = 0;
  bool up = true;
  const auto hop = [&](int index) {
    if (index < 0) {
      up = false;
      return;
    }
    const Link& link = world.links[index];
    up = up && links_[index].up;
    time += wire_ns(world.answer_bytes, world.media[link.medium].rate) + link.delay;
    bytes += world.answer_bytes;
  };
  const int direct = work.sender == to && work.node == node ? links_[work.link].back : link_between(node, to);
  if (direct >= 0) {
    hop(direct);
  } else {
    int at = node;
    for (int i = work.depth - 1; i >= 0; --i)
      if (work.path[i] != at) {
        hop(link_between(at, work.path[i]));
        at = work.path[i];
      }
    if (at != to) hop(link_between(at, to));
  }
  if (sent_bytes != nullptr) *sent_bytes = bytes;
  if (open != nullptr) *open = up;
  return time;
}

void Simulator::send_home(uint32_t w, Outcome outcome, bool forced) {
  Work& work = works_[w];
  give_credit(work);
  work.outcome = static_cast<uint8_t>(outcome);
  work.forced = forced;
  int64_t bytes = 0;
  bool open = true;
  const int64_t time = home_ns(work, work.node, static_cast<int>(world.source[work.task]), &bytes, &open);
  results.wire[work.task] += bytes;
  sent[work.node] += bytes;
  results.cost[work.task] += static_cast<double>(bytes) * world.byte_price;
  write(What::kAnswer, work.task, work.attempt, work.node, static_cast<int64_t>(outcome), work.segment - 1);
  if (!open)
    vanish(w, totals.now);
  else if (time == 0)
    answered(w);
  else
    events_.push(totals.now + time, EventKind::kAnswer, w, 0);
}

void Simulator::answered(uint32_t w) {
  const Work work = works_[w];
  free_work(w);
  const auto outcome = static_cast<Outcome>(work.outcome);
  const bool stale = outcome != Outcome::kAnswered && work.attempt != attempt_[work.task];
  if (results.outcome[work.task] != 0 || stale) {
    ++totals.duplicates;
    write(What::kDuplicate, work.task, work.attempt, work.node, work.outcome, work.segment - 1);
    return;
  }
  settle(work.task, outcome, outcome == Outcome::kAnswered ? work.segment - 1 : -1, work.node, work.forced);
}

void Simulator::give_credit(Work& work) {
  if (work.credited || work.sender < 0) return;
  work.credited = 1;
  const int back = links_[work.link].back, place = links_[work.link].place;
  const int64_t length = std::min<int64_t>(0xFFFF, length_of(nodes_[work.node]));
  events_.push(totals.now + (back < 0 ? 0 : world.links[back].delay), EventKind::kCredit, static_cast<uint32_t>(work.sender),
               static_cast<uint32_t>(place) | static_cast<uint32_t>(length) << 16);
}

// -- decisions ------------------------------------------------------------------------------------------------------------

Decision Simulator::decide(uint32_t w) {
  Work& work = works_[w];
  Node& node = nodes_[work.node];
  const auto more_urgent = std::upper_bound(node.ready.begin(), node.ready.end(), Ready{work.deadline, work.order, w, 0});
  const int64_t ahead = static_cast<int64_t>(node.running.size()) + (node.ready.end() - more_urgent);
  tell(node, ahead);
  const int exit = work.exit;
  work.exit = -1;  // an exit is told once
  sched::Sample sample;
  sample.confidence = work.confidence;
  const Said& said = this->said(work.task, exit < 0 ? exits_ : exit);
  sample.gate = said.gate;
  sample.delta = said.delta;
  sample.label = said.label;
  sample.pool = said.pool;
  const Decision d = node.scheduler->decide(work.handle, exit, sample, local(node));
  write(What::kDecide, work.task, work.attempt, work.node, exit, d.code());
  return d;
}

void Simulator::follow(uint32_t w) { follow(w, decide(w)); }

// Does what the scheduler says; a peer without credit makes it choose again without that peer.
void Simulator::follow(uint32_t w, Decision d) {
  const int n = works_[w].node;
  Node& node = nodes_[n];
  const auto& members = world.members[n];
  shut_.clear();
  while (d.action == Action::kOffload && (node.credit[d.node] <= 0 || node.link[d.node] < 0)) {
    shut_.push_back(static_cast<uint32_t>(d.node));
    node.scheduler->set_node_up(d.node, false);
    d = decide(w);
  }
  for (uint32_t place : shut_) node.scheduler->set_node_up(static_cast<int>(place), nodes_[members[place]].known_up);
  Work& work = works_[w];
  switch (d.action) {
    case Action::kExit:
      send_home(w, Outcome::kAnswered, d.forced);
      break;
    case Action::kContinue: {
      work.since = totals.now;
      const Ready ready{work.deadline, work.order, w, work.segment};
      node.ready.insert(std::upper_bound(node.ready.begin(), node.ready.end(), ready), ready);
      break;
    }
    case Action::kOffload:
      node.scheduler->finish(work.handle);
      --node.credit[d.node];
      give_credit(work);
      transmit(w, node.link[d.node], d.codec);
      break;
    case Action::kWait:
      ++node.waiting;
      work.since = -1;
      break;
    case Action::kReject:
      send_home(w, Outcome::kRejected, false);
      break;
  }
}

void Simulator::tell(Node& node, int64_t ahead) {
  const int64_t told = ahead << 32 | node.waiting;
  if (told == node.told) return;
  node.told = told;
  node.scheduler->observe_queue(node.me, ahead, node.waiting);
}

// Asks for the decisions that waiting tasks have got meanwhile; each of them stands behind all that is here, as in the live node.
void Simulator::pump(int n) {
  Node& node = nodes_[n];
  if (!node.alive || node.thaw_at > totals.now) return;
  const auto look = [this, &node] {
    node.scheduler->set_idle(!node.busy && node.ready.empty());
    if (node.waiting > 0) tell(node, length_of(node));
  };
  int64_t handle;
  Decision d;
  for (look(); node.scheduler->poll(local(node), &handle, &d); look()) {
    const uint32_t w = node.by_slot[handle & 0xFFFFFFFF];
    if (works_[w].since == -1) --node.waiting;
    works_[w].since = totals.now;
    write(What::kDecide, works_[w].task, works_[w].attempt, n, -1, d.code());
    follow(w, d);
    dispatch(n);
  }
  arm_tick(n);
}

// Starts a batch of the most urgent task's segment. One that waited longer than `stale` is decided anew.
void Simulator::dispatch(int n) {
  Node& node = nodes_[n];
  if (!node.alive || node.busy || node.thaw_at > totals.now) return;
  batch_.clear();
  int segment = -1;
  while (static_cast<int64_t>(batch_.size()) < world.batch[n]) {
    auto next = node.ready.end();
    while (next != node.ready.begin() && segment >= 0 && (next - 1)->segment != segment) --next;
    if (next == node.ready.begin()) break;
    const uint32_t w = (--next)->work;
    const int s = next->segment;
    node.ready.erase(next);
    if (totals.now - works_[w].since > world.stale) {
      const Decision d = decide(w);
      if (d.action != Action::kContinue) {
        follow(w, d);
        continue;
      }
    }
    segment = s;
    batch_.push_back(w);
  }
  if (batch_.empty()) return;
  const int64_t rows = static_cast<int64_t>(batch_.size());
  const size_t cell = static_cast<size_t>(n) * world.segments + segment;
  double time = static_cast<double>(world.service[cell * world.max_batch + rows - 1]) * node.slow;
  if (world.jitter[cell] > 0) time *= std::max(kLeastJitter, 1.0 + world.jitter[cell] * kRoot3 * (2.0 * node.stream.uniform() - 1.0));
  const int64_t spent = std::max<int64_t>(1, static_cast<int64_t>(time));
  node.running.swap(batch_);
  node.busy = true;
  node.segment = segment;
  node.started = totals.now;
  node.spent = spent;
  node.frozen_at_start = node.frozen;
  ++totals.batches;
  for (uint32_t w : node.running) write(What::kRun, works_[w].task, works_[w].attempt, n, segment, rows);
  events_.push(totals.now + spent, EventKind::kDone, static_cast<uint32_t>(n), node.epoch);
}

void Simulator::done(int n) {
  Node& node = nodes_[n];
  if (node.frozen > node.frozen_at_start) {
    events_.push(totals.now + (node.frozen - node.frozen_at_start), EventKind::kDone, static_cast<uint32_t>(n), node.epoch);
    node.frozen_at_start = node.frozen;
    return;
  }
  rows_.clear();
  rows_.swap(node.running);  // each keeps its memory
  node.busy = false;
  const int64_t took = totals.now - node.started, count = static_cast<int64_t>(rows_.size());
  const int segment = node.segment;
  busy[n] += took;
  ran[n] += count;
  node.scheduler->observe(segment, node.me, count, took);
  const int64_t share = node.spent / count;
  for (uint32_t w : rows_) {
    Work& work = works_[w];
    results.compute[work.task] += share;
    results.cost[work.task] += static_cast<double>(share) / kNs * world.price[n];
    work.exit = static_cast<int16_t>(segment);
    work.segment = static_cast<int16_t>(segment + 1);
    work.confidence = said(work.task, segment).confidence;
    give_credit(work);
    write(What::kRan, work.task, work.attempt, n, segment, took);
  }
  for (uint32_t w : rows_) follow(w);
  pump(n);
  dispatch(n);
}

// -- membership and faults -------------------------------------------------------------------------------------------------

void Simulator::report(int n) {
  const Node& node = nodes_[n];
  events_.push(totals.now + world.report, EventKind::kReport, static_cast<uint32_t>(n), 0);
  if (!node.alive || node.thaw_at > totals.now) return;
  const int64_t length = length_of(node);
  for (const Observer& o : observers_[n])
    if (nodes_[o.node].alive) nodes_[o.node].scheduler->observe_queue(o.place, length, node.waiting);
  pump(n);
  dispatch(n);
}

std::vector<uint32_t> Simulator::works_on(int n) const {
  const Node& node = nodes_[n];
  std::vector<uint32_t> found = node.running;
  for (const Ready& r : node.ready) found.push_back(r.work);
  for (size_t slot = 0; slot < node.by_slot.size(); ++slot) {
    const uint32_t w = node.by_slot[slot];
    if (w != kNone && works_[w].since == -1 && works_[w].node == n && (works_[w].handle & 0xFFFFFFFF) == static_cast<int64_t>(slot))
      found.push_back(w);
  }
  std::sort(found.begin(), found.end(), [&](uint32_t a, uint32_t b) { return works_[a].order < works_[b].order; });
  found.insert(found.end(), node.inbox.begin(), node.inbox.end());
  return found;
}

void Simulator::die(int n) {
  Node& node = nodes_[n];
  if (!node.alive) return;
  ++node.epoch;
  // The peers know before the source starts its tasks over, or it would send them here again.
  events_.push(totals.now + world.detect, EventKind::kDetect, static_cast<uint32_t>(n), node.epoch);
  for (uint32_t w : works_on(n)) {
    works_[w].since = 0;
    vanish(w, totals.now);
  }
  node.running.clear();
  node.inbox.clear();
  node.ready.clear();
  node.alive = node.busy = false;
  node.waiting = 0;
  node.thaw_at = 0;
  node.tick_at = kNever;
}

// Comes back empty, with a fresh scheduler that has learned nothing.
void Simulator::restart(int n) {
  Node& node = nodes_[n];
  if (node.alive) return;
  node.own = std::make_unique<sched::Scheduler>(node.scheduler->model().config);
  node.scheduler = node.own.get();
  node.alive = true;
  node.told = -1;
  ++node.epoch;
  std::fill(node.by_slot.begin(), node.by_slot.end(), kNone);
  const auto& members = world.members[n];
  for (size_t i = 0; i < members.size(); ++i) {
    node.credit[i] = world.credit;
    if (members[i] != n && !nodes_[members[i]].known_up) node.scheduler->set_node_up(static_cast<int>(i), false);
  }
  for (const Observer& o : observers_[n]) nodes_[o.node].credit[o.place] = world.credit;
  if (!node.known_up) set_known(n, true);
  arm_tick(n);
}

void Simulator::set_known(int n, bool up) {
  nodes_[n].known_up = up;
  write(up ? What::kUp : What::kDown, -1, -1, n, 0, 0);
  for (const Observer& o : observers_[n]) {
    Node& other = nodes_[o.node];
    other.credit[o.place] = world.credit;
    if (other.alive) other.scheduler->set_node_up(o.place, up);
  }
}

// The policy's next wish for a tick may have moved with anything that it was told.
void Simulator::arm_tick(int n) {
  Node& node = nodes_[n];
  const int64_t next = node.scheduler->next_tick();
  if (next == kNever) return;
  const int64_t at = sched::add_saturated(totals.now, std::max<int64_t>(1, sched::subtract_saturated(next, local(node))));
  if (at >= node.tick_at) return;
  node.tick_at = at;
  events_.push(at, EventKind::kTick, static_cast<uint32_t>(n), node.epoch);
}

void Simulator::fault(const Fault& f) {
  write(What::kFault, -1, -1, f.target, static_cast<int64_t>(f.kind), f.span);
  switch (f.kind) {
    case FaultKind::kDeath:
      die(f.target);
      break;
    case FaultKind::kRestart:
      restart(f.target);
      break;
    case FaultKind::kFreeze: {
      Node& node = nodes_[f.target];
      if (!node.alive) break;
      const int64_t until = totals.now + f.span, from = std::max(node.thaw_at, totals.now);
      if (until <= from) break;
      node.frozen += until - from;
      node.thaw_at = until;
      events_.push(until, EventKind::kThaw, static_cast<uint32_t>(f.target), node.epoch);
      if (f.span > world.detect) events_.push(totals.now + world.detect, EventKind::kDetect, static_cast<uint32_t>(f.target), node.epoch);
      break;
    }
    case FaultKind::kSlow:
      nodes_[f.target].slow = f.value;
      break;
    case FaultKind::kLinkDown:
      links_[f.target].up = false;
      ++links_[f.target].epoch;
      events_.push(totals.now + world.detect, EventKind::kLinkDetect, static_cast<uint32_t>(f.target), links_[f.target].epoch);
      break;
    case FaultKind::kLinkUp: {
      const Link& link = world.links[f.target];
      links_[f.target].up = true;
      ++links_[f.target].epoch;
      const int to = links_[f.target].place;
      if (to >= 0) nodes_[link.source].scheduler->set_link_up(nodes_[link.source].me, to, true);
      break;
    }
    case FaultKind::kLoss:
      links_[f.target].loss = f.value;
      break;
    case FaultKind::kDuplicate:
      links_[f.target].duplicate = f.value;
      break;
    case FaultKind::kClock:
      nodes_[f.target].offset = f.span;
      nodes_[f.target].drift = f.value;
      break;
  }
}

// -- pool -----------------------------------------------------------------------------------------------------------------

uint32_t Simulator::new_work() {
  uint32_t w = free_;
  if (w == kNone) {
    w = static_cast<uint32_t>(works_.size());
    works_.emplace_back();
  } else {
    free_ = works_[w].next_free;
  }
  totals.peak = std::max(totals.peak, static_cast<int64_t>(works_.size()));
  works_[w] = Work{};
  works_[w].sender = -1;
  works_[w].exit = -1;
  works_[w].link = -1;
  works_[w].handle = -1;
  works_[w].confidence = std::nan("");
  return w;
}

void Simulator::free_work(uint32_t w) {
  works_[w].next_free = free_;
  works_[w].since = 0;
  free_ = w;
}

}  // namespace fastee::sim
