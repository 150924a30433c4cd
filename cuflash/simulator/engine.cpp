// The scheduler: groups of lanes, meeting points, barriers, blocks.
#include <cstdarg>
#include <cstdio>
#include <map>

#include "machine.hpp"

// -- the table of handlers

namespace {
struct Entry {
    std::string name;
    Handler fn;
};
std::vector<Entry> &table() {
    static std::vector<Entry> entries;
    return entries;
}
}  // namespace

Registered::Registered(const char *name, Handler fn) { table().push_back({name, fn}); }

// -- findings

Finding &finding_at(Warp &w, u32 kind, u32 lane, u64 address) {
    Finding &f = *w.launch->args->finding;
    f.kind = kind;
    f.pc = w.pc;
    f.block = w.block ? w.block->linear : 0;
    f.thread = w.thread(lane);
    f.address = address;
    return f;
}

void report(Warp &w, u32 kind, u32 lane, u64 address, const char *format, ...) {
    Finding &f = finding_at(w, kind, lane, address);
    va_list args;
    va_start(args, format);
    vsnprintf(f.text, sizeof f.text, format, args);
    va_end(args);
    throw Stop();
}

namespace {

constexpr u64 SLICE = 20000;  // branches that a warp may execute before the next one has its turn
constexpr u64 LOOK = 1024;    // instructions between two looks at the clock
constexpr std::chrono::milliseconds SIGNALS(50);  // between two looks at signals

struct Engine {
    LaunchArgs &args;
    Launch L;
    std::vector<std::unique_ptr<Cluster>> pool;

    void *thread_state = nullptr;  // of Python, while the launch runs without its lock

    explicit Engine(LaunchArgs &a) : args(a) {}

    // -- groups of lanes

    void merge(Warp &w) {  // groups that stand at the same place are one group again
        auto &g = w.groups;
        for (size_t i = 0; i < g.size(); i++)
            for (size_t j = i + 1; j < g.size();) {
                bool joinable = (g[i].state == READY || g[i].state == WAIT_MEET) &&
                                (g[j].state == READY || g[j].state == WAIT_MEET);
                if (joinable && g[i].pc == g[j].pc && g[i].stack == g[j].stack) {
                    g[i].mask |= g[j].mask;
                    g[i].state = READY;
                    g.erase(g.begin() + long(j));
                } else {
                    j++;
                }
            }
    }

    int pick(Warp &w) {
        auto &g = w.groups;
        if (g.size() > 1) merge(w);
        int best = -1;
        u32 seen = 0;
        for (size_t i = 0; i < g.size(); i++) {
            if (g[i].state != READY) continue;
            if (L.random) {
                if (L.rng.below(++seen) == 0) best = int(i);
            } else if (best < 0 || g[i].pc < g[size_t(best)].pc) {
                best = int(i);
            }
        }
        return best;
    }

    // Splits lanes off the group; they continue at pc. May move the groups.
    void fork(Warp &w, size_t index, u32 mask, u32 pc) {
        Group other = w.groups[index];
        other.mask = mask;
        other.pc = pc;
        other.state = READY;
        w.groups[index].mask &= ~mask;
        w.groups.push_back(other);
    }

    void exit_lanes(Warp &w, size_t index, u32 mask) {
        check_exit(w, mask);
        if (w.live == mask) check_products_exit(w);
        w.live &= ~mask;
        w.block->live -= u32(__builtin_popcount(mask));
        w.groups[index].mask &= ~mask;
        if (!w.groups[index].mask) w.groups.erase(w.groups.begin() + long(index));
        L.changes++;
        for (Group &g : w.groups)
            if (g.state == WAIT_MEET) g.state = READY;  // who waited for these lanes looks again
        for (u32 k = 0; k < 16; k++)
            if (w.block->barriers[k].arrived) try_barrier(*w.block, k);
        if (w.block->live == 0) {
            check_block_exit(*w.block);
            check_warpgroups_exit(*w.block);
            w.block->done = true;
        }
        if (L.cluster_size > 1) try_cluster(*w.block->cluster);
    }

