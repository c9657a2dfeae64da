// Causal attention within documents, for training on a CPU: forward, and backward by computing the scores again.
//
// A document is an attention of its own: what its tokens may not read is never touched, and within it a group of R
// rows stops at its last key. Rows of scores are short enough to be kept whole, so the softmax is the plain one.
// Every product is made of one tile: R rows by C vectors of sums that stay in registers, the left matrix read number by
// number, the right one in rows. A task is a document and some of its heads, which are read together, as heads of a
// token lie side by side and tokens far apart. No two tasks write to the same place, so results do not depend on who
// does what.
//
// Axes: B batch, T tokens, H heads, G key-value heads, K head width; n tokens of one document.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, C = 4;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32, C = 2;
#else
constexpr int VECTOR_BYTES = 16, C = 2;
#endif
constexpr int R = 6;                   // with C vectors each: what registers hold, but for a row of the right matrix
constexpr int64_t BLOCK = 8 * R;       // queries whose scores are kept before keys and values take their gradients
constexpr int64_t FEW = 1 << 18;       // multiplications that are not worth waking a thread for
constexpr int64_t TOGETHER = 1 << 11;  // bytes of a token that one task reads at once
constexpr int64_t NEAR = 1 << 21;      // bytes of a task that a second cache holds
constexpr int64_t TASKS = 8;           // so many a thread, if heads allow: the last one keeps all others waiting

template <typename T> constexpr int64_t W = VECTOR_BYTES / sizeof(T);

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

template <typename T> inline void store(T* to, Vector<T> v) { std::memcpy(to, &v, sizeof v); }

inline int64_t up(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

// c = or += a b for R rows and V vectors; number i of row r of a is a[r * row + i * step].
template <typename T, int V>
inline void tile(const T* a, int64_t row, int64_t step, const T* b, int64_t b_row, int64_t depth, T* c, int64_t c_row,
                 bool add) {
    Vector<T> sum[R][V] = {};
    for (int64_t i = 0; i < depth; ++i) {
        Vector<T> right[V];
        for (int v = 0; v < V; ++v) right[v] = load(b + i * b_row + v * W<T>);
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v) sum[r][v] += a[r * row + i * step] * right[v];
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) {
            T* to = c + r * c_row + v * W<T>;
            store(to, add ? load(to) + sum[r][v] : sum[r][v]);
        }
}

// The same for any number of vectors.
template <typename T>
void multiply(const T* a, int64_t row, int64_t step, const T* b, int64_t b_row, int64_t depth, T* c, int64_t c_row,
              int64_t vectors, bool add = false) {
    for (; vectors >= C; vectors -= C, b += C * W<T>, c += C * W<T>)
        tile<T, C>(a, row, step, b, b_row, depth, c, c_row, add);
    if (vectors == 3) tile<T, 3>(a, row, step, b, b_row, depth, c, c_row, add);
    if (vectors == 2) tile<T, 2>(a, row, step, b, b_row, depth, c, c_row, add);
    if (vectors == 1) tile<T, 1>(a, row, step, b, b_row, depth, c, c_row, add);
}

// (B, T, heads, K); K lies together.
template <typename T> struct Tensor {
    T* data;
    int64_t batch, token, head;
    T* at(int64_t b, int64_t t, int64_t h) const { return data + b * batch + t * token + h * head; }
};

struct Document {
    int64_t batch, first, n;
};

struct Heads {
    int64_t first, count;
};

template <typename T> struct Attention {
    Tensor<T> q, k, v, out, grad, dq, dk, dv;
    const T *cos, *sin;  // (B, T, K / 2), by which queries and keys are rotated first; null where they are not
    bool interleaved;    // pairs (2i, 2i + 1), not (i, i + K / 2)
    T* lse;  // (B, H, T), the logarithm of each row's sum of exp(score)
    const int32_t* starts;
    int64_t B, T_, H, G, K;
    T scale;
    int64_t width() const { return up(K, W<T>); }
};

template <typename T> int64_t rows_of(int64_t n) { return std::max(up(n, R), up(n, W<T>)); }

