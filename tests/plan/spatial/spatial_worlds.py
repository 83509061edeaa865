"""Random nets and plans for the tests of the spatial planner."""

import random

from fastee.planning.spatial import NetBuilder


def random_net(rng: random.Random, max_h: int = 24):
    """A small net of convolutions, poolings, and now and then a residual or branching block."""
    while True:
        try:
            b = NetBuilder("random", rng.randint(6, max_h), rng.randint(1, 8))
            for _ in range(rng.randint(1, 5)):
                what = rng.random()
                if what < 0.5:
                    b.conv(rng.randint(1, 32), rng.randint(1, 4), rng.randint(1, 2), rng.randint(0, 2), dilation=rng.randint(1, 2))
                elif what < 0.7:
                    k = rng.randint(2, 3)
                    b.pool(k, rng.randint(1, 3), rng.randint(0, k // 2), rng.random() < 0.5)
                elif what < 0.85:  # branches of different reach, the narrow one read last on the way back
                    x = b.last
                    b.cat(b.conv(3, 1, source=x), b.conv(2, 5, padding=2, source=x))
                else:
                    c, x = b.shapes[b.last][0], b.last
                    b.add(x, b.conv(c, 3, padding=1, source=b.conv(c, 1, source=x)))
            return b.build(rng.randint(0, 10**6), rng.randint(0, 2))
        except ValueError:
            continue


def random_plan(rng: random.Random, net, providers: int):
    volumes = [0, *(p for p in net.cut_points[1:-1] if rng.random() < 0.4), len(net.layers)]
    return volumes, [[0, *sorted(rng.randint(0, net.height(b)) for _ in range(providers - 1)), net.height(b)] for b in volumes[1:]]
