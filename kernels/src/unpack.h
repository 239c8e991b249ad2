// Brings panels of 32 columns of a weight of 8 or 4 bits into the order that products of states read, see product.h.
//
// Weights of 8 bits have the order of int8. In a grouped weight, 32 inner entries of a column share a scale, and a minimum if it
// has minima: an entry stands for scale * q + minimum. A group of 8 bits is 8 lines of 64 bytes, each of four inner entries of
// 16 columns. A group of 4 bits is 4 lines: the low halves of the bytes of line i are what line i of 8 bits would be, and
// the high halves what line i + 4 would be. Their q is in 0 ... 15, and without minima an entry stands for scale * (q - 8). Scales of
// a byte have a factor for each column, and come with zeros in sixteenths: an entry stands for factor * scale * (q - zero / 16).
#pragma once

#include "kernels.h"
#include "product.h"
#include "vector.h"

namespace {

constexpr int64_t SHARING = 32;  // inner entries that share a scale
constexpr int64_t SOON = 8192;   // bytes that are on their way from memory, also while what was unpacked before is multiplied

// Entries of 4 bits, which are the lowest ones of the words.
GK_INLINE vf halves(vu words) {
#if defined(__AVX512F__)
    const __m512 each = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return (vf)_mm512_permutexvar_ps((__m512i)words, each);  // looks at no other bits
#else
    return __builtin_convertvector(vi(words & 15), vf);
#endif
}

// Writes four inner entries of W columns, the i-th of which is found(i), as the product of T reads them.
template <class T, class Found> GK_INLINE void write(Found found, vf scale, vf minimum, char* to) {
    vf entry[4];
    for (int i = 0; i < 4; i++) entry[i] = fma(found(i), scale, minimum);
    for (int i = 0; i < 4 && sizeof(T) == 4; i++) store((float*)(to + 64 * i), entry[i]);
    for (int i = 0; i < 2 && sizeof(T) == 2; i++) {
        const vi pair = paired(entry[2 * i], entry[2 * i + 1]);
        memcpy(to + 64 * i, &pair, sizeof pair);
    }
}

// Unpacks groups of a block of 16 columns.
template <int FORMAT, class T> void unpack_block(const gk_weight& weight, int64_t block, int64_t begin, int64_t end, char* to) {
    constexpr bool HALVES = FORMAT == GK_Q4 || FORMAT == GK_Q4Z;
    constexpr int64_t LINES = HALVES ? 4 : 8, LINE = 4 * 16 * sizeof(T);  // LINE: what becomes of a line
    const int64_t groups = up(weight.inner, 64) / SHARING;
    const char* from = (const char*)weight.packed + (block * groups + begin) * LINES * 64;
    for (int64_t g = begin; g < end; g++, from += LINES * 64, to += 8 * LINE)
        for (int64_t c = 0; c < 16; c += W) {
            vf scale, minimum = vf{};
            if (FORMAT == GK_INT8) scale = load((const float*)weight.scale + block * 16 + c);
            else if (FORMAT == GK_Q4Z) {
                const uint8_t* share = (const uint8_t*)weight.scale + (block * groups + g) * 32 + c;
                __builtin_prefetch(share + SOON / 8);
                scale = load(share) * load(weight.factor + block * 16 + c);
                minimum = scale * load(share + 16) * (-1.0f / 16);
            } else {
                const int64_t at = (block * groups + g) * 16 + c;
                __builtin_prefetch((const uint16_t*)weight.scale + at + SOON / 16);
                scale = load_half((const uint16_t*)weight.scale + at);
                if (weight.minimum) minimum = load_half((const uint16_t*)weight.minimum + at);
                else if (FORMAT == GK_Q4) minimum = -8.0f * scale;
            }
            for (int64_t i = 0; i < LINES; i++) {
                if (!c) __builtin_prefetch(from + i * 64 + SOON);
                const vi words = load((const int32_t*)(from + i * 64 + c * 4));
                if (HALVES) {
                    write<T>([&](int k) GK_ALWAYS { return halves(vu(words) >> (8 * k)); }, scale, minimum, to + i * LINE + c * 4);
                    write<T>([&](int k) GK_ALWAYS { return halves(vu(words) >> (8 * k + 4)); }, scale, minimum, to + (i + 4) * LINE + c * 4);
                } else {
                    auto byte = [&](int k) GK_ALWAYS { return __builtin_convertvector((words << (24 - 8 * k)) >> 24, vf); };
                    write<T>(byte, scale, minimum, to + i * LINE + c * 4);
                }
            }
        }
}

template <class T> inline auto unpacking(int32_t format) {
    switch (format) {
        case GK_Q4Z: return unpack_block<GK_Q4Z, T>;
        case GK_Q4: return unpack_block<GK_Q4, T>;
        case GK_Q8: return unpack_block<GK_Q8, T>;
        default: return unpack_block<GK_INT8, T>;
    }
}
// Unpacks groups of a panel for products of this dtype. The second block begins `size` bytes behind the first.
inline void unpack_panel(const gk_weight& weight, int32_t dtype, int64_t panel, int64_t begin, int64_t end, char* to, int64_t size) {
    const auto run = dtype == GK_BF16 ? unpacking<bf16>(weight.format) : unpacking<float>(weight.format);
    run(weight, 2 * panel, begin, end, to);
    run(weight, 2 * panel + 1, begin, end, to + size);
}

}  // namespace
