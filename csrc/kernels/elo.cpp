// Elo tournaments in random orders. fourbit.h has the equations.
//
// A tournament is a chain: each match needs the ratings that the one before left. So eight orders are played side by
// side, each in its own lane: the compiler makes vectors of the arithmetic, and the waits of one lane are filled by the
// others. An order is drawn while it is played (Fisher-Yates from the front), which lets it stop after `length`
// matches.
//
// All operations are additions, products and one division in fp64, none contracted, so that every level and the
// reference agree to the last bit. 2^t is a polynomial of degree 11 on [-1/2, 1/2], the Taylor series, whose rest is
// below (ln 2 / 2)^12 / 12! < 7e-15, times a power of two.
//
// Cost: orders * length updates of some 8 ns, most of it the reads of a random match; 4 n bytes a lane.

#include <stdlib.h>

#include "../level.h"

FB_BEGIN

namespace {

constexpr int kLanes = 8;
constexpr uint64_t kGamma = 0x9e3779b97f4a7c15u;
constexpr int64_t kMostPlayers = 32768;

// The finaliser of splitmix64.
inline uint64_t mixed(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

// 2^t for |t| <= 1000.
inline double power_of_two(double t) {
    const double magic = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer, ties to even
    const double whole = (t + magic) - magic;
    const double f = t - whole;
    double p = 4.44553827187081e-10;
    p = p * f + 7.054911620801121e-09;
    p = p * f + 1.0178086009239696e-07;
    p = p * f + 1.3215486790144305e-06;
    p = p * f + 1.5252733804059838e-05;
    p = p * f + 0.00015403530393381606;
    p = p * f + 0.0013333558146428441;
    p = p * f + 0.009618129107628477;
    p = p * f + 0.055504108664821576;
    p = p * f + 0.2402265069591007;
    p = p * f + 0.6931471805599453;
    p = p * f + 1.0;
    const int64_t exponent = ((int64_t)whole + 1023) << 52;
    double scale;
    memcpy(&scale, &exponent, sizeof scale);
    return p * scale;
}

// Eight orders of one tournament. `left`: [kLanes, n], `now`: [players, kLanes].
void play(const uint32_t* matches, int64_t n, int64_t players, int64_t length, uint64_t seed, int64_t first_order,
          double k, double start, uint32_t* left, double* now) {
    uint64_t state[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
        state[lane] = mixed(seed + kGamma * (uint64_t)(first_order + lane + 1));
        memcpy(left + lane * n, matches, (size_t)n * sizeof *left);
    }
    for (int64_t i = 0; i < players * kLanes; ++i) now[i] = start;
    for (int64_t i = 0; i < length; ++i) {
        const uint64_t rest = (uint64_t)(n - i);
        int64_t a[kLanes], b[kLanes];
        double one[kLanes], other[kLanes], points[kLanes], change[kLanes];
        for (int lane = 0; lane < kLanes; ++lane) {
            state[lane] += kGamma;
            const int64_t drawn = i + (int64_t)(((mixed(state[lane]) >> 32) * rest) >> 32);
            uint32_t* mine = left + lane * n;
            const uint32_t match = mine[drawn];
            mine[drawn] = mine[i];
            a[lane] = (int64_t)(match & 0x7fffu) * kLanes + lane;
            b[lane] = (int64_t)((match >> 15) & 0x7fffu) * kLanes + lane;
            points[lane] = 0.5 * (double)(match >> 30);
            one[lane] = now[a[lane]];
            other[lane] = now[b[lane]];
        }
        for (int lane = 0; lane < kLanes; ++lane) {
            double t = (other[lane] - one[lane]) * 0.008304820237218406;  // log2(10) / 400
            t = t < -1000.0 ? -1000.0 : t;
            t = t > 1000.0 ? 1000.0 : t;
            change[lane] = k * (points[lane] - 1.0 / (1.0 + power_of_two(t)));
        }
        for (int lane = 0; lane < kLanes; ++lane) {
            now[a[lane]] = one[lane] + change[lane];
            now[b[lane]] = other[lane] - change[lane];
        }
    }
}

bool are_playable(const uint32_t* matches, int64_t n, int64_t players) {
    for (int64_t i = 0; i < n; ++i) {
        const uint32_t a = matches[i] & 0x7fffu, b = (matches[i] >> 15) & 0x7fffu;
        if (a == b || a >= players || b >= players || (matches[i] >> 30) > 2) return false;
    }
    return true;
}

int64_t smaller_of(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace

int32_t elo(const uint32_t* matches, const int64_t* ends, int64_t tournaments, int64_t players, int64_t orders,
            int64_t first_order, int64_t length, uint64_t seed, double k, double start, double* ratings,
            int32_t threads) {
    if (tournaments < 0 || orders < 0 || length < 0 || players < 1 || players > kMostPlayers) return FB_BAD_ARGUMENT;
    int64_t most = 0;
    for (int64_t t = 0, begin = 0; t < tournaments; begin = ends[t++]) {
        if (ends[t] < begin || !are_playable(matches + begin, ends[t] - begin, players)) return FB_BAD_ARGUMENT;
        most = ends[t] - begin > most ? ends[t] - begin : most;
    }
    const int64_t blocks = (orders + kLanes - 1) / kLanes;
    int32_t status = FB_OK;
#pragma omp parallel num_threads(threads)
    {
        uint32_t* left = (uint32_t*)malloc((size_t)(most * kLanes + 1) * sizeof *left);
        double* now = (double*)malloc((size_t)(players * kLanes) * sizeof *now);
        const bool ready = left && now;
        if (!ready) {
#pragma omp atomic write
            status = FB_NO_MEMORY;
        }
#pragma omp for schedule(dynamic)
        for (int64_t job = 0; job < tournaments * blocks; ++job) {
            const int64_t t = job / blocks, done = job % blocks * kLanes;
            const int64_t begin = t ? ends[t - 1] : 0, n = ends[t] - begin;
            if (!ready) continue;
            play(matches + begin, n, players, smaller_of(length, n), mixed(seed + kGamma * (uint64_t)t),
                 first_order + done, k, start, left, now);
            for (int64_t lane = 0; lane < smaller_of(kLanes, orders - done); ++lane) {
                double* out = ratings + (t * orders + done + lane) * players;
                for (int64_t p = 0; p < players; ++p) out[p] = now[p * kLanes + lane];
            }
        }
        free(left);
        free(now);
    }
    return status;
}

FB_END
