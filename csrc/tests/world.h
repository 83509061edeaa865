// A world of equal segments and nodes in which every policy can be built.
#pragma once
#include "sched/scheduler.h"

inline fastee::sched::Config equal_world(const char* policy, int segments, int max_tasks) {
  fastee::sched::Config c;
  c.segments = segments;
  c.nodes = 3;
  c.codecs = 2;
  c.batch_sizes = {1, 8};
  const size_t n = static_cast<size_t>(segments);
  c.mean.assign(6 * n, 1e-3);
  c.spread.assign(6 * n, 1e-4);
  c.wire_bytes.assign(2 * n, 4096);
  c.codec_seconds.assign(2 * n, 1e-5);
  c.bandwidth.assign(9, 1e8);
  c.delay.assign(9, 1e-3);
  c.hosts.assign(3 * n, 1);
  c.thresholds.assign(n - 1, 0.8);
  c.params.delta.assign(n - 1, 0.5);
  c.params.tiers = {0, 1, 2};
  c.params.counts.assign(n, 1);
  c.policy = policy;
  c.deadline = 20'000'000;
  c.max_tasks = max_tasks;
  return c;
}