    // -- barriers of a block

    void try_barrier(Block &b, u32 id) {
        Barrier &bar = b.barriers[id];
        u32 expected = bar.expected;
        if (!expected) {
            expected = b.threads;
            if (b.live < b.threads && bar.arrived >= b.live) {
                if (L.check(C_BARRIERS)) {
                    for (Warp &w : b.warps)
                        for (Group &g : w.groups)
                            if (g.state == WAIT_BARRIER) {
                                w.pc = g.pc;
                                report(w, K_DIVERGENT_BARRIER, first(g.mask), 0,
                                       "%u of the block's %u threads have exited and never reach this barrier",
                                       b.threads - b.live, b.threads);
                            }
                }
                expected = b.live;
            }
        }
        if (bar.arrived < expected) return;
        for (Warp &w : b.warps)
            for (Group &g : w.groups)
                if (g.state == WAIT_BARRIER && barrier_id(w, g) == id) {
                    const Ins &i = L.code[g.pc];
                    if (i.a >= 2) {
                        if (i.a == 2) {
                            u32 *d = w.reg<u32>(i.o[2]);
                            LANES(g.mask, d[l] = bar.count)
                        } else {
                            u32 &p = w.pred(i.o[2]);
                            bool yes = i.a == 3 ? bar.all : bar.any;
                            p = (p & ~g.mask) | (yes ? g.mask : 0);
                        }
                    }
                    g.state = READY;
                    g.pc++;
                }
        if (!bar.parties.empty()) sync_parties(bar.parties);
        bar = Barrier();
        L.changes++;
    }

    u32 barrier_id(Warp &w, const Group &g) { return w.reg<u32>(L.code[g.pc].o[0])[first(g.mask)] & 15; }

    void arrive(Warp &w, size_t index, u32 m, const Ins &i) {
        Block &b = *w.block;
        Group &g = w.groups[index];
        u32 id = barrier_id(w, g);
        Barrier &bar = b.barriers[id];
        u32 expected = i.flags & HAS_COUNT ? w.reg<u32>(i.o[1])[first(m)] : 0;
        if (expected % 32)
            report(w, K_DIVERGENT_BARRIER, first(m), 0, "barrier %u is for %u threads, which are no whole warps", id,
                   expected);
        if (bar.arrived == 0) {
            bar.expected = expected;
            bar.pc = w.pc;
        } else if (L.check(C_BARRIERS) && bar.expected != expected) {
            report(w, K_DIVERGENT_BARRIER, first(m), 0,
                   "barrier %u is waited for with %u threads here and with %u elsewhere", id,
                   expected ? expected : b.threads, bar.expected ? bar.expected : b.threads);
        }
        if (L.races.on()) bar.parties.push_back(party(w, m, i.a != 1));
        bar.arrived += (i.flags & HAS_COUNT) && (i.flags & ALIGNED) ? 32 : u32(__builtin_popcount(m));
        if (i.a >= 2) {
            u32 p = w.pred(i.o[3]);
            if (i.flags & NOT_C) p = ~p;
            bar.count += u32(__builtin_popcount(p & m));
            bar.all &= (p & m) == m;
            bar.any |= (p & m) != 0;
        }
        if (i.a == 1) g.pc++;
        else g.state = WAIT_BARRIER;
        try_barrier(b, id);
    }

    // -- execution

