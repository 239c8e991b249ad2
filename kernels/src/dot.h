// Products of one row with columns of a packed weight of any format. They wait for memory: each entry of the weight is read
// once, in the order in which it lies, and little is computed with it.
#pragma once

#include "kernels.h"
#include "product.h"
#include "unpack.h"
#include "vector.h"

namespace {

constexpr int64_t AHEAD = 8192;    // bytes that are on their way from memory
constexpr int N = 16 / W;          // vectors of a block's columns

// Asks for a line of a weight. It is read once, and should not take the place of what lies in the outer caches.
GK_INLINE void ask(const void* p) { __builtin_prefetch(p, 0, 0); }

// A row as products read it, padded with zeros to 64 entries: as floats, and as entries of 8 bits with a scale and a sum for
// each 32.
struct Row {
    float* x;
    int8_t* q;
    float* scale;
    int32_t* sum;
};

// Quantises 32 entries of a row by the largest magnitude. The scale of entries that are not all finite is NaN.
inline void quantise_group(const Row& row, int64_t g) {
    constexpr int V = SHARING / W;
    const float* x = row.x + g * SHARING;
    int8_t* q = row.q + g * SHARING;
    vi most = {};  // as whole numbers, magnitudes have their own order, and what is not finite comes last
    for (int v = 0; v < V; v++) most = maximum(most, bits<vi>(absolute(load(x + v * W))));
    const int32_t largest = top(most);
    const float peak = bits<float>(largest);
    row.sum[g] = 0;
    if (largest >= 0x7f800000 || peak < 1e-30f) {
        row.scale[g] = largest >= 0x7f800000 ? NAN : 0.0f;
        memset(q, 0, SHARING);
        return;
    }
    row.scale[g] = peak * (1.0f / 127.0f);
    const vf by = all(127.0f / peak);
    vf s = {};
    for (int v = 0; v < V; v++) {
        const vi entry = rounded(load(x + v * W) * by);
        store(q + v * W, entry);
        s += __builtin_convertvector(entry, vf);
    }
    row.sum[g] = int32_t(sum(s));
}
inline void quantise_row(const Row& row, int64_t n) {
    for (int64_t g = 0; g < up(n, 64) / SHARING; g++) quantise_group(row, g);
}

// ---- Integer products of a vector's columns, four entries each ------------------------------------------------------

typedef uint8_t vq __attribute__((vector_size(4 * W)));

GK_INLINE vq load_line(const char* p) { vq x; memcpy(&x, p, sizeof x); return x; }

// Adds the products of entries of a weight and of the row. The weight's are signed, with 128 added where they are raised.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr bool RAISED = true;
GK_INLINE vi add_unsigned(vi s, vq w, vi x) {
#if defined(__AVX512VNNI__)
    return (vi)_mm512_dpbusd_epi32((__m512i)s, (__m512i)w, (__m512i)x);
#else
    return (vi)_mm256_dpbusd_avx_epi32((__m256i)s, (__m256i)w, (__m256i)x);
#endif
}
GK_INLINE vi add_signed(vi s, vq w, vi x) { return add_unsigned(s, w ^ 128, x); }
#elif defined(__AVX2__)
constexpr bool RAISED = false;
GK_INLINE vi add_unsigned(vi s, vq w, vi x) {
    const __m256i pairs = _mm256_maddubs_epi16((__m256i)w, (__m256i)x);
    return s + (vi)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
GK_INLINE vi add_signed(vi s, vq w, vi x) {
    return add_unsigned(s, (vq)_mm256_abs_epi8((__m256i)x), (vi)_mm256_sign_epi8((__m256i)w, (__m256i)x));
}
#else
constexpr bool RAISED = false;
GK_INLINE vi add_signed(vi s, vq w, vi x) {
#if defined(__ARM_FEATURE_DOTPROD)
    return (vi)vdotq_s32((int32x4_t)s, (int8x16_t)w, (int8x16_t)x);
#elif defined(__ARM_NEON)
    const int8x16_t a = (int8x16_t)w, b = (int8x16_t)x;
    const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b)), high = vmull_s8(vget_high_s8(a), vget_low_s8(b));
    return s + (vi)vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high));
