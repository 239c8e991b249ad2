// A linear map of rows, and what follows it, in blocks of rows that stay in the processor's cache.
#pragma once

#include "activations.h"
#include "kernels.h"
#include "product.h"
#include "rows.h"

namespace {

constexpr int64_t BLOCK_BYTES = 512 << 10;  // of results of a block of rows: about half of a second-level cache

// Up to 32 rows of x as the product reads them.
struct Strip {
    const char* x;
    int64_t stride;  // bytes
    int64_t rows;
};

// Whether rows end within a cache line, so that each has to be copied. Otherwise only a last strip of few rows is.
inline bool ragged(const gk_linear& l) { return l.dtype != GK_INT8 && l.weight.inner * item(l.dtype) % 64; }

inline Strip strip_of(const gk_linear& l, int64_t row, int64_t rows, char* copy) {
    const int64_t size = item(l.dtype), bytes = l.weight.inner * size, stride = l.x.stride * size;
    const char* x = (const char*)l.x.data + row * stride;
    if (!ragged(l) && !(TILES && l.dtype != GK_F32 && rows % 16)) return {x, stride, rows};
    const int64_t padded = padded_inner(l.dtype, l.weight.inner) * size;
    memset(copy, 0, ROWS * padded);
    for (int64_t r = 0; r < rows; r++) memcpy(copy + r * padded, x + r * stride, bytes);
    return {copy, padded, rows};
}

// A block is up to 32 rows of a panel of 32 columns: products that wait for their bias, activation and gate.
struct Block {
    int64_t row, rows, panel;
    const float* y;  // the products, [rows, 32]
    const float* z;  // the gate's products; null for none
    void* out;       // what they become, [rows, columns], with a stride: floats, or states
    int64_t stride;
    int64_t columns;
    const int32_t* sums;
    Extent* extents;  // of the rows; null if nobody needs them
};
typedef void (*Finish)(const gk_linear&, const Block&, int64_t begin, int64_t end);

template <int ACTIVATION> inline vf activate(vf x) {
    if (ACTIVATION == GK_GELU) return gelu(x);
    if (ACTIVATION == GK_GELU_TANH) return gelu_tanh(x);
    if (ACTIVATION == GK_SILU) return silu(x);
    if (ACTIVATION == GK_RELU) return relu(x);
    if (ACTIVATION == GK_TANH) return tanh(x);
    return x;
}

// Scales and shifts the columns of a panel.
template <bool INT8> struct Scaled {
    vf scale[COLUMNS / W], sums[COLUMNS / W], bias[COLUMNS / W];
    Scaled(const gk_weight& weight, int64_t panel) {
        for (int v = 0; v < COLUMNS / W; v++) {
            scale[v] = INT8 ? load(weight.scale + panel * COLUMNS + v * W) : vf{};
            sums[v] = INT8 ? load(weight.sums + panel * COLUMNS + v * W) : vf{};
            bias[v] = weight.bias ? load(weight.bias + panel * COLUMNS + v * W) : vf{};
        }
    }
    vf operator()(const float* y, int v, vf row_scale, vf middle, int32_t lift) const {
        if (!INT8) return load(y + v * W) + bias[v];
        const vi sum = load((const int32_t*)y + v * W) - lift;
        return fma(__builtin_convertvector(sum, vf), scale[v] * row_scale, fma(sums[v], middle, bias[v]));
    }
};

// Bias, activation and gate of some rows of a block.
template <int ACTIVATION, bool INT8, bool GATED, bool EXTENTS, class S>
void finish_rows(const gk_linear& l, const Block& block, int64_t begin, int64_t end) {
    const Scaled<INT8> own(l.weight, block.panel), gate(GATED ? l.gate : l.weight, block.panel);
    const float* scales = INT8 ? l.x.scale + 2 * block.row : nullptr;
    const int64_t n = block.columns;
    S* out = (S*)block.out + begin * block.stride;
    for (int64_t r = begin; r < end; r++, out += block.stride) {
        const vf scale = all(INT8 ? scales[2 * r] : 0.0f), middle = all(INT8 ? scales[2 * r + 1] : 0.0f);
        const int32_t lift = LIFTED && INT8 ? 128 * block.sums[r] : 0;
        Extent extent = EXTENTS ? block.extents[r] : Extent();
#pragma GCC unroll 8
        for (int v = 0; v < COLUMNS / W; v++) {
            vf x = own(block.y + r * COLUMNS, v, scale, middle, lift);
            if (GATED) x *= activate<ACTIVATION>(gate(block.z + r * COLUMNS, v, scale, middle, lift));
            else x = activate<ACTIVATION>(x);
            if (EXTENTS) extent.add(first(as_state<S>(x), n - v * W));
            if (v * W < n) store_at(out, v * W, n, x);
        }
        if (EXTENTS) block.extents[r] = extent;
    }
}

template <int ACTIVATION, bool INT8, bool GATED> Finish finish_at(bool halves, bool extents) {
    if (extents) return halves ? finish_rows<ACTIVATION, INT8, GATED, true, bf16> : finish_rows<ACTIVATION, INT8, GATED, true, float>;
    return halves ? finish_rows<ACTIVATION, INT8, GATED, false, bf16> : finish_rows<ACTIVATION, INT8, GATED, false, float>;
}
template <int ACTIVATION> Finish finish_with(const gk_linear& l, bool halves, bool extents) {
    if (l.dtype == GK_INT8)
        return l.gate.packed ? finish_at<ACTIVATION, true, true>(halves, extents) : finish_at<ACTIVATION, true, false>(halves, extents);
    return l.gate.packed ? finish_at<ACTIVATION, false, true>(halves, extents) : finish_at<ACTIVATION, false, false>(halves, extents);
}
inline Finish finish_of(const gk_linear& l, bool halves, bool extents) {
    switch (l.activation) {
        case GK_GELU: return finish_with<GK_GELU>(l, halves, extents);
        case GK_GELU_TANH: return finish_with<GK_GELU_TANH>(l, halves, extents);
        case GK_SILU: return finish_with<GK_SILU>(l, halves, extents);
        case GK_RELU: return finish_with<GK_RELU>(l, halves, extents);
        case GK_TANH: return finish_with<GK_TANH>(l, halves, extents);
        default: return finish_with<GK_NONE>(l, halves, extents);
    }
}

constexpr int64_t TOGETHER = 4;  // strips that share a panel while it is in the cache

// Multiplies block by block. Where tiles multiply, a block is finished while the next one is multiplied; elsewhere at once, and
// memory that is needed next is brought into the cache meanwhile.
class Panels {
   public:
    // halves: whether the results are bf16, and not float32.
    Panels(const gk_linear& l, bool halves, bool extents)
        : l(l), finish(finish_of(l, halves, extents)), bytes(COLUMNS * (halves ? 2 : 4)) {}

