// What is computed row by row: norms, quantising, and turning heads by angles.
#pragma once

#include <math.h>

#include "kernels.h"
#include "vector.h"

namespace {

// A row with half of its range below this is a row of zeros: 127 divided by it would not be finite.
constexpr float least = 1e-30f;

// The range of a row's entries and zero. As signed numbers, the bits of entries above zero have the order of the entries; as
// unsigned numbers, those of entries below zero have the order of the magnitudes. The bits of what is not finite are the largest.
struct Extent {
    vi above = {};
    vu below = {};
    GK_INLINE void add(vf x) {
        above = maximum(above, bits<vi>(x));
        below = maximum(below, bits<vu>(x));
    }
    // The middle of the range, and half of its length, which is NaN if an entry is not finite.
    GK_INLINE void measure(float& middle, float& half) const {
        const int32_t most = top(above);
        const uint32_t lowest = top(below);
        const bool finite = most < 0x7f800000 && lowest < 0xff800000u;
        const float a = bits<float>(most) * 0.5f, b = lowest >> 31 ? bits<float>(lowest) * 0.5f : 0.0f;
        middle = a + b;
        half = finite ? a - b : NAN;
    }
};

// The extent of a row of n states.
template <class S> GK_INLINE Extent extent_of(const S* y, int64_t n) {
    Extent found;
    int64_t i = 0;
    for (; i + W <= n; i += W) found.add(load(y + i));
    if (i < n) found.add(load_some(y + i, n - i));
    return found;
}
#if defined(__AVX512BW__)
// The bits of bf16 have the same order.
template <> GK_INLINE Extent extent_of(const bf16* y, int64_t n) {
    __m512i above = {}, below = {};
    for (int64_t i = 0; i < n; i += 32) {
        const __m512i x = _mm512_maskz_loadu_epi16(n - i < 32 ? (1u << (n - i)) - 1 : ~0u, y + i);
        above = _mm512_max_epi16(above, x);
        below = _mm512_max_epu16(below, x);
    }
    // Of the two words of a lane, the larger one.
    Extent found;
    found.above = maximum((vi)above, (vi)above << 16);
    found.below = maximum((vu)below, (vu)below << 16);
    found.above &= int32_t(0xffff0000);
    found.below &= 0xffff0000u;
    return found;
}
#endif

// Quantises a row of n states by its range, which has this middle and half of its length, and fills with zeros to a multiple of
// 64. Of a row that is not finite the scale is NaN, so that whatever is computed from the row is NaN.
template <class S>
inline void quantise(const S* y, int64_t n, float middle, float half, int8_t* q, float* scale) {
    if (!(half >= least)) {
        scale[0] = half < least ? 0.0f : NAN;
        scale[1] = 0;
        memset(q, 0, up(n, 64));
        return;
    }
    const vf by = all(127.0f / half), shift = -middle * by;
    auto entry = [&](vf x) { return rounded(fma(x, by, shift)); };
    scale[0] = half * (1.0f / 127.0f);
    scale[1] = middle;
    int64_t i = 0;
    for (; i + 4 * W <= n; i += 4 * W)
        store_four(q + i, entry(load(y + i)), entry(load(y + i + W)), entry(load(y + i + 2 * W)), entry(load(y + i + 3 * W)));
    for (; i < n; i += W) {
        int8_t some[W];
        store(some, entry(load_at(y, i, n)));
        memcpy(q + i, some, smaller<int64_t>(W, n - i));
    }
    if (n % 64) memset(q + n, 0, up(n, 64) - n);
}

// The factor and the shift by which a norm changes a row of n floats, from the row's sum (layer) or sum of squares (RMS).
struct Normed {
    float mean = 0, factor = 1;
};
// The sum of what add(sum, begin, end) adds for each vector of n entries. Four sums grow beside each other, because each waits for
// its last addition.
template <class Add> GK_INLINE float total(int64_t n, Add add) {
    vf s[4] = {};
    int64_t i = 0;
    for (; i + 4 * W <= n; i += 4 * W)
        for (int k = 0; k < 4; k++) add(s[k], i + k * W, i + k * W + W);
    for (; i < n; i += W) add(s[0], i, n);
    return sum((s[0] + s[1]) + (s[2] + s[3]));
}
inline Normed measure(const float* y, int64_t n, const gk_norm& norm) {
    Normed found;
    if (norm.kind == GK_LAYER_NORM)
        found.mean = total(n, [&](vf& s, int64_t i, int64_t end) GK_ALWAYS { s += load_at(y, i, end); }) / n;
    const float squares = total(n, [&](vf& s, int64_t i, int64_t end) GK_ALWAYS {
        const vf d = first(load_at(y, i, end) - found.mean, end - i);
        s = fma(d, d, s);
    });
    found.factor = 1.0f / sqrtf(squares / n + norm.eps);
    return found;
}
GK_INLINE vf apply(const gk_norm& norm, const Normed& found, vf x, int64_t i, int64_t n) {
    vf weight = load_at(norm.weight, i, n);
    if (norm.offset != 0) weight += norm.offset;
    weight *= found.factor;
    return norm.bias ? fma(x - found.mean, weight, load_at(norm.bias, i, n)) : (x - found.mean) * weight;
}
inline void normalise(float* y, int64_t n, const gk_norm& norm) {
    const Normed found = measure(y, n, norm);
    for (int64_t i = 0; i < n; i += W) store_at(y, i, n, apply(norm, found, load_at(y, i, n), i, n));
}

template <class S> inline S* row_of(const gk_rows& rows, int64_t row) { return (S*)rows.data + row * rows.stride; }

constexpr int64_t AT_ONCE = 4;  // rows that go through the same steps beside each other, because each step waits for sums of a row

// Quantises `count` rows of n states with a stride.
template <class S>
inline void quantise_rows(const S* y, int64_t stride, int64_t count, int64_t n, const gk_rows& quantised, int64_t row) {
    float middle[AT_ONCE], half[AT_ONCE];
    for (int64_t r = 0; r < count; r++) extent_of(y + r * stride, n).measure(middle[r], half[r]);
    for (int64_t r = 0; r < count; r++)
        quantise(y + r * stride, n, middle[r], half[r], row_of<int8_t>(quantised, row + r), quantised.scale + 2 * (row + r));
}

// The end of every row: norm, output and quantised output of `count` rows of n floats with a stride, which are overwritten.
template <class S>
inline void end_rows(float* y, int64_t stride, int64_t count, int64_t n, const gk_norm& norm, const gk_rows& output,
                     const gk_rows& quantised, int64_t row) {
    Normed found[AT_ONCE];
    for (int64_t r = 0; norm.kind && r < count; r++) found[r] = measure(y + r * stride, n, norm);
    // States are no longer than floats, so that they can take the place of those that have been read.
    const int64_t step = stride * sizeof(float) / sizeof(S);
    for (int64_t r = 0; r < count; r++) {
        const float* from = y + r * stride;
        auto state = [&](int64_t i, int64_t end) GK_ALWAYS {
            const vf x = load_at(from, i, end);
            return norm.kind ? apply(norm, found[r], x, i, end) : x;
        };
        S* out = output.data ? row_of<S>(output, row + r) : (S*)y + r * step;
        int64_t i = 0;
        for (; i + 2 * W <= n; i += 2 * W) store_pair(out + i, state(i, i + W), state(i + W, i + 2 * W));
        for (; i < n; i += W) store_at(out, i, n, state(i, n));
    }
    if (!quantised.data) return;
    if (output.data) quantise_rows(row_of<S>(output, row), output.stride, count, n, quantised, row);
    else quantise_rows((const S*)y, step, count, n, quantised, row);
}

template <class S>
int32_t run_rows(int64_t begin, int64_t end, int64_t width, const gk_rows& x, const gk_norm& norm, const gk_rows& output,
                 const gk_rows& quantised) {
    const int64_t stride = up(width, 16);
    Room room(AT_ONCE * stride * 4);
    float* y = room.of<float>();
    if (!y) return GK_NO_MEMORY;
    for (int64_t row = begin, count; row < end; row += count) {
        count = smaller(AT_ONCE, end - row);
        if (!norm.kind && !output.data) {
            quantise_rows(row_of<S>(x, row), x.stride, count, width, quantised, row);
            continue;
        }
        for (int64_t r = 0; r < count; r++) {
            const S* from = row_of<S>(x, row + r);
            for (int64_t i = 0; i < width; i += W) store_at(y + r * stride, i, width, load_at(from, i, width));
        }
        end_rows<S>(y, stride, count, width, norm, output, quantised, row);
    }
    return 0;
}

// Entry i of the first half of a head and entry i of its second half are a pair that turns by the angle i of the row.
template <class S>
int32_t run_heads(int64_t begin, int64_t end, int64_t heads, int64_t size, const gk_rows& x, const gk_norm& norm,
                  const float* cosine, const float* sine) {
    Room room(up(size, 64) * 4);
    float* y = room.of<float>();
    if (!y) return GK_NO_MEMORY;
    const int64_t half = size / 2;
    for (int64_t row = begin; row < end; row++)
        for (int64_t head = 0; head < heads; head++) {
            S* at = row_of<S>(x, row) + head * size;
            for (int64_t i = 0; i < size; i += W) store_at(y, i, size, load_at(at, i, size));
            if (norm.kind) normalise(y, size, norm);
            if (!cosine) {
                for (int64_t i = 0; i < size; i += W) store_at(at, i, size, load_at(y, i, size));
                continue;
            }
            for (int64_t i = 0; i < half; i += W) {
                vf a = load_at(y, i, half), b = load_at(y + half, i, half);
                vf c = load_at(cosine + row * half, i, half), s = load_at(sine + row * half, i, half);
                store_at(at, i, half, fma(a, c, -(b * s)));
                store_at(at + half, i, half, fma(b, c, a * s));
            }
        }
    return 0;
}

}  // namespace