#else
    for (int i = 0; i < 4 * W; i++) s[i / 4] += int8_t(w[i]) * int8_t(((vq)x)[i]);
    return s;
#endif
}
GK_INLINE vi add_unsigned(vi s, vq w, vi x) { return add_signed(s, w, x); }
#endif

GK_INLINE vi word_of(const int8_t* q) { return vi{} + word((const char*)q); }

// The scales and minima of groups of a block, in turn.
template <bool MINIMUM> struct Shares {
    static constexpr bool LIFTED = !MINIMUM;  // whether 8 comes off entries of 4 bits
    const uint16_t *scale, *minimum;
    GK_INLINE Shares(const gk_weight& w, int64_t block, int64_t groups)
        : scale((const uint16_t*)w.scale + block * groups * 16),
          minimum(MINIMUM ? (const uint16_t*)w.minimum + block * groups * 16 : nullptr) {}
    // Adds a group's products.
    GK_INLINE void add(const Row& row, int64_t g, const vi* s, vf* y) {
        ask((const char*)scale + AHEAD / 4);
        if (MINIMUM) ask((const char*)minimum + AHEAD / 4);
        for (int n = 0; n < N; n++) {
            y[n] = fma(__builtin_convertvector(s[n], vf), load_half(scale + n * W) * row.scale[g], y[n]);
            if (MINIMUM) y[n] = fma(load_half(minimum + n * W), all(row.scale[g] * row.sum[g]), y[n]);
        }
        scale += 16;
        if (MINIMUM) minimum += 16;
    }
    GK_INLINE void end(vf*) const {}
};

// The same of scales and zeros of a byte each, which are one more stream from memory, and not two.
struct Zeros {
    static constexpr bool LIFTED = false;
    const uint8_t* at;
    const float* factor;
    GK_INLINE Zeros(const gk_weight& w, int64_t block, int64_t groups)
        : at((const uint8_t*)w.scale + block * groups * 32), factor(w.factor + block * 16) {}
    GK_INLINE void add(const Row& row, int64_t g, const vi* s, vf* y) {
        if (!(g & 1)) ask(at + AHEAD / 4);  // a line is two groups
        const vf zero = all(row.sum[g] * (-1.0f / 16));
        for (int n = 0; n < N; n++) {
            const vf product = fma(load(at + 16 + n * W), zero, __builtin_convertvector(s[n], vf));
            y[n] = fma(product, load(at + n * W) * row.scale[g], y[n]);
        }
        at += 32;
    }
    GK_INLINE void end(vf* y) const {
        for (int n = 0; n < N; n++) y[n] *= load(factor + n * W);
    }
};

// ---- 16 columns ----------------------------------------------------------------------------------------------------

// The products of a group of entries of 8 bits, which lie at `at`.
GK_INLINE void sum_group(const Row& row, int64_t g, const char* at, vi* s) {
    for (int n = 0; n < N; n++) s[n] = vi{} - (RAISED ? 128 * row.sum[g] : 0);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        ask(at + AHEAD + i * 64);
        const vi x = word_of(row.q + g * SHARING + 4 * i);
        for (int n = 0; n < N; n++) s[n] = add_signed(s[n], load_line(at + i * 64 + n * 4 * W), x);
    }
}

// Products without bias: `y` gets those of the columns of a block.
GK_INLINE void by_columns(const Row& row, const gk_weight& w, int64_t block, vf* y) {
    const int64_t groups = up(w.inner, 64) / SHARING;
    const char* at = (const char*)w.packed + block * groups * 512;
    for (int n = 0; n < N; n++) y[n] = vf{};
    for (int64_t g = 0; g < groups; g++, at += 512) {
        vi s[N];
        sum_group(row, g, at, s);
        for (int n = 0; n < N; n++) y[n] = fma(__builtin_convertvector(s[n], vf), all(row.scale[g]), y[n]);
    }
    for (int n = 0; n < N; n++) y[n] *= load((const float*)w.scale + block * 16 + n * W);
}

