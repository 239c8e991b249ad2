// A linear map of rows, and what follows it, in blocks of rows that stay in the processor's cache.
#pragma once

#include "activations.h"
#include "kernels.h"
#include "product.h"
#include "rows.h"

namespace {

constexpr int64_t BLOCK_BYTES = 512 << 10;  // of results of a block of rows: about half of a second-level cache

// What a task has of its own.
struct Desk {
    Session session;
    Room results, copy, sums;
    int64_t width, ldy;
    Desk(const gk_linear& l, int64_t rows, int64_t ldy)
        : results(rows * ldy * 4),
          copy(ROWS * padded_inner(l.dtype, l.weight.inner) * item(l.dtype)),
          sums(rows * 4),
          width(up(l.weight.columns, COLUMNS)),
          ldy(ldy) {}
    bool ready() const { return results.at && copy.at && sums.at; }
};

// Up to 32 rows of x as the product reads them.
struct Strip {
    const char* x;
    int64_t stride;  // bytes
    int64_t rows;
};

inline Strip strip_of(const gk_linear& l, int64_t row, int64_t rows, char* copy) {
    const int64_t size = item(l.dtype), bytes = l.weight.inner * size, stride = l.x.stride * size;
    const char* x = (const char*)l.x.data + row * stride;
    const bool ragged = l.dtype != GK_INT8 && bytes % 64;
    if (!ragged && !(TILES && l.dtype != GK_F32 && rows % 16)) return {x, stride, rows};
    const int64_t padded = padded_inner(l.dtype, l.weight.inner) * size;
    memset(copy, 0, ROWS * padded);
    for (int64_t r = 0; r < rows; r++) memcpy(copy + r * padded, x + r * stride, bytes);
    return {copy, padded, rows};
}

// Multiplies a strip with the columns of a panel.
inline void multiply(const gk_linear& l, const gk_weight& weight, const Strip& strip, int64_t panel, float* y, int64_t ldy) {
    const int64_t block = block_bytes(l.dtype, weight.inner);
    const char* w = (const char*)weight.packed + 2 * panel * block;
    const int64_t groups = padded_inner(l.dtype, weight.inner) / group(l.dtype);
    if (l.dtype == GK_INT8) product(int8_t(), strip.x, strip.stride, strip.rows, w, block, groups, (int32_t*)y, ldy);
    else if (l.dtype == GK_BF16) product(bf16(), strip.x, strip.stride, strip.rows, w, block, groups, y, ldy);
    else product(float(), strip.x, strip.stride, strip.rows, w, block, groups, y, ldy);
}

// Scales and shifts 32 columns of a row, in place.
struct Scaled {
    bool whole;  // numbers, of int8 products
    vf scale[COLUMNS / W], bias[COLUMNS / W];
    Scaled(const gk_linear& l, const gk_weight& weight, int64_t panel) : whole(l.dtype == GK_INT8) {
        for (int v = 0; v < COLUMNS / W; v++) {
            const int64_t at = panel * COLUMNS + v * W;
            scale[v] = whole ? load(weight.scale + at) : all(1);
            bias[v] = weight.bias ? load(weight.bias + at) : vf{};
        }
    }
    vf operator()(const float* y, int v, float row_scale, int32_t lift) const {
        if (!whole) return load(y + v * W) + bias[v];
        vi sum = load((const int32_t*)y + v * W) - lift;
        return __builtin_convertvector(sum, vf) * (scale[v] * row_scale) + bias[v];
    }
};

template <int ACTIVATION> inline vf activate(vf x) {
    if (ACTIVATION == GK_GELU) return gelu(x);
    if (ACTIVATION == GK_GELU_TANH) return gelu_tanh(x);
    if (ACTIVATION == GK_SILU) return silu(x);
    if (ACTIVATION == GK_RELU) return relu(x);
    if (ACTIVATION == GK_TANH) return tanh(x);
    return x;
}

// Bias, activation and gate of a panel of `rows` rows, in place. z holds the gate's product, with the same stride.
template <int ACTIVATION>
inline void finish_panel(const gk_linear& l, int64_t row, int64_t rows, int64_t panel, float* y, const float* z, int64_t ldy,
                         const int32_t* sums, Peak* peaks) {
    const Scaled own(l, l.weight, panel), gate(l, z ? l.gate : l.weight, panel);
    const int64_t columns = l.weight.columns - panel * COLUMNS;  // the others are padding
    for (int64_t r = 0; r < rows; r++) {
        const float scale = l.x.scale ? l.x.scale[row + r] : 1.0f;
        const int32_t lift = LIFTED && l.x.scale ? 128 * sums[r] : 0;
        float* at = y + r * ldy;
        for (int v = 0; v < COLUMNS / W; v++) {
            vf x = own(at, v, scale, lift);
            x = z ? x * activate<ACTIVATION>(gate(z + r * COLUMNS, v, scale, lift)) : activate<ACTIVATION>(x);
            store(at + v * W, x);
            if (peaks) peaks[r].add(first(x, columns - v * W));
        }
    }
}

inline void finish(const gk_linear& l, int64_t row, int64_t rows, int64_t panel, float* y, const float* z, int64_t ldy,
                   const int32_t* sums, Peak* peaks) {
    switch (l.activation) {
#define GK_CASE(name) \
    case name: return finish_panel<name>(l, row, rows, panel, y, z, ldy, sums, peaks);
        GK_CASE(GK_NONE)
        GK_CASE(GK_GELU)
        GK_CASE(GK_GELU_TANH)
        GK_CASE(GK_SILU)
        GK_CASE(GK_RELU)
        GK_CASE(GK_TANH)
#undef GK_CASE
    }
}

// Multiplies a strip with a panel, and with the gate's.
inline void compute(const gk_linear& l, const Strip& strip, int64_t row, int64_t panel, float* y, int64_t ldy,
                    const int32_t* sums, Peak* peaks) {
    alignas(64) float gate[ROWS * COLUMNS];
    multiply(l, l.weight, strip, panel, y, ldy);
    if (l.gate.packed) multiply(l, l.gate, strip, panel, gate, COLUMNS);
    finish(l, row, strip.rows, panel, y, l.gate.packed ? gate : nullptr, ldy, sums, peaks);
}

// What follows when a row is complete.
template <class S> inline void finish_row(const gk_linear& l, int64_t row, float* y) {
    const int64_t n = l.weight.columns;
    if (l.first_norm.kind) normalise(y, n, l.first_norm);
    const S* residual = l.residual.data ? row_of<S>(l.residual, row) : nullptr;
    S* total = l.total.data ? row_of<S>(l.total, row) : nullptr;
    if (residual || total)
        for (int64_t i = 0; i < n; i += W) {
            vf x = load_at(y, i, n);
            if (residual) x = load_at(residual, i, n) + x * l.factor;
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

inline void sums_of(const gk_linear& l, const Strip& strip, int32_t* sums) {
    if (LIFTED && l.dtype == GK_INT8)
        for (int64_t r = 0; r < strip.rows; r++) sums[r] = row_sum(strip.x + r * strip.stride, up(l.weight.inner, 64));
}

// Rows whose columns are independent of each other go straight to the output.
template <class S> int32_t straight(const gk_linear& l, int64_t begin, int64_t end, int64_t first_panel, int64_t last_panel) {
    constexpr int64_t TOGETHER = 4;  // strips that share a panel while it is in the cache
    Desk desk(l, ROWS, COLUMNS);
    Room copies(TOGETHER * ROWS * padded_inner(l.dtype, l.weight.inner) * item(l.dtype)), all_sums(TOGETHER * ROWS * 4);
    if (!desk.ready() || !copies.at || !all_sums.at) return GK_NO_MEMORY;
    float* y = desk.results.of<float>();
    for (int64_t start = begin; start < end; start += TOGETHER * ROWS) {
        Strip strips[TOGETHER];
        int64_t count = 0;
        for (int64_t row = start; row < smaller(end, start + TOGETHER * ROWS); row += ROWS, count++) {
            char* copy = copies.of<char>() + count * ROWS * padded_inner(l.dtype, l.weight.inner) * item(l.dtype);
            strips[count] = strip_of(l, row, smaller<int64_t>(ROWS, end - row), copy);
            sums_of(l, strips[count], all_sums.of<int32_t>() + count * ROWS);
        }
        for (int64_t panel = first_panel; panel < last_panel; panel++) {
            const int64_t column = panel * COLUMNS, n = smaller<int64_t>(COLUMNS, l.weight.columns - column);
            for (int64_t s = 0; s < count; s++) {
                const int64_t row = start + s * ROWS;
                compute(l, strips[s], row, panel, y, COLUMNS, all_sums.of<int32_t>() + s * ROWS, nullptr);
                for (int64_t r = 0; r < strips[s].rows; r++) {
                    S* out = row_of<S>(l.output, row + r) + column;
                    for (int64_t i = 0; i < n; i += W) store_at(out, i, n, load(y + r * COLUMNS + i));
                }
            }
        }
    }
    return 0;
}

// Rows that are finished as a whole: blocks of them are kept until all columns are there.
template <class S> int32_t by_blocks(const gk_linear& l, int64_t begin, int64_t end) {
    const int64_t width = up(l.weight.columns, COLUMNS);
    const int64_t strips = larger<int64_t>(1, smaller<int64_t>(4, BLOCK_BYTES / (ROWS * width * 4)));
    const int64_t copy_bytes = ROWS * padded_inner(l.dtype, l.weight.inner) * item(l.dtype);
    Desk desk(l, strips * ROWS, width);
    Room copies(strips * copy_bytes), peak_room(strips * ROWS * sizeof(Peak));
    if (!desk.ready() || !copies.at || !peak_room.at) return GK_NO_MEMORY;
    const bool track = only_quantised(l);
    Peak* peaks = peak_room.of<Peak>();
    for (int64_t start = begin; start < end; start += strips * ROWS) {
        Strip found[4];
        int64_t count = 0;
        for (int64_t row = start; row < smaller(end, start + strips * ROWS); row += ROWS, count++) {
            found[count] = strip_of(l, row, smaller<int64_t>(ROWS, end - row), copies.of<char>() + count * copy_bytes);
            sums_of(l, found[count], desk.sums.of<int32_t>() + count * ROWS);
        }
        for (int64_t r = 0; track && r < strips * ROWS; r++) peaks[r] = Peak();
        for (int64_t panel = 0; panel < width / COLUMNS; panel++)
            for (int64_t s = 0; s < count; s++)
                compute(l, found[s], start + s * ROWS, panel, desk.results.of<float>() + s * ROWS * width + panel * COLUMNS,
                        width, desk.sums.of<int32_t>() + s * ROWS, track ? peaks + s * ROWS : nullptr);
        for (int64_t s = 0; s < count; s++)
            for (int64_t r = 0; r < found[s].rows; r++) {
                float* y = desk.results.of<float>() + (s * ROWS + r) * width;
                const int64_t row = start + s * ROWS + r;
                if (track)
                    quantise(y, l.weight.columns, peaks[s * ROWS + r].value(), row_of<int8_t>(l.quantised, row),
                             l.quantised.scale + row);
                else finish_row<S>(l, row, y);
            }
    }
    return 0;
}

}  // namespace
