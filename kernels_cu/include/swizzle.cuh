// Rows of a tile in shared memory without bank conflicts.
#pragma once

// Where 16-byte chunk `chunk` of row `row` lies in a tile of rows of kRowBytes: rows are exclusive-or'ed over the banks
// so that eight rows of one chunk (an ldmatrix) and one row's chunks (a copy) both meet every bank once.
template <int kRowBytes>
struct Swizzle {
    static_assert(kRowBytes % 64 == 0, "rows are whole half-lines of 64 bytes");
    // Rows of whole 128-byte lines permute 8 chunks; rows of an odd number of half-lines start on alternating halves
    // already and permute 4.
    static constexpr int kPeriod = kRowBytes % 128 == 0 ? 8 : 4;

    static __device__ __forceinline__ int mask(int row) { return kPeriod == 8 ? row & 7 : (row >> 1) & 3; }
    static __device__ __forceinline__ int offset(int row, int chunk) {
        return row * kRowBytes + ((chunk ^ mask(row)) << 4);
    }
};