// Memory of a thread for one document after the other, in pieces that begin on a vector's boundary. Rows of heads are
// filled with zeros up to whole vectors, and documents up to whole groups of rows, see `rows_of`.
template <typename T> class Room {
  public:
    explicit Room(int64_t size) {
        thread_local std::vector<T> memory;  // kept from call to call: fresh pages are dear
        if (int64_t(memory.size()) < size + W<T>) memory.resize(size + W<T>);
        next = memory.data() + (VECTOR_BYTES - reinterpret_cast<uintptr_t>(memory.data()) % VECTOR_BYTES) / sizeof(T);
    }
    T* take(int64_t rows, int64_t columns) { return (next += rows * columns) - rows * columns; }

  private:
    T* next;
};

// One row times `factor`, its pairs rotated by the angles of `token`, or back by them.
template <typename T>
inline void copy_turned(const Attention<T>& a, int64_t token, bool back, T factor, const T* from, T* __restrict__ to) {
    const int64_t half = a.K / 2;
    const T *cos = a.cos + token * half, *sin = a.sin + token * half;
    const T along = factor, across = back ? -factor : factor;
    if (a.interleaved)
        for (int64_t i = 0; i < half; ++i) {
            const T first = from[2 * i], second = from[2 * i + 1], c = along * cos[i], s = across * sin[i];
            to[2 * i] = first * c - second * s;
            to[2 * i + 1] = second * c + first * s;
        }
    else
        for (int64_t i = 0; i < half; ++i) {
            const T first = from[i], second = from[i + half], c = along * cos[i], s = across * sin[i];
            to[i] = first * c - second * s;
            to[i + half] = second * c + first * s;
        }
}

template <typename T> inline void copy_row(int64_t K, T factor, const T* from, T* __restrict__ to) {
    for (int64_t k = 0; k < K; ++k) to[k] = factor * from[k];
}

// Rows of some heads of a document, head after head, each `rows_of` long. Walks along whole rows of memory: heads of a
// token lie together, and tokens far apart.
template <typename T>
void copy_heads(const Attention<T>& a, Tensor<T> from, const Document& d, Heads heads, bool turned, T factor, T* to) {
    const int64_t width = a.width(), rows = rows_of<T>(d.n);
    for (int64_t i = 0; i < d.n; ++i)
        for (int64_t h = 0; h < heads.count; ++h) {
            const T* row = from.at(d.batch, d.first + i, heads.first + h);
            T* out = to + (h * rows + i) * width;
            if (turned)
                copy_turned(a, d.batch * a.T_ + d.first + i, false, factor, row, out);
            else
                copy_row(a.K, factor, row, out);
            std::fill(out + a.K, out + width, T(0));
        }
    for (int64_t h = 0; h < heads.count; ++h)
        std::fill(to + (h * rows + d.n) * width, to + (h + 1) * rows * width, T(0));
}

// The way back of `copy_heads`.
template <typename T>
void write_heads(const Attention<T>& a, const T* from, const Document& d, Heads heads, bool turned, T factor,
                 Tensor<T> to) {
    const int64_t width = a.width(), rows = rows_of<T>(d.n);
    for (int64_t i = 0; i < d.n; ++i)
        for (int64_t h = 0; h < heads.count; ++h) {
            const T* row = from + (h * rows + i) * width;
            T* out = to.at(d.batch, d.first + i, heads.first + h);
            if (turned)
                copy_turned(a, d.batch * a.T_ + d.first + i, true, factor, row, out);
            else
                copy_row(a.K, factor, row, out);
        }
}

// Lanes of `low` and `high` with and without bit `width` change places, so that after all widths W rows are W columns.
template <typename T, int width, int... l>
inline void cross(Vector<T>& low, Vector<T>& high, std::integer_sequence<int, l...>) {
    typedef typename Types<T>::Index Index;
    constexpr int other = W<T>;
    const Index first = {((l & width) ? (l ^ width) + other : l)...};
    const Index second = {((l & width) ? l + other : (l ^ width))...};
    const Vector<T> crossed = __builtin_shuffle(low, high, first);
    high = __builtin_shuffle(low, high, second);
    low = crossed;
}

