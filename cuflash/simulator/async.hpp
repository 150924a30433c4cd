// What instructions have in common whose bytes arrive later, and count themselves at an mbarrier.
#pragma once
#include "machine.hpp"

struct Place {  // in shared memory
    Block *block;
    u32 off;
};
// Where an address of shared memory, generic or not, lies; all of so many bytes.
Place shared_place(Warp &w, u32 lane, u64 address, u32 bytes, bool write);
// The address that a lane's operand says.
u64 operand_address(Warp &w, u16 slot, u8 width, s64 offset, u32 lane);
// An operation will write here: nobody else may touch it until it has been waited for.
void write_later(Warp &w, u32 lane, const Place &to, u32 bytes, const Actor &actor);
// Starts an operation of the warp's current instruction. It happens now or later.
void start(Warp &w, Pending &&p);