    // The next block is of the strip that has the number `place` among those of its panel.
    void next(const Strip& strip, int64_t place, Block block) {
        const int64_t steps = padded_inner(l.dtype, l.weight.inner) * item(l.dtype) / 64 * (l.gate.packed ? 2 : 1);
        const int64_t rows = (before.rows + steps - 1) / steps;
        for (int64_t r = 0; !tiles && r < block.rows; r++)
            for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((char*)block.out + r * (bytes / COLUMNS) * block.stride + i, 1);
        block.z = nullptr;
        if (l.gate.packed) {
            multiply(l.gate, strip, place, block.panel, gates[turn], rows);
            block.z = gates[turn];
        }
        multiply(l.weight, strip, place, block.panel, products[turn], rows);
        block.y = products[turn];
        end();
        before = block;
        done = 0;
        turn = 1 - turn;
        if (!tiles) end();
    }

    // Finishes what is left.
    void end() {
        if (done < before.rows) finish(l, before, done, before.rows);
        done = before.rows;
    }

   private:
    // Strips bring the next panel into the cache, a part each. Tiles finish some rows in each step.
    struct Step {
        const char* ahead;
        Panels& panels;
        int64_t rows;
        void step() {
            const int64_t begin = panels.done, end = smaller(panels.before.rows, begin + rows);
            if (begin < end) panels.finish(panels.l, panels.before, begin, end);
            panels.done = end;
        }
    };

    void multiply(const gk_weight& weight, const Strip& strip, int64_t place, int64_t panel, float* y, int64_t rows) {
        const int64_t block = block_bytes(l.dtype, weight.inner), last = up(weight.columns, COLUMNS) / COLUMNS - 1;
        const char *first = (const char*)weight.packed, *w = first + 2 * panel * block;
        const int64_t groups = padded_inner(l.dtype, weight.inner) / group(l.dtype);
        Step meanwhile{(panel < last ? w + 2 * block : first) + place * (2 * block / TOGETHER), *this, rows};
        if (l.dtype == GK_INT8)
            product(int8_t(), strip.x, strip.stride, strip.rows, w, block, groups, (int32_t*)y, COLUMNS, meanwhile);
        else if (l.dtype == GK_BF16) product(bf16(), strip.x, strip.stride, strip.rows, w, block, groups, y, COLUMNS, meanwhile);
        else product(float(), strip.x, strip.stride, strip.rows, w, block, groups, y, COLUMNS, meanwhile);
    }