template <typename T, int width = 1> inline void turn(Vector<T>* rows) {
    if constexpr (width < W<T>) {
#pragma GCC unroll 16
        for (int i = 0; i < W<T>; ++i)
            if (!(i & width)) cross<T, width>(rows[i], rows[i + width], std::make_integer_sequence<int, W<T>>());
        turn<T, 2 * width>(rows);
    }
}

// Rows become columns, `span` numbers a row.
template <typename T> void transpose(const T* from, int64_t n, int64_t width, T* to, int64_t span) {
    for (int64_t i = 0; i < n; i += W<T>)
        for (int64_t k = 0; k < width; k += W<T>) {
            Vector<T> rows[W<T>];
            for (int64_t l = 0; l < W<T>; ++l) rows[l] = load(from + (i + l) * width + k);
            turn<T>(rows);
            for (int64_t l = 0; l < W<T>; ++l) store(to + (k + l) * span + i, rows[l]);
        }
}

// A whole matrix, (columns, rows) to (rows, columns); both are multiples of W.
template <typename T> int turn_matrix(const T* from, T* to, int64_t rows, int64_t columns, int threads) {
    if (rows % W<T> || columns % W<T>) return false;
    constexpr int64_t BAND = 4 * W<T>;
#pragma omp parallel for schedule(static) num_threads(rows * columns < FEW ? 1 : threads)
    for (int64_t first = 0; first < rows; first += BAND)
        for (int64_t j = 0; j < columns; j += W<T>)
            for (int64_t i = first; i < std::min(first + BAND, rows); i += W<T>) {
                Vector<T> block[W<T>];
                for (int64_t l = 0; l < W<T>; ++l) block[l] = load(from + (j + l) * rows + i);
                turn<T>(block);
                for (int64_t l = 0; l < W<T>; ++l) store(to + (i + l) * columns + j, block[l]);
            }
    return true;
}

// Scores of a document in rows: whole vectors, and one more, as rows a power of two apart would share few cache lines.
template <typename T> int64_t span_of(int64_t n) { return up(n, W<T>) + W<T>; }

// exp(score - maximum) of the first `count` scores, zeros up to `whole`; the inverse of the sum, and its logarithm.
template <typename T> T softmax(T* score, int64_t count, int64_t whole, T& inverse) {
    T maximum = score[0], total = 0;
    for (int64_t j = 1; j < count; ++j) maximum = std::max(maximum, score[j]);
    std::fill(score + count, score + whole, maximum);
    for (int64_t j = 0; j < whole; ++j) score[j] = std::exp(score[j] - maximum);
    std::fill(score + count, score + whole, T(0));
    for (int64_t j = 0; j < whole; ++j) total += score[j];
    inverse = 1 / total;
    return maximum + std::log(total);
}

// Scores become weights, and gradients of weights become those of scores; zeros up to `whole`.
template <typename T> void softmax_backward(T* score, T* grad, int64_t count, int64_t whole, T lse, T delta) {
    std::fill(score + count, score + whole, lse);
    for (int64_t j = 0; j < whole; ++j) score[j] = std::exp(score[j] - lse);
    for (int64_t j = 0; j < whole; ++j) grad[j] = score[j] * (grad[j] - delta);
    std::fill(score + count, score + whole, T(0));
    std::fill(grad + count, grad + whole, T(0));
}

