// What a few rows need beside products and attention: norms, rotations, gates, hazards, and the choice of a token.
//
// Each is a handful of operations to torch, and for few rows starting an operation takes longer than the operation.
// Compiled like cpu.cpp.
//
// Axes: N rows, D width, H heads, K head width, V vocabulary.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

constexpr int64_t ALONE = 32 * 1024;  // numbers that one thread does faster than several

// y = x / rms(x) * w, row by row.
template <typename T>
void norm(const T* x, const T* w, T* y, int64_t N, int64_t D, double eps, int threads) {
#pragma omp parallel for num_threads(threads) if (N * D > ALONE)
    for (int64_t n = 0; n < N; ++n) {
        const T* from = x + n * D;
        T squares = 0;
        for (int64_t i = 0; i < D; ++i) squares += from[i] * from[i];
        const T scale = 1 / std::sqrt(squares / T(D) + T(eps));
        for (int64_t i = 0; i < D; ++i) y[n * D + i] = from[i] * scale * w[i];
    }
}

// Rotates, in place, the first H heads of rows that lie `stride` numbers apart; cos and sin are (N, K / 2). Coordinate i
// goes with i + K / 2, or, interleaved, 2 i with 2 i + 1.
template <typename T>
void rotate(T* x, const T* cos, const T* sin, int64_t N, int64_t H, int64_t K, int64_t stride, bool interleaved,
            int threads) {
    const int64_t half = K / 2;
#pragma omp parallel for num_threads(threads) if (N * H * K > ALONE)
    for (int64_t n = 0; n < N; ++n)
        for (int64_t h = 0; h < H; ++h) {
            T* head = x + n * stride + h * K;
            const T *c = cos + n * half, *s = sin + n * half;
            if (interleaved) {
                for (int64_t i = 0; i < half; ++i) {
                    const T a = head[2 * i], b = head[2 * i + 1];
                    head[2 * i] = a * c[i] - b * s[i];
                    head[2 * i + 1] = b * c[i] + a * s[i];
                }
            } else {
                for (int64_t i = 0; i < half; ++i) {
                    const T a = head[i], b = head[half + i];
                    head[i] = a * c[i] - b * s[i];
                    head[half + i] = b * c[i] + a * s[i];
                }
            }
        }
}

// y = silu(x[:, :D]) * x[:, D:].
template <typename T> void gate(const T* x, T* y, int64_t N, int64_t D, int threads) {
#pragma omp parallel for num_threads(threads) if (N * D > ALONE)
    for (int64_t n = 0; n < N; ++n) {
        const T *opens = x + n * 2 * D, *up = opens + D;
        for (int64_t i = 0; i < D; ++i) y[n * D + i] = opens[i] / (1 + std::exp(-opens[i])) * up[i];
    }
}

// y = sigmoid(x w + b): a number per row, too little work for more than one thread.
template <typename T> void hazard(const T* x, const T* w, const T* b, T* y, int64_t N, int64_t D) {
    for (int64_t n = 0; n < N; ++n) {
        T sum = 0;
        for (int64_t i = 0; i < D; ++i) sum += x[n * D + i] * w[i];
        y[n] = 1 / (1 + std::exp(-(sum + b[0])));
    }
}

// The first place of the largest number.
template <typename T> int64_t largest(const T* x, int64_t count) {
    T most = x[0];
    for (int64_t i = 1; i < count; ++i) most = std::max(most, x[i]);
    for (int64_t i = 0; i < count; ++i)
        if (x[i] == most) return i;
    return 0;  // where nothing is a number
}

// The raw log-probability of a token, in nats.
template <typename T> double log_probability(const T* logits, int64_t V, int64_t token) {
    T most = logits[0], sum = 0;
    for (int64_t i = 1; i < V; ++i) most = std::max(most, logits[i]);
    for (int64_t i = 0; i < V; ++i) sum += std::exp(logits[i] - most);
    return logits[token] - most - std::log(sum);
}

// Addressed noise, as noise.py defines it: the finaliser of splitmix64 over key and counters, in order.
constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15;

inline uint64_t mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
    return x ^ (x >> 31);
}

inline double gumbel(uint64_t mixed) {
    // 52 bits fit a signed integer, which more processors turn into a floating number many at a time.
    const double uniform = (double(int64_t(mix(mixed + GOLDEN) >> 12)) + 0.5) * 0x1p-52;
    return -std::log(-std::log(uniform));
}

// The noise of ids 0 .. V - 1 at one position of one sample.
inline void noise(uint64_t key, int64_t sample, int64_t position, int64_t V, double* to) {
    const uint64_t place = mix(position * GOLDEN + mix(sample * GOLDEN + key));
    for (int64_t id = 0; id < V; ++id) to[id] = gumbel(mix(id * GOLDEN + place));
}

// The id whose logit over the temperature, with its noise, is largest. A division is written where torch divides: a
// product with the reciprocal would be another number.
template <typename T>
__attribute__((optimize("no-reciprocal-math"))) int64_t largest_noisy(const T* logits, int64_t V, double temperature,
                                                                      const double* noise) {
    thread_local std::vector<double> kept;
    if (int64_t(kept.size()) < V) kept.resize(V);
    double* noisy = kept.data();
    for (int64_t i = 0; i < V; ++i) noisy[i] = noise[i] + double(logits[i]) / temperature;
    return largest(noisy, V);
}

// The likeliest token of each row, or where `noisy` is given the one that is largest there, and its log-probability.
template <typename T>
void pick(const T* logits, const double* noisy, int64_t* tokens, double* chances, int64_t N, int64_t V, int threads) {
#pragma omp parallel for num_threads(threads) if (N * V > ALONE)
    for (int64_t n = 0; n < N; ++n) {
        tokens[n] = noisy ? largest(noisy + n * V, V) : largest(logits + n * V, V);
        chances[n] = log_probability(logits + n * V, V, tokens[n]);
    }
}

}  // namespace

#define LOOPWISE_ROWS(T, name)                                                                                       \
    extern "C" void loopwise_norm_##name(const T* x, const T* w, T* y, int64_t N, int64_t D, double eps, int threads) { \
        norm(x, w, y, N, D, eps, threads);                                                                            \
    }                                                                                                                 \
    extern "C" void loopwise_rotate_##name(T* x, const T* cos, const T* sin, int64_t N, int64_t H, int64_t K,         \
                                           int64_t stride, int interleaved, int threads) {                            \
        rotate(x, cos, sin, N, H, K, stride, interleaved != 0, threads);                                              \
    }                                                                                                                 \
    extern "C" void loopwise_gate_##name(const T* x, T* y, int64_t N, int64_t D, int threads) {                       \
        gate(x, y, N, D, threads);                                                                                    \
    }                                                                                                                 \
    extern "C" void loopwise_hazard_##name(const T* x, const T* w, const T* b, T* y, int64_t N, int64_t D) {          \
        hazard(x, w, b, y, N, D);                                                                                     \
    }                                                                                                                 \
    extern "C" void loopwise_pick_##name(const T* logits, const double* noisy, int64_t* tokens, double* chances,      \
                                         int64_t N, int64_t V, int threads) {                                         \
        pick(logits, noisy, tokens, chances, N, V, threads);                                                          \
    }

LOOPWISE_ROWS(float, float32)
LOOPWISE_ROWS(double, float64)
