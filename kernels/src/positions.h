// Products with relative positions, for disentangled attention (DeBERTa, arXiv 2006.03654): of a query with the key of its
// distance from a token, and of a token's key with the query of that distance. Both are packed with a column for each distance,
// so that what the products of one query, or of one key, are needed for lies side by side, whatever the distances share.
#pragma once

#include "kernels.h"
#include "keys.h"
#include "softmax.h"

namespace {

constexpr int64_t KEYS = 256;          // of a block
constexpr int64_t SCORES = KEYS + 16;  // from one row of scores to the next: rows lie in different sets of the cache
constexpr int64_t TOKENS = 128;        // queries whose products with the queries of positions are computed together

// Keys or queries of positions of one head, by column. Those of column `origin` are of distance zero; distances rise or fall.
template <class S> struct Distances {
    const S* states;
    int64_t stride, entry;
    const int32_t* rows;  // that of distance zero
    int64_t origin, sign, most;
    int64_t distance(int64_t i) const { return sign * (i - origin); }
    bool has(int64_t i) const { return distance(i) <= most && -distance(i) <= most; }
    const S* operator[](int64_t i) const { return states + rows[distance(i)] * stride + entry; }
};

template <class S> class Positions {
   public:
    typedef Factor<S> T;
    static constexpr int64_t ACROSS = SCORES + 32;     // from one query to the next in what comes of the keys of positions
    static constexpr int64_t ALONG = TOKENS + 4 * 16;  // from one key to the next in what comes of the queries of positions

    // longest: the most keys of a span. room: the most keys that are packed at once.
    Positions(const gk_attention& a, int64_t longest, int64_t room)
        : a(a), inner(up(a.head_size, 64 / sizeof(T))), longest(longest), origin(up(longest, COLUMNS) + COLUMNS) {
        if (!a.position_rows) return;
        const int64_t bytes = columns() * inner * sizeof(T);
        ok = !a.position_key || (keys.make(bytes) && across.make(QUERIES * ACROSS * 4));
        ok = ok && (!a.position_query || (queries.make(bytes) && along.make(room * ALONG * 4) && rows.make(COLUMNS * inner * sizeof(T))));
    }
    bool ready() const { return ok; }

    // Packs keys and queries of positions of a head.
    void pack(int64_t head) {
        if (head == packed || !a.position_rows) return;
        packed = head;
        const int64_t at = head * a.head_size, most = smaller(a.reach, longest - 1);
        const Distances<S> key = {(const S*)a.position_key, a.position_key_stride, at, a.position_rows + a.reach, origin, -1, most};
        const Distances<S> query = {(const S*)a.position_query, a.position_query_stride, at, a.position_rows + a.reach, origin, 1, most};
        if (a.position_key) pack_keys<T>(key, 0, columns(), a.head_size, inner, keys.of<char>());
        if (a.position_query) pack_keys<T>(query, 0, columns(), a.head_size, inner, queries.of<char>());
    }

    // Multiplies the keys from `begin` to `end`, which are whole panels, by the queries of positions, for the tokens at the places
    // from `first` to `last`, at most TOKENS. `all` are the keys of the sequence.
    void meet(const Tokens<S>& all, int64_t begin, int64_t end, int64_t first, int64_t last) {
        if (!a.position_query) return;
        from = begin, place = first;
        for (int64_t key = begin; key < end; key += COLUMNS) {
            const int64_t column = column_of(key), stop = origin + last - key + 1, count = smaller<int64_t>(COLUMNS, all.count - key);
            for (int64_t r = 0; r < count; r++)
                for (int64_t i = 0; i < inner; i += W * GROUP<T>) {
                    const vi x = words_at<T>(all[key + r], i, a.head_size);
                    memcpy(rows.template of<T>() + r * inner + i, &x, sizeof x);
                }
            for (int64_t c = column; c < stop; c += COLUMNS)
                times(rows.template of<char>(), inner * sizeof(T), count, queries, c, along_of(key) + c - column, ALONG);
        }
    }

    // Adds the products of positions to the scores of some queries, the first one of which is at a place, and the keys from
    // `begin` to `end`.
    void add(const char* x, int64_t stride, int64_t count, int64_t first, int64_t begin, int64_t end, float* scores) {
        const int64_t column = (origin + begin - first - count + 1) / 16 * 16, stop = origin + end - first;
        for (int64_t c = column; a.position_key && c < stop; c += COLUMNS)
            times(x, stride, count, keys, c, across.template of<float>() + c - column, ACROSS);
        for (int64_t row = 0; row < count; row += W)
            for (int64_t key = begin; key < end; key += W) {
                vi met[W] = {};
                if (a.position_query) {
                    const float* at = along_of(key / COLUMNS * COLUMNS) + origin + first + row - column_of(key / COLUMNS * COLUMNS);
                    for (int64_t k = 0; k < W; k++) met[k] = bits<vi>(load(at + key % COLUMNS * ALONG - key + k * (ALONG - 1)));
                    transpose(met);
                }
                const int64_t rows = smaller<int64_t>(W, count - row);
                for (int64_t r = 0; r < rows; r++) {
                    vf sum = bits<vf>(met[r]);
                    if (a.position_key) sum += load(across.template of<float>() + (row + r) * ACROSS + origin + key - first - row - r - column);
                    float* to = scores + (row + r) * SCORES + key - begin;
                    store(to, load(to) + sum);
                }
            }
    }

   private:
    int64_t columns() const { return 2 * origin + 2 * COLUMNS; }
    float* along_of(int64_t key) const { return along.template of<float>() + (key - from) * ALONG; }
    // The first column that the keys of a panel need, for the tokens from `place` on.
    int64_t column_of(int64_t panel) const { return (origin + place - panel - COLUMNS + 1) / 16 * 16; }

    // Products of rows and the 32 columns from one on that begins a block.
    void times(const char* x, int64_t stride, int64_t count, const Room& w, int64_t column, float* y, int64_t ldy) const {
        const int64_t bytes = inner * sizeof(T);
        product(T(), x, stride, count, w.of<char>() + column * bytes, 16 * bytes, bytes / 4, y, ldy);
    }

    const gk_attention& a;
    const int64_t inner, longest, origin;
    Room keys, queries, across, along, rows;
    int64_t packed = -1, from = 0, place = 0;
    bool ok = true;
};

}  // namespace
