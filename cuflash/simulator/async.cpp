// mbarriers, bulk copies, asynchronous stores: what completes on its own and is waited for.
#include "async.hpp"

#include "access.hpp"

Place shared_place(Warp &w, u32 lane, u64 a, u32 bytes, bool write) {
    u64 all[32];
    SharedAt s;
    all[lane] = (a & SPACE_MASK) == SHARED_BASE ? a & ~SPACE_MASK : a;
    shared_bounds(w, 1u << lane, all, bytes, s, write);
    return {s.block[lane], s.off[lane]};
}

namespace {

Mbarrier &barrier_at(Warp &w, u32 lane, const Place &p) {
    auto found = p.block->mbarriers.find(p.off);
    if (found == p.block->mbarriers.end()) report(w, K_MBARRIER, lane, p.off, "no mbarrier was initialised here");
    return found->second;
}

void complete(Launch &L, Mbarrier &b) {
    if (b.pending != 0 || b.transactions != 0) return;
    b.phase++;
    b.pending = b.expected;
    b.arrived = std::move(b.arriving);
    b.arriving = SyncVar();
    L.changes++;
}

void arrive(Warp &w, u32 lane, const Place &p, u32 count, bool release, bool drop) {
    Mbarrier &b = barrier_at(w, lane, p);
    if (s64(count) > b.pending)
        report(w, K_MBARRIER, lane, p.off, "%u arrivals at an mbarrier that waits for %lld", count,
               static_cast<long long>(b.pending));
    if (release && w.launch->races.on()) tell(w, lane, b.arriving);
    b.pending -= count;
    if (drop) b.expected -= count;
    complete(*w.launch, b);
}

// One asynchronous operation happens. The finding that it may make is told of the instruction that started it.
void perform(Pending &p) {
    Launch &L = *p.warp->launch;
    p.done = true;
    L.changes++;
    u32 pc = p.warp->pc;
    p.warp->pc = p.pc;
    switch (p.what) {
        case Pending::TO_SHARED: {
            const u8 *from =
                p.source_block ? p.source_block->shared + p.source : reinterpret_cast<const u8 *>(p.source);
            memcpy(p.block->shared + p.destination, from, p.bytes);
            break;
        }
        case Pending::LINE_TO_SHARED:  // row r of the pattern has chunk c at chunk c ^ r % 8
            for (u32 c = 0; c < p.bytes / 16; c++) {
                u8 *to = p.block->shared + p.destination + 16 * (c ^ ((p.destination / p.bytes) & 7));
                u32 have = p.have <= 16 * c ? 0 : std::min(16u, p.have - 16 * c);
                memcpy(to, reinterpret_cast<const u8 *>(p.source) + 16 * c, have);
                memset(to + have, 0, 16 - have);
            }
            break;
        case Pending::TO_GLOBAL:
            memcpy(reinterpret_cast<void *>(p.destination), p.source_block->shared + p.source, p.bytes);
            break;
        case Pending::VALUE: memcpy(p.block->shared + p.destination, p.value, p.bytes); break;
        case Pending::ARRIVE: break;
    }
    if (p.what == Pending::TO_SHARED || p.what == Pending::LINE_TO_SHARED || p.what == Pending::VALUE) {
        if (L.check(C_FLIGHT)) memset(&p.block->in_flight[p.destination], 0, p.bytes);
        if (L.check(C_INIT)) memset(&p.block->initialised[p.destination], 1, p.bytes);
        Mbarrier &b = barrier_at(*p.warp, p.lane, {p.barrier_block, p.barrier});
        b.transactions -= p.bytes;
        if (L.races.on()) land(b.arriving, *p.warp->block, p.actor);
        complete(L, b);
    } else if (p.what == Pending::ARRIVE) {
        land_copies(*p.warp, p.lane, p.group);
        arrive(*p.warp, p.lane, {p.barrier_block, p.barrier}, p.bytes, true, false);
    }
    p.warp->pc = pc;
}

}  // namespace

u64 operand_address(Warp &w, u16 slot, u8 width, s64 offset, u32 lane) {
    u64 a[32];
    addresses(w, slot, width, offset, 1u << lane, a);
    return a[lane];
}

