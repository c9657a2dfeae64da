// The CPU kernels of the serving engine: attention through a page table, and products of a few rows with a matrix.
//
// Both are bound by reading memory, not by arithmetic, so both do the same two things: read every byte once, in long
// runs, and keep many independent sums going. Vectors are GCC's; nothing here names an instruction set.
//
// Axes: N rows, H heads, G key-value heads, K head width, S slots; of a matrix, `in` and `out`.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif

template <typename T> constexpr int LANES = VECTOR_BYTES / sizeof(T);

template <typename T> struct Types;
template <> struct Types<float> {
    typedef float Vector __attribute__((vector_size(VECTOR_BYTES)));
    typedef int32_t Index __attribute__((vector_size(VECTOR_BYTES)));
};
template <> struct Types<double> {
    typedef double Vector __attribute__((vector_size(VECTOR_BYTES)));
    typedef int64_t Index __attribute__((vector_size(VECTOR_BYTES)));
};
template <typename T> using Vector = typename Types<T>::Vector;

template <typename T> inline Vector<T> load(const T* from) {
    Vector<T> v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

// The first `count` lanes; zeros beyond, where nothing is read.
template <typename T> inline Vector<T> load_some(const T* from, int64_t count) {
    Vector<T> v = {};
    std::memcpy(&v, from, count * sizeof(T));
    return v;
}

template <typename T> inline void store(T* to, Vector<T> v) { std::memcpy(to, &v, sizeof v); }

// Lane l of the result is the sum of lanes l and l ^ width of `low` where bit `width` of l is 0, of `high` where it is 1.
template <typename T, int width, int... l>
inline Vector<T> fold(Vector<T> low, Vector<T> high, std::integer_sequence<int, l...>) {
    typedef typename Types<T>::Index Index;
    constexpr int W = LANES<T>;
    const Index own = {((l & width) ? l + W : l)...}, other = {((l & width) ? (l ^ width) + W : (l ^ width))...};
    return __builtin_shuffle(low, high, own) + __builtin_shuffle(low, high, other);
}

// Lane l of the result is the sum of all lanes of a[l]: a transpose and a sum, in W - 1 folds.
template <typename T, int width = 1> inline Vector<T> lane_sums(Vector<T>* a) {
    constexpr int W = LANES<T>;
    if constexpr (width == W) {
        return a[0];
    } else {
        for (int i = 0; i < W / (2 * width); ++i)
            a[i] = fold<T, width>(a[2 * i], a[2 * i + 1], std::make_integer_sequence<int, W>());
        return lane_sums<T, 2 * width>(a);
    }
}

// ---------------------------------------------------------------------------------------------------------- attention

constexpr int BLOCK = 64;     // slots whose scores are known before their values are read; they fit the first cache
constexpr int TILE = 32;      // rows of one table row that share what is read of it
constexpr int WORTH_PACKING = 4;  // queries of one key-value head
constexpr int SHORTEST = 32;  // slots that are worth a task of their own
constexpr int SHARES = 8;     // tasks per thread, so that unequal lengths even out

template <typename T> constexpr T LOWEST = T(-1e30);  // not an infinity: -ffast-math knows none

template <typename T> struct Attention {
    const T *q, *keys, *values;
    T* out;
    const int32_t* table;
    const int64_t *rows, *lengths;
    int64_t key_stride, value_stride, table_stride;
    int64_t N, H, G, K, S, M, C;  // M, C: rows and columns of the table
    T scale;
};

// Rows first .. first + count of one table row; its parts are what tasks work on.
struct Tile {
    int64_t first, count, longest, part, parts;
};

struct Part {
    const Tile* tile;
    int64_t begin, end;
};

// Where the keys and values of a block's slots lie; filled up to BLOCK with the last slot.
template <typename T> struct Block {
    const T *key[BLOCK], *value[BLOCK];
};

// One head of a block, copied together. In the pool the slots of one head are a power of two apart and fall upon the
// same few lines of the first cache, so what several queries read would never stay there.
template <typename T> void pack(const Block<T>& from, int64_t offset, int64_t K, T* room, Block<T>& to) {
    for (int64_t s = 0; s < BLOCK; ++s) {
        T *key = room + 2 * s * K, *value = key + K;
        to.key[s] = std::copy_n(from.key[s] + offset, K, key) - K;
        to.value[s] = std::copy_n(from.value[s] + offset, K, value) - K;
    }
}

// What the online softmax (Milakov and Gimelshein 2018) carries for one query: sums of exp(score - maximum) * value,
// the total of exp(score - maximum), and the maximum; K + 2 numbers.
template <typename T> struct State {
    T* sums;
    T &total, &maximum;
    State(T* at, int64_t K) : sums(at), total(at[K]), maximum(at[K + 1]) {}
};

// a[j] += the products of C vectors of q with those of W keys. Asks for the values, if they are `far`, which come next.
template <typename T, int C, bool far>
inline void add_products(Vector<T>* a, const T* q, const T* const* key, const T* const* value, int64_t offset) {
    constexpr int W = LANES<T>;
    Vector<T> part[C];
    for (int c = 0; c < C; ++c) part[c] = load(q + c * W);
    for (int j = 0; j < W; ++j)
        for (int c = 0; c < C; ++c) {
            if constexpr (far) __builtin_prefetch(value[j] + offset + c * W);
            a[j] += part[c] * load(key[j] + offset + c * W);
        }
}

// sums += weight[s] * value[s] for C vectors of the head; two slots at a time, as one sum would wait for itself.
template <typename T, int C>
inline void add_values(T* sums, const T* weight, const T* const* value, int64_t offset, int64_t count) {
    constexpr int W = LANES<T>;
    Vector<T> even[C], odd[C] = {};
    for (int c = 0; c < C; ++c) even[c] = load(sums + c * W);
    int64_t s = 0;
    for (; s + 1 < count; s += 2)
        for (int c = 0; c < C; ++c) {
            even[c] += weight[s] * load(value[s] + offset + c * W);
            odd[c] += weight[s + 1] * load(value[s + 1] + offset + c * W);
        }
    if (s < count)
        for (int c = 0; c < C; ++c) even[c] += weight[s] * load(value[s] + offset + c * W);
    for (int c = 0; c < C; ++c) store(sums + c * W, even[c] + odd[c]);
}

// One query over the first `count` slots of a block.
template <typename T, bool far>
void attend_block(const T* q, const Block<T>& block, int64_t offset, int64_t count, int64_t K, T scale, State<T> state) {
    constexpr int W = LANES<T>;
    T score[BLOCK];
    for (int64_t s = 0; s < count; s += W) {
        const T *const *key = block.key + s, *const *value = block.value + s;
        Vector<T> a[W] = {};
        int64_t k = 0;
        for (; k + 4 * W <= K; k += 4 * W) add_products<T, 4, far>(a, q + k, key, value, offset + k);
        for (; k + W <= K; k += W) add_products<T, 1, far>(a, q + k, key, value, offset + k);
        if (k < K)
            for (int j = 0; j < W; ++j) a[j] += load_some(q + k, K - k) * load_some(key[j] + offset + k, K - k);
        store(score + s, lane_sums<T>(a) * scale);
    }

    T maximum = state.maximum, total = 0;
    for (int64_t s = 0; s < count; ++s) maximum = std::max(maximum, score[s]);
    for (int64_t s = 0; s < count; ++s) score[s] = std::exp(score[s] - maximum);
    for (int64_t s = 0; s < count; ++s) total += score[s];
    const T keep = std::exp(state.maximum - maximum);
    state.maximum = maximum;
    state.total = state.total * keep + total;

    T* sums = state.sums;
    for (int64_t k = 0; k < K; ++k) sums[k] *= keep;
    int64_t k = 0;
    for (; k + 4 * W <= K; k += 4 * W) add_values<T, 4>(sums + k, score, block.value, offset + k, count);
    for (; k + W <= K; k += W) add_values<T, 1>(sums + k, score, block.value, offset + k, count);
    for (; k < K; ++k)
        for (int64_t s = 0; s < count; ++s) sums[k] += score[s] * block.value[s][offset + k];
}

// All queries of a tile over its slots begin .. end. Returns false when the table names a slot that does not exist.
template <typename T> bool attend_part(const Attention<T>& a, const Part& part, T* states) {
    const Tile& tile = *part.tile;
    const int32_t* slots = a.table + a.rows[tile.first] * a.table_stride;
    const int64_t K = a.K, stride = K + 2, group = a.H / a.G;
    for (int64_t i = 0; i < tile.count * a.H; ++i) {
        std::fill_n(states + i * stride, K + 1, T(0));
        states[i * stride + K + 1] = LOWEST<T>;
    }
    const bool packs = tile.count * group >= WORTH_PACKING;
    thread_local std::vector<T> room;
    if (packs) room.resize(2 * BLOCK * K);
    Block<T> block, packed;
    for (int64_t begin = part.begin; begin < part.end; begin += BLOCK) {
        const int64_t count = std::min<int64_t>(BLOCK, part.end - begin);
        for (int64_t s = 0; s < BLOCK; ++s) {
            const int64_t slot = slots[begin + std::min(s, count - 1)];
            if (slot < 0 || slot >= a.S) return false;
            block.key[s] = a.keys + slot * a.key_stride;
            block.value[s] = a.values + slot * a.value_stride;
        }
        for (int64_t g = 0; g < a.G; ++g) {
            if (packs) pack(block, g * K, K, room.data(), packed);
            for (int64_t query = 0; query < tile.count * group; ++query) {
                const int64_t r = query / group, h = g * group + query % group;
                const int64_t live = std::min(count, a.lengths[tile.first + r] - begin);
                if (live <= 0) continue;
                const T* q = a.q + ((tile.first + r) * a.H + h) * K;
                const State<T> state(states + (r * a.H + h) * stride, K);
                if (packs)
                    attend_block<T, false>(q, packed, 0, live, K, a.scale, state);
                else
                    attend_block<T, true>(q, block, g * K, live, K, a.scale, state);
            }
        }
    }
    return true;
}

// The answer of one query from the states of all parts; zeros where nothing was read.
template <typename T> void merge(const T* states, int64_t parts, int64_t part_stride, int64_t K, T* out) {
    T maximum = LOWEST<T>, total = 0;
    for (int64_t i = 0; i < parts; ++i) maximum = std::max(maximum, states[i * part_stride + K + 1]);
    std::fill_n(out, K, T(0));
    for (int64_t i = 0; i < parts; ++i) {
        const T* state = states + i * part_stride;
        const T keep = std::exp(state[K + 1] - maximum);
        total += keep * state[K];
        for (int64_t k = 0; k < K; ++k) out[k] += keep * state[k];
    }
    const T share = total > 0 ? 1 / total : T(0);
    for (int64_t k = 0; k < K; ++k) out[k] *= share;
}

// Returns false, with nothing of use in `out`, when rows, lengths or slots point outside the table or the pool.
template <typename T> bool attend(const Attention<T>& a, int threads) {
    // Neighbours of one table row make a tile; then long tiles are cut into parts until no task is a large share.
    std::vector<Tile> tiles;
    int64_t work = 0, parts = 0;
    for (int64_t n = 0; n < a.N; ++n) {
        if (a.rows[n] < 0 || a.rows[n] >= a.M || a.lengths[n] < 0 || a.lengths[n] > a.C) return false;
        if (tiles.empty() || tiles.back().count == TILE || a.rows[tiles.back().first] != a.rows[n])
            tiles.push_back({n, 0, 0, 0, 0});
        Tile& tile = tiles.back();
        tile.count += 1;
        tile.longest = std::max(tile.longest, a.lengths[n]);
        work += a.lengths[n];
    }
    const int64_t share = threads > 1 ? work / (threads * SHARES) : work;
    std::vector<Part> tasks;
    for (Tile& tile : tiles) {
        const int64_t least = std::max<int64_t>(SHORTEST, share / tile.count);
        tile.part = parts;
        tile.parts = std::max<int64_t>(1, (tile.longest + least - 1) / least);
        parts += tile.parts;
        const int64_t length = (tile.longest + tile.parts - 1) / tile.parts;
        for (int64_t i = 0; i < tile.parts; ++i)
            tasks.push_back({&tile, std::min(i * length, tile.longest), std::min((i + 1) * length, tile.longest)});
    }
    const int64_t stride = a.K + 2;
    std::vector<int64_t> offsets;
    int64_t size = 0;
    for (const Part& task : tasks) {
        offsets.push_back(size);
        size += task.tile->count * a.H * stride;
    }
    thread_local std::vector<T> scratch;  // kept from call to call: fresh pages cost more than short attentions
    if (int64_t(scratch.size()) < size) scratch.resize(size);
    T* states = scratch.data();

    threads = std::min<int64_t>(threads, std::max<size_t>(1, tasks.size()));
    bool sound = true;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic, 1) reduction(&& : sound)
        for (size_t i = 0; i < tasks.size(); ++i) sound = attend_part(a, tasks[i], states + offsets[i]) && sound;
#pragma omp for schedule(static)
        for (size_t i = 0; i < tiles.size(); ++i) {
            const Tile& tile = tiles[i];
            for (int64_t query = 0; query < tile.count * a.H; ++query)
                merge(states + offsets[tile.part] + query * stride, tile.parts, tile.count * a.H * stride, a.K,
                      a.out + (tile.first * a.H + query) * a.K);
        }
    }
    return sound;
}