    // May the lanes m of a group execute the warp operation now? `need` gets the lanes that have to be there.
    bool gathered(Warp &w, const Ins &i, u32 m, u32 &ready) {
        if (i.ctl == MEET_ALL) {
            if (w.live != FULL)
                report(w, K_DIVERGENT_WARP, first(m), 0, "a warp operation needs 32 live lanes; %d are alive",
                       __builtin_popcount(w.live));
            ready = m == FULL ? m : 0;
            return m == FULL;
        }
        const u32 *masks = w.reg<u32>(i.o[15]);
        u32 mm = masks[first(m)];
        bool same = true;
        for (u32 t = m; t; t &= t - 1) same &= masks[first(t)] == mm;
        if (same && mm == m) {
            ready = m;
            return true;
        }
        ready = 0;
        for (u32 rest = m; rest;) {  // lanes may name different partners
            u32 l = first(rest), want = masks[l], have = 0;
            for (u32 t = m; t; t &= t - 1) have |= u32(masks[first(t)] == want) << first(t);
            rest &= ~have;
            if (!((want >> l) & 1))
                report(w, K_DIVERGENT_WARP, l, 0, "lane %u executes a warp operation whose mask %08x does not name it",
                       l, want);
            if (want & ~w.live)
                report(w, K_DIVERGENT_WARP, l, 0,
                       "the mask %08x of a warp operation names lanes that have exited (%08x)", want, want & ~w.live);
            if (have == want) ready |= have;
        }
        return ready == m;
    }

    // Every loop comes by here. Python handles its signals, which a launch must not keep waiting.
    void look(Warp &w) {
        L.look_at = L.steps + LOOK;
        auto now = std::chrono::steady_clock::now();
        if (now > L.deadline) time_limit(w);
        if (now < L.signals_at) return;
        L.signals_at = now + SIGNALS;
        args.acquire(thread_state);
        int raised = args.signals();
        thread_state = args.release();
        if (raised) throw Interrupt();
    }

    // Runs a warp until it has to wait or its slice ends. Says whether it executed anything.
    bool run(Warp &w) {
        u64 budget = SLICE, start = L.steps;
        w.yield = false;
        while (!w.yield) {
            int index = pick(w);
            if (index < 0 || budget == 0) break;
            run_group(w, size_t(index), budget);
        }
        return L.steps != start;
    }

    void run_group(Warp &w, size_t index, u64 &budget) {
        const Ins *code = L.code;
        Group *g = &w.groups[index];
        bool alone = w.groups.size() == 1;
        u32 pc = g->pc;
        const u32 mask = g->mask;
        PcCount *counts = L.pc_counts;
        for (;;) {
            const Ins &i = code[pc];
            u32 m = mask;
            if (i.guard != NONE) {
                u32 p = w.pred(i.guard);
                m &= i.guard_not ? ~p : p;
            }
            w.pc = pc;
            if (i.ctl == SIMPLE) {
                counts[pc].executed++;
                L.steps++;
                if (m) i.fn(w, i, m);
                pc++;
                continue;
            }
            if (i.ctl == LABEL) {
                pc++;
                if (!alone) break;
                continue;
            }
            counts[pc].executed++;
            L.steps++;
            switch (i.ctl) {
                case BRANCH: {
                    if (L.steps >= L.look_at) look(w);
                    if (budget) budget--;
                    if (m == mask) {
                        pc = i.target;
                        if (alone && budget && !L.random) continue;
                    } else if (m == 0) {
                        pc++;
                        if (alone) continue;
                    } else {
                        g->pc = pc + 1;
                        fork(w, index, m, i.target);
                        return;
                    }
                    g->pc = pc;
                    return;
                }
                case BRANCH_TABLE: {
                    const u32 *which = w.reg<u32>(i.o[0]);
                    u32 rest = m;
                    g->pc = pc + 1;
                    while (rest) {
                        u32 l = first(rest), same = 0;
                        for (u32 t = rest; t; t &= t - 1) same |= u32(which[first(t)] == which[l]) << first(t);
                        if (which[l] >= u32(i.imm))
                            report(w, K_TRAP, l, 0, "brx.idx with index %u of %u", which[l], u32(i.imm));
                        rest &= ~same;
                        u32 target = args.tables[i.target + which[l]];
                        if (same == w.groups[index].mask) w.groups[index].pc = target;
                        else fork(w, index, same, target);
                    }
                    return;
                }
                case EXIT:
                    if (m == 0) {
                        pc++;
                        continue;
                    }
                    g->pc = pc + 1;
                    exit_lanes(w, index, m);
                    return;
                case MEET:
                case MEET_ALL: {
                    if (m == 0) {
                        pc++;
                        continue;
                    }
                    if (m != mask) {  // the others pass by
                        g->pc = pc;
                        fork(w, index, mask & ~m, pc + 1);
                        counts[pc].executed--;
                        return;
                    }
                    u32 ready = 0;
                    if (gathered(w, i, m, ready)) {
                        i.fn(w, i, m);
                        pc++;
                        if (w.yield || (L.random && L.rng.below(4) == 0)) {
                            g->pc = pc;
                            scatter(w, index);
                            w.yield = true;
                            return;
                        }
                        continue;
                    }
                    counts[pc].executed--;
                    L.steps--;
                    g->pc = pc;
                    if (ready) {
                        fork(w, index, mask & ~ready, pc);
                        w.groups.back().state = WAIT_MEET;
                        counts[pc].executed++;
                        L.steps++;
                        i.fn(w, i, ready);
                        w.groups[index].pc = pc + 1;
                    } else {
                        g->state = WAIT_MEET;
                    }
                    return;
                }
                case BARRIER: {
                    if (m == 0) {
                        pc++;
                        continue;
                    }
                    g->pc = pc;
                    if (m != mask) {
                        fork(w, index, mask & ~m, pc + 1);
                        return;
                    }
                    if ((i.flags & ALIGNED) && m != w.live &&
                        w.groups.size() > 1) {  // the warp's other lanes have to come, too
                        counts[pc].executed--;
                        L.steps--;
                        g->state = WAIT_MEET;
                        return;
                    }
                    arrive(w, index, m, i);
                    return;
                }
                case CLUSTER_BARRIER:
                    g->pc = pc;
                    cluster_barrier(w, index, m, mask, i);
                    return;
                case YIELDING:
                    if (m) i.fn(w, i, m);
                    pc++;
                    if (w.yield) {
                        g->pc = pc;
                        return;
                    }
                    continue;
                default: report(w, K_INTERNAL, 0, 0, "control %u", i.ctl);
            }
        }
        w.groups[index].pc = pc;
    }

