// Keys and values of one head of a sequence, brought into the order in which products read weights: see product.h.
// A key is a column of the product with the queries. A value is a row of the product with the probabilities.
#pragma once

#include <type_traits>
#include <utility>

#include "product.h"

namespace {

// Queries, keys, values and probabilities are multiplied as bf16 where states are, and the level has such products.
template <class S> using Factor = std::conditional_t<std::is_same_v<S, bf16> && HAS_BF16, bf16, float>;
template <class T> constexpr int64_t GROUP = 4 / sizeof(T);  // entries of four bytes

// States of one head of consecutive tokens, the first ones of which may lie elsewhere. The head begins at `entry` of a token.
template <class S> struct Tokens {
    const S *own, *shared;
    int64_t own_stride, shared_stride, shared_count, count, entry;
    bool has(int64_t i) const { return i < count; }
    const S* operator[](int64_t i) const {
        return i < shared_count ? shared + i * shared_stride + entry : own + (i - shared_count) * own_stride + entry;
    }
};

// Four bytes for each lane, from entry i of a row of n: one float32 or two bf16. What is behind the row's end is zero.
template <class T, class S> inline vi words_at(const S* row, int64_t i, int64_t n) {
    constexpr int64_t ALL = W * GROUP<T>;
    if constexpr (std::is_same_v<T, float>) {
        return i < n ? bits<vi>(load_at(row, i, n)) : vi{};
    } else {
        vi x = {};
        if (n - i >= ALL) memcpy(&x, row + i, sizeof x);
        else if (n - i == ALL / 2) memcpy(&x, row + i, sizeof x / 2);
        else if (i < n) memcpy(&x, row + i, (n - i) * sizeof(S));
        return x;
    }
}

// Exchanges the lanes that have bit B of row a with those that lack it of row b.
template <int B, int... L> inline void exchange(vi& a, vi& b, std::integer_sequence<int, L...>) {
    const vi x = __builtin_shufflevector(a, b, ((L & B) ? W + (L ^ B) : L)...);
    b = __builtin_shufflevector(a, b, ((L & B) ? W + L : (L ^ B))...);
    a = x;
}
template <int B> inline void exchange_rows(vi* x) {
    for (int r = 0; r < W; r++)
        if (!(r & B)) exchange<B>(x[r], x[r | B], std::make_integer_sequence<int, W>());
}
// Turns W rows into columns.
inline void transpose(vi* x) {
    exchange_rows<1>(x);
    exchange_rows<2>(x);
    if constexpr (W > 4) exchange_rows<4>(x);
    if constexpr (W > 8) exchange_rows<8>(x);
}

// Packs the keys from `begin` to `end`, which are multiples of 16, with zeros where there is no key. A row has `size` entries, and
// `inner` when it is padded.
template <class T, class Keys>
void pack_keys(const Keys& keys, int64_t begin, int64_t end, int64_t size, int64_t inner, char* to) {
    const int64_t groups = inner / GROUP<T>;
    for (int64_t key = begin; key < end; key += 16, to += groups * 64)
        for (int64_t lane = 0; lane < 16; lane += W)
            for (int64_t group = 0; group < groups; group += W) {
                vi x[W];
                for (int64_t r = 0; r < W; r++) {
                    const int64_t at = key + lane + r;
                    x[r] = keys.has(at) ? words_at<T>(keys[at], group * GROUP<T>, size) : vi{};
                }
                transpose(x);
                for (int64_t r = 0; r < W; r++) memcpy(to + (group + r) * 64 + lane * 4, &x[r], sizeof(vi));
            }
}

#if defined(__AVX512BW__)
// As pack_values does, where all values are finite: returns false if one is not.
inline bool pack_pairs(const Tokens<bf16>& values, int64_t begin, int64_t end, int64_t size, int64_t columns, int64_t block, char* to) {
    const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4,
                                           35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16)), magnitude = _mm512_set1_epi16(0x7fff);
    __m512i most = _mm512_setzero_si512();
    auto entries = [&](int64_t at, int64_t i) GK_ALWAYS {
        if (at >= values.count || i >= size) return _mm512_setzero_si512();
        return _mm512_maskz_loadu_epi16(size - i < 32 ? (1u << (size - i)) - 1 : ~0u, values[at] + i);
    };
    for (int64_t at = begin; at < end; at += 2, to += 64)
        for (int64_t i = 0; i < columns; i += 32) {
            const __m512i a = entries(at, i), b = entries(at + 1, i);
            most = _mm512_max_epu16(most, _mm512_max_epu16(_mm512_and_si512(magnitude, a), _mm512_and_si512(magnitude, b)));
            _mm512_store_si512(to + i / 16 * block, _mm512_permutex2var_epi16(a, first, b));
            _mm512_store_si512(to + (i / 16 + 1) * block, _mm512_permutex2var_epi16(a, second, b));
        }
    return !_mm512_cmpge_epu16_mask(most, _mm512_set1_epi16(0x7f80));
}
#endif

// Packs the values from `begin` to `end`, which are multiples of 32, with zeros behind the last value. A row has `size` entries,
// and `columns` when it is padded. `block` is the bytes from one block of 16 entries to the next. An entry that is not finite
// becomes zero, because its product with the probability of a hidden key, which is zero, would be NaN. Returns whether there is none.
template <class T, class S>
bool pack_values(const Tokens<S>& values, int64_t begin, int64_t end, int64_t size, int64_t columns, int64_t block, char* to) {
#if defined(__AVX512BW__)
    if constexpr (std::is_same_v<T, bf16> && std::is_same_v<S, bf16>)
        if (pack_pairs(values, begin, end, size, columns, block, to)) return true;
#endif
    vi finite = ~vi{};
    auto entries = [&](int64_t at, int64_t i) {
        if (at >= values.count || i >= size) return vf{};
        const vf x = load_at(values[at], i, size);
        finite &= is_finite(x);
        return where(is_finite(x), x, vf{});
    };
    for (int64_t at = begin; at < end; at += GROUP<T>, to += 64)
        for (int64_t i = 0; i < columns; i += W) {
            vf x = entries(at, i);
            if constexpr (std::is_same_v<T, bf16>)
                x = bits<vf>((bits<vu>(x) >> 16) | (bits<vu>(entries(at + 1, i)) & 0xffff0000u));
            store((float*)(to + i / 16 * block + i % 16 * 4), x);
        }
    return !top(~finite & 1);
}

}  // namespace
