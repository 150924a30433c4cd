// The machine that executes decoded PTX: types shared by the engine, the memory and the arithmetic.
//
// A warp executes in lock step: a register is an array of 32 lanes, an instruction is one call of a handler with the
// mask of the lanes that execute it, and lanes that diverge are groups with a program counter of their own. Predicates
// are bit masks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using f32 = float;
using f64 = double;

constexpr u32 FULL = ~0u;
constexpr u16 NONE = 0xffff;
constexpr int UNIT = 64;  // registers are placed at multiples of this many bytes of the warp's register file

struct Warp;
struct Ins;
using Handler = void (*)(Warp &, const Ins &, u32 mask);

// What the engine does with an instruction; everything but SIMPLE touches the control flow.
enum Control : u8 {
    SIMPLE,
    LABEL,
    BRANCH,
    EXIT,
    MEET,
    MEET_ALL,
    BARRIER,
    BRANCH_TABLE,
    YIELDING,
    CLUSTER_BARRIER,
    CALL,
    RETURN
};

enum Flags : u32 {
    FTZ = 1,
    SAT = 2,
    RZ = 4,
    RM = 8,
    RP = 16,
    RELU = 32,
    NAN_WINS = 64,
    APPROX = 128,
    STRONG = 256,  // volatile, relaxed or stronger: no data race with other strong accesses
    ACQUIRE = 512,
    RELEASE = 1024,
    CTA_SCOPE = 2048,
    SIGNED = 4096,
    WIDE_REG = 8192,  // the register has 64 bits although the access has fewer
    NOT_C = 16384,
    HAS_COUNT = 32768,
    WAITS = 65536,
    CLUSTER_SPACE = 131072,
    ALIGNED = 262144,
    BULK_READ = 524288,
};

struct Ins {
    union {
        u64 op;      // as it comes: index of the handler
        Handler fn;  // once loaded
    };
    s64 imm;     // address offset or constant
    u16 o[16];   // operands: register slots in units of UNIT bytes
    u32 target;  // of a branch
    u16 guard;   // predicate slot, or NONE
    u8 guard_not;
    u8 ctl;
    u8 a, b, c, d;  // parameters of the handler
    u32 flags;
};
static_assert(sizeof(Ins) == 64, "the layout is written down in program.py, too");

enum Space : u8 { GENERIC, GLOBAL, SHARED, LOCAL, PARAM, CONST };

// Generic addresses of memory that is not host memory. Host addresses have less than 48 bits.
constexpr u64 SHARED_BASE = 0x0100'0000'0000'0000, LOCAL_BASE = 0x0200'0000'0000'0000,
              PARAM_BASE = 0x0400'0000'0000'0000;
constexpr u64 SPACE_MASK = 0xff00'0000'0000'0000;
constexpr u32 RANK_SHIFT = 24;  // shared::cluster address = (rank + 1) << 24 | offset; 0 << 24 is the block's own

enum Kind : u32 {
    K_BOUNDS_GLOBAL = 1,
    K_BOUNDS_SHARED,
    K_BOUNDS_LOCAL,
    K_MISALIGNED,
    K_UNINITIALISED,
    K_IN_FLIGHT,
    K_NEVER_WAITED,
    K_RACE_SHARED,
    K_RACE_GLOBAL,
    K_DIVERGENT_BARRIER,
    K_DIVERGENT_WARP,
    K_DEADLOCK,
    K_TIME_LIMIT,
    K_ASSERT,
    K_READONLY,
    K_MBARRIER,
    K_TRAP,
    K_INTERNAL,
    K_CALL_DEPTH,
    K_WARPGROUP,
    K_PROXY,
    K_REGISTERS,
    K_EARLY,
};

enum Check : u32 {
    C_BOUNDS = 1,
    C_ALIGN = 2,
    C_INIT = 4,
    C_FLIGHT = 8,
    C_WAITED = 16,
    C_RACE_SHARED = 32,
    C_RACE_GLOBAL = 64,
    C_BARRIERS = 128,
    C_COUNT = 256,
    C_TURN = 512,
};

struct Finding {
    u32 kind, pc, block, thread;
    u64 address;
    u32 size, other_pc, other_block, other_thread;
    u32 write, other_write;
    u32 has_other;
    u32 pad;
    char text[512];
};