    // In random order lanes part now and then, as independent thread scheduling allows.
    void scatter(Warp &w, size_t index) {
        Group &g = w.groups[index];
        u32 some = g.mask & L.rng();
        if (L.random && some && some != g.mask && L.rng.below(4) == 0) fork(w, index, some, g.pc);
    }

    void try_cluster(Cluster &c) {
        u32 live = 0;
        for (auto &b : c.blocks) live += b->live;
        if (!c.arrived || c.arrived < live) return;
        c.arrived = 0;
        c.generation++;
        L.changes++;
        if (L.races.on()) {
            c.sync = std::move(c.fenced);
            c.fenced = SyncVar();
            for (auto &b : c.blocks) {
                std::vector<Party> mine;
                for (const Party &p : c.parties)
                    if (p.warp->block == b.get()) mine.push_back(p);
                if (mine.empty()) continue;
                Known k = sum_of(mine);
                leave(c.sync, b->linear, k);
            }
            c.parties.clear();
        }
        for (auto &b : c.blocks)
            for (Warp &w : b->warps)
                for (Group &g : w.groups)
                    if (g.state == WAIT_CLUSTER) g.state = READY;  // they look again
    }

    void cluster_barrier(Warp &w, size_t index, u32 m, u32 mask, const Ins &i) {
        Group &g = w.groups[index];
        if (m == 0) {
            g.pc++;
            return;
        }
        if (m != mask) {
            fork(w, index, mask & ~m, g.pc + 1);
            return;
        }
        if ((i.flags & ALIGNED) && m != w.live && w.groups.size() > 1) {
            L.pc_counts[w.pc].executed--;
            g.state = WAIT_MEET;
            return;
        }
        Cluster &c = *w.block->cluster;
        if (i.a == 0) {
            for (u32 t = m; t; t &= t - 1) w.cluster_phase[first(t)] = c.generation;
            c.arrived += u32(__builtin_popcount(m));
            if (L.races.on() && (i.flags & RELEASE)) c.parties.push_back(party(w, m, false));
            else if (L.races.on())
                for (u32 t = m; t; t &= t - 1)
                    if (!w.clocks->fences[first(t)].cta) tell_fenced(w, first(t), c.fenced);
            g.pc++;
            try_cluster(c);
            return;
        }
        for (u32 t = m; t; t &= t - 1)
            if (w.cluster_phase[first(t)] >= c.generation) {
                L.pc_counts[w.pc].executed--;
                L.steps--;
                g.state = WAIT_CLUSTER;
                return;
            }
        if (L.races.on() && (i.flags & ACQUIRE)) learn(w, m, c.sync);
        g.pc++;
    }