template <bool MINIMUM> GK_INLINE void by_groups(const Row& row, const gk_weight& w, int64_t block, vf* y) {
    const int64_t groups = up(w.inner, 64) / SHARING;
    const char* at = (const char*)w.packed + block * groups * 512;
    Shares<MINIMUM> shares(w, block, groups);
    for (int n = 0; n < N; n++) y[n] = vf{};
    for (int64_t g = 0; g < groups; g++, at += 512) {
        vi s[N];
        sum_group(row, g, at, s);
        shares.add(row, g, s, y);
    }
}

template <class Shared> GK_INLINE void by_halves(const Row& row, const gk_weight& w, int64_t block, vf* y) {
    const int64_t groups = up(w.inner, 64) / SHARING;
    const char* at = (const char*)w.packed + block * groups * 256;
    Shared shares(w, block, groups);
    for (int n = 0; n < N; n++) y[n] = vf{};
#pragma GCC unroll 2
    for (int64_t g = 0; g < groups; g++, at += 256) {
        vi s[N];
        for (int n = 0; n < N; n++) s[n] = vi{} - (Shared::LIFTED ? 8 * row.sum[g] : 0);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            ask(at + AHEAD + i * 64);
            const vi x = word_of(row.q + g * SHARING + 4 * i), high = word_of(row.q + g * SHARING + 16 + 4 * i);
            for (int n = 0; n < N; n++) {
                const vq line = load_line(at + i * 64 + n * 4 * W);
                s[n] = add_unsigned(add_unsigned(s[n], line & 15, x), line >> 4, high);
            }
        }
        shares.add(row, g, s, y);
    }
    shares.end(y);
}

GK_INLINE void by_pairs_of_bf16(const Row& row, const gk_weight& w, int64_t block, vf* y) {
    const int64_t lines = padded_inner(GK_BF16, w.inner) / 2;
    const char* at = (const char*)w.packed + block * lines * 64;
    vf s[4][N] = {};
    for (int64_t k = 0; k < lines; k += 2, at += 128) {
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
            ask(at + AHEAD + i * 64);
            const vf a = all(row.x[2 * (k + i)]), b = all(row.x[2 * (k + i) + 1]);
            for (int n = 0; n < N; n++) {
                const vu pair = (vu)load_line(at + i * 64 + n * 4 * W);
                s[2 * i][n] = fma(bits<vf>(pair << 16), a, s[2 * i][n]);
                s[2 * i + 1][n] = fma(bits<vf>(pair & 0xffff0000u), b, s[2 * i + 1][n]);
            }
        }
    }
    for (int n = 0; n < N; n++) y[n] = (s[0][n] + s[1][n]) + (s[2][n] + s[3][n]);
}

GK_INLINE void by_floats(const Row& row, const gk_weight& w, int64_t block, vf* y) {
    const int64_t lines = padded_inner(GK_F32, w.inner);
    const char* at = (const char*)w.packed + block * lines * 64;
    vf s[4][N] = {};
    for (int64_t k = 0; k < lines; k += 4, at += 256) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            ask(at + AHEAD + i * 64);
            const vf a = all(row.x[k + i]);
            for (int n = 0; n < N; n++) s[i][n] = fma((vf)load_line(at + i * 64 + n * 4 * W), a, s[i][n]);
        }
    }
    for (int n = 0; n < N; n++) y[n] = (s[0][n] + s[1][n]) + (s[2][n] + s[3][n]);
}

// The products of the columns of blocks from `begin` to `end`, with their bias, of which those that are there are written.
template <class Sixteen> GK_INLINE void blocks(const gk_weight& w, int64_t begin, int64_t end, float* to, Sixteen sixteen) {
    for (int64_t block = begin; block < end; block++) {
        vf y[N];
        sixteen(block, y);
        for (int n = 0; n < N; n++) {
            const int64_t column = block * 16 + n * W;
            if (w.bias) y[n] += load(w.bias + column);
            if (column < w.columns) store_at(to, column, w.columns, y[n]);
        }
    }
}

