// Happens-before: what each thread knows of the others, and who touched which bytes.
//
// A warp counts its synchronisations (Warp::epoch); every access is stamped with that count. A thread knows the
// accesses of thread t whose stamp is less than its entry for t. Barriers make their threads know all that any of them
// knows; a release leaves the knowledge of a thread at an address, an acquire takes it from there. Two accesses to the
// same byte race if neither thread knows of the other's, one of them writes and one is not atomic.
#pragma once

#include "runtime.hpp"

struct Block;
struct Launch;

// A reference to a Knowledge, counted.
class Known {
public:
    Known() = default;
    Known(const Known &o);
    Known(Known &&o) noexcept : p(o.p) { o.p = nullptr; }
    Known &operator=(Known o) noexcept {
        std::swap(p, o.p);
        return *this;
    }
    ~Known();
    Knowledge *operator->() const { return p; }
    Knowledge &operator*() const { return *p; }
    explicit operator bool() const { return p != nullptr; }
    bool operator==(const Known &o) const { return p == o.p; }
    bool operator!=(const Known &o) const { return p != o.p; }
    static Known make();

private:
    Knowledge *p = nullptr;
};

// What is known of the threads of other blocks, by block. Never changed once made.
using Foreign = std::shared_ptr<const std::unordered_map<u32, Known>>;

struct Knowledge {
    u32 references = 0;
    std::vector<u32> at;     // by thread: accesses with a lesser stamp are known
    std::vector<u32> least;  // by warp: the least of its threads' entries
    Foreign foreign;
};

enum AccessKind : u8 { A_WRITE = 1, A_STRONG = 2, A_FLIGHT = 4 };

struct Record {
    u32 epoch, lanes, pc, block, step;
    u16 bytes;  // of the line of 16
    u8 warp, kind;
};

struct Line {  // who touched 16 bytes
    static constexpr u32 INLINE = 2;
    u32 n = 0;
    u32 generation = 0;  // of the shadow; an older one means an empty line
    u32 writes = 0;      // records that are no reads
    u32 extra = 0;       // where the records beyond the inline ones are: one more than an index, 0 if nowhere
    Record r[INLINE];
};
static_assert(sizeof(Line) == 64, "a line of the cache");

struct Shadow {
    std::vector<Line> lines;
    std::vector<std::vector<Record>> extra;
    u32 generation = 0;
    void reset(size_t bytes);
};

inline Record &record_at(Shadow &s, Line &line, u32 k) {
    return k < Line::INLINE ? line.r[k] : s.extra[line.extra - 1][k - Line::INLINE];
}

// Knowledge that was left at an address by releases.
struct SyncVar {
    std::unordered_map<u32, Known> by_block;
    bool cta = false;  // scope of the release
};

// What a thread keeps between a fence and the relaxed accesses around it.
struct FenceState {
    Known released;  // knowledge at the last fence
    u32 released_epoch = 0;
    bool cta = false;
    std::shared_ptr<SyncVar> pending;  // read by relaxed accesses, not yet acquired
};

struct ProxyFence {  // a fence.proxy.async and what its lanes knew
    u32 lanes, epoch;
    Known known[32];
};

struct WarpClocks {
    Known known[32];
    FenceState fences[32];
    std::deque<ProxyFence> proxy_fences;
};

struct RaceState {  // of a launch
    bool shared = false, global = false;
    std::unordered_map<u64, std::unique_ptr<Shadow>> pages;
    u64 last_page = ~0ull;
    Shadow *last = nullptr;
    std::unordered_map<u64, SyncVar> variables;
    bool on() const { return shared || global; }
};

void races_start(Block &b);  // nobody knows anything
// Asynchronous copies act as threads of a warp of their own, whose number is one more than the block's last.
struct Actor {
    u32 warp, lanes, epoch;
};
void race_shared(Warp &w, u32 lane, Block &b, u32 off, u32 bytes, u8 kind, const Actor *actor = nullptr);
void race_global(Warp &w, u32 lane, u64 address, u32 bytes, u8 kind, const Actor *actor = nullptr);
Actor new_actor(Block &b);
void land(SyncVar &v, Block &b, const Actor &a);  // whoever learns from v knows what the copy did
void learn_actor(Warp &w, u32 lane, Block &b, const Actor &a);
void race_landed(Warp &w, u32 lane, Block &b, u32 off, u32 bytes);  // a copy in flight has been waited for
void sync_warp(Warp &w, u32 mask);
void proxy_fence(Warp &w, u32 mask);
using Fenced = std::vector<u32>;  // by thread: writes with a lesser stamp are fenced
Fenced fenced_writes(Warp &w);    // for all lanes of the warp
void check_proxy(Warp &w, Block &b, u32 off, const Fenced &fenced);  // 16 bytes that wgmma reads
struct Party {
    Warp *warp;
    u32 mask;
    bool learns;  // bar.arrive only tells
    u32 epoch;    // when it arrived
};
Party party(Warp &w, u32 mask, bool learns);
Known sum_of(const std::vector<Party> &parties);
void sync_parties(const std::vector<Party> &parties);
void release_at(Warp &w, u32 lane, u64 key, bool cta);
void acquire_at(Warp &w, u32 lane, u64 key, bool cta);
void relaxed_write(Warp &w, u32 lane, u64 key, bool exchange);  // publishes what a fence before it released
void relaxed_read(Warp &w, u32 lane, u64 key);
void fence_lanes(Warp &w, u32 mask, bool cta);
// Tells what the thread knows to a place of its own, and the other way round: mbarriers.
void leave(SyncVar &v, u32 block, const Known &k);
void tell(Warp &w, u32 lane, SyncVar &v);
void tell_fenced(Warp &w, u32 lane, SyncVar &v);  // what it knew at its last fence
void learn(Warp &w, u32 mask, const SyncVar &v);
