// Blocks, launches, and the way in which a handler reports a finding.
#pragma once

#include <chrono>

#include "runtime.hpp"
#include "numbers.hpp"
#include "races.hpp"

struct Cluster;

struct Barrier {
    u32 arrived = 0, expected = 0, pc = 0;
    u32 all = 1, any = 0, count = 0;  // of the predicates of bar.red
    std::vector<Party> parties;
};

struct Mbarrier {
    u32 expected = 0;
    s64 pending = 0, transactions = 0;
    u64 phase = 0;
    SyncVar arriving, arrived;  // knowledge of this phase's and of the last phase's arrivals
};

// A bulk copy, an asynchronous store or an arrival that waits for copies; it happens at the latest when somebody waits
// for it.
struct Pending {
    enum What : u8 { TO_SHARED, LINE_TO_SHARED, TO_GLOBAL, ARRIVE, VALUE } what;
    Warp *warp;
    u32 lane, pc, bytes;
    u32 have;  // bytes of a line that come from memory, those behind them are zeros
    u32 group;  // of bulk copies to global memory; of ARRIVE, the number of the last copy that it waits for
    u64 source;
    Block *block, *source_block;  // of the destination and of the source in shared memory
    u64 destination;
    Block *barrier_block;
    u32 barrier;
    Actor actor;
    bool done;
    u8 value[16];
};

struct IssuedProduct {  // or another instruction of wgmma, by the first warp of a warpgroup that came to it
    u32 pc, warp;
    u64 a, b;
    bool add;
};

struct WarpGroup {
    std::vector<IssuedProduct> issued;
    std::vector<Actor> actors;  // by group of products
};

struct Block {
    Launch *launch = nullptr;
    Cluster *cluster = nullptr;
    u32 id[3] = {0, 0, 0}, linear = 0, rank = 0;
    u32 threads = 0, live = 0;
    u8 *shared = nullptr;  // followed by nothing: bounds are checked against shared_size
    std::vector<u8> shared_memory;
    std::vector<u8> initialised;  // per byte
    std::vector<u8> in_flight;    // copies on their way, per byte
    std::vector<Warp> warps;
    std::vector<u8> local_memory;
    std::vector<u8> register_file;
    Barrier barriers[16];
    Shadow shadow;
    u32 actors = 0;                               // asynchronous copies so far
    std::unordered_map<u32, Mbarrier> mbarriers;  // by offset in shared memory
    std::vector<WarpGroup> warpgroups;            // empty until one is used
    bool done = false;
};

struct Cluster {
    std::vector<std::unique_ptr<Block>> blocks;
    u32 arrived = 0;
    u64 generation = 0;
    std::vector<Party> parties;
    SyncVar fenced;  // what relaxed arrivals of this generation had fenced before
    SyncVar sync;    // of the last generation
    std::vector<Pending> pending;
    bool done = false;
    u32 slices = 0;
};

// What Python hands over; launch.py writes down the same layout.
struct LaunchArgs {
    const Ins *code;
    u64 instructions;
    u32 grid[3], block[3], cluster[3];
    u32 system_shared, static_shared, dynamic_shared, local_size, slots;
    const u64 *constants;  // triples: slot, bytes of a lane, value
    u64 constant_count;
    const u8 *params;
    u64 params_size;
    const Region *regions;
    u64 region_count;
    RegionCount *region_counts;
    PcCount *pc_counts;
    u32 checks, random, jitter, cp_async;  // cp_async: 0 late, 1 early, 2 random
    u64 seed;
    f64 time_limit;
    Finding *finding;
    char *output;  // of printf
    u64 output_size, output_used;
    const u32 *tables;  // branch targets of brx.idx
    u32 window, multiprocessors;
    u32 registers;  // of a thread as launched; 0: not known
    u32 waits;      // whether it has a griddepcontrol.wait
    // PyEval_SaveThread, PyEval_RestoreThread and PyErr_CheckSignals of the Python that called
    void *(*release)();
    void (*acquire)(void *);
    int (*signals)();
};

struct Launch {
    LaunchArgs *args = nullptr;
    const Ins *code = nullptr;
    u32 grid[3], block[3], cluster[3];
    u32 warps = 0, threads = 0, cluster_size = 1;
    u32 system_shared = 0, dynamic_shared = 0, shared_size = 0;  // addresses from system_shared to shared_size are valid
    u32 checks = 0, jitter = 0, cp_async = 0, multiprocessors = 132;
    bool random = false;
    Random rng;
    PcCount *pc_counts = nullptr;
    RegionCount *region_counts = nullptr;
    const Region *regions = nullptr;
    u32 region_count = 0;
    std::vector<u32> hints;  // region that an instruction met last
    std::vector<Ins> loaded;
    u64 steps = 0;  // instructions executed, the clock of the machine
    RaceState races;
    u64 changes = 0;  // events that another thread may be waiting for
    u64 look_at = 0;  // the step at which the engine looks at the clock again
    std::chrono::steady_clock::time_point deadline, signals_at;

    u64 clock() const { return steps * 4; }
    bool check(u32 which) const { return checks & which; }
};

// Ends the launch with a finding about one lane of the warp's current instruction.
[[noreturn]] void report(Warp &w, u32 kind, u32 lane, u64 address, const char *format, ...)
    __attribute__((format(printf, 5, 6)));
Finding &finding_at(Warp &w, u32 kind, u32 lane, u64 address);

// Moves results by up to `ulps` units in the last place, at random.
inline void jitter(Warp &w, u32 *d, u32 m, u32 ulps) {
    for (u32 t = m; t; t &= t - 1) {
        u32 l = first(t);
        u32 v = d[l] & 0x7fffffff;
        if (v > 0x00800000 + ulps && v < 0x7f800000 - ulps) d[l] += w.launch->rng.below(2 * ulps + 1) - ulps;
    }
}

void wait_copies(Warp &w, u32 mask, u32 pending_allowed);
void land_copies(Warp &w, u32 lane, u32 number);  // all copies of the lane up to this one
void check_exit(Warp &w, u32 mask);
void check_block_exit(Block &b);
void check_products_exit(Warp &w);
void check_warpgroups_exit(Block &b);
bool advance_pending(Cluster &c);  // lets one asynchronous operation happen; for a machine that would stand still