struct Stop {};       // thrown by the first finding
struct Interrupt {};  // thrown when a signal's handler raised an exception in Python

struct Region {
    u64 lo, hi;
    u64 origin;  // where the array's allocation starts: sectors are counted as if that were aligned, which it is on a
                 // GPU
    u32 id;
    u32 readonly;
};

struct RegionCount {
    u64 read_bytes, read_sectors, read_ideal, write_bytes, write_sectors, write_ideal;
};

struct PcCount {
    u64 executed;  // by warps
    u64 lanes;
    u64 shared_ideal, shared_real;  // wavefronts
    u64 sectors, sectors_ideal, bytes;
};

struct Random {
    u64 s = 1;
    u32 operator()() {
        s ^= s << 13;
        s ^= s >> 7;
        s ^= s << 17;
        return u32((s * 0x2545F4914F6CDD1Dull) >> 32);
    }
    u32 below(u32 n) { return u32((u64((*this)()) * n) >> 32); }
};

struct Block;
struct Launch;

enum State : u8 { READY, WAIT_MEET, WAIT_BARRIER, WAIT_CLUSTER };

struct Group {
    u32 mask, pc;
    u8 state;
    std::vector<u32> stack;  // return addresses
};

struct CopyOp {  // one cp.async of a warp
    u32 mask, group, pc;
    u32 number;  // of the warp's copies, in the order of the program
    u8 bytes;
    u8 early;
    u8 n[32];
    u64 src[32];
    u32 dst[32];
};

struct WarpProduct {  // a warp's share of a wgmma.mma_async that has not been waited for
    const Ins *ins;
    u32 pc, group;
    u64 a, b;  // descriptors
    bool add, done;
};

struct Products {  // of a warp
    std::deque<WarpProduct> queue;
    u32 issued = 0, committed = 0, waited = 0;  // products, groups, groups
    bool fenced = false;
    u32 registers = 0, registers_pc = 0;  // what setmaxnreg asked for last
};

struct Knowledge;
struct WarpClocks;

struct Warp {
    u8 *regs = nullptr;
    u8 *local = nullptr;
    Block *block = nullptr;
    Launch *launch = nullptr;
    u32 index = 0;  // in its block
    u32 exists = 0, live = 0;
    u32 waited = 0;  // lanes that have executed griddepcontrol.wait
    u32 pc = 0;  // of the instruction being executed, for reports
    bool yield = false;
    bool progressed = false;
    std::vector<Group> groups;
    std::deque<CopyOp> copies;
    u32 copies_started = 0;
    u32 committed[32];
    u64 cluster_phase[32];  // generation of the cluster barrier at which a lane arrived
    u32 epoch = 1;          // counts the synchronisations of the warp's lanes
    u32 bulk_committed[32];
    std::unique_ptr<WarpClocks> clocks;  // for race detection
    Products products;
    Warp();
    Warp(Warp &&) noexcept;
    ~Warp();

    template <class T>
    T *reg(u16 slot) {
        return reinterpret_cast<T *>(regs + size_t(slot) * UNIT);
    }
    u32 &pred(u16 slot) { return *reinterpret_cast<u32 *>(regs + size_t(slot) * UNIT); }
    u32 thread(u32 lane) const { return index * 32 + lane; }
};

inline u32 first(u32 mask) { return u32(__builtin_ctz(mask)); }

// Handlers register themselves by name; decode.py asks for the names.
struct Registered {
    Registered(const char *name, Handler fn);
};
#define OP_CAT2(a, b) a##b
#define OP_CAT(a, b) OP_CAT2(a, b)
#define OP(name, ...) static Registered OP_CAT(registered_, __COUNTER__)(name, __VA_ARGS__);

// Runs a body for each lane of the mask; the full warp in a form that the compiler turns into vector instructions.
#define LANES(mask, ...)                                                   \
    if ((mask) == FULL) {                                                  \
        _Pragma("GCC ivdep") for (u32 l = 0; l < 32; l++) { __VA_ARGS__; } \
    } else {                                                               \
        for (u32 rest_ = (mask); rest_; rest_ &= rest_ - 1) {              \
            u32 l = first(rest_);                                          \
            __VA_ARGS__;                                                   \
        }                                                                  \
    }
