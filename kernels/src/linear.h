// A linear map of rows, and what follows it, in blocks of rows that stay in the processor's cache.
#pragma once

#include "finish.h"
#include "kernels.h"
#include "product.h"
#include "rows.h"
#include "unpack.h"

namespace {

// Of results of a block of rows: about half of a second-level cache. Where tiles multiply, it costs less to write results to a
// larger cache than to read the weights again for few rows.
constexpr int64_t BLOCK_BYTES = TILES ? 4 << 20 : 512 << 10;

// Up to 32 rows of x as the product reads them.
struct Strip {
    const char* x;
    int64_t stride;  // bytes
    int64_t rows;
};

// The dtype of the product: states of bf16 become float32 where the level has no product of bf16.
inline int32_t factors(const gk_linear& l) { return l.dtype == GK_BF16 && !HAS_BF16 ? GK_F32 : l.dtype; }

// Whether each row has to be copied, because rows end within a cache line, or are of another dtype than the product's factors.
// Otherwise only a last strip of few rows is.
inline bool copied(const gk_linear& l) {
    return (l.dtype != GK_INT8 && l.weight.inner * item(l.dtype) % 64) || factors(l) != l.dtype;
}

inline Strip strip_of(const gk_linear& l, int64_t row, int64_t rows, char* copy) {
    const int64_t inner = l.weight.inner, stride = l.x.stride * item(l.dtype), padded = padded_inner(factors(l), inner) * item(factors(l));
    const char* x = (const char*)l.x.data + row * stride;
    if (!copied(l) && !(TILES && l.dtype != GK_F32 && rows % 16)) return {x, stride, rows};
    memset(copy, 0, ROWS * padded);
    for (int64_t r = 0; r < rows; r++) {
        if (factors(l) == l.dtype) memcpy(copy + r * padded, x + r * stride, inner * item(l.dtype));
        else
            for (int64_t i = 0; i < inner; i += W)
                store_at((float*)(copy + r * padded), i, inner, load_at((const bf16*)(x + r * stride), i, inner));
    }
    return {copy, padded, rows};
}

constexpr int64_t TOGETHER = TILES ? 8 : 4;  // strips that are multiplied by the same panels
constexpr int64_t GROUP_BYTES = 512 << 10;   // of panels that stay in the second-level cache while strips pass
// Tiles read so fast that one of the factors has to lie in the first-level cache: inner entries of a strip stay there while
// panels pass by. So many bytes of each row are multiplied at a time, at most.
constexpr int64_t PART = 1024;
// Of rows that have more parts than DEPTH, half of DEPTH are multiplied at a time, so that these parts of all strips stay in the
// second-level cache while panels pass by.
constexpr int64_t DEPTH = 4;

// The strips of some rows, as the product reads them, with the sums of their entries.
struct Strips {
    const int64_t copy_bytes;
    Strip strip[TOGETHER];
    int64_t count;
    Room copies, sums;
    explicit Strips(const gk_linear& l)
        : copy_bytes(ROWS * padded_inner(factors(l), l.weight.inner) * item(factors(l))),
          copies((copied(l) ? TOGETHER : 1) * copy_bytes),
          sums(TOGETHER * ROWS * 4) {}
    bool ready() const { return copies.at && sums.at; }
    int32_t* sums_of(int64_t s) const { return sums.of<int32_t>() + s * ROWS; }
    void take(const gk_linear& l, int64_t from, int64_t end) {
        count = 0;
        for (int64_t at = from; at < end; at += ROWS, count++) {
            char* copy = copies.of<char>() + (copied(l) ? count * copy_bytes : 0);
            const Strip one = strip_of(l, at, smaller<int64_t>(ROWS, end - at), copy);
            strip[count] = one;
            for (int64_t r = 0; LIFTED && l.dtype == GK_INT8 && r < one.rows; r++)
                sums_of(count)[r] = row_sum(one.x + r * one.stride, up(l.weight.inner, 64));
        }
    }
};

// Multiplies strips by panels. Where tiles multiply, a block is finished while the next one is multiplied; elsewhere at once, and
// memory that is needed next is brought into the cache meanwhile.
class Panels {
   public:
    // floats: whether the results are float32, and not states.
    Panels(const gk_linear& l, bool floats)
        : l(l),
          finish(finish_of(l, floats)),
          bytes(floats || l.states == GK_F32 ? 4 : 2),
          dtype(factors(l)),
          tiles(TILES && dtype != GK_F32),
          inner(padded_inner(dtype, l.weight.inner) * item(dtype)),
          part(tiles ? up((inner - 1) / ((inner - 1) / PART + 1) + 1, 64) : inner),
          depth(inner <= DEPTH * part ? inner : DEPTH / 2 * part),
          group(tiles ? larger<int64_t>(1, GROUP_BYTES / (COLUMNS * depth)) : 1),
          sums(part < inner ? (depth < inner ? TOGETHER : 1) * 2 * group * ROWS * COLUMNS * 4 : 0),
          own(l.weight.format == dtype ? 0 : group * panel_bytes()),
          gate(l.gate.format == dtype || !l.gate.packed ? 0 : group * panel_bytes()) {}
    bool ready() const { return sums.at && own.at && gate.at; }

