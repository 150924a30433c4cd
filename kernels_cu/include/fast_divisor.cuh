// Division by a number that the host knows.
#pragma once

// number / divisor without a division, for 0 <= number < 2^31; kernels/fields.py finds magic and shift (Granlund and Montgomery,
// "Division by invariant integers using multiplication", theorem 4.2).
struct FastDivisor {
    unsigned int magic;  // ceil(2^(31 + shift) / divisor)
    int shift;           // ceil(log2(divisor))

    __device__ __forceinline__ unsigned int divide(unsigned int number) const {
        return __umulhi(number << 1, magic) >> shift;
    }
};
