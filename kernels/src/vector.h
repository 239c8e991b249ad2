// Vectors of float32 in the width of the level, in the compiler's own notation, so that one source serves every level.
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(_WIN32)
#include <malloc.h>
#endif

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

// Compilers give up on many small functions in one source, although a call costs more than what these compute.
#define GK_ALWAYS __attribute__((always_inline))
#define GK_INLINE inline GK_ALWAYS

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));
typedef int8_t vb __attribute__((vector_size(W)));
typedef uint8_t vub __attribute__((vector_size(W)));
typedef uint16_t bf16;

template <class T> inline T smaller(T a, T b) { return a < b ? a : b; }
template <class T> inline T larger(T a, T b) { return a > b ? a : b; }
inline int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <class To, class From> inline To bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "bits of another size");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

GK_INLINE vf all(float x) {
#if defined(__AVX512F__)
    return (vf)_mm512_set1_ps(x);
#elif defined(__AVX2__)
    return (vf)_mm256_set1_ps(x);
#elif defined(__ARM_NEON)
    return (vf)vdupq_n_f32(x);
#else
    return vf{x, x, x, x};
#endif
}
GK_INLINE vf load(const float* p) { vf x; memcpy(&x, p, sizeof x); return x; }
GK_INLINE void store(float* p, vf x) { memcpy(p, &x, sizeof x); }
GK_INLINE vi load(const int32_t* p) { vi x; memcpy(&x, p, sizeof x); return x; }
GK_INLINE vf load(const bf16* p) {
    vh x;
    memcpy(&x, p, sizeof x);
    return bits<vf>(__builtin_convertvector(x, vu) << 16);
}
// GCC 12 takes vectors of bytes to vectors of words entry by entry, where it is not told the instruction.
GK_INLINE vf load(const int8_t* p) {
    vb x;
    memcpy(&x, p, sizeof x);
#if defined(__AVX512F__)
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)x));
#elif defined(__AVX2__)
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
    return __builtin_convertvector(__builtin_convertvector(x, vi), vf);
#endif
}
GK_INLINE vf load(const uint8_t* p) {
    vub x;
    memcpy(&x, p, sizeof x);
#if defined(__AVX512F__)
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32((__m128i)x));
#elif defined(__AVX2__)
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
    return __builtin_convertvector(__builtin_convertvector(x, vi), vf);
#endif
}
// Of float16.
GK_INLINE vf load_half(const uint16_t* p) {
    vh x;
    memcpy(&x, p, sizeof x);
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps((__m256i)x);
#elif defined(__AVX2__)
    return (vf)_mm256_cvtph_ps((__m128i)x);
#else
    const vu u = __builtin_convertvector(x, vu);
    const vf magnitude = bits<vf>((u & 0x7fff) << 13) * 0x1p112f;
    const vu not_finite = bits<vu>(vi((u & 0x7c00) == 0x7c00)) & 0x7f800000;
    return bits<vf>(bits<vu>(magnitude) | not_finite | (u & 0x8000) << 16);
#endif
}
// To bf16, in the lower halves.
GK_INLINE vu shortened(vf x) {
    vu u = bits<vu>(x);
    vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    vu nan = bits<vu>(vi(x != x));
    return (nan & 0x7fc0) | (~nan & rounded);
}
GK_INLINE void store(bf16* p, vf x) {
#if defined(__AVX512BF16__)
    __m256bh y = _mm512_cvtneps_pbh((__m512)x);
#else
    vh y = __builtin_convertvector(shortened(x), vh);
#endif
    memcpy(p, &y, sizeof y);
}
// Words of two entries of bf16 each: a's in the lower half, b's in the upper one.
GK_INLINE vi paired(vf a, vf b) {
#if defined(__AVX512BF16__)
    constexpr auto both = [](int i) { return (i + 16) << 16 | i; };
    const __m512i order = _mm512_setr_epi32(both(0), both(1), both(2), both(3), both(4), both(5), both(6), both(7), both(8), both(9),
                                            both(10), both(11), both(12), both(13), both(14), both(15));
    return (vi)_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
#else
    return bits<vi>(shortened(a) | shortened(b) << 16);
#endif
}

// Two vectors side by side.
template <class T> GK_INLINE void store_pair(T* p, vf a, vf b) { store(p, a), store(p + W, b); }
template <> GK_INLINE void store_pair(bf16* p, vf a, vf b) {
#if defined(__AVX512BF16__)
    const __m512bh y = _mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
    memcpy(p, &y, sizeof y);
#else
    store(p, a), store(p + W, b);
#endif
}

// As a state of this type has it.
template <class S> GK_INLINE vf as_state(vf x) {
    S y[W];
    store(y, x);
    return load(y);
}
template <> GK_INLINE vf as_state<float>(vf x) { return x; }

// The first n < W entries; the others are zero.
template <class T> GK_INLINE vf load_some(const T* p, int64_t n) {
    T x[W] = {};
    memcpy(x, p, n * sizeof(T));
    return load(x);
}
template <class T> GK_INLINE void store_some(T* p, vf x, int64_t n) {
    T y[W];
    store(y, x);
    memcpy(p, y, n * sizeof(T));
}
template <class T> GK_INLINE vf load_at(const T* p, int64_t i, int64_t n) {
    return n - i >= W ? load(p + i) : load_some(p + i, n - i);
}
template <class T> GK_INLINE void store_at(T* p, int64_t i, int64_t n, vf x) {
    if (n - i >= W) store(p + i, x);
    else store_some(p + i, x, n - i);
}

// a b + c with one rounding where the level has it. The compiler must not choose, because the same row would get other bits
// in another place.
GK_INLINE vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON)
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

