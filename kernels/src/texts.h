// What a lens reads of a sequence: the state that the head reads, the means of two texts, and how similar their tokens are.
#pragma once

#include <math.h>

#include "kernels.h"
#include "product.h"
#include "vector.h"

namespace {

constexpr float LEAST_NORM = 1e-12f;  // that cosines are computed with
constexpr int SIMILARITIES = 5;

// Rows of states, which may lie in two places.
template <class S> struct Text {
    const S *before, *behind;
    int64_t stride, first, length;
    Text(const gk_features& f, const gk_sequence& one, int64_t start, int64_t stop)
        : before((const S*)f.prefix + start * f.stride),
          behind((const S*)f.own + (one.start + larger(start, one.shared) - one.shared) * f.stride),
          stride(f.stride),
          first(larger<int64_t>(smaller(stop, one.shared) - start, 0)),
          length(stop - start) {}
    const S* operator[](int64_t row) const { return row < first ? before + row * stride : behind + (row - first) * stride; }
};

// The mean of what `row` adds to a sum for each row. Some columns at a time go through all rows.
template <class Row> inline void average(int64_t rows, int64_t width, float* mean, Row row) {
    constexpr int V = 4;
    const float share = 1.0f / larger<int64_t>(rows, 1);
    for (int64_t i = 0; i < width; i += V * W) {
        vf sums[V] = {};
        for (int64_t r = 0; r < rows; r++)
            for (int v = 0; v < V; v++)
                if (i + v * W < width) row(sums[v], r, i + v * W);
        for (int v = 0; v < V; v++)
            if (i + v * W < width) store_at(mean, i + v * W, width, sums[v] * share);
    }
}
template <class S> inline void average(const Text<S>& text, int64_t width, float* mean) {
    average(text.length, width, mean, [&](vf& sum, int64_t r, int64_t i) { sum += load_at(text[r], i, width); });
}

// Copies a row, and returns its size.
template <class S> inline float copy_row(const S* from, int64_t width, float* to) {
    vf squares = {};
    for (int64_t i = 0; i < width; i += W) {
        vf x = load_at(from, i, width);
        squares = fma(x, x, squares);
        store_at(to, i, width, x);
    }
    return larger(sqrtf(sum(squares)), LEAST_NORM);
}

// Compares the tokens of a query with those of a document.
template <class S> class Comparison {
   public:
    Comparison(const Text<S>& query, const Text<S>& document, int64_t width)
        : query(query), document(document), width(width), padded(padded_inner(GK_F32, width)),
          panels(up(query.length, COLUMNS) / COLUMNS), directions(panels * COLUMNS * padded * 4), rows(ROWS * padded * 4),
          best(panels * COLUMNS * 4), match(panels * COLUMNS * 4) {}

    bool there() const { return directions.at && rows.at && best.at && match.at; }

    // compared: the mean product of each token of the query and the token most similar to it, [width]; and five numbers.
    void run(float* compared) {
        pack();
        for (int64_t first = 0; first < document.length; first += ROWS) see(first, smaller<int64_t>(ROWS, document.length - first));
        const int32_t* nearest = match.of<int32_t>();
        average(query.length, width, compared, [&](vf& sum, int64_t r, int64_t i) {
            sum = fma(load_at(query[r], i, width), load_at(document[nearest[r]], i, width), sum);
        });
        float total = 0, lowest = INFINITY;
        for (int64_t t = 0; t < query.length; t++) {
            total += best.of<float>()[t];
            lowest = smaller(lowest, best.of<float>()[t]);
        }
        float* numbers = compared + width;
        numbers[0] = total / query.length;
        numbers[1] = lowest;
        numbers[2] = all_cosines / document.length / query.length;
        numbers[3] = best_of_document / document.length;
        numbers[4] = logf(document.length);
    }

   private:
    // The directions of the query's tokens, as a packed weight.
    void pack() {
        float *packed = directions.of<float>(), *row = rows.of<float>();
        memset(packed, 0, panels * COLUMNS * padded * 4);
        for (int64_t t = 0; t < query.length; t++) {
            const float by = 1.0f / copy_row(query[t], width, row);
            float* column = packed + t / 16 * 16 * padded + t % 16;
            for (int64_t i = 0; i < width; i++) column[i * 16] = row[i] * by;
        }
        memset(rows.at, 0, ROWS * padded * 4);
        for (int64_t t = 0; t < panels * COLUMNS; t++) {
            best.of<float>()[t] = -INFINITY;
            match.of<int32_t>()[t] = 0;
        }
    }

    // Compares some tokens of the document with all of the query.
    void see(int64_t first, int64_t count) {
        float size[ROWS], y[ROWS * COLUMNS];
        vf sums[ROWS], peaks[ROWS];
        for (int64_t r = 0; r < count; r++) {
            size[r] = copy_row(document[first + r], width, rows.of<float>() + r * padded);
            sums[r] = vf{};
            peaks[r] = all(-INFINITY);
        }
        const int64_t block = block_bytes(GK_F32, width);
        for (int64_t panel = 0; panel < panels; panel++) {
            const char* packed = directions.of<char>() + panel * 2 * block;
            product(float(), rows.of<char>(), padded * 4, count, packed, block, padded, y, COLUMNS);
            for (int v = 0; v < COLUMNS / W; v++) note(first, count, panel * COLUMNS + v * W, y + v * W, size, sums, peaks);
        }
        for (int64_t r = 0; r < count; r++) {
            all_cosines += sum(sums[r]);
            best_of_document += top(peaks[r]);
        }
    }

    // Notes the products of some tokens of the document with those of the query from one on.
    void note(int64_t first, int64_t count, int64_t column, const float* y, const float* size, vf* sums, vf* peaks) {
        float* best_at = best.of<float>() + column;
        int32_t* match_at = match.of<int32_t>() + column;
        vf most = load(best_at);
        vi place = load(match_at);
        const vi own = counting() < vi{} + int32_t(smaller<int64_t>(query.length - column, W));
        for (int64_t r = 0; r < count; r++) {
            const vf cosine = load(y + r * COLUMNS) * (1.0f / size[r]);
            sums[r] += cosine;  // those of no token are zero
            peaks[r] = maximum(peaks[r], where(own, cosine, all(-INFINITY)));
            const vi better = vi(cosine > most);
            most = where(better, cosine, most);
            place = (better & (vi{} + int32_t(first + r))) | (~better & place);
        }
        store(best_at, most);
        memcpy(match_at, &place, sizeof place);
    }

    const Text<S>&query, &document;
    const int64_t width, padded, panels;
    Room directions, rows, best, match;
    float all_cosines = 0, best_of_document = 0;
};

// The features of one sequence: 4 * width numbers, and with similarities width + 5 more.
template <class S> bool look(const gk_features& f, const gk_sequence& one, float* found) {
    const int64_t width = f.width;
    const Text<S> query(f, one, one.query[0], one.query[1]), document(f, one, one.document[0], one.document[1]);
    const Text<S> states(f, one, one.shared, one.shared + one.length);
    float *read = found, *asked = found + width, *told = asked + width, *both = told + width, *compared = both + width;
    if (f.pooling == GK_MEAN) average(states, width, read);
    else copy_row(states[f.pooling == GK_LAST ? states.length - 1 : 0], width, read);
    average(query, width, asked);
    average(document, width, told);
    for (int64_t i = 0; i < width; i++) both[i] = asked[i] * told[i];
    if (!f.similarities) return true;
    if (!query.length || !document.length) {
        memset(compared, 0, (width + SIMILARITIES) * 4);
        return true;
    }
    Comparison<S> comparison(query, document, width);
    if (!comparison.there()) return false;
    comparison.run(compared);
    return true;
}

inline int32_t run_features(const gk_features& f, int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; n++) {
        float* found = f.output + n * f.output_stride;
        if (!(f.states == GK_BF16 ? look<bf16>(f, f.sequences[n], found) : look<float>(f, f.sequences[n], found))) return GK_NO_MEMORY;
    }
    return 0;
}

}  // namespace
