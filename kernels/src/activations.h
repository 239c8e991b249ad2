// Activations of vectors.
#pragma once

#include <float.h>
#include <math.h>

#include "kernels.h"
#include "vector.h"

namespace {

// At plus and minus infinity every activation is its limit, but for an error below 1e-36.

#if defined(__AVX512F__)
// Through the `count` Chebyshev points between two ends, a polynomial by Newton's divided differences: its coefficients at
// powers of the distance from `origin`.
template <class F> void interpolate(F f, double begin, double end, double origin, int count, double* c) {
    double t[4], d[4];
    for (int k = 0; k < count; k++) {
        t[k] = (begin + end) / 2 - (end - begin) / 2 * cos(3.14159265358979 * (2 * k + 1) / (2 * count)) - origin;
        d[k] = f(origin + t[k]);
    }
    for (int order = 1; order < count; order++)
        for (int k = count - 1; k >= order; k--) d[k] = (d[k] - d[k - 1]) / (t[k] - t[k - order]);
    for (int power = 0; power < count; power++) c[power] = 0;
    for (int k = count - 1; k >= 0; k--) {  // c = c * (t - t[k]) + d[k]
        for (int power = count - 1; power > 0; power--) c[power] = c[power - 1] - t[k] * c[power];
        c[0] = d[k] - t[k] * c[0];
    }
}

// For states of float32, GELU(x) = x / 2 + h(|x|), where h(a) = a (Phi(a) - 1/2) for the normal distribution's Phi. h is a
// cubic polynomial in each of 32 intervals, with an error of 1e-6; from 4.96 on h(a) = a / 2.
constexpr float gelu_step = 0.16f;
alignas(64) float gelu_table[4][32];

// For states of bf16, GELU(x) = max(x, 0) - g(|x|), where g(a) = a Phi(-a). g is a quadratic polynomial in each of 31 intervals
// about multiples of the step, with an error of 1.4e-5, and zero in the last one.
constexpr float short_step = 0.15f, short_end = 31 * short_step;
alignas(64) float short_table[3][32];

void start_activations() {
    auto h = [](double a) { return 0.5 * a * erf(a / sqrt(2.0)); };
    auto g = [](double a) { return -0.5 * a * erfc(a / sqrt(2.0)); };
    for (int i = 0; i < 31; i++) {
        double c[4];
        interpolate(h, double(gelu_step) * i, double(gelu_step) * (i + 1), double(gelu_step) * i, 4, c);
        for (int power = 0; power < 4; power++) gelu_table[power][i] = float(c[power]);
        interpolate(g, short_step * (i - 0.5), short_step * (i + 0.5), 0, 3, c);
        for (int power = 0; power < 3; power++) short_table[power][i] = float(c[power]);
    }
    gelu_table[0][31] = float(31 * double(gelu_step) / 2);
    gelu_table[1][31] = 0.5f;
    gelu_table[2][31] = gelu_table[3][31] = 0;
    for (int power = 0; power < 3; power++) short_table[power][31] = 0;
    // As exact beside zero as elsewhere, measured by the result: g(a) = -a / 2 + a^2 / sqrt(2 pi) and a term of a^4.
    short_table[0][0] = 0;
    short_table[1][0] = -0.5f;
    short_table[2][0] = 0.398942f;
}

GK_INLINE vf of_table(const float* table, __m512i index) {
    return (vf)_mm512_permutex2var_ps(_mm512_load_ps(table), index, _mm512_load_ps(table + 16));
}

// As exact as states of type S need it.
template <class S> GK_INLINE vf gelu(vf x) {
    x = maximum(all(-FLT_MAX), x);
    vf a = minimum(all(FLT_MAX), absolute(x));
    __m512i index = _mm512_cvttps_epi32((__m512)minimum(a * (1 / gelu_step), all(31.0f)));
    vf t = fma((vf)_mm512_cvtepi32_ps(index), all(-gelu_step), a);
    vf h = of_table(gelu_table[3], index);
    h = fma(h, t, of_table(gelu_table[2], index));
    h = fma(h, t, of_table(gelu_table[1], index));
    h = fma(h, t, of_table(gelu_table[0], index));
    return fma(x, all(0.5f), h);
}
template <> GK_INLINE vf gelu<bf16>(vf x) {
    const vf a = (vf)_mm512_range_ps((__m512)x, _mm512_set1_ps(short_end), 10);  // the smaller magnitude
    const __m512i index = (__m512i)fma(a, all(1 / short_step), all(12582912.0f));  // in the lowest bits
    const vf c = fma(a, of_table(short_table[2], index), of_table(short_table[1], index));
    return fma(a, c, of_table(short_table[0], index) + maximum(all(0), x));
}
#else
void start_activations() {}

// The error function by Abramowitz and Stegun, 7.1.26: an error of 1.5e-7.
template <class S> GK_INLINE vf gelu(vf x) {
    x = maximum(all(-FLT_MAX), x);
    vf a = absolute(x) * 0.70710678f;
    vf t = reciprocal(1.0f + 0.3275911f * a);
    vf p = all(1.061405429f);
    p = fma(p, t, all(-1.453152027f));
    p = fma(p, t, all(1.421413741f));
    p = fma(p, t, all(-0.284496736f));
    p = fma(p, t, all(0.254829592f));
    return 0.5f * x + 0.5f * absolute(x) * (1.0f - p * t * exponential(-a * a));
}
#endif

GK_INLINE vf sigmoid(vf x) { return reciprocal(1.0f + exponential(-x)); }
// Below -88 the sigmoid stays what it is there, so that the products by it are bounded there as well.
GK_INLINE vf silu(vf x) { return maximum(all(-88), x) * sigmoid(x); }
GK_INLINE vf tanh(vf x) { return 2.0f * sigmoid(2.0f * x) - 1.0f; }
GK_INLINE vf gelu_tanh(vf x) { return maximum(all(-88), x) * sigmoid(x * (1.5957691216f + 0.0713548162f * x * x)); }
GK_INLINE vf relu(vf x) { return maximum(all(0), x); }

}  // namespace