    const gk_linear& l;
    const Finish finish;
    const int64_t bytes;  // of a row of a block's results
    const bool tiles = TILES && l.dtype != GK_F32;
    Block before{};
    int64_t done = 0;
    int turn = 0;
    alignas(64) float products[2][ROWS * COLUMNS];
    alignas(64) float gates[2][ROWS * COLUMNS];
};

// What follows when a row is complete.
template <class S> inline void finish_row(const gk_linear& l, int64_t row, float* y) {
    const int64_t n = l.weight.columns;
    if (l.first_norm.kind) normalise(y, n, l.first_norm);
    const S* residual = l.residual.data ? row_of<S>(l.residual, row) : nullptr;
    S* total = l.total.data ? row_of<S>(l.total, row) : nullptr;
    if (residual || total)
        for (int64_t i = 0; i < n; i += W) {
            vf x = load_at(y, i, n);
            if (residual) x = fma(x, all(l.factor), load_at(residual, i, n));
            store_at(y, i, n, x);
            if (total) store_at(total, i, n, x);
        }
    end_row<S>(y, n, l.norm, l.output, l.quantised, row);
}

inline bool only_output(const gk_linear& l) {
    return !l.first_norm.kind && !l.norm.kind && !l.residual.data && !l.total.data && !l.quantised.data;
}
inline bool only_quantised(const gk_linear& l) {
    return !l.first_norm.kind && !l.norm.kind && !l.residual.data && !l.total.data && !l.output.data;
}

// The strips of some rows, as the product reads them, with the sums of their entries.
struct Strips {
    const int64_t copy_bytes;
    Strip strip[TOGETHER];
    int64_t count;
    Room copies, sums;
    explicit Strips(const gk_linear& l)
        : copy_bytes(ROWS * padded_inner(l.dtype, l.weight.inner) * item(l.dtype)),
          copies((ragged(l) ? TOGETHER : 1) * copy_bytes),
          sums(TOGETHER * ROWS * 4) {}
    bool ready() const { return copies.at && sums.at; }
    int32_t* sums_of(int64_t s) const { return sums.of<int32_t>() + s * ROWS; }
    void take(const gk_linear& l, int64_t from, int64_t end) {
        count = 0;
        for (int64_t at = from; at < end; at += ROWS, count++) {
            char* copy = copies.of<char>() + (ragged(l) ? count * copy_bytes : 0);
            const Strip one = strip_of(l, at, smaller<int64_t>(ROWS, end - at), copy);
            strip[count] = one;
            for (int64_t r = 0; LIFTED && l.dtype == GK_INT8 && r < one.rows; r++)
                sums_of(count)[r] = row_sum(one.x + r * one.stride, up(l.weight.inner, 64));
        }
    }
};

// Rows whose columns are independent of each other go straight to the output.
template <class S> int32_t straight(const gk_linear& l, int64_t begin, int64_t end, int64_t first_panel, int64_t last_panel) {
    [[maybe_unused]] Session session;
    Strips strips(l);
    if (!strips.ready()) return GK_NO_MEMORY;
    for (int64_t start = begin; start < end; start += TOGETHER * ROWS) {
        strips.take(l, start, smaller(end, start + TOGETHER * ROWS));
        Panels panels(l, sizeof(S) == 2, false);
        for (int64_t panel = first_panel; panel < last_panel; panel++)
            for (int64_t s = 0; s < strips.count; s++) {
                const int64_t row = start + s * ROWS, column = panel * COLUMNS;
                panels.next(strips.strip[s], s,
                            {row, strips.strip[s].rows, panel, nullptr, nullptr, row_of<S>(l.output, row) + column, l.output.stride,
                             l.weight.columns - column, strips.sums_of(s), nullptr});
            }
        panels.end();
    }
    return 0;
}

// Rows that are finished as a whole: blocks of them are kept as R until all columns are there. Each row has room for
// a cache line more, because rows at a power of two would meet in few places of the cache.
template <class S, class R> int32_t by_blocks(const gk_linear& l, int64_t begin, int64_t end) {
    const int64_t width = up(l.weight.columns, COLUMNS), stride = width + 64 / sizeof(R);
    const int64_t together = larger<int64_t>(1, smaller<int64_t>(TOGETHER, BLOCK_BYTES / (ROWS * width * sizeof(R))));
    const bool track = only_quantised(l);
    [[maybe_unused]] Session session;
    Strips strips(l);
    Room results(together * ROWS * stride * sizeof(R)), extent_room(together * ROWS * sizeof(Extent));
    if (!strips.ready() || !results.at || !extent_room.at) return GK_NO_MEMORY;
    Extent* extents = extent_room.of<Extent>();
    for (int64_t start = begin; start < end; start += together * ROWS) {
        strips.take(l, start, smaller(end, start + together * ROWS));
        for (int64_t r = 0; track && r < together * ROWS; r++) extents[r] = Extent();
        Panels panels(l, sizeof(R) == 2, track);
        for (int64_t panel = 0; panel < width / COLUMNS; panel++)
            for (int64_t s = 0; s < strips.count; s++)
                panels.next(strips.strip[s], s,
                            {start + s * ROWS, strips.strip[s].rows, panel, nullptr, nullptr,
                             results.of<R>() + s * ROWS * stride + panel * COLUMNS, stride, l.weight.columns - panel * COLUMNS,
                             strips.sums_of(s), extents + s * ROWS});
        panels.end();
        for (int64_t row = start; row < smaller(end, start + together * ROWS); row++) {
            R* y = results.of<R>() + (row - start) * stride;
            if (track)
                quantise(y, l.weight.columns, extents[row - start], row_of<int8_t>(l.quantised, row), l.quantised.scale + 2 * row);
            else finish_row<S>(l, row, (float*)y);
        }
    }
    return 0;
}

}  // namespace