template <typename T> void forward(const Attention<T>& a, const Document& d, Heads kv) {
    const int64_t n = d.n, K = a.K, width = a.width(), span = span_of<T>(n), rows = rows_of<T>(n), size = rows * width;
    const Heads heads = {kv.first * (a.H / a.G), kv.count * (a.H / a.G)};
    const bool turned = a.cos != nullptr;
    Room<T> room(2 * (heads.count + kv.count) * size + width * span + R * (span + width));
    T *qs = room.take(heads.count, size), *outs = room.take(heads.count, size);
    T *ks = room.take(kv.count, size), *vs = room.take(kv.count, size);
    T *k_turned = room.take(width, span), *score = room.take(R, span), *sums = room.take(R, width);
    copy_heads(a, a.q, d, heads, turned, a.scale, qs);
    copy_heads(a, a.k, d, kv, turned, T(1), ks);
    copy_heads(a, a.v, d, kv, false, T(1), vs);
    for (int64_t h = 0; h < heads.count; ++h) {
        const int64_t g = h / (a.H / a.G);
        const T *q = qs + h * size, *v = vs + g * size;
        if (h % (a.H / a.G) == 0) transpose(ks + g * size, n, width, k_turned, span);
        T* lse = a.lse + (d.batch * a.H + heads.first + h) * a.T_ + d.first;
        for (int64_t i = 0; i < n; i += R) {
            const int64_t end = std::min(i + R, n), whole = up(end, W<T>);
            multiply(q + i * width, width, 1, k_turned, span, K, score, span, whole / W<T>);
            T inverse[R];
            for (int64_t r = 0; r < end - i; ++r)
                lse[i + r] = softmax(score + r * span, i + r + 1, whole, inverse[r]);
            multiply(score, span, 1, v, width, end, sums, width, width / W<T>);
            for (int64_t r = 0; r < end - i; ++r)
                copy_row(width, inverse[r], sums + r * width, outs + h * size + (i + r) * width);
        }
    }
    write_heads(a, outs, d, heads, false, T(1), a.out);
}

template <typename T> void backward(const Attention<T>& a, const Document& d, Heads kv) {
    const int64_t n = d.n, K = a.K, width = a.width(), span = span_of<T>(n), rows = rows_of<T>(n), size = rows * width;
    const Heads heads = {kv.first * (a.H / a.G), kv.count * (a.H / a.G)};
    const bool turned = a.cos != nullptr;
    Room<T> room((4 * heads.count + 4 * kv.count) * size + 2 * (width + BLOCK) * span);
    T *qs = room.take(heads.count, size), *outs = room.take(heads.count, size);
    T *grads = room.take(heads.count, size), *dqs = room.take(heads.count, size);
    T *ks = room.take(kv.count, size), *vs = room.take(kv.count, size);
    T *dks = room.take(kv.count, size), *dvs = room.take(kv.count, size);
    T *k_turned = room.take(width, span), *v_turned = room.take(width, span);
    T *weight = room.take(BLOCK, span), *dscore = room.take(BLOCK, span);
    copy_heads(a, a.q, d, heads, turned, a.scale, qs);
    copy_heads(a, a.out, d, heads, false, T(1), outs);
    copy_heads(a, a.grad, d, heads, false, T(1), grads);
    copy_heads(a, a.k, d, kv, turned, T(1), ks);
    copy_heads(a, a.v, d, kv, false, T(1), vs);
    std::fill_n(dks, kv.count * size, T(0));
    std::fill_n(dvs, kv.count * size, T(0));
    for (int64_t h = 0; h < heads.count; ++h) {
        const int64_t g = h / (a.H / a.G);
        const T *q = qs + h * size, *grad = grads + h * size, *answers = outs + h * size, *k = ks + g * size;
        T *dq = dqs + h * size, *dk = dks + g * size, *dv = dvs + g * size;
        if (h % (a.H / a.G) == 0) {
            transpose(k, n, width, k_turned, span);
            transpose(vs + g * size, n, width, v_turned, span);
        }
        const T* lse = a.lse + (d.batch * a.H + heads.first + h) * a.T_ + d.first;
        for (int64_t block = 0; block < n; block += BLOCK) {
            const int64_t stop = std::min(block + BLOCK, n);
            for (int64_t i = block; i < stop; i += R) {
                const int64_t end = std::min(i + R, n), whole = up(end, W<T>);
                T *w = weight + (i - block) * span, *ds = dscore + (i - block) * span;
                multiply(q + i * width, width, 1, k_turned, span, K, w, span, whole / W<T>);
                multiply(grad + i * width, width, 1, v_turned, span, K, ds, span, whole / W<T>);
                for (int64_t r = 0; r < end - i; ++r) {
                    const T *answer = answers + (i + r) * width, *its_grad = grad + (i + r) * width;
                    T delta = 0;
                    for (int64_t c = 0; c < width; ++c) delta += answer[c] * its_grad[c];
                    softmax_backward(w + r * span, ds + r * span, i + r + 1, whole, lse[i + r], delta);
                }
                multiply(ds, span, 1, k, width, end, dq + i * width, width, width / W<T>);
            }
            for (int64_t j = 0; j < stop; j += R) {
                const int64_t i = std::max(j, block), at = (i - block) * span + j, depth = stop - i;
                T *dk_rows = dk + j * width, *dv_rows = dv + j * width;
                multiply(weight + at, 1, span, grad + i * width, width, depth, dv_rows, width, width / W<T>, true);
                multiply(dscore + at, 1, span, q + i * width, width, depth, dk_rows, width, width / W<T>, true);
            }
        }
    }
    write_heads(a, dqs, d, heads, turned, a.scale, a.dq);
    write_heads(a, dks, d, kv, turned, T(1), a.dk);
    write_heads(a, dvs, d, kv, false, T(1), a.dv);
}