    // -- blocks

    std::unique_ptr<Cluster> allocate() {
        auto c = std::make_unique<Cluster>();
        for (u32 k = 0; k < L.cluster_size; k++) {
            auto b = std::make_unique<Block>();
            b->launch = &L;
            b->cluster = c.get();
            b->rank = k;
            b->shared_memory.resize(L.shared_size + 1024);
            b->shared =
                b->shared_memory.data() + (1024 - (reinterpret_cast<uintptr_t>(b->shared_memory.data()) & 1023));
            b->warps.resize(L.warps);
            size_t file = size_t(args.slots) * UNIT;
            b->register_file.resize(file * L.warps + 64);
            b->local_memory.resize(size_t(args.local_size) * 32 * L.warps);
            u8 *base = b->register_file.data() + (64 - (reinterpret_cast<uintptr_t>(b->register_file.data()) & 63));
            for (u32 n = 0; n < L.warps; n++) {
                Warp &w = b->warps[n];
                w.launch = &L;
                w.block = b.get();
                w.index = n;
                w.regs = base + file * n;
                w.local = b->local_memory.data() + size_t(args.local_size) * 32 * n;
                for (u64 k2 = 0; k2 < args.constant_count; k2++) {
                    const u64 *t = args.constants + 3 * k2;
                    if (t[1] == 0) w.pred(u16(t[0])) = u32(t[2]);
                    else if (t[1] == 8)
                        for (u32 l = 0; l < 32; l++) w.reg<u64>(u16(t[0]))[l] = t[2];
                    else
                        for (u32 l = 0; l < 32; l++) w.reg<u32>(u16(t[0]))[l] = u32(t[2]);
                }
            }
            c->blocks.push_back(std::move(b));
        }
        return c;
    }

    void start(Cluster &c, u64 number) {
        u32 per[3] = {L.grid[0] / L.cluster[0], L.grid[1] / L.cluster[1], L.grid[2] / L.cluster[2]};
        u32 cid[3] = {u32(number % per[0]), u32(number / per[0] % per[1]), u32(number / per[0] / per[1])};
        c.arrived = 0;
        c.generation = 1;
        c.parties.clear();
        c.fenced = SyncVar();
        c.pending.clear();
        c.done = false;
        c.slices = 0;
        for (u32 k = 0; k < L.cluster_size; k++) {
            Block &b = *c.blocks[k];
            u32 in[3] = {k % L.cluster[0], k / L.cluster[0] % L.cluster[1], k / L.cluster[0] / L.cluster[1]};
            for (int d = 0; d < 3; d++) b.id[d] = cid[d] * L.cluster[d] + in[d];
            b.linear = b.id[0] + L.grid[0] * (b.id[1] + L.grid[1] * b.id[2]);
            b.threads = b.live = L.threads;
            b.done = false;
            for (Barrier &bar : b.barriers) bar = Barrier();
            b.mbarriers.clear();
            b.warpgroups.clear();
            memset(b.shared, 0xff, L.shared_size);  // NaN in every format
            if (L.checks & C_INIT) b.initialised.assign(L.shared_size, 0);
            if (L.checks & C_FLIGHT) b.in_flight.assign(L.shared_size, 0);
            for (u32 n = 0; n < L.warps; n++) {
                Warp &w = b.warps[n];
                u32 lanes = L.threads - 32 * n;
                w.exists = w.live = lanes >= 32 ? FULL : (1u << lanes) - 1;
                w.groups.clear();
                w.groups.push_back({w.live, 0, READY, {}});
                w.copies.clear();
                w.copies_started = 0;
                w.products = Products();
                memset(w.committed, 0, sizeof w.committed);
                memset(w.bulk_committed, 0, sizeof w.bulk_committed);
                memset(w.cluster_phase, 0, sizeof w.cluster_phase);
            }
            races_start(b);
        }
    }