// ------------------------------------------------------------------------------------------------------------- linear

constexpr int64_t STEP = 32;         // outputs that a thread takes at a time
constexpr int64_t NEAR = 32 * 1024;  // bytes of x that stay in the first cache while weights stream past
constexpr int64_t AHEAD = 2048;      // bytes between the weights that are asked for and those that are used

// y[n][o] = or += the sum over i in from .. to of x[n][i] * w[o][i], for N rows and outputs begin .. end: W sums at once,
// as R outputs by N rows.
template <typename T, int N>
void linear_rows(const T* x, const T* w, T* y, int64_t in, int64_t out, int64_t begin, int64_t end, int64_t from,
                 int64_t to) {
    constexpr int W = LANES<T>, R = W / N;
    // The processor fetches ahead within a page at best, and a wide tile fills its window with sums, not with loads.
    constexpr int64_t far = AHEAD / sizeof(T);
    const int64_t ahead = in > far ? far : R * in;
    const int64_t whole = to - (to - from) % W;
    for (int64_t o = begin; o < end; o += R) {
        const T* row[R];
        for (int r = 0; r < R; ++r) row[r] = w + std::min(o + r, end - 1) * in;
        Vector<T> a[W] = {};
        for (int64_t i = from; i < whole; i += W)
            for (int r = 0; r < R; ++r) {
                __builtin_prefetch(row[r] + i + ahead, 0, 2);
                const Vector<T> weight = load(row[r] + i);
                for (int n = 0; n < N; ++n) a[r * N + n] += weight * load(x + i * N + n * W);
            }
        if (whole < to)
            for (int r = 0; r < R; ++r) {
                const Vector<T> weight = load_some(row[r] + whole, to - whole);
                for (int n = 0; n < N; ++n) a[r * N + n] += weight * load(x + whole * N + n * W);
            }
        const Vector<T> sums = lane_sums<T>(a);
        for (int r = 0; r < std::min<int64_t>(R, end - o); ++r)
            for (int n = 0; n < N; ++n) {
                T& sum = y[n * out + o + r];
                sum = (from ? sum : 0) + sums[r * N + n];
            }
    }
}