// Of a NaN in b, both functions return the NaN.
GK_INLINE vf maximum(vf a, vf b) {
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__ARM_NEON)
    return (vf)vmaxq_f32((float32x4_t)a, (float32x4_t)b);
#else
    return a > b ? a : b;
#endif
}
GK_INLINE vf minimum(vf a, vf b) {
#if defined(__AVX512F__)
    return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#else
    return -maximum(-a, -b);
#endif
}
GK_INLINE vf absolute(vf x) { return bits<vf>(bits<vu>(x) & 0x7fffffffu); }
GK_INLINE vf where(vi mask, vf yes, vf no) { return bits<vf>((mask & bits<vi>(yes)) | (~mask & bits<vi>(no))); }
GK_INLINE vi is_finite(vf x) { return vi(x * 0.0f == 0.0f); }
GK_INLINE vi counting() {
    vi x;
    for (int i = 0; i < W; i++) x[i] = i;
    return x;
}
// Zero from entry n on.
GK_INLINE vf first(vf x, int64_t n) { return n >= W ? x : bits<vf>(bits<vi>(x) & vi(counting() < vi{} + int32_t(n))); }

GK_INLINE float sum(vf x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);
#else
    float s[W];
    store(s, x);
    for (int n = W / 2; n; n /= 2)
        for (int i = 0; i < n; i++) s[i] += s[i + n];
    return s[0];
#endif
}
GK_INLINE float top(vf x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)x);
#else
    float s[W];
    store(s, x);
    float m = s[0];
    for (int i = 1; i < W; i++) m = s[i] > m ? s[i] : m;
    return m;
#endif
}

// To the nearest whole number, ties to even; |x| < 2^22.
GK_INLINE vi rounded(vf x) {
#if defined(__AVX512F__)
    return (vi)_mm512_cvtps_epi32((__m512)x);
#elif defined(__AVX2__)
    return (vi)_mm256_cvtps_epi32((__m256)x);
#else
    return bits<vi>(x + 12582912.0f) - 0x4b400000;
#endif
}
GK_INLINE vi maximum(vi a, vi b) {
#if defined(__AVX512F__)
    return (vi)_mm512_max_epi32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (vi)_mm256_max_epi32((__m256i)a, (__m256i)b);
#elif defined(__ARM_NEON)
    return (vi)vmaxq_s32((int32x4_t)a, (int32x4_t)b);
#else
    return a > b ? a : b;
#endif
}
GK_INLINE vu maximum(vu a, vu b) {
#if defined(__AVX512F__)
    return (vu)_mm512_max_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (vu)_mm256_max_epu32((__m256i)a, (__m256i)b);
#elif defined(__ARM_NEON)
    return (vu)vmaxq_u32((uint32x4_t)a, (uint32x4_t)b);
#else
    return a > b ? a : b;
#endif
}
#if defined(__AVX512F__)
GK_INLINE int32_t top(vi x) { return _mm512_reduce_max_epi32((__m512i)x); }
GK_INLINE uint32_t top(vu x) { return _mm512_reduce_max_epu32((__m512i)x); }
#else
template <class V> GK_INLINE auto top(V x) {
    auto m = x[0];
    for (int i = 1; i < W; i++) m = x[i] > m ? x[i] : m;
    return m;
}
#endif
GK_INLINE void store(int8_t* p, vi x) {
#if defined(__AVX512F__)
    _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)x));
#else
    vb y = __builtin_convertvector(x, vb);
    memcpy(p, &y, sizeof y);
#endif
}
// Four vectors side by side, of entries that fit into 8 bits.
GK_INLINE void store_four(int8_t* p, vi a, vi b, vi c, vi d) {
#if defined(__AVX512BW__)
    // Packing works within each 16 bytes, which then hold four entries of each vector.
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i words = _mm512_packs_epi32((__m512i)a, (__m512i)b), more = _mm512_packs_epi32((__m512i)c, (__m512i)d);
    _mm512_storeu_si512(p, _mm512_permutexvar_epi32(order, _mm512_packs_epi16(words, more)));
#else
    store(p, a), store(p + W, b), store(p + 2 * W, c), store(p + 3 * W, d);
#endif
}

GK_INLINE vf reciprocal(vf x) {
#if defined(__AVX512F__)
    vf r = (vf)_mm512_rcp14_ps((__m512)x);
    return r * fma(-x, r, all(2.0f));
#else
    return 1.0f / x;
#endif
}

// e^x, at least e^-87. The polynomial of 2^f, |f| <= 1/2, has a relative error of 8e-8.
GK_INLINE vf exponential(vf x) {
    vf y = minimum(all(127.0f), maximum(all(-126.0f), x * 1.44269504089f));
    vf n = (y + 12582912.0f) - 12582912.0f;
    vf f = y - n;
    vf p = all(1.32764718e-3f);
    p = fma(p, f, all(9.67554133e-3f));
    p = fma(p, f, all(5.55071327e-2f));
    p = fma(p, f, all(2.40221197e-1f));
    p = fma(p, f, all(6.93146967e-1f));
    p = fma(p, f, all(1.0f));
    return p * bits<vf>((rounded(n) + 127) << 23);
}

// Memory of one task, aligned to a cache line.
struct Room {
    void* at = nullptr;
    Room() = default;
    explicit Room(int64_t bytes) { make(bytes); }
    void* make(int64_t bytes) {
#if defined(_WIN32)
        at = _aligned_malloc(up(bytes, 64) + 64, 64);
#else
        if (posix_memalign(&at, 64, up(bytes, 64) + 64)) at = nullptr;
#endif
        return at;
    }
    ~Room() {
#if defined(_WIN32)
        _aligned_free(at);
#else
        free(at);
#endif
    }
    Room(const Room&) = delete;
    Room& operator=(const Room&) = delete;
    template <class T> T* of() const { return static_cast<T*>(at); }
};

}  // namespace