// Key-value heads of one task: as many as make a token's part long enough to be fetched ahead, if all that they need
// stays near the processor.
template <typename T> int64_t heads_together(const Attention<T>& a, int64_t n, int64_t documents, int threads) {
    const int64_t each = 4 * (1 + a.H / a.G) * rows_of<T>(n) * a.width() * sizeof(T);
    const int64_t shared = documents * a.G / (TASKS * threads);
    return std::max<int64_t>(1, std::min({a.G, TOGETHER / int64_t(a.K * sizeof(T)), NEAR / each, shared}));
}

// Returns false, having done nothing, when `starts` are not those of documents.
template <typename T, typename Pass> bool each_document(const Attention<T>& a, int threads, Pass pass) {
    std::vector<Document> documents;
    int64_t work = 0;
    for (int64_t b = 0; b < a.B; ++b)
        for (int64_t t = 0; t < a.T_; ++t) {
            const int64_t start = a.starts[b * a.T_ + t];
            if (start == t)
                documents.push_back({b, t, 0});
            else if (t == 0 || start != documents.back().first)
                return false;
            work += ++documents.back().n * a.H * a.K;
        }
    std::vector<std::pair<Document, Heads>> tasks;
    for (const Document& d : documents)
        for (int64_t g = 0, step = heads_together(a, d.n, documents.size(), threads); g < a.G; g += step)
            tasks.push_back({d, {g, std::min(step, a.G - g)}});
#pragma omp parallel for schedule(dynamic, 1) num_threads(work < FEW ? 1 : threads)
    for (size_t i = 0; i < tasks.size(); ++i) pass(a, tasks[i].first, tasks[i].second);
    return true;
}

// `data`: q, k, v, the answers and their gradient, and the gradients of q, k and v, the last four null in the forward
// pass. `sizes`: B, T, H, G, K, then the strides of batch, token and head of all eight in turn.
template <typename T>
int run(void** data, const T* cos, const T* sin, T* lse, const int32_t* starts, const int64_t* sizes, double scale,
        int interleaved, int threads, int back) {
    const auto tensor = [&](int i) {
        const int64_t* stride = sizes + 5 + 3 * i;
        return Tensor<T>{static_cast<T*>(data[i]), stride[0], stride[1], stride[2]};
    };
    const Attention<T> a = {tensor(0), tensor(1), tensor(2), tensor(3), tensor(4), tensor(5), tensor(6), tensor(7),
                            cos, sin, interleaved != 0, lse, starts,
                            sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], T(scale)};
    return each_document(a, threads, back ? backward<T> : forward<T>);
}

}  // namespace

extern "C" {
int loopwise_turn_float32(const float* from, float* to, int64_t rows, int64_t columns, int threads) {
    return turn_matrix(from, to, rows, columns, threads);
}
int loopwise_turn_float64(const double* from, double* to, int64_t rows, int64_t columns, int threads) {
    return turn_matrix(from, to, rows, columns, threads);
}
int loopwise_causal_float32(void** data, const float* cos, const float* sin, float* lse, const int32_t* starts,
                            const int64_t* sizes, double scale, int interleaved, int threads, int back) {
    return run(data, cos, sin, lse, starts, sizes, scale, interleaved, threads, back);
}
int loopwise_causal_float64(void** data, const double* cos, const double* sin, double* lse, const int32_t* starts,
                            const int64_t* sizes, double scale, int interleaved, int threads, int back) {
    return run(data, cos, sin, lse, starts, sizes, scale, interleaved, threads, back);
}
}