void start(Warp &w, Pending &&p) {
    p.warp = &w;
    p.pc = w.pc;
    p.done = false;
    Launch &L = *w.launch;
    if (L.cp_async == 1 || (L.cp_async == 2 && (L.rng() & 1))) perform(p);
    auto &all = w.block->cluster->pending;
    if (!p.done || p.what == Pending::TO_GLOBAL) all.push_back(std::move(p));
    if (all.size() > 256) {
        size_t kept = 0;
        for (Pending &q : all)
            if (!q.done || q.what == Pending::TO_GLOBAL) {
                if (&all[kept] != &q) all[kept] = std::move(q);
                kept++;
            }
        all.resize(kept);
    }
}

void write_later(Warp &w, u32 l, const Place &to, u32 n, const Actor &actor) {
    Launch &L = *w.launch;
    if (L.races.shared) race_shared(w, l, *to.block, to.off, n, A_WRITE, &actor);
    check_write(w, l, *to.block, to.off, n);
    if (L.check(C_FLIGHT)) memset(&to.block->in_flight[to.off], 1, n);
}

namespace {

// -- mbarriers: o[12] address, d its width

void init(Warp &w, const Ins &i, u32 m) {
    for (u32 t = m; t; t &= t - 1) {
        u32 l = first(t);
        Place p = shared_place(w, l, operand_address(w, i.o[12], i.d, i.imm, l), 8, true);
        if (p.off & 7) report(w, K_MISALIGNED, l, p.off, "an mbarrier at an address that is no multiple of 8");
        if (w.launch->races.shared) race_shared(w, l, *p.block, p.off, 8, A_WRITE);
        check_write(w, l, *p.block, p.off, 8);
        Mbarrier b;
        b.expected = w.reg<u32>(i.o[1])[l];
        b.pending = b.expected;
        p.block->mbarriers[p.off] = std::move(b);
        memset(p.block->shared + p.off, 0, 8);
    }
    w.launch->changes++;
}
void inval(Warp &w, const Ins &i, u32 m) {
    for (u32 t = m; t; t &= t - 1) {
        Place p = shared_place(w, first(t), operand_address(w, i.o[12], i.d, i.imm, first(t)), 8, true);
        barrier_at(w, first(t), p);
        p.block->mbarriers.erase(p.off);
    }
}
// An mbarrier operation is atomic; it races with the initialisation only.
Place touch(Warp &w, const Ins &i, u32 lane) {
    Place p = shared_place(w, lane, operand_address(w, i.o[12], i.d, i.imm, lane), 8, true);
    if (w.launch->races.shared) race_shared(w, lane, *p.block, p.off, 8, A_STRONG);
    return p;
}
void arrive_op(Warp &w, const Ins &i, u32 m) {  // o[0] state, o[1] count, o[2] bytes to expect; a: drop
    for (u32 t = m; t; t &= t - 1) {
        u32 l = first(t);
        Place p = touch(w, i, l);
        Mbarrier &b = barrier_at(w, l, p);
        u64 state = b.phase;
        if (i.o[2] != NONE) b.transactions += w.reg<u32>(i.o[2])[l];
        arrive(w, l, p, i.o[1] == NONE ? 1 : w.reg<u32>(i.o[1])[l], i.flags & RELEASE, i.a);
        if (i.o[0] != NONE) w.reg<u64>(i.o[0])[l] = state;
    }
}
void expect(Warp &w, const Ins &i, u32 m) {  // a: 1 takes the bytes off instead
    for (u32 t = m; t; t &= t - 1) {
        u32 l = first(t);
        Place p = touch(w, i, l);
        Mbarrier &b = barrier_at(w, l, p);
        s64 n = w.reg<u32>(i.o[2])[l];
        b.transactions += i.a ? -n : n;
        complete(*w.launch, b);
    }
}
void wait(Warp &w, const Ins &i, u32 m) {  // o[0] predicate, o[1] state or parity; a: parity
    u32 yes = 0;
    for (u32 t = m; t; t &= t - 1) {
        u32 l = first(t);
        Place p = touch(w, i, l);
        if (i.a && w.reg<u32>(i.o[1])[l] > 1)
            report(w, K_MBARRIER, l, p.off, "a wait for parity %u, which is 0 or 1", w.reg<u32>(i.o[1])[l]);
        auto done = [&] {
            Mbarrier &b = barrier_at(w, l, p);
            u64 phase = i.a ? w.reg<u32>(i.o[1])[l] : w.reg<u64>(i.o[1])[l];
            return i.a ? (b.phase & 1) != phase : b.phase != phase;
        };
        if (!done()) {  // what is under way for this barrier may happen now
            auto &all = w.block->cluster->pending;
            for (size_t k = 0; k < all.size() && !done(); k++)
                if (!all[k].done && all[k].what != Pending::TO_GLOBAL && all[k].barrier_block == p.block &&
                    all[k].barrier == p.off)
                    perform(all[k]);
        }
        if (done()) {
            yes |= 1u << l;
            if ((i.flags & ACQUIRE) && w.launch->races.on()) learn(w, 1u << l, barrier_at(w, l, p).arrived);
        }
    }
    w.pred(i.o[0]) = (w.pred(i.o[0]) & ~m) | yes;
    if (yes != m) w.yield = true;
}
void pending_count(Warp &w, const Ins &i, u32 m) {
    u32 *d = w.reg<u32>(i.o[0]);
    LANES(m, d[l] = 0)
}
void copies_arrive(Warp &w, const Ins &i, u32 m) {  // cp.async.mbarrier.arrive; a: noinc
    for (u32 t = m; t; t &= t - 1) {
        u32 l = first(t);
        Place p = touch(w, i, l);
        Mbarrier &b = barrier_at(w, l, p);
        if (!i.a) b.pending++;
        Pending op{};
        op.what = Pending::ARRIVE;
        op.lane = l;
        op.bytes = 1;
        op.group = w.copies_started;  // later copies are not waited for
        op.barrier_block = p.block;
        op.barrier = p.off;
        start(w, std::move(op));
    }
}

// -- bulk copies: o[0] destination, o[1] source, o[2] bytes, o[3] mbarrier; widths a, b, d

u32 bulk_bytes(Warp &w, const Ins &i, u32 l, u64 dst, u64 src) {
    u32 n = w.reg<u32>(i.o[2])[l];
    if ((n & 15) || (dst & 15) || (src & 15))
        report(w, K_MISALIGNED, l, (src & 15) ? src : dst,
               "a bulk copy of %u bytes; size and addresses have to be multiples of 16", n);
    return n;
}
void bulk_to_shared(Warp &w, const Ins &i, u32 m) {  // c: source is GLOBAL or SHARED
    Launch &L = *w.launch;
    for (u32 t = m; t; t &= t - 1) {
        u32 l = first(t);
        u64 dst = operand_address(w, i.o[0], i.a, i.imm, l), src = operand_address(w, i.o[1], i.b, s32(i.target), l);
        u32 n = bulk_bytes(w, i, l, dst, src);
        Place to = shared_place(w, l, dst, n, true),
              bar = shared_place(w, l, operand_address(w, i.o[3], i.d, 0, l), 8, true);
        Pending op{};
        op.what = Pending::TO_SHARED;
        op.actor = new_actor(*w.block);
        if (i.c == GLOBAL) {
            u64 all[32];
            all[l] = src;
            for (u32 k = 0; k < n; k += 16) {
                all[l] = src + k;
                global_access(w, 1u << l, all, nullptr, 16, READ, false, &op.actor);
            }
            op.source = src;
        } else {
            Place from = shared_place(w, l, src, n, false);
            check_read(w, l, *from.block, from.off, n);
            if (L.races.shared) race_shared(w, l, *from.block, from.off, n, 0, &op.actor);
            op.source_block = from.block;
            op.source = from.off;
        }
        write_later(w, l, to, n, op.actor);
        barrier_at(w, l, bar);
        op.lane = l;
        op.bytes = n;
        op.block = to.block;
        op.destination = to.off;
        op.barrier_block = bar.block;
        op.barrier = bar.off;
        start(w, std::move(op));
    }
}
void bulk_to_global(Warp &w, const Ins &i, u32 m) {
    for (u32 t = m; t; t &= t - 1) {
        u32 l = first(t);
        u64 dst = operand_address(w, i.o[0], i.a, i.imm, l), src = operand_address(w, i.o[1], i.b, s32(i.target), l);
        u32 n = bulk_bytes(w, i, l, dst, src);
        Place from = shared_place(w, l, src, n, false);
        Pending op{};
        op.what = Pending::TO_GLOBAL;
        op.actor = new_actor(*w.block);
        check_read(w, l, *from.block, from.off, n);
        if (w.launch->races.shared) race_shared(w, l, *from.block, from.off, n, 0, &op.actor);
        u64 all[32];
        for (u32 k = 0; k < n; k += 16) {
            all[l] = dst + k;
            global_access(w, 1u << l, all, nullptr, 16, WRITE, false, &op.actor);
        }
        op.lane = l;
        op.bytes = n;
        op.source_block = from.block;
        op.source = from.off;
        op.destination = dst;
        op.group = w.bulk_committed[l];
        start(w, std::move(op));
    }
}
void bulk_commit(Warp &w, const Ins &, u32 m) {
    for (u32 t = m; t; t &= t - 1) w.bulk_committed[first(t)]++;
}
void bulk_wait(Warp &w, const Ins &i, u32 m) {
    auto &all = w.block->cluster->pending;
    for (Pending &p : all) {
        if (p.what != Pending::TO_GLOBAL || p.warp != &w || !((m >> p.lane) & 1) || p.bytes == 0) continue;
        if (s32(p.group) >= s32(w.bulk_committed[p.lane] - u32(i.imm))) continue;
        if (!p.done) perform(p);
        if (w.launch->races.on()) learn_actor(w, p.lane, *w.block, p.actor);
        p.bytes = 0;  // waited for
        p.what = Pending::ARRIVE;
        p.done = true;
    }
}

// st.async: o[0..3] values, o[12] address, o[13] mbarrier; a elements of b bytes
void st_async(Warp &w, const Ins &i, u32 m) {
    for (u32 t = m; t; t &= t - 1) {
        u32 l = first(t), n = u32(i.a) * i.b;
        Place to = shared_place(w, l, operand_address(w, i.o[12], i.d, i.imm, l), n, true);
        Place bar = shared_place(w, l, operand_address(w, i.o[13], i.d, s32(i.target), l), 8, true);
        if (to.off % n)
            report(w, K_MISALIGNED, l, to.off, "an access of %u bytes at an address that is no multiple of %u", n, n);
        if (w.launch->races.shared) race_shared(w, l, *bar.block, bar.off, 8, A_STRONG);  // with its initialisation
        barrier_at(w, l, bar);
        Pending op{};
        op.what = Pending::VALUE;
        op.actor = new_actor(*w.block);
        write_later(w, l, to, n, op.actor);
        for (u32 k = 0; k < i.a; k++) {
            if (i.b == 8) memcpy(op.value + 8 * k, &w.reg<u64>(i.o[k])[l], 8);
            else memcpy(op.value + 4 * k, &w.reg<u32>(i.o[k])[l], 4);
        }
        op.lane = l;
        op.bytes = n;
        op.block = to.block;
        op.destination = to.off;
        op.barrier_block = bar.block;
        op.barrier = bar.off;
        start(w, std::move(op));
    }
}

OP("mbarrier.init", init)
OP("mbarrier.inval", inval)
OP("mbarrier.arrive", arrive_op)
OP("mbarrier.expect_tx", expect)
OP("mbarrier.wait", wait)
OP("mbarrier.pending_count", pending_count)
OP("cp.async.mbarrier.arrive", copies_arrive)
OP("cp.async.bulk.shared", bulk_to_shared)
OP("cp.async.bulk.global", bulk_to_global)
OP("cp.async.bulk.commit_group", bulk_commit)
OP("cp.async.bulk.wait_group", bulk_wait)
OP("st.async", st_async)

}  // namespace

bool advance_pending(Cluster &c) {
    for (Pending &p : c.pending)
        if (!p.done) {
            perform(p);
            return true;
        }
    return false;
}

void check_block_exit(Block &b) {
    for (Pending &p : b.cluster->pending) {
        // A store's value is on its way by itself: only the block that it goes to must be there still.
        bool ours = p.what == Pending::VALUE ? p.block == &b
                                             : p.warp->block == &b || (p.what != Pending::TO_GLOBAL && p.block == &b);
        if (!ours || (p.done && p.what != Pending::TO_GLOBAL)) continue;
        if (b.launch->check(C_WAITED)) {
            p.warp->pc = p.pc;
            report(*p.warp, K_NEVER_WAITED, p.lane, p.what == Pending::TO_GLOBAL ? p.source : p.destination,
                   "the block exits without having waited for this copy");
        }
        if (!p.done) perform(p);
        p.bytes = 0;
        p.what = Pending::ARRIVE;
    }
}
