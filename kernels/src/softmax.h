// A softmax of scores that come in blocks of keys: "Online normalizer calculation for softmax" (Milakov and Gimelshein, 2018).
#pragma once

#include <float.h>

#include "activations.h"
#include "product.h"

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace {

// While this lives, numbers below the smallest normal one are zero: x86 processors are a hundred times slower with them, and
// small probabilities are such numbers.
struct Flushing {
#if defined(__SSE__)
    const uint32_t before = _mm_getcsr();
    Flushing() { _mm_setcsr(before | 0x8040); }
    ~Flushing() { _mm_setcsr(before); }
#endif
};

constexpr int64_t QUERIES = 16;  // rows of a block: with the keys and values that they see they stay in the first-level cache

// 2^x, x <= 0, as exact as states of the type S need it. It is zero far below zero, and NaN of NaN.
template <class S> GK_INLINE vf power(vf x) {
    // x is a whole number and f: the number below x for bf16, the nearest one for float32.
    constexpr bool below = sizeof(S) == 2;
#if defined(__AVX512F__)
    const vf f = (vf)_mm512_reduce_ps((__m512)x, (below ? _MM_FROUND_TO_NEG_INF : _MM_FROUND_TO_NEAREST_INT) | _MM_FROUND_NO_EXC);
#else
    const vf near = maximum(all(-127.0f), x), n = (near - (below ? 0.5f : 0.0f) + 12582912.0f) - 12582912.0f, f = near - n;
#endif
    vf p;
    if constexpr (below) {  // 2^f, 0 <= f <= 1, with a relative error of 7.5e-5
        p = all(0.07802452f);
        p = fma(p, f, all(0.226067159f));
        p = fma(p, f, all(0.69583354f));
        p = fma(p, f, all(0.999925219f));
    } else {  // 2^f, |f| <= 1/2, with a relative error of 8e-8
        p = all(1.32764718e-3f);
        p = fma(p, f, all(9.67554133e-3f));
        p = fma(p, f, all(5.55071327e-2f));
        p = fma(p, f, all(2.40221197e-1f));
        p = fma(p, f, all(6.93146967e-1f));
        p = fma(p, f, all(1.0f));
    }
#if defined(__AVX512F__)
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)(below ? x : x - f));  // takes the whole number below by itself
#else
    const vf y = bits<vf>(bits<vi>(p) + (rounded(n) << 23));
    return where(vi(x < -126.0f), vf{}, where(vi(x == x), y, x));
#endif
}

// The state of a softmax of QUERIES rows: the largest score so far, and the sum of the probabilities, which are relative to it.
struct Softmax {
    alignas(64) float most[QUERIES], sum[QUERIES], shrunk[QUERIES], share[QUERIES];
    vf parts[QUERIES];

    void begin() {
        for (int64_t r = 0; r < QUERIES; r++) most[r] = -FLT_MAX, sum[r] = 0;
    }
    // Then share[r] is the factor that makes the sum of row r one.
    void end() {
        for (int64_t r = 0; r < QUERIES; r += W) store(share + r, 1.0f / load(sum + r));
    }

    // Overwrites n scores of each row, a multiple of 32, by probabilities of type T: 2^(by * score) over that of the largest
    // score, for states of type S. Then shrunk[r] is the factor of everything that came before in row r. A score of -infinity has a probability of zero.
    template <class S, class T> void add(int64_t rows, float* scores, int64_t stride, int64_t n, float by) {
        alignas(64) float now[QUERIES] = {};
        for (int64_t r = 0; r < rows; r++) {
            const float* from = scores + r * stride;
            vf a = all(-FLT_MAX), b = a;
            for (int64_t i = 0; i < n; i += 2 * W) {
                a = maximum(load(from + i), a);
                b = maximum(load(from + i + W), b);
            }
            parts[r] = maximum(a, b);
        }
        for (int64_t r = 0; r < rows; r++) now[r] = larger(most[r], top(parts[r]) * by);
        for (int64_t r = 0; r < rows; r++) {
            const float* from = scores + r * stride;
            T* to = (T*)from;
            const vf shift = all(now[r]);
            vf a = {}, b = {};
            for (int64_t i = 0; i < n; i += 2 * W) {
                const vf p = power<S>(fma(load(from + i), all(by), -shift)), q = power<S>(fma(load(from + i + W), all(by), -shift));
                a += p, b += q;
                store_pair(to + i, p, q);
            }
            parts[r] = a + b;
        }
        for (int64_t r = 0; r < QUERIES; r += W) store(shrunk + r, power<float>(load(most + r) - load(now + r)));
        for (int64_t r = 0; r < rows; r++) sum[r] = sum[r] * shrunk[r] + ::sum(parts[r]);
        memcpy(most, now, sizeof now);
    }
};

}  // namespace
