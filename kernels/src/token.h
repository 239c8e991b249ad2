// One token through layers of a decoder, in one call. What costs time is to read the weights, once each, so the threads stay
// together through all layers, and wait for each other only where one needs what the others have computed. What is cheap (norms,
// quantising) each of them computes for itself. A token's states do not depend on the number of threads.
#pragma once

#include "dot.h"
#include "finish.h"
#include "keys.h"
#include "kernels.h"
#include "rows.h"
#include "team.h"

namespace {

constexpr int64_t CHUNK = 128;                // keys that a thread attends to at a time
constexpr int64_t SCORED = CHUNK + W;         // scores of a query and a chunk
constexpr int64_t FAR = 16;                   // tokens whose keys or values are on their way from memory
constexpr int BESIDE = W == 8 ? 2 : 4;    // queries that share a head of the keys, and pass the keys together

// Hands out parts of a piece of memory; of no memory, it counts what they take.
struct Parts {
    char* at = nullptr;
    int64_t bytes = 0;
    template <class T> T* take(int64_t count) {
        T* found = at ? (T*)(at + bytes) : nullptr;
        bytes += up(count * int64_t(sizeof(T)), 64);
        return found;
    }
    Row row(int64_t n) {
        n = up(n, 64);
        return {take<float>(n), take<int8_t>(n), take<float>(n / SHARING), take<int32_t>(n / SHARING)};
    }
};

// The keys that a token sees, in chunks.
struct Chunks {
    int64_t begin, end;
    Chunks(const gk_token_layer& layer, int64_t place)
        : begin(layer.window ? larger<int64_t>(0, place - layer.window + 1) : 0), end(place + 1) {}
    int64_t count() const { return up(end - begin, CHUNK) / CHUNK; }
};

// The largest numbers that any layer has.
struct Widths {
    int64_t row = 0, heads = 0, group = 0, query = 0, inner = 0, parts = 0;
    explicit Widths(const gk_token& t) {
        row = t.width;
        for (int64_t i = 0; i < t.count; i++) {
            const gk_token_layer& l = t.layers[i];
            const int64_t own = l.heads * l.head_size, chunks = Chunks(l, t.tokens).count();
            row = larger(row, own);
            heads = larger(heads, up(own, 32) + 2 * up(l.key_heads * l.head_size, 32));
            group = larger(group, l.heads / l.key_heads * up(l.head_size, W));
            inner = larger(inner, l.up.columns);
            parts = larger(parts, chunks * l.heads);
            query = larger(query, up(l.head_size, W));
        }
    }
};

// What all threads read and write.
struct Shared {
    Row inner;       // what the MLP has inside
    float* gate;
    float* heads;    // queries, keys and values
    float* output;   // of a product that gives states
    float* attended; // of each chunk and head: what attention gave
    float* weight;   // the sum of the chunk's exponentials
    float* largest;  // and the largest score
    Shared(Parts& parts, const Widths& w, int64_t width)
        : inner(parts.row(w.inner)),
          gate(parts.take<float>(up(w.inner, 64))),
          heads(parts.take<float>(w.heads)),
          output(parts.take<float>(up(width, 32))),
          attended(parts.take<float>(w.parts * w.query)),
          weight(parts.take<float>(w.parts)),
          largest(parts.take<float>(w.parts)) {}
};

// What a thread has of its own.
struct Own {
    float* hidden;
    Row row;
    float* query;
    float* scores;
    Own(Parts& parts, const Widths& w, int64_t width)
        : hidden(parts.take<float>(up(width, 64))),
          row(parts.row(w.row)),
          query(parts.take<float>(w.group + w.query)),
          scores(parts.take<float>(BESIDE * SCORED)) {}
};

// ---- Attention -----------------------------------------------------------------------------------------------------

// Adds neighbours: lanes that lack bit B get sums of row a, the others of row b.
template <int B, int... L> GK_INLINE vf fold(vf a, vf b, std::integer_sequence<int, L...>) {
    return __builtin_shufflevector(a, b, ((L & B) ? W + L : L)...) + __builtin_shufflevector(a, b, ((L & B) ? W + (L ^ B) : (L ^ B))...);
}
template <int B> GK_INLINE void fold_rows(vf* x) {
    for (int r = 0; r < W; r++)
        if (!(r & B) && r % B == 0) x[r] = fold<B>(x[r], x[r | B], std::make_integer_sequence<int, W>());
}
// The sum of each of W vectors.
GK_INLINE vf sums(vf* x) {
    for (int r = 0; r < W; r += 2) x[r] = fold<1>(x[r], x[r + 1], std::make_integer_sequence<int, W>());
    for (int r = 0; r < W; r += 4) x[r] = fold<2>(x[r], x[r + 2], std::make_integer_sequence<int, W>());
    if constexpr (W > 4)
        for (int r = 0; r < W; r += 8) x[r] = fold<4>(x[r], x[r + 4], std::make_integer_sequence<int, W>());
    if constexpr (W > 8) x[0] = fold<8>(x[0], x[8], std::make_integer_sequence<int, W>());
    return x[0];
}

// Keys or values of one head, of type S.
template <class S> struct Kept {
    const S* at;
    int64_t stride;
    const float* scale;  // null for none
    int64_t scale_stride;
    Kept(const void* data, const float* scales, const gk_memory& memory, const gk_token_layer& layer, int64_t head)
        : at((const S*)data + head * layer.head_size),
          stride(memory.stride),
          scale(std::is_same_v<S, int8_t> ? scales + head : nullptr),
          scale_stride(layer.key_heads) {}
    const S* operator[](int64_t token) const { return at + token * stride; }
    void fetch(int64_t token, int64_t size) const {
        for (int64_t i = 0; i < size * int64_t(sizeof(S)); i += 64) __builtin_prefetch((const char*)(at + token * stride) + i);
    }
};

// An entry of a row of n, and those behind it.
template <bool WHOLE, class S> GK_INLINE vf entries(const S* p, int64_t i, int64_t n) {
    return WHOLE ? load(p + i) : load_at(p, i, n);
}

// Products of G queries, `wide` apart, with the keys from `begin` to `end`.
template <int G, bool WHOLE, class S>
void score(const float* query, int64_t wide, const Kept<S>& keys, int64_t begin, int64_t end, int64_t size, float* to) {
    for (int64_t token = begin; token < end; token += W) {
        vf s[G][W];
        for (int64_t r = 0; r < W; r++) {
            const int64_t at = smaller(token + r, end - 1);
            const S* key = keys[at];
            keys.fetch(at + FAR, size);
            vf sum[G] = {};
            for (int64_t i = 0; i < size; i += W) {
                const vf x = entries<WHOLE>(key, i, size);
                for (int g = 0; g < G; g++) sum[g] = fma(x, load(query + g * wide + i), sum[g]);
            }
            for (int g = 0; g < G; g++) s[g][r] = sum[g];
        }
        float scale[W];
        for (int64_t r = 0; std::is_same_v<S, int8_t> && r < W; r++) scale[r] = keys.scale[smaller(token + r, end - 1) * keys.scale_stride];
        for (int g = 0; g < G; g++) {
            const vf found = sums(s[g]);
            store(to + g * SCORED + token - begin, std::is_same_v<S, int8_t> ? found * load(scale) : found);
        }
    }
}

// The sum of the values from `begin` to `end`, each times its share, for V vectors of entries from one on and G queries.
template <int G, int V, bool WHOLE, class S>
GK_INLINE void collect_part(const float* share, const Kept<S>& values, int64_t begin, int64_t end, int64_t from, int64_t size, int64_t wide,
                            float* to) {
    vf s[G][V] = {};
    for (int64_t token = begin; token < end; token++) {
        const S* value = values[token];
        values.fetch(token + FAR, size);
        const float scale = std::is_same_v<S, int8_t> ? values.scale[token * values.scale_stride] : 1.0f;
        vf x[V];
        for (int v = 0; v < V; v++) x[v] = entries<WHOLE>(value, from + v * W, size);
        for (int g = 0; g < G; g++) {
            const vf p = all(std::is_same_v<S, int8_t> ? share[g * SCORED + token - begin] * scale : share[g * SCORED + token - begin]);
            for (int v = 0; v < V; v++) s[g][v] = fma(x[v], p, s[g][v]);
        }
    }
    for (int g = 0; g < G; g++)
        for (int v = 0; v < V; v++) store(to + g * wide + from + v * W, s[g][v]);
}
template <int G, bool WHOLE, class S>
void collect(const float* share, const Kept<S>& values, int64_t begin, int64_t end, int64_t size, int64_t wide, float* to) {
    int64_t i = 0;
    for (; i + 4 * W <= wide; i += 4 * W) collect_part<G, 4, WHOLE>(share, values, begin, end, i, size, wide, to);
    for (; i < wide; i += W) collect_part<G, 1, WHOLE>(share, values, begin, end, i, size, wide, to);
}

// Stores a head's key or value.
template <class S> void keep(const float* x, int64_t size, S* to, float*, int64_t) {
    for (int64_t i = 0; i < size; i += W) store_at(to, i, size, load(x + i));
}
template <> void keep(const float* x, int64_t size, int8_t* to, float* scale, int64_t place) {
    vf most = {};
    for (int64_t i = 0; i < size; i += W) most = maximum(most, absolute(load(x + i)));
    const float peak = top(most);
    scale[place] = peak * (1.0f / 127.0f);
    const vf by = all(peak < 1e-30f ? 0.0f : 127.0f / peak);
    for (int64_t i = 0; i < size; i += W) {
        int8_t some[W];
        store(some, rounded(load(x + i) * by));
        memcpy(to + i, some, smaller<int64_t>(W, size - i));
    }
}

// A head's norm and rotation, from states to others.
inline void turn(const float* from, int64_t size, const gk_norm& norm, const float* cosine, const float* sine, float* to) {
    for (int64_t i = 0; i < size; i += W) store(to + i, load_at(from, i, size));
    if (norm.kind) normalise(to, size, norm);
    const int64_t half = size / 2;
    for (int64_t i = 0; cosine && i < half; i += W) {
        const vf a = load_at(to, i, half), b = load_at(to + half, i, half);
        const vf c = load_at(cosine, i, half), s = load_at(sine, i, half);
        store_at(to, i, half, fma(a, c, -(b * s)));
        store_at(to + half, i, half, fma(b, c, a * s));
    }
}

// ---- The steps of a layer ------------------------------------------------------------------------------------------

struct Share {
    int64_t begin, end;
};

class Walk {
   public:
    Walk(const gk_token& t, const Shared& shared, const Own& own, Team& team, int32_t number)
        : t(t), shared(shared), own(own), team(team), number(number), size(team.size()) {}