    // Multiplies the strips by the panels from `first` to `last`; block(panel, strip) says where the results go.
    template <class BlockOf> void run(const Strips& strips, int64_t first, int64_t last, BlockOf block) {
        for (begin = first; begin < last; begin += group) {
            const int64_t end = smaller(last, begin + group);
            for (top = 0; top < inner; top += depth) {
                const int64_t bottom = smaller(inner, top + depth);
                unpack(l.weight, own, end, bottom);
                if (l.gate.packed) unpack(l.gate, gate, end, bottom);
                for (int64_t s = 0; s < strips.count; s++)
                    for (int64_t from = top; from < bottom; from += part)
                        for (int64_t panel = begin; panel < end; panel++) {
                            if (from + part < inner) add(strips.strip[s], s, panel, from);
                            else next(strips.strip[s], s, from, block(panel, s));
                        }
            }
        }
        finish_all();
    }

   private:
    // Strips bring the next panel into the cache, a part each. Tiles finish some rows in each step.
    struct Step {
        static constexpr bool streams = true;
        const char* ahead;
        const float* from;
        Panels& panels;
        int64_t rows;
        void step() {
            const int64_t begin = panels.done, end = smaller(panels.before.rows, begin + rows);
            if (begin < end) panels.finish(panels.l, panels.before, begin, end);
            panels.done = end;
        }
    };

    // The sums of a block so far, when only some of the inner entries are multiplied.
    float* sums_of(int64_t number, int64_t panel, bool gated) {
        const int64_t place = (depth < inner ? number * group : 0) + panel - begin;
        return sums.of<float>() + (2 * place + gated) * ROWS * COLUMNS;
    }

    // Multiplies a part of the inner entries that is not the last one.
    void add(const Strip& strip, int64_t number, int64_t panel, int64_t from) {
        if (l.gate.packed) multiply(true, strip, number, panel, from, sums_of(number, panel, true));
        multiply(false, strip, number, panel, from, sums_of(number, panel, false));
    }

    void next(const Strip& strip, int64_t number, int64_t from, Block block) {
        for (int64_t r = 0; !tiles && r < block.rows; r++)
            for (int64_t i = 0; i < COLUMNS * bytes; i += 64) __builtin_prefetch((char*)block.out + r * bytes * block.stride + i, 1);
        block.z = nullptr;
        if (l.gate.packed) {
            multiply(true, strip, number, block.panel, from, gates[turn]);
            block.z = gates[turn];
        }
        multiply(false, strip, number, block.panel, from, products[turn]);
        block.y = products[turn];
        finish_all();
        before = block;
        done = 0;
        turn = 1 - turn;
        if (!tiles) finish_all();
    }

    // Finishes what is left.
    void finish_all() {
        if (done < before.rows) finish(l, before, done, before.rows);
        done = before.rows;
    }

    // Groups of the inner entries that are multiplied while strips pass, and the bytes of their panel.
    int64_t groups() const { return up(depth / item(dtype), SHARING) / SHARING; }
    int64_t panel_bytes() const { return COLUMNS * groups() * SHARING * item(dtype); }
    // Unpacks the inner entries down to `bottom` of the panels that pass now, up to `end`.
    void unpack(const gk_weight& weight, const Room& room, int64_t end, int64_t bottom) {
        const int64_t each = SHARING * item(dtype), size = panel_bytes();
        for (int64_t panel = begin; panel < end && weight.format != dtype; panel++)
            unpack_panel(weight, dtype, panel, top / each, up(bottom, each) / each, room.of<char>() + (panel - begin) * size, size / 2);
    }

    void multiply(bool gated, const Strip& strip, int64_t number, int64_t panel, int64_t from, float* y) {
        const gk_weight& weight = gated ? l.gate : l.weight;
        const bool packed = weight.format != dtype;
        const int64_t block = packed ? panel_bytes() / 2 : block_bytes(dtype, weight.inner);
        const char* first = packed ? (gated ? gate : own).of<char>() - top * 16 : (const char*)weight.packed;
        const char *w = first + 2 * (packed ? panel - begin : panel) * block, *ahead = w + 2 * block;
        if (!packed && panel == up(weight.columns, COLUMNS) / COLUMNS - 1) ahead = first;
        const int64_t size = smaller(part, inner - from), steps = size / 64 * (l.gate.packed ? 2 : 1);
        Step meanwhile{ahead + number * (2 * block / TOGETHER), from ? sums_of(number, panel, gated) : nullptr, *this,
                       (before.rows + steps - 1) / steps};
        w += from * 16;
        const char* x = strip.x + from;
        if (dtype == GK_INT8) product(int8_t(), x, strip.stride, strip.rows, w, block, size / 4, (int32_t*)y, COLUMNS, meanwhile);
        else if (dtype == GK_BF16) product(bf16(), x, strip.stride, strip.rows, w, block, size / 4, y, COLUMNS, meanwhile);
        else product(float(), x, strip.stride, strip.rows, w, block, size / 4, y, COLUMNS, meanwhile);
    }

