// A launch of a few rows as one call: start states and one loop of the core; and another call for what rows say.
//
// What stands in cpu.cpp and rows.cpp, called one after the other: between two of torch's operations the host takes
// longer than few rows take in either. This file is the one that is compiled.
//
// Axes: N rows, D width, H heads, G key-value heads, K head width, M features of the MLP, V vocabulary.

#include "cpu.cpp"
#include "rows.cpp"

namespace {

// One block of the core. A norm that its layout does not have is null.
template <typename T> struct Layer {
    const T *attention_in, *qkv, *out, *attention_out, *mlp_in, *gate_up, *down, *mlp_out;
    T *keys, *values;
};

enum Injection : int64_t { NONE, ADD, ADAPTER };

// A looped model without what stands before and after its loops, and the tables that its rows are found in.
template <typename T> struct Core {
    int64_t width, heads, kv_heads, head_width, mlp_width, vocab;
    int64_t layer_count, interleaved, norms_sum, injection, starts_zero, read_norms;
    int64_t planes, capacity, slots, key_stride, value_stride;
    double eps, embed_scale;
    const Layer<T>* layers;
    const T *embed, *adapter, *adapter_bias, *loop_norm, *norm, *gate, *gate_bias, *head;
    const T *cos, *sin;      // (positions, K / 2)
    const int32_t* table;    // (sequences, planes, capacity)
    T *states, *injected;    // (seats, D)
};

// One row of a launch: where its state lies, the token that it begins with (-1 if it has begun), and what it reads.
struct Row {
    int64_t seat, token, sequence, plane, position;
};

template <typename T> void add_rows(T* x, const T* more, int64_t count) {
    for (int64_t i = 0; i < count; ++i) x[i] += more[i];
}

// Memory of a call, kept for the next: fresh pages cost more than what few rows compute.
template <typename T> class Room {
  public:
    explicit Room(int64_t size) {
        thread_local std::vector<T> kept;
        if (int64_t(kept.size()) < size) kept.resize(size);
        next_ = kept.data();
    }
    T* take(int64_t count) {
        T* found = next_;
        next_ += count;
        return found;
    }

  private:
    T* next_;
};

template <typename T> void start(const Core<T>& c, const Row& row) {
    const T* from = c.embed + row.token * c.width;
    T *state = c.states + row.seat * c.width, *injected = c.injected ? c.injected + row.seat * c.width : nullptr;
    for (int64_t i = 0; i < c.width; ++i) {
        const T embedded = from[i] * T(c.embed_scale);
        if (injected) injected[i] = embedded;
        state[i] = c.starts_zero ? T(0) : embedded;
    }
}

// x + f(n1(x)) and its variants: what f is given, and what becomes of its result.
template <typename T> const T* branch_input(const T* x, const T* weight, T* room, const Core<T>& c, int64_t N, int threads) {
    if (!weight) return x;
    norm(x, weight, room, N, c.width, c.eps, threads);
    return room;
}

template <typename T> void join_branch(T* x, T* branch, const T* weight, const Core<T>& c, int64_t N, int threads) {
    if (weight && !c.norms_sum) norm(branch, weight, branch, N, c.width, c.eps, threads);
    add_rows(x, branch, N * c.width);
    if (weight && c.norms_sum) norm(x, weight, x, N, c.width, c.eps, threads);
}

// One loop of every row, in place. Returns false when a row points outside the table or the pool.
template <typename T> bool run_core(const Core<T>& c, const Row* rows, int64_t N, T* x, int threads) {
    const int64_t D = c.width, H = c.heads, G = c.kv_heads, K = c.head_width, M = c.mlp_width, wide = (H + 2 * G) * K;
    Room<T> room(N * (2 * D + wide + 2 * H * K + 3 * M));
    T *normed = room.take(N * D), *branch = room.take(N * D), *qkv = room.take(N * wide), *q = room.take(N * H * K),
      *mixed = room.take(N * H * K), *both = room.take(N * 2 * M), *gated = room.take(N * M);
    thread_local std::vector<int64_t> places;
    places.resize(2 * N);
    int64_t *sequences = places.data(), *lengths = sequences + N;
    for (int64_t n = 0; n < N; ++n) {
        sequences[n] = rows[n].sequence * c.planes + rows[n].plane;
        lengths[n] = rows[n].position + 1;
    }
    for (int64_t l = 0; l < c.layer_count; ++l) {
        const Layer<T>& layer = c.layers[l];
        linear(branch_input(x, layer.attention_in, normed, c, N, threads), layer.qkv, qkv, N, D, wide, threads);
        for (int64_t n = 0; n < N; ++n) {
            T* own = qkv + n * wide;
            const int64_t half = K / 2, position = rows[n].position;
            const int64_t slot = c.table[sequences[n] * c.capacity + position];
            if (slot < 0 || slot >= c.slots) return false;
            rotate(own, c.cos + position * half, c.sin + position * half, 1, H + G, K, wide, c.interleaved != 0, 1);
            std::copy_n(own, H * K, q + n * H * K);
            std::copy_n(own + H * K, G * K, layer.keys + slot * c.key_stride);
            std::copy_n(own + (H + G) * K, G * K, layer.values + slot * c.value_stride);
        }
        const Attention<T> attention = {
            q, layer.keys, layer.values, mixed, c.table, sequences, lengths, c.key_stride, c.value_stride, c.capacity,
            N, H, G, K, c.slots, INT64_MAX, c.capacity, T(1 / std::sqrt(double(K)))};
        if (!attend(attention, threads)) return false;
        linear(mixed, layer.out, branch, N, H * K, D, threads);
        join_branch(x, branch, layer.attention_out, c, N, threads);
        linear(branch_input(x, layer.mlp_in, normed, c, N, threads), layer.gate_up, both, N, D, 2 * M, threads);
        gate(both, gated, N, M, threads);
        linear(gated, layer.down, branch, N, M, D, threads);
        join_branch(x, branch, layer.mlp_out, c, N, threads);
    }
    if (c.loop_norm) norm(x, c.loop_norm, x, N, D, c.eps, threads);
    return true;
}

// What enters the core: the state, with the prelude's output added or mapped in.
template <typename T> void inject(const Core<T>& c, const Row* rows, const T* before, int64_t N, T* x, int threads) {
    const int64_t D = c.width;
    if (c.injection != ADAPTER) {
        std::copy_n(before, N * D, x);
        for (int64_t n = 0; n < N && c.injection == ADD; ++n)
            add_rows(x + n * D, c.injected + rows[n].seat * D, D);
        return;
    }
    Room<T> room(N * 2 * D);
    T* joined = room.take(N * 2 * D);
    for (int64_t n = 0; n < N; ++n) {
        std::copy_n(before + n * D, D, joined + n * 2 * D);
        std::copy_n(c.injected + rows[n].seat * D, D, joined + n * 2 * D + D);
    }
    linear(joined, c.adapter, x, N, 2 * D, D, threads);
    for (int64_t n = 0; n < N && c.adapter_bias; ++n) add_rows(x + n * D, c.adapter_bias, D);
}

// One loop of N rows, from their seats and back; `before` and `after` hold their states, `hazards` what the gate says.
template <typename T>
bool loop(const Core<T>& c, const Row* rows, int64_t N, T* before, T* after, double* hazards, int threads) {
    const int64_t D = c.width;
    for (int64_t n = 0; n < N; ++n) {
        if (rows[n].token >= 0) start(c, rows[n]);
        std::copy_n(c.states + rows[n].seat * D, D, before + n * D);
    }
    inject(c, rows, before, N, after, threads);
    if (!run_core(c, rows, N, after, threads)) return false;
    for (int64_t n = 0; n < N; ++n) std::copy_n(after + n * D, D, c.states + rows[n].seat * D);
    if (!c.gate) return true;
    Room<T> room(N * (D + 1));
    T *normed = room.take(N * D), *chance = room.take(N);
    hazard(c.loop_norm ? after : branch_input(after, c.norm, normed, c, N, threads), c.gate, c.gate_bias, chance, N, D);
    std::copy_n(chance, N, hazards);
    return true;
}

// How the token of one row is chosen: the likeliest at temperature 0, otherwise with addressed noise.
struct Draw {
    int64_t place;  // of its state
    int64_t tells;  // whether its log-probability is wanted
    int64_t key, sample, position;
    double temperature;
};

// What N rows of `states` say.
template <typename T>
void say(const Core<T>& c, const T* states, const Draw* draws, int64_t N, int64_t* tokens, double* chances, int threads) {
    const int64_t D = c.width, V = c.vocab;
    Room<T> room(N * (D + V));
    T *hidden = room.take(N * D), *logits = room.take(N * V);
    for (int64_t n = 0; n < N; ++n) std::copy_n(states + draws[n].place * D, D, hidden + n * D);
    for (int64_t i = 0; i < c.read_norms; ++i) norm(hidden, c.norm, hidden, N, D, c.eps, threads);
    linear(hidden, c.head, logits, N, D, V, threads);
    const bool sampled = draws[0].temperature > 0;
#pragma omp parallel for num_threads(threads) if (N > 1 && N * V * (sampled ? 8 : 1) > ALONE)
    for (int64_t n = 0; n < N; ++n) {
        const T* row = logits + n * V;
        const Draw& draw = draws[n];
        tokens[n] = draw.temperature > 0 ? largest_noisy(row, V, draw.temperature, draw.key, draw.sample, draw.position)
                                         : largest(row, V);
        chances[n] = draw.tells ? log_probability(row, V, tokens[n]) : 0;
    }
}

}  // namespace

#define LOOPWISE_LAUNCH(T, name)                                                                                     \
    extern "C" int loopwise_loop_##name(const Core<T>* core, const Row* rows, int64_t N, T* before, T* after,         \
                                        double* hazards, int threads) {                                              \
        return loop(*core, rows, N, before, after, hazards, threads);                                                 \
    }                                                                                                                 \
    extern "C" void loopwise_say_##name(const Core<T>* core, const T* states, const Draw* draws, int64_t N,           \
                                        int64_t* tokens, double* chances, int threads) {                              \
        say(*core, states, draws, N, tokens, chances, threads);                                                       \
    }

LOOPWISE_LAUNCH(float, float32)
LOOPWISE_LAUNCH(double, float64)
