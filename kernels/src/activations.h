// Activations of vectors.
#pragma once

#include <float.h>
#include <math.h>

#include "kernels.h"
#include "vector.h"

namespace {

// At plus and minus infinity every activation is its limit, but for an error below 1e-36.

// GELU(x) = x / 2 + h(|x|), where h(a) = a (Phi(a) - 1/2) for the normal distribution's Phi.
#if defined(__AVX512F__)
// h is a cubic polynomial in each of 32 intervals, with an error of 1e-6; from 4.96 on h(a) = a / 2.
constexpr float gelu_step = 0.16f;
alignas(64) float gelu_table[4][32];

void start_activations() {
    const double step = gelu_step, pi = 3.14159265358979;
    auto h = [](double a) { return 0.5 * a * erf(a / sqrt(2.0)); };
    for (int i = 0; i < 31; i++) {
        // Through the four Chebyshev points of the interval, by Newton's divided differences.
        double t[4], d[4];
        for (int k = 0; k < 4; k++) {
            t[k] = step / 2 * (1 - cos(pi * (2 * k + 1) / 8));
            d[k] = h(i * step + t[k]);
        }
        for (int order = 1; order < 4; order++)
            for (int k = 3; k >= order; k--) d[k] = (d[k] - d[k - 1]) / (t[k] - t[k - order]);
        double c[4] = {d[3], 0, 0, 0};
        for (int k = 2; k >= 0; k--) {  // c = c * (t - t[k]) + d[k]
            for (int power = 3; power > 0; power--) c[power] = c[power - 1] - t[k] * c[power];
            c[0] = d[k] - t[k] * c[0];
        }
        for (int power = 0; power < 4; power++) gelu_table[power][i] = float(c[power]);
    }
    gelu_table[0][31] = float(31 * step / 2);
    gelu_table[1][31] = 0.5f;
    gelu_table[2][31] = gelu_table[3][31] = 0;
}

inline vf of_table(const float* table, __m512i index) {
    return (vf)_mm512_permutex2var_ps(_mm512_load_ps(table), index, _mm512_load_ps(table + 16));
}

inline vf gelu(vf x) {
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
#else
void start_activations() {}

// The error function by Abramowitz and Stegun, 7.1.26: an error of 1.5e-7.
inline vf gelu(vf x) {
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

inline vf sigmoid(vf x) { return reciprocal(1.0f + exponential(-x)); }
// Below -88 the sigmoid stays what it is there, so that the products by it are bounded there as well.
inline vf silu(vf x) { return maximum(all(-88), x) * sigmoid(x); }
inline vf tanh(vf x) { return 2.0f * sigmoid(2.0f * x) - 1.0f; }
inline vf gelu_tanh(vf x) { return maximum(all(-88), x) * sigmoid(x * (1.5957691216f + 0.0713548162f * x * x)); }
inline vf relu(vf x) { return maximum(all(0), x); }

}  // namespace
