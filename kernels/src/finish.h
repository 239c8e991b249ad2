// What follows a product at once, block by block: the scales of int8, bias, activation and gate.
#pragma once

#include "activations.h"
#include "kernels.h"
#include "product.h"

namespace {

// A block is up to 32 rows of a panel of 32 columns: products that wait for their bias, activation and gate.
struct Block {
    int64_t row, rows, panel;
    const float* y;  // the products, [rows, 32]
    const float* z;  // the gate's products; null for none
    void* out;       // what they become, [rows, columns], with a stride: floats, or states
    int64_t stride;
    int64_t columns;
    const int32_t* sums;
};
typedef void (*Finish)(const gk_linear&, const Block&, int64_t begin, int64_t end);

constexpr int VECTORS = COLUMNS / W;  // of a row of a block

template <int ACTIVATION, class S> GK_INLINE vf activate(vf x) {
    if (ACTIVATION == GK_GELU) return gelu<S>(x);
    if (ACTIVATION == GK_GELU_TANH) return gelu_tanh(x);
    if (ACTIVATION == GK_SILU) return silu(x);
    if (ACTIVATION == GK_RELU) return relu(x);
    if (ACTIVATION == GK_TANH) return tanh(x);
    return x;
}

// Scales and shifts the columns of a panel.
template <bool INT8> struct Scaled {
    const float *scale, *sums, *bias;
    GK_INLINE Scaled(const gk_weight& weight, int64_t panel)
        : scale((const float*)weight.scale + panel * COLUMNS),
          sums(weight.sums + panel * COLUMNS),
          bias(weight.bias ? weight.bias + panel * COLUMNS : nothing) {}
    GK_INLINE vf operator()(const float* y, int v, vf row_scale, vf middle, int32_t lift) const {
        if (!INT8) return load(y + v * W) + load(bias + v * W);
        const vi sum = load((const int32_t*)y + v * W) - lift;
        return fma(__builtin_convertvector(sum, vf), load(scale + v * W) * row_scale,
                   fma(load(sums + v * W), middle, load(bias + v * W)));
    }
    alignas(64) static constexpr float nothing[COLUMNS] = {};
};

// Stores a row of a block of which n columns are there.
template <class R> GK_INLINE void store_row(R* to, const vf* x, int64_t n) {
    if (n >= COLUMNS) {
        for (int v = 0; v < VECTORS; v += 2) store_pair(to + v * W, x[v], x[v + 1]);
        return;
    }
    for (int v = 0; v * W < n; v++) store_at(to, v * W, n, x[v]);
}

// Finishes some rows of a block, whose results are of type R. S is the type of states.
template <int ACTIVATION, bool INT8, bool GATED, class S, class R>
void finish_rows(const gk_linear& l, const Block& block, int64_t begin, int64_t end) {
    const Scaled<INT8> own(l.weight, block.panel), gate(GATED ? l.gate : l.weight, block.panel);
    const float* scales = INT8 ? l.x.scale + 2 * block.row : nullptr;
    const float *y = block.y, *z = block.z;
    const int64_t n = block.columns, stride = block.stride;
    R* out = (R*)block.out + begin * stride;
    for (int64_t r = begin; r < end; r++, out += stride) {
        const vf scale = all(INT8 ? scales[2 * r] : 0.0f), middle = all(INT8 ? scales[2 * r + 1] : 0.0f);
        const int32_t lift = LIFTED && INT8 ? 128 * block.sums[r] : 0;
        vf x[VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) {
            x[v] = own(y + r * COLUMNS, v, scale, middle, lift);
            if (GATED) x[v] *= activate<ACTIVATION, S>(gate(z + r * COLUMNS, v, scale, middle, lift));
            else x[v] = activate<ACTIVATION, S>(x[v]);
        }
        store_row(out, x, n);
    }
}

// The function for these operands, with results of states or of floats.
template <int ACTIVATION, bool INT8, bool GATED> Finish finish_at(const gk_linear& l, bool floats) {
    if (l.states == GK_F32) return finish_rows<ACTIVATION, INT8, GATED, float, float>;
    return floats ? finish_rows<ACTIVATION, INT8, GATED, bf16, float> : finish_rows<ACTIVATION, INT8, GATED, bf16, bf16>;
}
template <int ACTIVATION> Finish finish_with(const gk_linear& l, bool floats) {
    if (l.dtype == GK_INT8)
        return l.gate.packed ? finish_at<ACTIVATION, true, true>(l, floats) : finish_at<ACTIVATION, true, false>(l, floats);
    return l.gate.packed ? finish_at<ACTIVATION, false, true>(l, floats) : finish_at<ACTIVATION, false, false>(l, floats);
}
inline Finish finish_of(const gk_linear& l, bool floats) {
    switch (l.activation) {
        case GK_GELU: return finish_with<GK_GELU>(l, floats);
        case GK_GELU_TANH: return finish_with<GK_GELU_TANH>(l, floats);
        case GK_SILU: return finish_with<GK_SILU>(l, floats);
        case GK_RELU: return finish_with<GK_RELU>(l, floats);
        case GK_TANH: return finish_with<GK_TANH>(l, floats);
        default: return finish_with<GK_NONE>(l, floats);
    }
}

}  // namespace
