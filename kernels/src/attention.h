// Attention of each span's queries to the span's keys: the products of queries and keys, a softmax of them, and the product
// with the values, for blocks of 32 rows and of 256 keys. A row is a query's state of one head; the heads that share a head of
// the keys are rows of the same blocks. Blocks of keys are counted from the first key of a sequence, so that a query's
// output does not depend on what is computed beside it.
#pragma once

#include "kernels.h"
#include "keys.h"
#include "softmax.h"

namespace {

constexpr int64_t KEYS = 256;               // of a block
constexpr int64_t SCORES = KEYS + 16;       // from one row of scores to the next: rows lie in different sets of the cache
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

inline int64_t rows_of(const gk_attention& a, const gk_span& span) { return span.length * (a.heads / a.key_heads); }

// What the rows from `row` on cost, about.
inline int64_t cost(const gk_attention& a, const gk_span& span, int64_t row) {
    const int64_t group = a.heads / a.key_heads, last = smaller<int64_t>(row + ROWS, rows_of(a, span)) - 1;
    const Range keys = seen(a, span, row / group, last / group);
    return keys.end / COLUMNS - keys.begin / COLUMNS + 2;
}

// Calls each(span, key head, row, place) for each block of rows; places count costs. Returns the cost of all.
template <class Each> inline int64_t walk(const gk_attention& a, Each each) {
    int64_t place = 0;
    for (int64_t s = 0; s < a.count; s++)
        for (int64_t head = 0; head < a.key_heads; head++)
            for (int64_t row = 0; row < rows_of(a, a.spans[s]); row += ROWS) {
                each(a.spans[s], head, row, place);
                place += cost(a, a.spans[s], row);
            }
    return place;
}

// What a task has of its own.
template <class S> struct Bench {
    typedef Factor<S> T;
    static constexpr int64_t LINE = 64 / sizeof(T);  // entries of a cache line
    const gk_attention& a;
    const int64_t inner, columns, room;  // entries of a padded key, of a padded value, and keys that there is room for
    Room query, scores, result, part, keys, values;
    Session session;
    Softmax softmax;
    Range packed = {0, 0};

    Bench(const gk_attention& a, int64_t room)
        : a(a),
          inner(up(a.head_size, LINE)),
          columns(up(a.head_size, COLUMNS)),
          room(room),
          query(ROWS * inner * sizeof(T)),
          scores(ROWS * SCORES * 4),
          result(ROWS * columns * 4),
          part(ROWS * COLUMNS * 4),
          keys(room * inner * sizeof(T)),
          values(room * columns * sizeof(T)) {}
    bool ready() const { return query.at && scores.at && result.at && part.at && keys.at && values.at; }

    // Packs what the span's queries see of a head.
    void pack(const gk_span& s, int64_t head) {
        const int64_t at = head * a.head_size;
        const Tokens<S> key = {(const S*)s.key + at, (const S*)s.shared_key + at, s.key_stride, s.shared_key_stride, s.shared, s.keys};
        const Tokens<S> value = {(const S*)s.value + at, (const S*)s.shared_value + at, s.value_stride, s.shared_value_stride,
                                 s.shared, s.keys};
        packed = seen(a, s, 0, s.length - 1);
        packed = {packed.begin / KEYS * KEYS, up(packed.end, COLUMNS)};
        pack_keys<T>(key, packed.begin, packed.end, a.head_size, inner, keys.of<char>());
        pack_values<T>(value, packed.begin, packed.end, a.head_size, columns, value_block(), values.of<char>());
    }
    int64_t value_block() const { return room * sizeof(T) * 16; }

    void attend(const gk_span& s, int64_t head, int64_t row) {
        const int64_t rows = smaller<int64_t>(ROWS, rows_of(a, s) - row), size = a.head_size, group = a.heads / a.key_heads;
        const S* from[ROWS];
        S* to[ROWS];
        Range sees[ROWS];
        int64_t token = row / group, member = row % group;
        for (int64_t r = 0; r < rows; r++) {
            const int64_t at = (head * group + member) * size;
            from[r] = (const S*)a.query + (s.start + token) * a.query_stride + at;
            to[r] = (S*)a.output + (s.start + token) * a.output_stride + at;
            sees[r] = seen(a, s, token, token);
            if (++member == group) member = 0, token++;
        }
        for (int64_t r = 0; r < up(rows, 16); r++)
            for (int64_t i = 0; i < inner; i += LINE / (16 / W)) {
                const vi x = r < rows ? words_at<T>(from[r], i, size) : vi{};
                memcpy(query.of<T>() + r * inner + i, &x, sizeof x);
            }
        softmax.begin();
        const Range all = {sees[0].begin, sees[rows - 1].end};
        for (int64_t block = all.begin / KEYS * KEYS; block < all.end; block += KEYS) {
            // Of the block, only panels of keys that some row sees are computed.
            const int64_t begin = larger(block, all.begin / COLUMNS * COLUMNS), end = smaller(block + KEYS, up(all.end, COLUMNS));
            score(begin, end, rows);
            if (a.softcap > 0) bound(end - begin, rows);
            for (int64_t r = 0; r < rows; r++) {
                hide(r, 0, sees[r].begin - begin);
                hide(r, sees[r].end - begin, end - begin);
            }
            softmax.add<T>(rows, scores.of<float>(), SCORES, end - begin, (a.softcap > 0 ? 1.0f : a.scaling) * LOG2_E);
            collect(begin, end, rows, block == all.begin / KEYS * KEYS);
        }
        for (int64_t r = 0; r < rows; r++) {
            const vf share = ::all(1.0f / softmax.sum[r]);
            for (int64_t i = 0; i < size; i += W) store_at(to[r], i, size, load(result.of<float>() + r * columns + i) * share);
        }
    }

    // The products of the queries and the keys from `begin` to `end`.
    void score(int64_t begin, int64_t end, int64_t rows) {
        const int64_t bytes = inner * sizeof(T);
        for (int64_t key = begin; key < end; key += COLUMNS)
            product(T(), query.of<char>(), bytes, rows, keys.of<char>() + (key - packed.begin) * bytes, 16 * bytes, bytes / 4,
                    scores.of<float>() + key - begin, SCORES);
    }

    void bound(int64_t n, int64_t rows) {
        for (int64_t r = 0; r < rows; r++)
            for (int64_t i = 0; i < n; i += W) {
                float* at = scores.of<float>() + r * SCORES + i;
                store(at, a.softcap * tanh(load(at) * (a.scaling / a.softcap)));
            }
    }

    // Makes scores of row r -infinity, from `begin` to `end`.
    void hide(int64_t r, int64_t begin, int64_t end) {
        for (int64_t i = larger<int64_t>(0, begin) / W * W; i < smaller(end, KEYS); i += W) {
            float* at = scores.of<float>() + r * SCORES + i;
            const vi lane = counting() + int32_t(i);
            store(at, where(vi(lane >= int32_t(begin)) & vi(lane < int32_t(end)), all(-INFINITY), load(at)));
        }
    }

    // Adds the products of the probabilities and the values from `begin` to `end`.
    void collect(int64_t begin, int64_t end, int64_t rows, bool fresh) {
        const char* from = values.of<char>() + (begin - packed.begin) / GROUP<T> * 64;
        for (int64_t column = 0; column < columns; column += COLUMNS, from += 2 * value_block()) {
            float* to = result.of<float>() + column;
            float* y = fresh ? to : part.of<float>();
            product(T(), scores.of<char>(), SCORES * 4, rows, from, value_block(), (end - begin) / GROUP<T>, y, fresh ? columns : COLUMNS);
            if (fresh) continue;
            for (int64_t r = 0; r < rows; r++)
                for (int64_t i = 0; i < COLUMNS; i += W)
                    store(to + r * columns + i, load(to + r * columns + i) * softmax.shrunk[r] + load(y + r * COLUMNS + i));
        }
    }
};

// Computes the blocks of rows whose places are in [begin, end).
template <class S> int32_t attend_blocks(const gk_attention& a, int64_t begin, int64_t end) {
    int64_t room = 0;
    for (int64_t s = 0; s < a.count; s++) {
        const Range all = seen(a, a.spans[s], 0, a.spans[s].length - 1);
        room = larger(room, up(all.end, COLUMNS) - all.begin / KEYS * KEYS);
    }
    Bench<S> bench(a, room);
    if (!bench.ready()) return GK_NO_MEMORY;
    const gk_span* packed = nullptr;
    int64_t packed_head = 0;
    walk(a, [&](const gk_span& s, int64_t head, int64_t row, int64_t place) {
        if (place < begin || place >= end) return;
        if (packed != &s || packed_head != head) bench.pack(s, head), packed = &s, packed_head = head;
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
