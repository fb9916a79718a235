# Floating point: five bodies under gravity, as many steps as told. Only + - * / and square root, which IEEE 754 fixes
# to the last bit (a power, for example, may differ between a library's variants for two processors).
import sys
from math import sqrt

bodies = [
    ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0], 39.47841760435743),
    ([4.84143144246472, -1.16032004402742, -0.10362204447112], [0.60632639299583, 2.81198684491626, -0.02521836165988], 0.03769367487038),
    ([8.34336671824457, 4.12479856412430, -0.40352341711432], [-1.01077434617879, 1.82566237123041, 0.00841576137658], 0.01128632613196),
    ([12.8943695621391, -15.1111514016986, -0.22330757889265], [1.08279100644153, 0.86871301816960, -0.01083263740136], 0.00172372405705),
    ([15.3796971148509, -25.9193146099879, 0.17925877295037], [0.97909073224389, 0.59469899864767, -0.03475595552110], 0.00203368686992),
]
pairs = [(a, b) for i, a in enumerate(bodies) for b in bodies[i + 1:]]

def advance(dt, steps):
    for _ in range(steps):
        for (p, v, m), (q, w, n) in pairs:
            dx = p[0] - q[0]
            dy = p[1] - q[1]
            dz = p[2] - q[2]
            square = dx * dx + dy * dy + dz * dz
            mag = dt / (square * sqrt(square))
            v[0] -= dx * n * mag
            v[1] -= dy * n * mag
            v[2] -= dz * n * mag
            w[0] += dx * m * mag
            w[1] += dy * m * mag
            w[2] += dz * m * mag
        for p, v, _m in bodies:
            p[0] += dt * v[0]
            p[1] += dt * v[1]
            p[2] += dt * v[2]

advance(0.01, int(sys.argv[1]))
for p, v, _m in bodies:
    print(*p, *v)