    void run() {
        memcpy(own.hidden, t.row, t.width * sizeof(float));
        for (int64_t i = 0; i < t.count; i++) {
            const gk_token_layer& next = t.layers[i + 1 < t.count ? i + 1 : i];
            layer(t.layers[i], t.memory[i], i + 1 < t.count ? next.query : t.head);
        }
        if (t.count && !number) memcpy(t.row, own.hidden, t.width * sizeof(float));
        if (!t.head.packed) return;
        take(own.hidden, t.width, t.final_norm, takes_quantised(t.head));
        const Share mine = share(blocks_of(t.head));
        (t.table ? multiply_table : multiply)(own.row, t.head, mine.begin, mine.end, t.logits);
    }

   private:
    const gk_token& t;
    const Shared& shared;
    const Own& own;
    Team& team;
    const int32_t number, size;

    // This thread's share of so many things.
    Share share(int64_t count) const { return {count * number / size, count * (number + 1) / size}; }

    // Waits for the others. Meanwhile the lines come that this thread reads first of what is next.
    void meet(const gk_weight& next) {
        fetch(next, share(blocks_of(next)).begin);
        team.meet();
    }

    // Takes the norm of states as the row.
    void take(const float* states, int64_t n, const gk_norm& norm, bool quantised) {
        const Normed found = norm.kind ? measure(states, n, norm) : Normed();
        for (int64_t i = 0; i < n; i += W) {
            const vf x = load_at(states, i, n);
            store_at(own.row.x, i, n, norm.kind ? apply(norm, found, x, i, n) : x);
        }
        complete(n, quantised);
    }
    void complete(int64_t n, bool quantised) {
        memset(own.row.x + n, 0, (up(n, 64) - n) * sizeof(float));
        if (quantised) quantise_row(own.row, n);
    }

