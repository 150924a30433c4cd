// Scores that saturate at a cap.
#pragma once
#include "fragment.cuh"
#include "params.cuh"
#include "ptx/arithmetic.cuh"

// cap * tanh(score * softmax_scale / cap) to a few ulps, where cap is large. Small arguments by a polynomial in u = x^2:
// tanh(x) = x + x u Q(u), a fit on [0, 1] that is off by less than 2^-26; the exponential would cancel.
__device__ __forceinline__ float capped_exactly(const DecodeParams& p, float score) {
    const float y = score * p.cap_scale, x = y * 0x1p-64f * p.cap_inverse, u = x * x;
    float q = -0.000358451827f;
    q = fmaf(q, u, 0.00230136397f);
    q = fmaf(q, u, -0.00794610567f);
    q = fmaf(q, u, 0.0214866567f);
    q = fmaf(q, u, -0.0538798012f);
    q = fmaf(q, u, 0.133323446f);
    q = fmaf(q, u, -0.333332956f);
    const float e = exp2_approx(x * 2.8853900817779268f);
    const float large = p.score_cap * fmaf(-2.0f, reciprocal_approx(e + 1.0f), 1.0f);
    return fabsf(x) <= 1.0f ? fmaf(y * u, q, y) : large;
}

// cap * tanh(x) = cap - 2 cap / (e^2x + 1): tanh.approx is too coarse for the LSE. That is off by cap * 2^-22; caps for which
// it matters are rare and take the long way.
template <int kFirst, int kSecond>
__device__ __forceinline__ void cap_scores(const DecodeParams& p, float (&s)[kFirst][kSecond][4]) {
    if (p.cap_exactly) {
        for_each<kFirst, kSecond, 4>([&](int t, int n, int i) { s[t][n][i] = capped_exactly(p, s[t][n][i]); });
    } else {
        for_each<kFirst, kSecond, 4>([&](int t, int n, int i) {
            const float e = exp2_approx(s[t][n][i] * p.tanh_scale);
            s[t][n][i] = p.score_cap - 2.0f * p.score_cap * reciprocal_approx(e + 1.0f);
        });
    }
}