    const gk_linear& l;
    const Finish finish;
    const int64_t bytes;  // of a result
    const int32_t dtype;  // of the factors
    const bool tiles;
    const int64_t inner;  // bytes of the inner entries
    const int64_t part, depth, group;
    Room sums, own, gate;
    int64_t begin = 0, top = 0;  // the panels, and the bytes of the inner entries, that are multiplied now begin here
    Block before{};
    int64_t done = 0;
    int turn = 0;
    alignas(64) float products[2][ROWS * COLUMNS];
    alignas(64) float gates[2][ROWS * COLUMNS];
};

// What follows when `count` rows, at most AT_ONCE, are complete.
template <class S> inline void finish_complete(const gk_linear& l, int64_t row, int64_t count, float* y, int64_t stride) {
    const int64_t n = l.weight.columns;
    for (int64_t r = 0; r < count; r++) {
        float* at = y + r * stride;
        if (l.first_norm.kind) normalise(at, n, l.first_norm);
        const S* residual = l.residual.data ? row_of<S>(l.residual, row + r) : nullptr;
        S* total = l.total.data ? row_of<S>(l.total, row + r) : nullptr;
        auto add = [&](int64_t i, int64_t end) GK_ALWAYS {
            vf x = load_at(at, i, end);
            if (residual) x = fma(x, all(l.factor), load_at(residual, i, end));
            store_at(at, i, end, x);
            if (total) store_at(total, i, end, x);
        };
        int64_t i = residual || total ? 0 : n;
        for (; i + W <= n; i += W) add(i, i + W);
        if (i < n) add(i, n);
    }
    end_rows<S>(y, stride, count, n, l.norm, l.output, l.quantised, row);
}

inline bool only_output(const gk_linear& l) {
    return !l.first_norm.kind && !l.norm.kind && !l.residual.data && !l.total.data && !l.quantised.data;
}
inline bool only_quantised(const gk_linear& l) {
    return !l.first_norm.kind && !l.norm.kind && !l.residual.data && !l.total.data && !l.output.data;
}

// Rows whose columns are independent of each other go straight to the output.
template <class S> int32_t straight(const gk_linear& l, int64_t begin, int64_t end, int64_t first_panel, int64_t last_panel) {
    [[maybe_unused]] Session session;
    Strips strips(l);
    Panels panels(l, sizeof(S) == 4);
    if (!strips.ready() || !panels.ready()) return GK_NO_MEMORY;
    for (int64_t start = begin; start < end; start += TOGETHER * ROWS) {
        strips.take(l, start, smaller(end, start + TOGETHER * ROWS));
        panels.run(strips, first_panel, last_panel, [&](int64_t panel, int64_t s) {
            const int64_t row = start + s * ROWS, column = panel * COLUMNS;
            return Block{row, strips.strip[s].rows, panel, nullptr, nullptr, row_of<S>(l.output, row) + column, l.output.stride,
                         l.weight.columns - column, strips.sums_of(s)};
        });
    }
    return 0;
}

// Rows that are finished as a whole: blocks of them are kept as R until all columns are there. Each row has room for
// a cache line more, because rows at a power of two would meet in few places of the cache.
template <class S, class R> int32_t by_blocks(const gk_linear& l, int64_t begin, int64_t end) {
    const int64_t width = up(l.weight.columns, COLUMNS), stride = width + 64 / sizeof(R);
    const int64_t together = larger<int64_t>(1, smaller<int64_t>(TOGETHER, BLOCK_BYTES / (ROWS * width * sizeof(R))));
    [[maybe_unused]] Session session;
    Strips strips(l);
    Panels panels(l, sizeof(R) == 4);
    Room results(together * ROWS * stride * sizeof(R));
    if (!strips.ready() || !panels.ready() || !results.at) return GK_NO_MEMORY;
    for (int64_t start = begin; start < end; start += together * ROWS) {
        strips.take(l, start, smaller(end, start + together * ROWS));
        panels.run(strips, 0, width / COLUMNS, [&](int64_t panel, int64_t s) {
            return Block{start + s * ROWS, strips.strip[s].rows, panel, nullptr, nullptr,
                         results.of<R>() + s * ROWS * stride + panel * COLUMNS, stride, l.weight.columns - panel * COLUMNS,
                         strips.sums_of(s)};
        });
        for (int64_t row = start, count; row < smaller(end, start + together * ROWS); row += count) {
            R* y = results.of<R>() + (row - start) * stride;
            count = smaller(AT_ONCE, smaller(end, start + together * ROWS) - row);
            if (only_quantised(l)) quantise_rows(y, stride, count, l.weight.columns, l.quantised, row);
            else finish_complete<S>(l, row, count, (float*)y, stride);
        }
    }
    return 0;
}

}  // namespace