    // Adds what a product gave to the hidden states.
    void add(const gk_norm& norm, float factor) {
        const int64_t n = t.width;
        const Normed found = norm.kind ? measure(shared.output, n, norm) : Normed();
        for (int64_t i = 0; i < n; i += W) {
            vf x = load_at(shared.output, i, n);
            if (norm.kind) x = apply(norm, found, x, i, n);
            store_at(own.hidden, i, n, fma(x, all(factor), load_at(own.hidden, i, n)));
        }
    }

    void layer(const gk_token_layer& l, const gk_memory& memory, const gk_weight& next) {
        const int64_t own_width = l.heads * l.head_size, chunks = Chunks(l, t.tokens).count();
        take(own.hidden, t.width, l.input_norm, takes_quantised(l.query) || takes_quantised(l.key) || takes_quantised(l.value));
        project(l);
        meet(l.output);
        const Share mine = share(l.key_heads * chunks);
        for (int64_t task = mine.begin; task < mine.end; task++) attend(l, memory, task / chunks, task % chunks, chunks);
        meet(l.output);
        merge(l, chunks);
        complete(own_width, takes_quantised(l.output));
        give(l.output);
        meet(l.gate.packed ? l.gate : l.up);
        add(l.attention_norm, l.factor);
        if (!l.up.packed) {
            take(own.hidden, t.width, l.mlp_norm, false);
            if (!number) memcpy(t.normed, own.row.x, t.width * sizeof(float));
            return;
        }
        take(own.hidden, t.width, l.mlp_norm, takes_quantised(l.gate) || takes_quantised(l.up));
        inside(l);
        meet(l.down);
        const Share last = share(blocks_of(l.down));
        multiply(shared.inner, l.down, last.begin, last.end, shared.output);
        meet(next);
        add(l.output_norm, l.factor);
    }