    void stuck(std::vector<std::unique_ptr<Cluster>> &resident) {
        struct Stuck {
            Warp *warp;
            Group *group;
        };
        std::vector<Stuck> all;
        std::map<u32, u32> waiting;
        for (auto &c : resident)
            for (auto &b : c->blocks)
                for (Warp &w : b->warps)
                    for (Group &g : w.groups) {
                        waiting[g.pc] += u32(__builtin_popcount(g.mask));
                        all.push_back({&w, &g});
                    }
        if (all.empty()) return;
        auto rank = [](const Stuck &x) { return std::make_pair(x.group->state != WAIT_MEET, x.group->pc); };
        Stuck worst = *std::min_element(all.begin(), all.end(),
                                        [&](const Stuck &x, const Stuck &y) { return rank(x) < rank(y); });
        Warp &w = *worst.warp;
        Group &g = *worst.group;
        w.pc = g.pc;
        u32 kind = g.state == WAIT_MEET ? (L.code[g.pc].ctl == BARRIER ? K_DIVERGENT_BARRIER : K_DIVERGENT_WARP)
                   : g.state == WAIT_BARRIER && waiting.size() > 1 ? K_DIVERGENT_BARRIER
                                                                   : K_DEADLOCK;
        Finding &f = finding_at(w, kind, first(g.mask), 0);
        for (const Stuck &x : all)
            if (x.group->pc != g.pc && !f.has_other) {
                f.has_other = 1;
                f.other_write = 2;  // it waits
                f.other_pc = x.group->pc;
                f.other_block = x.warp->block->linear;
                f.other_thread = x.warp->thread(first(x.group->mask));
            }
        std::string text = "no thread can go on; they wait:";
        for (auto &[pc, n] : waiting) text += " " + std::to_string(n) + "@" + std::to_string(pc);
        snprintf(f.text, sizeof f.text, "%s", text.c_str());
        throw Stop();
    }

    void main() {
        u64 total = u64(L.grid[0]) * L.grid[1] * L.grid[2] / L.cluster_size, next = 0;
        std::vector<u64> order;
        if (L.random) {
            order.resize(total);
            for (u64 k = 0; k < total; k++) order[k] = k;
            for (u64 k = total; k > 1; k--) std::swap(order[k - 1], order[L.rng.below(u32(k))]);
        }
        std::vector<std::unique_ptr<Cluster>> resident;
        u32 window = args.window ? args.window : 1;
        u64 idle = 0;
        std::vector<Warp *> turn;
        while (next < total || !resident.empty()) {
            while (resident.size() < window && next < total) {
                std::unique_ptr<Cluster> c;
                if (pool.empty()) {
                    c = allocate();
                } else {
                    c = std::move(pool.back());
                    pool.pop_back();
                }
                start(*c, L.random ? order[next] : next);
                next++;
                resident.push_back(std::move(c));
            }
            turn.clear();
            for (auto &c : resident)
                for (auto &b : c->blocks)
                    if (!b->done)
                        for (Warp &w : b->warps)
                            if (w.live) turn.push_back(&w);
            if (L.random)
                for (size_t k = turn.size(); k > 1; k--) std::swap(turn[k - 1], turn[L.rng.below(u32(k))]);
            u64 before = L.changes;
            bool ran = false, yielded = true;
            for (Warp *w : turn) {
                if (w->live && run(*w)) {
                    ran = true;
                    yielded = yielded && w->yield;
                }
            }
            if (!turn.empty()) look(*turn[0]);
            bool finished = false;
            for (size_t k = 0; k < resident.size();) {
                bool done = true;
                for (auto &b : resident[k]->blocks) done = done && b->done;
                if (done) {
                    pool.push_back(std::move(resident[k]));
                    resident.erase(resident.begin() + long(k));
                    finished = true;
                } else {
                    resident[k]->slices++;
                    k++;
                }
            }
            if (finished) {
                idle = 0;
                continue;
            }
            bool changed = L.changes != before;
            idle = changed ? 0 : idle + 1;
            bool spinning = !ran || idle > 2;
            bool advanced = false;
            if (spinning)
                for (auto &c : resident) advanced = advanced || advance_pending(*c);
            if (advanced) {
                idle = 0;
            } else if (spinning && next < total) {
                window = u32(resident.size()) + 1;  // they may be waiting for a block that has not started
                idle = 0;
            } else if (!ran || (idle > 3000 && yielded)) {
                stuck(resident);
            }
        }
    }

