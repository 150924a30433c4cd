// Accesses to memory as all instructions make them: addresses, checks, counts.
#pragma once

#include "machine.hpp"

enum Access : u32 { READ = 0, WRITE = 1, ATOMIC = 2 };

struct SharedAt {  // where the addresses of a warp's access to shared memory lie
    Block *block[32];
    u32 off[32];
    bool own;
};

inline void addresses(Warp &w, u16 slot, u8 width, s64 offset, u32 m, u64 *out) {
    if (slot == NONE) {
        for (u32 l = 0; l < 32; l++) out[l] = u64(offset);
    } else if (width == 8) {
        const u64 *r = w.reg<u64>(slot);
        LANES(m, out[l] = r[l] + u64(offset))
    } else {
        const u32 *r = w.reg<u32>(slot);
        LANES(m, out[l] = u32(r[l] + u32(offset)))
    }
}

void count_banks(Warp &w, u32 m, const u32 *off, u32 bytes);
void check_aligned(Warp &w, u32 m, const u64 *a, u32 bytes);
void global_access(Warp &w, u32 m, const u64 *a, const u8 *sizes, u32 bytes, Access kind, bool strong,
                   const Actor *actor = nullptr);
void shared_bounds(Warp &w, u32 m, const u64 *a, u32 bytes, SharedAt &s, bool write);
void check_read(Warp &w, u32 lane, Block &b, u32 off, u32 bytes);
void check_write(Warp &w, u32 lane, Block &b, u32 off, u32 bytes);