    float* keys_of(const gk_token_layer& l) const { return shared.heads + up(l.heads * l.head_size, 32); }
    float* values_of(const gk_token_layer& l) const { return keys_of(l) + up(l.key_heads * l.head_size, 32); }

    // Queries, keys and values: a share of the columns of all three.
    void project(const gk_token_layer& l) {
        const gk_weight* maps[] = {&l.query, &l.key, &l.value};
        float* to[] = {shared.heads, keys_of(l), values_of(l)};
        const Share mine = share(blocks_of(l.query) + blocks_of(l.key) + blocks_of(l.value));
        for (int64_t n = 0, first = 0; n < 3; first += blocks_of(*maps[n]), n++) {
            const int64_t begin = larger(mine.begin - first, int64_t(0)), end = smaller(mine.end - first, blocks_of(*maps[n]));
            if (begin < end) multiply(own.row, *maps[n], begin, end, to[n]);
        }
    }

    void give(const gk_weight& w) {
        const Share mine = share(blocks_of(w));
        multiply(own.row, w, mine.begin, mine.end, shared.output);
    }

    // The queries of a head of the keys, for a chunk of the keys. With the last chunk, the token's key and value are kept.
    void attend(const gk_token_layer& l, const gk_memory& memory, int64_t head, int64_t chunk, int64_t chunks) {
        switch (memory.dtype) {
            case GK_INT8: return attend_with<int8_t>(l, memory, head, chunk, chunks);
            case GK_BF16: return attend_with<bf16>(l, memory, head, chunk, chunks);
            default: return attend_with<float>(l, memory, head, chunk, chunks);
        }
    }
    template <class S>
    void attend_with(const gk_token_layer& l, const gk_memory& memory, int64_t head, int64_t chunk, int64_t chunks) {
        const int64_t n = l.head_size, wide = up(n, W), group = l.heads / l.key_heads;
        const float *cosine = l.angles < 0 ? nullptr : t.cosine[l.angles], *sine = l.angles < 0 ? nullptr : t.sine[l.angles];
        const Chunks all_keys(l, t.tokens);
        const int64_t begin = all_keys.begin + chunk * CHUNK, end = smaller(begin + CHUNK, all_keys.end);
        const Kept<S> keys(memory.key, memory.key_scale, memory, l, head), values(memory.value, memory.value_scale, memory, l, head);
        for (int64_t token = begin; token < smaller(begin + FAR, end); token++) keys.fetch(token, n), values.fetch(token, n);
        if (chunk == chunks - 1) {
            float* one = own.query + group * wide;
            const int64_t at = t.tokens * memory.stride + head * n, place = t.tokens * l.key_heads + head;
            turn(keys_of(l) + head * n, n, l.key_norm, cosine, sine, one);
            keep(one, n, (S*)memory.key + at, memory.key_scale, place);
            turn(values_of(l) + head * n, n, gk_norm{}, nullptr, nullptr, one);
            keep(one, n, (S*)memory.value + at, memory.value_scale, place);
        }
        for (int64_t m = 0; m < group; m++) {
            float* query = own.query + m * wide;
            turn(shared.heads + (head * group + m) * n, n, l.query_norm, cosine, sine, query);
            for (int64_t i = n; i < wide; i++) query[i] = 0;
        }
        for (int64_t m = 0, count; m < group; m += count) {
            count = smaller<int64_t>(BESIDE, group - m);
            const int64_t place = chunk * l.heads + head * group + m;
            const float* query = own.query + m * wide;
            static constexpr decltype(&queries<1, S>) all[] = {queries<1, S>, queries<2, S>, queries<3, S>, queries<4, S>};
            all[count - 1](*this, l, query, keys, values, begin, end, place);
        }
    }
    // Some queries that share a head of the keys.
    template <int G, class S>
    static void queries(const Walk& walk, const gk_token_layer& l, const float* query, const Kept<S>& keys, const Kept<S>& values,
                        int64_t begin, int64_t end, int64_t place) {
        const int64_t n = l.head_size, wide = up(n, W);
        float *scores = walk.own.scores, *to = walk.shared.attended + place * wide;
        (n == wide ? score<G, true, S> : score<G, false, S>)(query, wide, keys, begin, end, n, scores);
        for (int g = 0; g < G; g++)
            walk.soften(l, scores + g * SCORED, end - begin, walk.shared.largest[place + g], walk.shared.weight[place + g]);
        (n == wide ? collect<G, true, S> : collect<G, false, S>)(scores, values, begin, end, n, wide, to);
    }

