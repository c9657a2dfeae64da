// Causal attention within documents, for training on a CPU: forward, and backward by computing the scores again.
//
// A document is an attention of its own: what its tokens may not read is never touched, and within it a group of R
// rows stops at its last key. Rows of scores are short enough to be kept whole, so the softmax is the plain one.
// Every product is made of one tile: R rows by C vectors of sums that stay in registers, the left matrix read number by
// number, the right one in rows. No two tasks write to the same place, so results do not depend on who does what.
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
constexpr int R = 6;                  // with C vectors each: what the registers hold, but for a row of the right matrix
constexpr int64_t BLOCK = 8 * R;      // queries whose scores are kept before keys and values take their gradients
constexpr int64_t FEW = 1 << 18;      // multiplications that are not worth waking a thread for

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

template <typename T> struct Attention {
    Tensor<T> q, k, v, out, grad, dq, dk, dv;
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

template <typename T>
void copy_rows(Tensor<T> from, const Document& d, int64_t head, int64_t K, int64_t width, T factor, T* to) {
    for (int64_t i = 0; i < d.n; ++i) {
        const T* row = from.at(d.batch, d.first + i, head);
        for (int64_t k = 0; k < K; ++k) to[i * width + k] = factor * row[k];
        std::fill(to + i * width + K, to + (i + 1) * width, T(0));
    }
    std::fill(to + d.n * width, to + rows_of<T>(d.n) * width, T(0));
}

template <typename T>
void write_rows(const T* from, int64_t width, const Document& d, Tensor<T> to, int64_t head, int64_t K) {
    for (int64_t i = 0; i < d.n; ++i) std::copy_n(from + i * width, K, to.at(d.batch, d.first + i, head));
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

template <typename T> void forward(const Attention<T>& a, const Document& d, int64_t g) {
    const int64_t n = d.n, K = a.K, width = a.width(), span = span_of<T>(n), rows = rows_of<T>(n);
    Room<T> room(3 * rows * width + width * span + R * (span + width));
    T *q = room.take(rows, width), *k = room.take(rows, width), *v = room.take(rows, width);
    T *k_turned = room.take(width, span), *score = room.take(R, span), *sums = room.take(R, width);
    copy_rows(a.k, d, g, K, width, T(1), k);
    copy_rows(a.v, d, g, K, width, T(1), v);
    transpose(k, n, width, k_turned, span);
    for (int64_t h = g * (a.H / a.G); h < (g + 1) * (a.H / a.G); ++h) {
        copy_rows(a.q, d, h, K, width, a.scale, q);
        for (int64_t i = 0; i < n; i += R) {
            const int64_t end = std::min(i + R, n), whole = up(end, W<T>);
            multiply(q + i * width, width, 1, k_turned, span, K, score, span, whole / W<T>);
            T inverse[R];
            for (int64_t r = 0; r < end - i; ++r)
                a.lse[(d.batch * a.H + h) * a.T_ + d.first + i + r] =
                    softmax(score + r * span, i + r + 1, whole, inverse[r]);
            multiply(score, span, 1, v, width, end, sums, width, width / W<T>);
            for (int64_t r = 0; r < end - i; ++r) {
                T* out = a.out.at(d.batch, d.first + i + r, h);
                for (int64_t c = 0; c < K; ++c) out[c] = sums[r * width + c] * inverse[r];
            }
        }
    }
}

template <typename T> void backward(const Attention<T>& a, const Document& d, int64_t g) {
    const int64_t n = d.n, K = a.K, width = a.width(), span = span_of<T>(n), rows = rows_of<T>(n);
    Room<T> room(7 * rows * width + 2 * (width + BLOCK) * span + R * width);
    T *q = room.take(rows, width), *k = room.take(rows, width), *v = room.take(rows, width);
    T *grad = room.take(rows, width), *dk = room.take(rows, width), *dv = room.take(rows, width);
    T *k_turned = room.take(width, span), *v_turned = room.take(width, span);
    T *weight = room.take(BLOCK, span), *dscore = room.take(BLOCK, span), *dq = room.take(R, width);
    copy_rows(a.k, d, g, K, width, T(1), k);
    copy_rows(a.v, d, g, K, width, T(1), v);
    transpose(k, n, width, k_turned, span);
    transpose(v, n, width, v_turned, span);
    std::fill_n(dk, rows * width, T(0));
    std::fill_n(dv, rows * width, T(0));
    for (int64_t h = g * (a.H / a.G); h < (g + 1) * (a.H / a.G); ++h) {
        copy_rows(a.q, d, h, K, width, a.scale, q);
        copy_rows(a.grad, d, h, K, width, T(1), grad);
        for (int64_t block = 0; block < n; block += BLOCK) {
            const int64_t stop = std::min(block + BLOCK, n);
            for (int64_t i = block; i < stop; i += R) {
                const int64_t end = std::min(i + R, n), whole = up(end, W<T>);
                T *w = weight + (i - block) * span, *ds = dscore + (i - block) * span;
                multiply(q + i * width, width, 1, k_turned, span, K, w, span, whole / W<T>);
                multiply(grad + i * width, width, 1, v_turned, span, K, ds, span, whole / W<T>);
                for (int64_t r = 0; r < end - i; ++r) {
                    const T* out = a.out.at(d.batch, d.first + i + r, h);
                    T delta = 0;
                    for (int64_t c = 0; c < K; ++c) delta += out[c] * grad[(i + r) * width + c];
                    const T lse = a.lse[(d.batch * a.H + h) * a.T_ + d.first + i + r];
                    softmax_backward(w + r * span, ds + r * span, i + r + 1, whole, lse, delta);
                }
                multiply(ds, span, 1, k, width, end, dq, width, width / W<T>);
                for (int64_t r = 0; r < end - i; ++r) {
                    T* to = a.dq.at(d.batch, d.first + i + r, h);
                    for (int64_t c = 0; c < K; ++c) to[c] = a.scale * dq[r * width + c];
                }
            }
            for (int64_t j = 0; j < stop; j += R) {
                const int64_t i = std::max(j, block), at = (i - block) * span + j, depth = stop - i;
                T *dk_rows = dk + j * width, *dv_rows = dv + j * width;
                multiply(weight + at, 1, span, grad + i * width, width, depth, dv_rows, width, width / W<T>, true);
                multiply(dscore + at, 1, span, q + i * width, width, depth, dk_rows, width, width / W<T>, true);
            }
        }
    }
    write_rows(dk, width, d, a.dk, g, K);
    write_rows(dv, width, d, a.dv, g, K);
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
    const int64_t tasks = documents.size() * a.G;
#pragma omp parallel for schedule(dynamic, 1) num_threads(work < FEW ? 1 : threads)
    for (int64_t i = 0; i < tasks; ++i) pass(a, documents[i / a.G], i % a.G);
    return true;
}

// `data`: q, k, v, the answers and their gradient, and the gradients of q, k and v, the last four null in the forward
// pass. `sizes`: B, T, H, G, K, then the strides of batch, token and head of all eight in turn.
template <typename T>
int run(void** data, T* lse, const int32_t* starts, const int64_t* sizes, double scale, int threads, bool back) {
    const auto tensor = [&](int i) {
        const int64_t* stride = sizes + 5 + 3 * i;
        return Tensor<T>{static_cast<T*>(data[i]), stride[0], stride[1], stride[2]};
    };
    const Attention<T> a = {tensor(0), tensor(1), tensor(2), tensor(3), tensor(4), tensor(5), tensor(6), tensor(7),
                            lse, starts, sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], T(scale)};
    return each_document(a, threads, back ? backward<T> : forward<T>);
}

}  // namespace

extern "C" {
int loopwise_causal_float32(void** data, float* lse, const int32_t* starts, const int64_t* sizes, double scale,
                            int threads, int back) {
    return run(data, lse, starts, sizes, scale, threads, back);
}
int loopwise_causal_float64(void** data, double* lse, const int32_t* starts, const int64_t* sizes, double scale,
                            int threads, int back) {
    return run(data, lse, starts, sizes, scale, threads, back);
}
}
