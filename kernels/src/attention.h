// Attention of each span's queries to the span's keys: the products of queries and keys, a softmax of them, and the product
// with the values, for blocks of 16 rows and of 256 keys. A row is a query's state of one head; the heads that share a head of
// the keys are rows of the same blocks. Blocks of keys are counted from the first key of a sequence, so that a query's
// output does not depend on what is computed beside it.
#pragma once

#include "kernels.h"
#include "keys.h"
#include "positions.h"
#include "softmax.h"

namespace {

constexpr float LOG2_E = 1.44269504f;

struct Range {
    int64_t begin, end;
};

// The keys that the queries from `first` to `last` of a span see.
inline Range seen(const gk_attention& a, const gk_span& span, int64_t first, int64_t last) {
    const int64_t begin = a.window ? larger<int64_t>(0, span.first + first - a.window + 1) : 0;
    const int64_t end = a.causal ? span.first + last + 1 : a.window ? span.first + last + a.window : span.keys;
    return {begin, smaller(span.keys, end)};
}

// The same in whole panels of keys.
inline Range panels(const gk_attention& a, const gk_span& span, int64_t first, int64_t last) {
    const Range range = seen(a, span, first, last);
    return {range.begin / COLUMNS * COLUMNS, up(range.end, COLUMNS)};
}

inline int64_t rows_of(const gk_attention& a, const gk_span& span) { return span.length * (a.heads / a.key_heads); }

// What the rows from `row` on cost, about.
inline int64_t cost(const gk_attention& a, const gk_span& span, int64_t row) {
    const int64_t group = a.heads / a.key_heads, last = smaller(row + QUERIES, rows_of(a, span)) - 1;
    const Range keys = panels(a, span, row / group, last / group);
    return (keys.end - keys.begin) / COLUMNS + 1;
}

// Whether a span is one block of rows: then keys are packed when they are needed, and room for one block of keys is enough.
inline bool alone(const gk_attention& a, const gk_span& span) { return rows_of(a, span) <= QUERIES; }

// Calls each(span, key head, row, place) for each block of rows; places count costs. Returns the cost of all. The positions of
// a head serve all spans, and so come with the outer loop.
template <class Each> inline int64_t walk(const gk_attention& a, Each each) {
    const int64_t outer = a.position_rows ? a.key_heads : a.count, inner = a.position_rows ? a.count : a.key_heads;
    int64_t place = 0;
    for (int64_t i = 0; i < outer; i++)
        for (int64_t j = 0; j < inner; j++) {
            const gk_span& span = a.spans[a.position_rows ? j : i];
            for (int64_t row = 0; row < rows_of(a, span); row += QUERIES) {
                each(span, a.position_rows ? i : j, row, place);
                place += cost(a, span, row);
            }
        }
    return place;
}

// Rows of queries as a product reads them.
struct Queries {
    const char* x;
    int64_t stride;  // bytes
    int64_t rows;
};

// What a task has of its own.
template <class S> struct Bench {
    typedef Factor<S> T;
    static constexpr int64_t LINE = 64 / sizeof(T);  // entries of a cache line
    const gk_attention& a;
    const int64_t group;                 // heads that share a head of the keys
    const int64_t inner, columns, room;  // entries of a padded key, of a padded value, and keys that there is room for
    Room query, scores, result, part, keys, values;
    Session session;
    Flushing flushing;
    Softmax softmax;
    Positions<S> positions;
    Range packed = {0, 0};
    const gk_span* met = nullptr;  // the span and the row whose keys have met the queries of positions
    int64_t met_row = 0;
    bool finite = true;  // whether all values that were packed are

    Bench(const gk_attention& a, int64_t longest, int64_t room)
        : a(a),
          group(a.heads / a.key_heads),
          inner(up(a.head_size, LINE)),
          columns(up(a.head_size, COLUMNS)),
          room(room),
          query(QUERIES * inner * sizeof(T)),
          scores(QUERIES * SCORES * 4),
          result(QUERIES * columns * 4),
          part(QUERIES * COLUMNS * 4),
          keys(room * inner * sizeof(T)),
          values(room * columns * sizeof(T)),
          positions(a, longest, room) {}
    bool ready() const { return query.at && scores.at && result.at && part.at && keys.at && values.at && positions.ready(); }

    // Packs keys and values of a head, in whole panels.
    void pack(const gk_span& s, int64_t head, Range range) {
        packed = range;
        pack_keys<T>(keys_of(s, head), range.begin, range.end, a.head_size, inner, keys.of<char>());
        finite &= pack_values<T>(values_of(s, head), range.begin, range.end, a.head_size, columns, value_block(), values.of<char>());
    }
    Tokens<S> keys_of(const gk_span& s, int64_t head) const {
        const S *own = (const S*)a.key + s.place * a.key_stride, *shared = (const S*)a.shared_key;
        return {own, shared, a.key_stride, a.shared_key_stride, s.shared, s.keys, head * a.head_size};
    }
    Tokens<S> values_of(const gk_span& s, int64_t head) const {
        const S *own = (const S*)a.value + s.place * a.value_stride, *shared = (const S*)a.shared_value;
        return {own, shared, a.value_stride, a.shared_value_stride, s.shared, s.keys, head * a.head_size};
    }
    int64_t value_block() const { return room * sizeof(T) * 16; }

    void attend(const gk_span& s, int64_t head, int64_t row) {
        const int64_t rows = smaller(QUERIES, rows_of(a, s) - row);
        const Queries x = queries(s, head, row, rows);
        const Range keys = panels(a, s, row / group, (row + rows - 1) / group);
        softmax.begin();
        if (alone(a, s)) finite = true;
        for (int64_t begin = keys.begin, end; begin < keys.end; begin = end) {
            end = smaller(begin / KEYS * KEYS + KEYS, keys.end);
            if (alone(a, s)) pack(s, head, {begin, end});
            score(x, begin, end);
            if (a.position_rows) place(x, s, head, row, begin, end);
            if (a.softcap > 0) bound(rows, end - begin);
            if (a.causal || a.window || s.keys < end) hide(s, row, rows, begin, end);
            softmax.add<S, T>(rows, scores.of<float>(), SCORES, end - begin, (a.softcap > 0 ? 1.0f : a.scaling) * LOG2_E);
            collect(rows, begin, end, begin == keys.begin);
        }
        softmax.end();
        each_row(row, rows, [&](int64_t r, int64_t token, int64_t member) {
            S* to = (S*)a.output + (s.start + token) * a.output_stride + (head * group + member) * a.head_size;
            const float* from = result.of<float>() + r * columns;
            for (int64_t i = 0; i < a.head_size; i += W) store_at(to, i, a.head_size, load(from + i) * softmax.share[r]);
            if (!finite) spoil(to, values_of(s, head), seen(a, s, token, token));
        });
    }

    // Makes the entries NaN for which one of the keys has a value that is not finite.
    void spoil(S* to, const Tokens<S>& values, Range keys) const {
        for (int64_t key = keys.begin; key < keys.end; key++)
            for (int64_t i = 0; i < a.head_size; i += W) {
                const vf x = load_at(values[key], i, a.head_size);
                store_at(to, i, a.head_size, where(is_finite(x), load_at(to, i, a.head_size), all(NAN)));
            }
    }

    // Calls f(r, token, member) for rows in turn: the place of a row's token in the span, and of its head in the group.
    template <class F> void each_row(int64_t row, int64_t rows, F f) const {
        int64_t token = row / group, member = row % group;
        for (int64_t r = 0; r < rows; r++) {
            f(r, token, member);
            if (++member == group) member = 0, token++;
        }
    }

    // The queries as the product reads them: where they lie, or a copy.
    Queries queries(const gk_span& s, int64_t head, int64_t row, int64_t rows) const {
        const S* states = (const S*)a.query + s.start * a.query_stride + head * group * a.head_size;
        if (std::is_same_v<S, T> && group == 1 && a.head_size == inner && rows % 16 == 0)
            return {(const char*)(states + row * a.query_stride), a.query_stride * int64_t(sizeof(T)), rows};
        each_row(row, rows, [&](int64_t r, int64_t token, int64_t member) {
            const S* from = states + token * a.query_stride + member * a.head_size;
            for (int64_t i = 0; i < inner; i += W * GROUP<T>) {
                const vi x = words_at<T>(from, i, a.head_size);
                memcpy(query.of<T>() + r * inner + i, &x, sizeof x);
            }
        });
        return {query.of<char>(), inner * int64_t(sizeof(T)), rows};
    }

    // The products of the queries and the keys from `begin` to `end`.
    void score(const Queries& x, int64_t begin, int64_t end) {
        const int64_t bytes = inner * sizeof(T);
        for (int64_t key = begin; key < end; key += COLUMNS)
            product(T(), x.x, x.stride, x.rows, keys.of<char>() + (key - packed.begin) * bytes, 16 * bytes, bytes / 4,
                    scores.of<float>() + key - begin, SCORES);
    }

    // Adds the products with relative positions.
    void place(const Queries& x, const gk_span& s, int64_t head, int64_t row, int64_t begin, int64_t end) {
        const int64_t first = row / TOKENS * TOKENS, last = smaller(first + TOKENS, s.length) - 1;
        if (alone(a, s) || &s != met || first != met_row) {
            positions.meet(keys_of(s, head), packed.begin, packed.end, s.first + first, s.first + last);
            met = &s, met_row = first;
        }
        positions.add(x.x, x.stride, x.rows, s.first + row, begin, end, scores.of<float>());
    }

    void bound(int64_t rows, int64_t n) {
        for (int64_t r = 0; r < rows; r++)
            for (int64_t i = 0; i < n; i += W) {
                float* at = scores.of<float>() + r * SCORES + i;
                store(at, a.softcap * tanh(load(at) * (a.scaling / a.softcap)));
            }
    }

    // Makes the scores of keys that a row does not see -infinity.
    void hide(const gk_span& s, int64_t row, int64_t rows, int64_t begin, int64_t end) {
        if (!a.causal && !a.window) {  // all rows see the same keys
            for (int64_t r = 0; r < rows; r++) fill(scores.of<float>() + r * SCORES, s.keys - begin, end - begin);
            return;
        }
        each_row(row, rows, [&](int64_t r, int64_t token, int64_t) {
            const Range sees = seen(a, s, token, token);
            float* at = scores.of<float>() + r * SCORES;
            fill(at, 0, smaller(sees.begin, end) - begin);
            fill(at, larger(sees.end, begin) - begin, end - begin);
        });
    }
    static void fill(float* at, int64_t begin, int64_t end) {
        for (int64_t i = begin / W * W; i < end; i += W) {
            const vi lane = counting() + int32_t(i);
            store(at + i, where(vi(lane >= int32_t(begin)) & vi(lane < int32_t(end)), all(-INFINITY), load(at + i)));
        }
    }

    // Adds the products of the probabilities and the values from `begin` to `end`.
    void collect(int64_t rows, int64_t begin, int64_t end, bool fresh) {
        const char* from = values.of<char>() + (begin - packed.begin) / GROUP<T> * 64;
        for (int64_t column = 0; column < columns; column += COLUMNS, from += 2 * value_block()) {
            float* to = result.of<float>() + column;
            float* y = fresh ? to : part.of<float>();
            product(T(), scores.of<char>(), SCORES * 4, rows, from, value_block(), (end - begin) / GROUP<T>, y, fresh ? columns : COLUMNS);
            if (fresh) continue;
            for (int64_t r = 0; r < rows; r++)
                for (int64_t i = 0; i < COLUMNS; i += W)
                    store(to + r * columns + i, fma(load(to + r * columns + i), all(softmax.shrunk[r]), load(y + r * COLUMNS + i)));
        }
    }
};

// Computes the blocks of rows whose places are in [begin, end).
template <class S> int32_t attend_blocks(const gk_attention& a, int64_t begin, int64_t end) {
    int64_t room = 0, longest = 0;
    for (int64_t s = 0; s < a.count; s++) {
        longest = larger(longest, a.spans[s].keys);
        const Range all = panels(a, a.spans[s], 0, a.spans[s].length - 1);
        room = larger(room, alone(a, a.spans[s]) ? smaller(KEYS, all.end - all.begin) : all.end - all.begin);
    }
    Bench<S> bench(a, longest, room);
    if (!bench.ready()) return GK_NO_MEMORY;
    const gk_span* packed = nullptr;
    int64_t packed_head = 0;
    walk(a, [&](const gk_span& s, int64_t head, int64_t row, int64_t place) {
        if (place < begin || place >= end) return;
        if (!alone(a, s) && (packed != &s || packed_head != head)) {
            bench.finite = true;
            bench.met = nullptr;
            bench.pack(s, head, panels(a, s, 0, s.length - 1));
            packed = &s, packed_head = head;
        }
        bench.positions.pack(head);
        bench.attend(s, head, row);
    });
    return 0;
}

// The tasks of a call: shares of its cost.
struct AttentionJob {
    const gk_attention& a;
    int64_t tasks() const { return walk(a, [](const gk_span&, int64_t, int64_t, int64_t) {}); }
};

inline int32_t run_attention(const AttentionJob& job, int64_t begin, int64_t end) {
    return job.a.states == GK_BF16 ? attend_blocks<bf16>(job.a, begin, end) : attend_blocks<float>(job.a, begin, end);
}

}  // namespace