    // Scores of a chunk become exponentials of their distance to the largest one.
    void soften(const gk_token_layer& l, float* scores, int64_t n, float& largest, float& weight) const {
        vf most = all(-INFINITY), s = {};
        for (int64_t i = 0; i < n; i += W) {
            vf x = load(scores + i) * l.scaling;
            if (l.softcap > 0) x = l.softcap * tanh(x * (1 / l.softcap));
            x = where(vi(counting() + int32_t(i) < vi{} + int32_t(n)), x, all(-INFINITY));
            most = maximum(most, x);
            store(scores + i, x);
        }
        largest = top(most);
        for (int64_t i = 0; i < n; i += W) {
            const vf d = load(scores + i) - largest;
            // Far below, the products with values would be numbers that processors are slow with.
            const vf e = where(vi(d < -80.0f), vf{}, exponential(d)) + d * 0.0f;
            store(scores + i, e);
            s += first(e, n - i);
        }
        weight = sum(s);
    }

    // What attention gave to the chunks becomes the row.
    void merge(const gk_token_layer& l, int64_t chunks) {
        const int64_t n = l.head_size, wide = up(n, W);
        for (int64_t head = 0; head < l.heads; head++) {
            float most = -INFINITY, weight = 0, *to = own.row.x + head * n;
            for (int64_t c = 0; c < chunks; c++) most = larger(most, shared.largest[c * l.heads + head]);
            for (int64_t c = 0; c < chunks; c++) {
                const int64_t place = c * l.heads + head;
                const float by = expf(shared.largest[place] - most), *from = shared.attended + place * wide;
                weight += by * shared.weight[place];
                for (int64_t i = 0; i < n; i += W)
                    store_at(to, i, n, c ? fma(load(from + i), all(by), load_at(to, i, n)) : load(from + i) * by);
            }
            for (int64_t i = 0; i < n; i += W) store_at(to, i, n, load_at(to, i, n) * (1 / weight));
        }
    }