// The same of a table that lies row by row: its rows are the columns.
template <class S> void by_rows(const Row& row, const gk_weight& w, int64_t begin, int64_t end, float* to) {
    const int64_t inner = w.inner;
    for (int64_t column = 16 * begin; column < smaller(16 * end, w.columns); column++) {
        const S* from = (const S*)w.packed + column * inner;
        vf s[4] = {};
        int64_t i = 0;
        for (; i + 4 * W <= inner; i += 4 * W) {
            for (int64_t k = 0; k < int64_t(4 * W * sizeof(S)); k += 64) ask((const char*)(from + i) + AHEAD + k);
            for (int k = 0; k < 4; k++) s[k] = fma(load(from + i + k * W), load(row.x + i + k * W), s[k]);
        }
        for (; i < inner; i += W) s[0] = fma(load_at(from, i, inner), load_at(row.x, i, inner), s[0]);
        to[column] = sum((s[0] + s[1]) + (s[2] + s[3]));
    }
}

// Whether a product reads the row's entries of 8 bits.
inline bool takes_quantised(const gk_weight& w) { return w.packed && w.format != GK_BF16 && w.format != GK_F32; }

// Multiplies the row by the columns of the blocks from `begin` to `end`.
void multiply(const Row& row, const gk_weight& w, int64_t begin, int64_t end, float* to) {
    switch (w.format) {
        case GK_INT8: return blocks(w, begin, end, to, [&](int64_t b, vf* y) GK_ALWAYS { by_columns(row, w, b, y); });
        case GK_Q8:
            if (w.minimum) return blocks(w, begin, end, to, [&](int64_t b, vf* y) GK_ALWAYS { by_groups<true>(row, w, b, y); });
            return blocks(w, begin, end, to, [&](int64_t b, vf* y) GK_ALWAYS { by_groups<false>(row, w, b, y); });
        case GK_Q4:
            if (w.minimum) return blocks(w, begin, end, to, [&](int64_t b, vf* y) GK_ALWAYS { by_halves<Shares<true>>(row, w, b, y); });
            return blocks(w, begin, end, to, [&](int64_t b, vf* y) GK_ALWAYS { by_halves<Shares<false>>(row, w, b, y); });
        case GK_Q4Z: return blocks(w, begin, end, to, [&](int64_t b, vf* y) GK_ALWAYS { by_halves<Zeros>(row, w, b, y); });
        case GK_BF16: return blocks(w, begin, end, to, [&](int64_t b, vf* y) GK_ALWAYS { by_pairs_of_bf16(row, w, b, y); });
        default: return blocks(w, begin, end, to, [&](int64_t b, vf* y) GK_ALWAYS { by_floats(row, w, b, y); });
    }
}
// The same of a table that lies row by row.
void multiply_table(const Row& row, const gk_weight& w, int64_t begin, int64_t end, float* to) {
    return w.format == GK_BF16 ? by_rows<bf16>(row, w, begin, end, to) : by_rows<float>(row, w, begin, end, to);
}

inline int64_t blocks_of(const gk_weight& w) { return (w.columns + 15) / 16; }

// Brings the first lines of a block into the cache while nothing else is read.
inline void fetch(const gk_weight& w, int64_t block) {
    if (!w.packed || block >= blocks_of(w)) return;
    const int64_t bytes = w.format == GK_Q4 || w.format == GK_Q4Z ? up(w.inner, 64) * 8 : block_bytes(w.format == GK_Q8 ? GK_INT8 : w.format, w.inner);
    const char* at = (const char*)w.packed + block * bytes;
    for (int64_t i = 0; i < AHEAD; i += 64) ask(at + i);
    const char* shares = (const char*)w.scale + block * (bytes / 8);
    for (int64_t i = 0; w.format == GK_Q4Z && i < AHEAD / 4; i += 64) ask(shares + i);
}

}  // namespace