    void time_limit(Warp &w) {
        if (!w.groups.empty()) w.pc = w.groups[0].pc;
        u32 lane = w.groups.empty() ? 0 : first(w.groups[0].mask);
        report(w, K_TIME_LIMIT, lane, 0, "the launch took longer than %.1f s", args.time_limit);
    }

    int launch() {
        L.args = &args;
        for (int d = 0; d < 3; d++) {
            L.grid[d] = args.grid[d];
            L.block[d] = args.block[d];
            L.cluster[d] = args.cluster[d];
        }
        L.threads = L.block[0] * L.block[1] * L.block[2];
        L.warps = (L.threads + 31) / 32;
        L.cluster_size = L.cluster[0] * L.cluster[1] * L.cluster[2];
        L.dynamic_shared = args.dynamic_shared;
        L.system_shared = args.system_shared;
        L.shared_size = args.system_shared + args.static_shared + args.dynamic_shared;
        L.checks = args.checks;
        L.races.shared = L.check(C_RACE_SHARED);
        L.races.global = L.check(C_RACE_GLOBAL);
        L.jitter = args.jitter;
        L.cp_async = args.cp_async;
        L.random = args.random;
        L.rng.s = args.seed * 0x9E3779B97F4A7C15ull + 0x1234567;
        if (!L.rng.s) L.rng.s = 1;
        L.multiprocessors = args.multiprocessors;
        L.pc_counts = args.pc_counts;
        L.region_counts = args.region_counts;
        L.regions = args.regions;
        L.region_count = u32(args.region_count);
        L.hints.assign(args.instructions, 0);
        L.loaded.assign(args.code, args.code + args.instructions);
        auto &entries = table();
        for (Ins &i : L.loaded) i.fn = entries[i.op].fn;
        L.code = L.loaded.data();
        auto now = std::chrono::steady_clock::now();
        L.deadline = now + std::chrono::microseconds(s64(args.time_limit * 1e6));
        L.signals_at = now + SIGNALS;
        thread_state = args.release();
        int result = 0;
        try {
            main();
        } catch (const Stop &) {
            result = 1;
        } catch (const Interrupt &) {
            result = 2;
        }
        args.acquire(thread_state);
        return result;
    }
};

}  // namespace

#define EXPORT __attribute__((visibility("default")))
extern "C" {
EXPORT u64 sim_op_count() { return table().size(); }
EXPORT const char *sim_op_name(u64 k) { return table()[k].name.c_str(); }
EXPORT u64 sim_sizes() { return sizeof(Ins) | u64(sizeof(LaunchArgs)) << 16 | u64(sizeof(Finding)) << 32; }
EXPORT int sim_launch(LaunchArgs *args) { return Engine(*args).launch(); }
}