    // What the MLP has inside: a share of whole groups of 32, so that each thread can quantise its own.
    void inside(const gk_token_layer& l) {
        const Share groups = share(up(l.up.columns, 32) / 32);
        const int64_t begin = 2 * groups.begin, end = smaller(2 * groups.end, blocks_of(l.up)), n = l.up.columns;
        const bool gated = l.gate.packed;
        if (gated) multiply(own.row, l.gate, begin, end, shared.gate);
        multiply(own.row, l.up, begin, end, shared.inner.x);
        for (int64_t i = begin * 16; i < groups.end * 32; i += W) {
            const vf x = load(shared.inner.x + i);
            const vf y = gated ? x * activated(load(shared.gate + i), l.activation) : activated(x, l.activation);
            store(shared.inner.x + i, first(y, n - i));
        }
        if (takes_quantised(l.down))
            for (int64_t g = groups.begin; g < groups.end; g++) quantise_group(shared.inner, g);
        if (number != size - 1 || up(n, 64) == up(n, 32)) return;
        const int64_t g = up(n, 32) / 32;  // padding
        memset(shared.inner.x + g * 32, 0, 32 * sizeof(float));
        quantise_group(shared.inner, g);
    }
    static vf activated(vf x, int32_t activation) {
        switch (activation) {
            case GK_GELU: return activate<GK_GELU, float>(x);
            case GK_GELU_TANH: return activate<GK_GELU_TANH, float>(x);
            case GK_SILU: return activate<GK_SILU, float>(x);
            case GK_RELU: return activate<GK_RELU, float>(x);
            case GK_TANH: return activate<GK_TANH, float>(x);
            default: return x;
        }
    }
};

// A call: the memory of all threads, and the threads.
struct TokenJob {
    const gk_token& t;
    const Widths widths;
    const int32_t threads;
    Room room;
    Team team;
    TokenJob(const gk_token& t, int32_t threads) : t(t), widths(t), threads(threads), team(threads) {
        Parts parts;
        take(parts, threads - 1);
        room.make(parts.bytes);
    }
    void run(int64_t tasks) {
        const int32_t number = team.join(tasks);
        if (number < 0) return;
        Parts parts;
        parts.at = room.of<char>();
        const Shared shared(parts, widths, t.width);
        Own own = Own(parts, widths, t.width);
        for (int32_t n = 0; n < number; n++) own = Own(parts, widths, t.width);
        Walk(t, shared, own, team, number).run();
    }

   private:
    void take(Parts& parts, int32_t number) const {
        Shared(parts, widths, t.width);
        for (int32_t n = 0; n <= number; n++) Own(parts, widths, t.width);
    }
};

}  // namespace
