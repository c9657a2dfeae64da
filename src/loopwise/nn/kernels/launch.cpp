// A launch of a few rows as one call: start states and one loop of the core; another call for what rows say; and one that
// runs both again and again for one request alone, drafts included.
//
// What stands in cpu.cpp and rows.cpp, called one after the other: between two of torch's operations the host takes
// longer than few rows take in either. This file is the one that is compiled.
//
// Axes: N rows, D width, H heads, G key-value heads, K head width, M features of the MLP, V vocabulary.

#include <chrono>

#include "cpu.cpp"
#include "rows.cpp"

namespace {

// One block of the core. A norm that its layout does not have is null.
template <typename T> struct Layer {
    const T *attention_in, *qkv, *out, *attention_out, *mlp_in, *gate_up, *down, *mlp_out;
    T *keys, *values;
};

enum Injection : int64_t { NONE, ADD, ADAPTER };

// One row of a launch: where its state lies, the token that it begins with (-1 if it has begun), and what it reads.
struct Row {
    int64_t seat, token, sequence, plane, position;
};

// How the token of one row is chosen: the likeliest at temperature 0, otherwise with addressed noise.
struct Draw {
    int64_t place;  // of its state
    int64_t tells;  // whether its log-probability is wanted
    int64_t key, sample, position;
    double temperature;
};

// A looped model without what stands before and after its loops, and the tables that its rows are found in.
template <typename T> struct Core {
    int64_t width, heads, kv_heads, head_width, mlp_width, vocab;
    int64_t layer_count, interleaved, norms_sum, injection, starts_zero, read_norms;
    int64_t planes, capacity, slots, key_stride, value_stride;
    double eps, embed_scale;
    const Layer<T>* layers;
    const T *embed, *adapter, *adapter_bias, *loop_norm, *norm, *gate, *gate_bias, *head;
    const T *cos, *sin;      // (positions, K / 2)
    int32_t* table;          // (sequences, planes, capacity)
    T *states, *injected;    // (seats, D)
    // Of a call of `loop`: its rows, their states before and after, and what the gate says of them.
    Row* rows;
    T *before, *after;
    double* hazards;
    // Of a call of `say`: what is asked, tokens and log-probabilities.
    Draw* draws;
    int64_t* tokens;
    double* chances;
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

// One loop of N rows, from their seats and back.
template <typename T> bool loop(const Core<T>& c, int64_t N, int threads) {
    const int64_t D = c.width;
    const Row* rows = c.rows;
    T *before = c.before, *after = c.after;
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
    std::copy_n(chance, N, c.hazards);
    return true;
}

// The noise of the next positions of one sample, kept while drafts are read again and again.
class Noise {
  public:
    // Where that of a position lies, of at most `PLACES` neighbours; drawn unless it is there.
    const double* at(const Draw& draw, int64_t V) {
        Kept& kept = kept_[draw.position % PLACES];
        if (kept.key != draw.key || kept.sample != draw.sample || kept.position != draw.position ||
            int64_t(kept.numbers.size()) != V) {
            kept.numbers.resize(V);
            noise(draw.key, draw.sample, draw.position, V, kept.numbers.data());
            kept.key = draw.key, kept.sample = draw.sample, kept.position = draw.position;
        }
        return kept.numbers.data();
    }

  private:
    static constexpr int64_t PLACES = 16;
    struct Kept {
        int64_t key = 0, sample = 0, position = 0;
        std::vector<double> numbers;
    };
    Kept kept_[PLACES];
};

inline const double* fresh_noise(const Draw& draw, int64_t V) {
    thread_local std::vector<double> numbers;
    numbers.resize(V);
    noise(draw.key, draw.sample, draw.position, V, numbers.data());
    return numbers.data();
}

// What N rows of `states` say; `kept` where they are neighbours of one sample.
template <typename T> void say(const Core<T>& c, const T* states, int64_t N, int threads, Noise* kept = nullptr) {
    const int64_t D = c.width, V = c.vocab;
    const Draw* draws = c.draws;
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
        if (draw.temperature > 0) {
            c.tokens[n] = largest_noisy(row, V, draw.temperature, kept ? kept->at(draw, V) : fresh_noise(draw, V));
        } else {
            c.tokens[n] = largest(row, V);
        }
        c.chances[n] = draw.tells ? log_probability(row, V, c.tokens[n]) : 0;
    }
}

// One position of a request in flight, as `engine/request.py` has it.
struct Flying {
    int64_t position, token, loop, seat, asked;
    int64_t left;             // the loop after which it stopped; 0 while that is open
    int64_t spare;            // what it said there
    double survival, chance;  // of having gone on, by its hazards; log-probability of `spare`
};

// A token that has become certain: the loops of its row after which the next one ran from it, whether the row was read
// from the first draft loop on, and its loops.
struct Said {
    int64_t token, settled, asked, loops;
    double logprob;
};

// One request alone; see `engine/solo.py`.
struct Solo {
    int64_t sequence, loops, last_row;             // the last position that may run
    int64_t window, draft_loop, redraft;           // as in `engine/speculation.py`
    int64_t planned, min_loops;                    // the loop after which rows stop; 0 where hazards decide
    int64_t aliases, first, page;                  // whether readers of planes that a row never wrote find its last
    int64_t key, sample, end_count, most;          // tokens that end the answer; tokens to make at most
    double threshold, temperature, seconds;        // once this time is over it stops at the next certain token
    const int64_t* ends;
    const int32_t* own;                            // (loops, span): slots of the positions from `first` on
    int64_t span;
    int64_t* deepest;                              // (span), the last plane that each of them has written
    Flying* flight;                                // in order of position, with room for window + 2
    int64_t* seats;                                // a stack of free ones
    Said* said;                                    // room for most + window
    int64_t flying, free, tokens, ticks, rows, started;  // drafts that were started
};

// Forgets the flight from an index on, and the pages that only it needed.
inline void drop(Solo& s, int64_t from) {
    if (from >= s.flying) return;
    const int64_t page = (s.flight[from].position + s.page - 1) / s.page * s.page;
    if (page < s.first + s.span) std::fill(s.deepest + std::max<int64_t>(page - s.first, 0), s.deepest + s.span, 0);
    for (; s.flying > from; --s.flying)
        if (s.flight[s.flying - 1].loop > 0) s.seats[s.free++] = s.flight[s.flying - 1].seat;
}

inline bool is_end(const Solo& s, int64_t token) {
    const int64_t* last = s.ends + s.end_count;
    return std::find(s.ends, last, token) != last;
}

inline Flying fresh(int64_t position, int64_t token) { return {position, token, 0, -1, 0, 0, -1, 1.0, 0.0}; }

// The first row has stopped and said `token`; whether the answer is over.
inline bool confirm(Solo& s, int64_t token, double logprob) {
    const Flying row = s.flight[0];
    const bool kept = s.flying > 1 && s.flight[1].token == token;
    s.said[s.tokens++] = {token, kept ? row.left - s.flight[1].loop : row.left, row.asked, row.left, logprob};
    s.seats[s.free++] = row.seat;
    if (kept) {
        std::copy(s.flight + 1, s.flight + s.flying--, s.flight);
    } else {
        drop(s, 1);
        s.flight[0] = fresh(row.position + 1, token);
    }
    return row.position == s.last_row || is_end(s, token);
}

// A row said `token` that is not certain yet: the next position starts with it, or anew.
inline void draft(Solo& s, int64_t place, int64_t token) {
    Flying& row = s.flight[place];
    if (row.loop == s.draft_loop) row.asked = 1;
    if (place + 1 < s.flying) {
        if (s.flight[place + 1].token == token) return;
        drop(s, place + 1);
    }
    if (is_end(s, token)) return;
    s.flight[s.flying++] = fresh(row.position + 1, token);
    s.started += 1;
}

// Whether a row stops after the loop that it has run: `Judge` in `engine/judge.py`, in the same float64.
inline bool stops(const Solo& s, Flying& row, double hazard) {
    if (s.planned) return row.loop >= s.planned;
    if (row.loop >= s.loops) return true;
    volatile double going_on = row.survival * (1 - hazard);  // rounded by itself: no part of a fused operation
    if (going_on < row.survival) row.survival = going_on;    // not for NaN
    return s.threshold < 1 && 1 - going_on >= s.threshold && row.loop >= s.min_loops;
}

// What readers of each plane find at a position.
template <typename T> int32_t& entry(const Core<T>& c, const Solo& s, int64_t plane, int64_t position) {
    return c.table[(s.sequence * c.planes + plane) * c.capacity + position];
}

// The rows of a tick: those of the frontier and its drafts that have not stopped. Returns how many.
template <typename T> int64_t begin_tick(const Core<T>& c, Solo& s) {
    int64_t count = 0;
    for (int64_t n = 0; n < std::min(s.flying, s.window + 1); ++n) {
        Flying& row = s.flight[n];
        if (row.left) continue;
        const int64_t at = row.position - s.first;
        if (row.loop == 0) {
            row.seat = s.seats[--s.free];
            // One that was here before may have stopped early.
            for (int64_t plane = 1; plane <= s.loops; ++plane)
                entry(c, s, plane, row.position) = s.own[(plane - 1) * s.span + at];
        }
        c.rows[count++] = {row.seat, row.loop ? -1 : row.token, s.sequence, row.loop + 1, row.position};
        row.loop += 1;
        s.deepest[at] = std::max(s.deepest[at], row.loop);
    }
    return count;
}

// Ticks until enough tokens are certain. Returns false when a row points outside the table or the pool.
template <typename T> bool run_alone(const Core<T>& c, Solo& s, int threads) {
    static thread_local Noise kept;
    const auto began = std::chrono::steady_clock::now();
    while (true) {
        const int64_t N = begin_tick(c, s), said = s.tokens, front = s.flight[0].position;
        if (!loop(c, N, threads)) return false;
        s.ticks += 1;
        s.rows += N;
        for (int64_t n = 0; n < N; ++n) {
            Flying& row = s.flight[c.rows[n].position - front];
            if (!stops(s, row, c.hazards[n])) continue;
            row.left = row.loop;
            for (int64_t plane = row.left + 1; s.aliases && plane < c.planes; ++plane)
                entry(c, s, plane, row.position) = entry(c, s, row.left, row.position);
        }
        // The window counts from the first row that goes on.
        int64_t last = s.last_row - 1;
        for (int64_t n = s.flying - 1; n >= 0; --n)
            if (!s.flight[n].left) last = std::min(s.flight[n].position + s.window, s.last_row) - 1;
        const auto drafts = [&](const Flying& row) {
            const bool reads = row.left || row.loop == s.draft_loop || (s.redraft && row.loop > s.draft_loop);
            return s.window && reads && row.position <= last;
        };
        int64_t jobs = 0;
        for (int64_t n = 0; n < N; ++n) {
            const Flying& row = s.flight[c.rows[n].position - front];
            if (row.left || drafts(row))
                c.draws[jobs++] = {n, row.left > 0, s.key, s.sample, row.position + 1, s.temperature};
        }
        if (jobs) say(c, c.after, jobs, threads, &kept);
        for (int64_t job = 0; job < jobs; ++job) {
            const int64_t place = c.draws[job].position - 1 - s.flight[0].position;
            if (place >= s.flying || s.flight[place].loop == 0) break;  // dropped meanwhile, and all behind it
            Flying& row = s.flight[place];
            if (row.left && place == 0) {
                if (confirm(s, c.tokens[job], c.chances[job])) return true;
                continue;
            }
            if (row.left) row.spare = c.tokens[job], row.chance = c.chances[job];
            if (drafts(row)) draft(s, place, c.tokens[job]);
        }
        // A row that had stopped before it was confirmed speaks as soon as it is.
        while (s.flight[0].left)
            if (confirm(s, s.flight[0].spare, s.flight[0].chance)) return true;
        const std::chrono::duration<double> took = std::chrono::steady_clock::now() - began;
        if (s.tokens > said && (s.tokens >= s.most || took.count() > s.seconds)) return true;
    }
}

}  // namespace

#define LOOPWISE_LAUNCH(T, name)                                                                                     \
    extern "C" int loopwise_loop_##name(const Core<T>* core, int64_t N, int threads) { return loop(*core, N, threads); } \
    extern "C" void loopwise_say_##name(const Core<T>* core, const T* states, int64_t N, int threads) {               \
        say(*core, states, N, threads);                                                                               \
    }                                                                                                                 \
    extern "C" int loopwise_alone_##name(const Core<T>* core, Solo* solo, int threads) {                              \
        return run_alone(*core, *solo, threads);                                                                      \
    }

LOOPWISE_LAUNCH(float, float32)
LOOPWISE_LAUNCH(double, float64)
