// The few instructions of ARM processors that the kernels name, in plain C++ for other processors: the code of the ARM
// levels runs everywhere in tests. Each function does what Arm's intrinsics reference says of the name, slowly.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

typedef float float32x4_t __attribute__((vector_size(16)));
typedef int32_t int32x2_t __attribute__((vector_size(8)));
typedef int32_t int32x4_t __attribute__((vector_size(16)));
typedef uint32_t uint32x4_t __attribute__((vector_size(16)));
typedef int16_t int16x8_t __attribute__((vector_size(16)));
typedef int8_t int8x8_t __attribute__((vector_size(8)));
typedef int8_t int8x16_t __attribute__((vector_size(16)));
struct bfloat16x8_t { uint16_t at[8]; };

namespace neon {

template <class To, class From> inline To load(const From* p) { To x; memcpy(&x, p, sizeof x); return x; }
template <class To, class From> inline To bits(From x) { return load<To>(&x); }
template <class V, class T> inline V all(T value) {
    V x;
    for (unsigned i = 0; i < sizeof x / sizeof value; i++) x[i] = value;
    return x;
}
// Half 0 or half 1 of a vector.
template <class Half, class V> inline Half half(V x, int which) { return load<Half>((const char*)&x + which * sizeof(Half)); }
inline float real(uint16_t x) { return bits<float>(uint32_t(x) << 16); }

}  // namespace neon

inline float32x4_t vmaxq_f32(float32x4_t a, float32x4_t b) {
    for (int i = 0; i < 4; i++) a[i] = isnan(a[i]) || a[i] > b[i] ? a[i] : b[i];
    return a;
}
inline int32x4_t vmaxq_s32(int32x4_t a, int32x4_t b) {
    for (int i = 0; i < 4; i++) a[i] = a[i] > b[i] ? a[i] : b[i];
    return a;
}
inline uint32x4_t vmaxq_u32(uint32x4_t a, uint32x4_t b) {
    for (int i = 0; i < 4; i++) a[i] = a[i] > b[i] ? a[i] : b[i];
    return a;
}
inline float32x4_t vfmaq_f32(float32x4_t sum, float32x4_t a, float32x4_t b) {
    for (int i = 0; i < 4; i++) sum[i] = fmaf(a[i], b[i], sum[i]);
    return sum;
}

inline int32x2_t vld1_s32(const int32_t* p) { return neon::load<int32x2_t>(p); }
inline int32x4_t vld1q_s32(const int32_t* p) { return neon::load<int32x4_t>(p); }
inline int8x16_t vld1q_s8(const int8_t* p) { return neon::load<int8x16_t>(p); }
inline void vst1_s32(int32_t* p, int32x2_t x) { memcpy(p, &x, sizeof x); }
inline void vst1q_s32(int32_t* p, int32x4_t x) { memcpy(p, &x, sizeof x); }
inline float32x4_t vdupq_n_f32(float x) { return neon::all<float32x4_t>(x); }
inline int32x2_t vdup_n_s32(int32_t x) { return neon::all<int32x2_t>(x); }
inline int32x4_t vdupq_n_s32(int32_t x) { return neon::all<int32x4_t>(x); }

inline int8x8_t vreinterpret_s8_s32(int32x2_t x) { return neon::bits<int8x8_t>(x); }
inline int8x16_t vreinterpretq_s8_s32(int32x4_t x) { return neon::bits<int8x16_t>(x); }
inline bfloat16x8_t vreinterpretq_bf16_s32(int32x4_t x) { return neon::bits<bfloat16x8_t>(x); }
inline float32x4_t vreinterpretq_f32_s32(int32x4_t x) { return neon::bits<float32x4_t>(x); }
inline int32x4_t vreinterpretq_s32_f32(float32x4_t x) { return neon::bits<int32x4_t>(x); }

inline int8x8_t vget_low_s8(int8x16_t x) { return neon::half<int8x8_t>(x, 0); }
inline int8x8_t vget_high_s8(int8x16_t x) { return neon::half<int8x8_t>(x, 1); }
inline int32x2_t vget_low_s32(int32x4_t x) { return neon::half<int32x2_t>(x, 0); }
inline int32x2_t vget_high_s32(int32x4_t x) { return neon::half<int32x2_t>(x, 1); }
inline int32x4_t vcombine_s32(int32x2_t low, int32x2_t high) { return int32x4_t{low[0], low[1], high[0], high[1]}; }
inline int32x4_t vzip1q_s32(int32x4_t a, int32x4_t b) { return int32x4_t{a[0], b[0], a[1], b[1]}; }
inline int32x4_t vzip2q_s32(int32x4_t a, int32x4_t b) { return int32x4_t{a[2], b[2], a[3], b[3]}; }

inline int32x4_t vaddq_s32(int32x4_t a, int32x4_t b) { return a + b; }
inline int32x4_t vpaddq_s32(int32x4_t a, int32x4_t b) {
    return int32x4_t{a[0] + a[1], a[2] + a[3], b[0] + b[1], b[2] + b[3]};
}
inline int32x4_t vpaddlq_s16(int16x8_t x) {
    return int32x4_t{x[0] + x[1], x[2] + x[3], x[4] + x[5], x[6] + x[7]};
}
inline int16x8_t vmull_s8(int8x8_t a, int8x8_t b) {
    int16x8_t x;
    for (int i = 0; i < 8; i++) x[i] = int16_t(a[i] * b[i]);
    return x;
}

// Four groups of four products each.
inline int32x4_t vdotq_s32(int32x4_t sum, int8x16_t a, int8x16_t b) {
    for (int i = 0; i < 16; i++) sum[i / 4] += a[i] * b[i];
    return sum;
}
// Rows of a, [2, 8], with rows of b, [2, 8]: a @ b.T, [2, 2].
inline int32x4_t vmmlaq_s32(int32x4_t sum, int8x16_t a, int8x16_t b) {
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 8; k++) sum[i] += a[i / 2 * 8 + k] * b[i % 2 * 8 + k];
    return sum;
}
// Rows of a, [2, 4], with rows of b, [2, 4]: a @ b.T, [2, 2].
inline float32x4_t vbfmmlaq_f32(float32x4_t sum, bfloat16x8_t a, bfloat16x8_t b) {
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 4; k++) sum[i] += neon::real(a.at[i / 2 * 4 + k]) * neon::real(b.at[i % 2 * 4 + k]);
    return sum;
}
