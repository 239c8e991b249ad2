// Products of up to 32 rows with 32 columns of a packed weight, by the instructions of the level.
//
// A packed weight has its columns in blocks of 16. In a block lie, for each group of inner entries in turn, the
// group's entries of the 16 columns: 4 int8, 2 bf16 or 1 float32 a column, so 64 bytes. Columns are padded with zeros to
// a multiple of 32 and the inner entries to a multiple of 64 bytes.
#pragma once

#include <utility>

#include "kernels.h"
#include "vector.h"

namespace {

constexpr int ROWS = 32, COLUMNS = 32;

inline int64_t item(int32_t dtype) { return dtype == GK_INT8 ? 1 : dtype == GK_BF16 ? 2 : 4; }
inline int64_t group(int32_t dtype) { return 4 / item(dtype); }
inline int64_t padded_inner(int32_t dtype, int64_t inner) { return up(inner, 64 / item(dtype)); }
// Bytes of a block of 16 columns.
inline int64_t block_bytes(int32_t dtype, int64_t inner) { return padded_inner(dtype, inner) * item(dtype) * 16; }

// What happens beside a product: strips bring memory from `ahead` on into the cache, groups * 32 bytes; tiles call step()
// after each 64 bytes of inner entries, and add to the sums of a block [rows, 32] at `from`, if it is not null.
struct Idle {
    static constexpr bool streams = false;  // whether weights are read once, and should not push the rows out of the cache
    static constexpr const float* from = nullptr;
    const char* ahead;
    void step() {}
};

// x: rows padded to 64 bytes, `stride` in bytes. w: two blocks, the second `block` bytes behind the first. groups: of four
// bytes a column, a multiple of 16. y: int32 or float32 [rows, 32] with a stride of `ldy`. Rows up to a multiple of 16 may be
// read and written if TILES.
#if defined(__AMX_INT8__) && defined(__AMX_BF16__)
constexpr bool TILES = true;

struct alignas(64) Tiles {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Each task loads the shapes of the tiles, and gives the tiles back: oneDNN uses them too.
struct Session {
    Session() {
        Tiles tiles;
        _tile_loadconfig(&tiles);
    }
    ~Session() { _tile_release(); }
};

// The sums begin with those of a block [rows, 32], or with zero if it is null.
inline void begin_sums(const float* from, int64_t rows) {
    if (!from) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        return;
    }
    _tile_loadd(0, from, COLUMNS * 4);
    _tile_loadd(1, from + 16, COLUMNS * 4);
    if (rows <= 16) return;
    _tile_loadd(2, from + 16 * COLUMNS, COLUMNS * 4);
    _tile_loadd(3, from + 16 * COLUMNS + 16, COLUMNS * 4);
}

#define GK_LOAD_WEIGHTS(tile, from) \
    if (Meanwhile::streams) _tile_stream_loadd(tile, from, 64); \
    else _tile_loadd(tile, from, 64);

// After each step of inner entries the processor gets something else to do: the tiles multiply beside it.
#define GK_TILE_PRODUCT(dot)                                                       \
    const int64_t bytes = groups * 4;                                              \
    begin_sums(meanwhile.from, rows);                                              \
    if (rows > 16) {                                                               \
        for (int64_t k = 0; k < bytes; k += 64) {                                  \
            GK_LOAD_WEIGHTS(6, w + k * 16)                                         \
            _tile_loadd(4, x + k, stride);                                         \
            GK_LOAD_WEIGHTS(7, w + block + k * 16)                                 \
            dot(0, 4, 6);                                                          \
            _tile_loadd(5, x + 16 * stride + k, stride);                           \
            dot(1, 4, 7);                                                          \
            dot(2, 5, 6);                                                          \
            dot(3, 5, 7);                                                          \
            meanwhile.step();                                                      \
        }                                                                          \
        _tile_stored(2, y + 16 * ldy, ldy * 4);                                    \
        _tile_stored(3, y + 16 * ldy + 16, ldy * 4);                               \
    } else {                                                                       \
        for (int64_t k = 0; k < bytes; k += 64) {                                  \
            GK_LOAD_WEIGHTS(6, w + k * 16)                                         \
            _tile_loadd(4, x + k, stride);                                         \
            GK_LOAD_WEIGHTS(7, w + block + k * 16)                                 \
            dot(0, 4, 6);                                                          \
            dot(1, 4, 7);                                                          \
            meanwhile.step();                                                      \
        }                                                                          \
    }                                                                              \
    _tile_stored(0, y, ldy * 4);                                                   \
    _tile_stored(1, y + 16, ldy * 4);

template <class Meanwhile>
inline void product(int8_t, const char* x, int64_t stride, int64_t rows, const char* w, int64_t block, int64_t groups,
                    int32_t* y, int64_t ldy, Meanwhile& meanwhile) {
    GK_TILE_PRODUCT(_tile_dpbssd)
}
template <class Meanwhile>
inline void product(bf16, const char* x, int64_t stride, int64_t rows, const char* w, int64_t block, int64_t groups,
                    float* y, int64_t ldy, Meanwhile& meanwhile) {
    GK_TILE_PRODUCT(_tile_dpbf16ps)
}

#else
constexpr bool TILES = false;
struct Session {};
#endif

inline int32_t word(const char* p) { int32_t x; memcpy(&x, p, 4); return x; }

#if defined(__AVX512F__)
constexpr int LANES = 16;  // columns of an accumulator
typedef __m512i Lanes;
#define GK_LOAD(p) _mm512_loadu_si512(p)
#elif defined(__AVX2__)
constexpr int LANES = 8;
typedef __m256i Lanes;
#define GK_LOAD(p) _mm256_loadu_si256((const __m256i*)(p))
#endif

// R rows with V accumulators of LANES columns each, for the columns from `lane` on. Dot adds one group of inner entries of one row.
template <class Dot, int R, int V>
inline void strip(const char* x, int64_t stride, const char* w, int64_t block, int64_t groups,
                  typename Dot::Value* y, int64_t ldy, int lane, const char* ahead) {
    typename Dot::Sum acc[R][V];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) acc[r][v] = Dot::zero();
    for (int64_t k = 0; k < groups; k += 4) {
        __builtin_prefetch(ahead + k * 16);
#pragma GCC unroll 4
        for (int64_t i = k; i < k + 4; i++) {
            typename Dot::Weights b[V];
            for (int v = 0; v < V; v++) {
                int column = lane + v * Dot::LANES;
                b[v] = Dot::weights(w + (column / 16) * block + i * 64 + (column % 16) * 4);
            }
            for (int r = 0; r < R; r++) {
                auto a = Dot::entries(x + r * stride + i * 4);
                for (int v = 0; v < V; v++) acc[r][v] = Dot::add(acc[r][v], a, b[v]);
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) Dot::keep(y + r * ldy + lane + v * Dot::LANES, acc[r][v]);
}

template <class Dot, int R>
void strips(const char* x, int64_t stride, const char* w, int64_t block, int64_t groups, typename Dot::Value* y, int64_t ldy,
            const char* ahead) {
    for (int lane = 0; lane < COLUMNS; lane += Dot::VECTORS * Dot::LANES)
        strip<Dot, R, Dot::VECTORS>(x, stride, w, block, groups, y, ldy, lane, ahead);
}

// The function for a number of rows.
template <class Dot, int... R> inline auto strips_of(int64_t rows, std::integer_sequence<int, R...>) {
    static constexpr decltype(&strips<Dot, 1>) all[] = {strips<Dot, R + 1>...};
    return all[rows - 1];
}

// Strips of about as many rows each, because a strip of few rows takes as long as one of many.
template <class Dot>
inline void by_strips(const char* x, int64_t stride, int64_t rows, const char* w, int64_t block, int64_t groups,
                      typename Dot::Value* y, int64_t ldy, const char* ahead) {
    int64_t row = 0;
    for (int64_t left = (rows + Dot::ROWS - 1) / Dot::ROWS; left; left--) {
        const int64_t count = (rows - row) / left;
        const auto run = strips_of<Dot>(count, std::make_integer_sequence<int, Dot::ROWS>());
        run(x + row * stride, stride, w, block, groups, y + row * ldy, ldy, ahead + left % 2 * groups * 16);
        row += count;
    }
}

#if defined(__ARM_FEATURE_MATMUL_INT8) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define GK_PAIRS 1

// Two rows and two columns at once: an instruction multiplies eight bytes of each of two rows with eight bytes of each of
// two columns, which two groups of inner entries give when they are zipped. A sum holds the four products.
struct PairsInt8 {
    typedef int32_t Value;
    static int32x4_t add(int32x4_t s, int32x4_t a, int32x4_t b) {
        return vmmlaq_s32(s, vreinterpretq_s8_s32(a), vreinterpretq_s8_s32(b));
    }
};
struct PairsBf16 {
    typedef float Value;
    static int32x4_t add(int32x4_t s, int32x4_t a, int32x4_t b) {
        return vreinterpretq_s32_f32(
            vbfmmlaq_f32(vreinterpretq_f32_s32(s), vreinterpretq_bf16_s32(a), vreinterpretq_bf16_s32(b)));
    }
};

// P pairs of rows with 8 columns. If `single`, there is one row: it is its own partner, whose results are left out.
template <class Pairs, int P>
inline void pair_strip(const char* x, int64_t stride, const char* w, int64_t groups, typename Pairs::Value* y, int64_t ldy,
                       bool single) {
    int32x4_t acc[P][4];
    for (int p = 0; p < P; p++)
        for (int v = 0; v < 4; v++) acc[p][v] = vdupq_n_s32(0);
    const int64_t partner = single ? 0 : stride;
    for (int64_t k = 0; k < groups; k += 2) {
        int32x4_t b[4];
        for (int v = 0; v < 4; v += 2) {
            int32x4_t low = vld1q_s32((const int32_t*)(w + k * 64 + v * 8));
            int32x4_t high = vld1q_s32((const int32_t*)(w + k * 64 + 64 + v * 8));
            b[v] = vzip1q_s32(low, high);
            b[v + 1] = vzip2q_s32(low, high);
        }
        for (int p = 0; p < P; p++) {
            const char* row = x + 2 * p * stride + k * 4;
            int32x4_t a = vcombine_s32(vld1_s32((const int32_t*)row), vld1_s32((const int32_t*)(row + partner)));
            for (int v = 0; v < 4; v++) acc[p][v] = Pairs::add(acc[p][v], a, b[v]);
        }
    }
    for (int p = 0; p < P; p++)
        for (int v = 0; v < 4; v++) {
            int32_t* to = (int32_t*)(y + 2 * p * ldy + 2 * v);
            vst1_s32(to, vget_low_s32(acc[p][v]));
            if (!single) vst1_s32(to + ldy, vget_high_s32(acc[p][v]));
        }
}

template <class Pairs>
inline void by_pairs(const char* x, int64_t stride, int64_t rows, const char* w, int64_t block, int64_t groups,
                     typename Pairs::Value* y, int64_t ldy) {
    for (int column = 0; column < COLUMNS; column += 8) {
        const char* from = w + (column / 16) * block + (column % 16) * 4;
        auto* to = y + column;
        int64_t r = 0;
        for (; r + 8 <= rows; r += 8) pair_strip<Pairs, 4>(x + r * stride, stride, from, groups, to + r * ldy, ldy, false);
        for (; r + 2 <= rows; r += 2) pair_strip<Pairs, 1>(x + r * stride, stride, from, groups, to + r * ldy, ldy, false);
        if (r < rows) pair_strip<Pairs, 1>(x + r * stride, stride, from, groups, to + r * ldy, ldy, true);
    }
}
#endif

// ---- float32 -----------------------------------------------------------------------------------------------------

struct DotF32 {
    typedef float Value;
    typedef vf Sum;
    typedef vf Weights;
    static constexpr int LANES = W, VECTORS = W == 16 ? 2 : W == 8 ? 2 : 4, ROWS = W == 16 ? 11 : W == 8 ? 6 : 4;
    static Sum zero() { return vf{}; }
    static Weights weights(const char* p) { return load((const float*)p); }
    static vf entries(const char* p) { return all(*(const float*)p); }
    static Sum add(Sum s, vf a, vf b) { return fma(a, b, s); }
    static void keep(float* y, Sum s) { store(y, s); }
};
template <class Meanwhile>
inline void product(float, const char* x, int64_t stride, int64_t rows, const char* w, int64_t block, int64_t groups,
                    float* y, int64_t ldy, Meanwhile& meanwhile) {
    by_strips<DotF32>(x, stride, rows, w, block, groups, y, ldy, meanwhile.ahead);
}

// ---- bf16 --------------------------------------------------------------------------------------------------------

#if defined(__AVX512BF16__)
constexpr bool HAS_BF16 = true;
#if !defined(__AMX_BF16__)
struct DotBf16 {
    typedef float Value;
    typedef __m512 Sum;
    typedef __m512i Weights;
    static constexpr int LANES = 16, VECTORS = 2, ROWS = 11;
    static Sum zero() { return _mm512_setzero_ps(); }
    static Weights weights(const char* p) { return _mm512_loadu_si512(p); }
    static __m512i entries(const char* p) { return _mm512_set1_epi32(word(p)); }
    static Sum add(Sum s, __m512i a, __m512i b) { return _mm512_dpbf16_ps(s, (__m512bh)a, (__m512bh)b); }
    static void keep(float* y, Sum s) { _mm512_storeu_ps(y, s); }
};
template <class Meanwhile>
inline void product(bf16, const char* x, int64_t stride, int64_t rows, const char* w, int64_t block, int64_t groups,
                    float* y, int64_t ldy, Meanwhile& meanwhile) {
    by_strips<DotBf16>(x, stride, rows, w, block, groups, y, ldy, meanwhile.ahead);
}
#endif
#elif defined(GK_PAIRS)
constexpr bool HAS_BF16 = true;
template <class Meanwhile>
inline void product(bf16, const char* x, int64_t stride, int64_t rows, const char* w, int64_t block, int64_t groups,
                    float* y, int64_t ldy, Meanwhile&) {
    by_pairs<PairsBf16>(x, stride, rows, w, block, groups, y, ldy);
}
#else
constexpr bool HAS_BF16 = false;
template <class Meanwhile>
inline void product(bf16, const char*, int64_t, int64_t, const char*, int64_t, int64_t, float*, int64_t, Meanwhile&) {}
#endif

// ---- int8 --------------------------------------------------------------------------------------------------------

#if defined(GK_PAIRS)
constexpr bool LIFTED = false;
inline int32_t row_sum(const char*, int64_t) { return 0; }
template <class Meanwhile>
inline void product(int8_t, const char* x, int64_t stride, int64_t rows, const char* w, int64_t block, int64_t groups,
                    int32_t* y, int64_t ldy, Meanwhile&) {
    by_pairs<PairsInt8>(x, stride, rows, w, block, groups, y, ldy);
}
#elif !(defined(__AMX_INT8__) && defined(__AMX_BF16__))
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
// vpdpbusd multiplies unsigned by signed: the weights get 128 added, and 128 times the sum of the row's entries comes off.
struct DotInt8 {
    typedef int32_t Value;
    typedef Lanes Sum;
    typedef Lanes Weights;
    static constexpr int LANES = ::LANES, VECTORS = 2, ROWS = LANES == 16 ? 11 : 6;
#if defined(__AVX512VNNI__)
    static Sum zero() { return _mm512_setzero_si512(); }
    static Weights weights(const char* p) { return _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-128)); }
    static Lanes entries(const char* p) { return _mm512_set1_epi32(word(p)); }
    static Sum add(Sum s, Lanes a, Lanes b) { return _mm512_dpbusd_epi32(s, b, a); }
    static void keep(int32_t* y, Sum s) { _mm512_storeu_si512(y, s); }
#else
    static Sum zero() { return _mm256_setzero_si256(); }
    static Weights weights(const char* p) { return _mm256_xor_si256(GK_LOAD(p), _mm256_set1_epi8(-128)); }
    static Lanes entries(const char* p) { return _mm256_set1_epi32(word(p)); }
    static Sum add(Sum s, Lanes a, Lanes b) { return _mm256_dpbusd_avx_epi32(s, b, a); }
    static void keep(int32_t* y, Sum s) { _mm256_storeu_si256((__m256i*)y, s); }
#endif
};
constexpr bool LIFTED = true;  // the weights
#elif defined(__AVX2__)
// vpmaddubsw multiplies unsigned by signed: the row's magnitudes by the weights with the row's signs. A sum of two products
// fits into 16 bits, because no entry is -128.
struct DotInt8 {
    typedef int32_t Value;
    typedef __m256i Sum;
    typedef __m256i Weights;
    static constexpr int LANES = 8, VECTORS = 2, ROWS = 4;
    static Sum zero() { return _mm256_setzero_si256(); }
    static Weights weights(const char* p) { return GK_LOAD(p); }
    static __m256i entries(const char* p) { return _mm256_set1_epi32(word(p)); }
    static Sum add(Sum s, __m256i a, __m256i b) {
        const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(a), _mm256_sign_epi8(b, a));
        return _mm256_add_epi32(s, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    static void keep(int32_t* y, Sum s) { _mm256_storeu_si256((__m256i*)y, s); }
};
constexpr bool LIFTED = false;
#elif defined(__ARM_FEATURE_DOTPROD)
struct DotInt8 {
    typedef int32_t Value;
    typedef int32x4_t Sum;
    typedef int8x16_t Weights;
    static constexpr int LANES = 4, VECTORS = 4, ROWS = 4;
    static Sum zero() { return vdupq_n_s32(0); }
    static Weights weights(const char* p) { return vld1q_s8((const int8_t*)p); }
    static int8x16_t entries(const char* p) { return vreinterpretq_s8_s32(vdupq_n_s32(word(p))); }
    static Sum add(Sum s, int8x16_t a, int8x16_t b) { return vdotq_s32(s, b, a); }
    static void keep(int32_t* y, Sum s) { vst1q_s32(y, s); }
};
constexpr bool LIFTED = false;
#elif defined(__ARM_NEON)
struct DotInt8 {
    typedef int32_t Value;
    typedef int32x4_t Sum;
    typedef int8x16_t Weights;
    static constexpr int LANES = 4, VECTORS = 4, ROWS = 4;
    static Sum zero() { return vdupq_n_s32(0); }
    static Weights weights(const char* p) { return vld1q_s8((const int8_t*)p); }
    static int8x8_t entries(const char* p) { return vreinterpret_s8_s32(vdup_n_s32(word(p))); }
    static Sum add(Sum s, int8x8_t a, int8x16_t b) {
        int16x8_t low = vmull_s8(vget_low_s8(b), a), high = vmull_s8(vget_high_s8(b), a);
        return vaddq_s32(s, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
    }
    static void keep(int32_t* y, Sum s) { vst1q_s32(y, s); }
};
constexpr bool LIFTED = false;
#else
struct DotInt8 {
    typedef int32_t Value;
    typedef int32_t Sum;
    typedef const int8_t* Weights;
    static constexpr int LANES = 1, VECTORS = 8, ROWS = 2;
    static Sum zero() { return 0; }
    static Weights weights(const char* p) { return (const int8_t*)p; }
    static const int8_t* entries(const char* p) { return (const int8_t*)p; }
    static Sum add(Sum s, const int8_t* a, const int8_t* b) {
        return s + a[0] * b[0] + a[1] * b[1] + a[2] * b[2] + a[3] * b[3];
    }
    static void keep(int32_t* y, Sum s) { *y = s; }
};
constexpr bool LIFTED = false;
#endif

inline int32_t row_sum(const char* x, int64_t bytes) {
    int32_t s = 0;
    for (int64_t i = 0; i < bytes; i++) s += (int8_t)x[i];
    return s;
}

template <class Meanwhile>
inline void product(int8_t, const char* x, int64_t stride, int64_t rows, const char* w, int64_t block, int64_t groups,
                    int32_t* y, int64_t ldy, Meanwhile& meanwhile) {
    by_strips<DotInt8>(x, stride, rows, w, block, groups, y, ldy, meanwhile.ahead);
}
#else
constexpr bool LIFTED = false;
inline int32_t row_sum(const char*, int64_t) { return 0; }
#endif

template <class T, class Y>
inline void product(T kind, const char* x, int64_t stride, int64_t rows, const char* w, int64_t block, int64_t groups, Y* y,
                    int64_t ldy) {
    Idle idle{w};
    product(kind, x, stride, rows, w, block, groups, y, ldy, idle);
}

}  // namespace