template <typename T, int... n> auto* linear_for(int64_t rows, std::integer_sequence<int, n...>) {
    static decltype(&linear_rows<T, 1>) const table[] = {linear_rows<T, n + 1>...};
    return table[rows - 1];
}

// Rows n of x laid out as [i / W][n][W], with zeros at the end: rows of a power of two would all fall upon the same lines
// of the first cache.
template <typename T> void interleave(const T* x, int64_t rows, int64_t in, T* to) {
    constexpr int W = LANES<T>;
    for (int64_t i = 0; i < in; i += W)
        for (int64_t n = 0; n < rows; ++n)
            store(to + i * rows + n * W, load_some(x + n * in + i, std::min<int64_t>(W, in - i)));
}

template <typename T>
void linear(const T* x, const T* w, T* y, int64_t N, int64_t in, int64_t out, int threads) {
    constexpr int W = LANES<T>;
    const int64_t steps = (out + STEP - 1) / STEP, width = (in + W - 1) / W * W;
    thread_local std::vector<T> room;
    if (int64_t(room.size()) < N * width) room.resize(N * width);
    T* laid = room.data();
    for (int64_t n = 0; n < N; n += W) interleave(x + n * in, std::min<int64_t>(W, N - n), in, laid + n * width);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t step = 0; step < steps; ++step)
        for (int64_t n = 0; n < N; n += W) {
            const int64_t rows = std::min<int64_t>(W, N - n);
            const int64_t strip = std::max<int64_t>(NEAR / int64_t(sizeof(T)) / rows / W * W, W);
            const auto kernel = linear_for<T>(rows, std::make_integer_sequence<int, W>());
            for (int64_t from = 0; from < in; from += strip)
                kernel(laid + n * width, w, y + n * out, in, out, step * STEP, std::min(out, (step + 1) * STEP), from,
                       std::min(in, from + strip));
        }
}

}  // namespace

#define LOOPWISE_KERNELS(T, name)                                                                                    \
    extern "C" int loopwise_attend_##name(const T* q, const T* keys, const T* values, T* out, const int32_t* table,   \
                                          const int64_t* rows, const int64_t* lengths, const int64_t* size,           \
                                          double scale, int threads) {                                                \
        const Attention<T> a = {q,       keys,    values,  out,     table,   rows,    lengths, size[0], size[1],      \
                                size[2], size[3], size[4], size[5], size[6], size[7], size[8], size[9], T(scale)};    \
        return attend(a, threads);                                                                                    \
    }                                                                                                                 \
    extern "C" void loopwise_linear_##name(const T* x, const T* w, T* y, int64_t N, int64_t in, int64_t out,          \
                                           int threads) {                                                             \
        linear(x, w, y, N, in, out, threads);                                                                         \
    }

LOOPWISE_KERNELS(float, float32)
LOOPWISE_KERNELS(double, float64)
