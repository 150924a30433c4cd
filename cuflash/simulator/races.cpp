#include "races.hpp"

#include "machine.hpp"

namespace {

std::vector<Knowledge *> &pool() {
    static thread_local std::vector<Knowledge *> free;
    return free;
}

// Lanes of a warp that exist count; the others never touch anything.
void refresh_least(Knowledge &k, u32 warp) {
    u32 least = ~0u;
    for (u32 t = warp * 32; t < warp * 32 + 32; t++) least = std::min(least, k.at[t]);
    k.least[warp] = least;
}

// Entries of the block's threads and of its copies (the last 32), with those of lanes that do not exist out of the way.
void clear(Launch &L, Knowledge &k) {
    k.at.assign((L.warps + 1) * 32, 0);
    for (u32 t = L.threads; t < L.warps * 32; t++) k.at[t] = ~0u;
    k.least.assign(L.warps + 1, 0);
    k.foreign.reset();
}

Known copy(const Knowledge &from) {
    Known k = Known::make();
    k->at = from.at;
    k->least = from.least;
    k->foreign = from.foreign;
    return k;
}

// A knowledge that only this lane refers to.
Knowledge &own(Warp &w, u32 lane) {
    Known &k = w.clocks->known[lane];
    if (k->references > 1) k = copy(*k);
    return *k;
}

void join(Knowledge &into, const Knowledge &from) {
    for (size_t t = 0; t < into.at.size(); t++) into.at[t] = std::max(into.at[t], from.at[t]);
    for (u32 n = 0; n < into.least.size(); n++) refresh_least(into, n);
}

void join_entry(std::unordered_map<u32, Known> &map, u32 block, const Known &k) {
    Known &slot = map[block];
    if (!slot) {
        slot = k;
    } else if (slot != k) {
        slot = copy(*slot);
        join(*slot, *k);
    }
}

Foreign join_foreign(const Foreign &a, const Foreign &b) {
    if (!a || a == b) return b;
    if (!b) return a;
    auto out = std::make_shared<std::unordered_map<u32, Known>>(*a);
    for (auto &[block, k] : *b) join_entry(*out, block, k);
    return out;
}

bool knows(Warp &w, u32 lane, const Record &r) {
    const Knowledge &mine = *w.clocks->known[lane];
    const Knowledge *k = &mine;
    if (r.block != w.block->linear) {
        if (!mine.foreign) return false;
        auto found = mine.foreign->find(r.block);
        if (found == mine.foreign->end()) return false;
        k = &*found->second;
    }
    if (k->least[r.warp] > r.epoch) return true;
    u32 others = r.lanes;
    if (r.block == w.block->linear && r.warp == w.index) others &= ~(1u << lane);  // it knows itself
    for (u32 t = others; t; t &= t - 1)
        if (k->at[r.warp * 32 + first(t)] <= r.epoch) return false;
    return true;
}

[[noreturn]] void race(Warp &w, u32 lane, const Record &r, u32 kind, u64 address, u8 access, bool shared) {
    Finding &f = finding_at(w, kind, lane, address);
    f.write = access & A_WRITE;
    f.has_other = 1;
    f.other_pc = r.pc;
    f.other_block = r.block;
    u32 others = r.lanes;
    if (r.block == w.block->linear && r.warp == w.index && others != 1u << lane) others &= ~(1u << lane);
    f.other_thread = r.warp * 32u + first(others);
    f.other_write = r.kind & A_WRITE;
    report(w, kind, lane, address, "a %s of %s memory and %s by another thread are not ordered",
           access & A_WRITE ? "write" : "read", shared ? "shared" : "global",
           r.kind & A_FLIGHT  ? "an asynchronous copy in flight"
           : r.kind & A_WRITE ? "a write"
                              : "a read");
}

// The copy was issued before this access, but nobody has waited for it.
[[noreturn]] void in_flight(Warp &w, u32 lane, const Record &r, u64 address, u16 bytes, u8 access) {
    address += u32(__builtin_ctz(r.bytes & bytes));
    Finding &f = finding_at(w, K_IN_FLIGHT, lane, address);
    f.write = access & A_WRITE;
    f.has_other = f.other_write = 1;
    f.other_pc = r.pc;
    f.other_block = r.block;
    f.other_thread = r.warp * 32u + first(r.lanes);
    report(w, K_IN_FLIGHT, lane, address, "a %s of shared memory that an asynchronous copy is still writing",
           access & A_WRITE ? "write" : "read");
}

void add(Shadow &s, Line &line, const Record &r) {
    if (line.n >= Line::INLINE) {
        if (!line.extra) {
            s.extra.emplace_back();
            line.extra = u32(s.extra.size());
        }
        auto &more = s.extra[line.extra - 1];
        if (more.size() <= line.n - Line::INLINE) more.resize(line.n - Line::INLINE + 1);
    }
    record_at(s, line, line.n++) = r;
    line.writes += r.kind & A_WRITE;
}

// Does the later access `now` make it needless to remember the earlier one, of the same warp? Whoever knows the later
// one knows both.
bool replaces(const Record &now, const Record &old) {
    return old.block == now.block && old.warp == now.warp && old.kind == now.kind && !(old.lanes & ~now.lanes) &&
           !(old.bytes & ~now.bytes);
}

void touch(Shadow &s, u32 index, Warp &w, u32 lane, u16 bytes, u8 kind, u32 finding, u64 address, bool shared,
           const Actor *actor) {
    Line &line = s.lines[index];
    Record now{w.epoch, 1u << lane, w.pc, w.block->linear, u32(w.launch->steps), bytes, u8(w.index), kind};
    if (actor) {
        now.epoch = actor->epoch;
        now.lanes = actor->lanes;
        now.warp = u8(actor->warp);
    }
    const u32 me = now.lanes;
    bool write = kind & A_WRITE;
    if (line.generation != s.generation) {
        line.generation = s.generation;
        line.n = line.writes = line.extra = 0;
    }
    if (!write && line.n) {  // other lanes of the warp have just read the same: one record for all of them
        Record &last = record_at(s, line, line.n - 1);
        if (last.block == now.block && last.warp == now.warp && last.kind == kind && last.bytes == bytes &&
            last.epoch == now.epoch) {
            bool clean = true;
            for (u32 k = 0; k < line.n && line.writes; k++) {
                const Record &r = record_at(s, line, k);
                if ((r.kind & A_WRITE) && (r.bytes & bytes))
                    clean = clean && !(r.kind & A_FLIGHT) && (knows(w, lane, r) || (kind & r.kind & A_STRONG));
            }
            if (clean) {
                last.lanes |= me;
                last.pc = w.pc;
                if (line.n >= 2 && replaces(last, record_at(s, line, line.n - 2))) {
                    record_at(s, line, line.n - 2) = last;
                    line.n--;
                }
                return;
            }
        }
        if (!line.writes) {
            if (replaces(now, last)) last = now;
            else add(s, line, now);
            return;
        }
    }
    u32 kept = 0, writes = 0;
    for (u32 k = 0; k < line.n; k++) {
        Record r = record_at(s, line, k);
        if (r.bytes & bytes) {
            bool mine = r.block == now.block && r.warp == now.warp && r.lanes == me;
            bool conflict = (write || (r.kind & A_WRITE)) && !((kind & A_STRONG) && (r.kind & A_STRONG));
            bool same_instruction = r.step == now.step && r.block == now.block && r.warp == now.warp && r.pc == now.pc;
            if ((r.kind & A_FLIGHT) && w.launch->check(C_FLIGHT) && (mine || knows(w, lane, r)))
                in_flight(w, lane, r, address, bytes, kind);
            bool ordered = mine || (!(r.kind & A_FLIGHT) && knows(w, lane, r));
            if (conflict && !ordered &&
                !(same_instruction && write && (r.kind & A_WRITE) && !((kind | r.kind) & A_FLIGHT)))
                race(w, lane, r, finding, address + u32(__builtin_ctz(r.bytes & bytes)), kind, shared);
            if (write && (ordered || same_instruction) && !((r.kind & A_FLIGHT) && mine)) {
                r.bytes &= u16(~bytes);
                if (!r.bytes) continue;
            } else if (!write) {
                if (r.block == now.block && r.warp == now.warp && r.kind == kind && r.bytes == bytes &&
                    r.epoch == now.epoch)
                    now.lanes |= r.lanes;
                if (replaces(now, r)) continue;
            }
        }
        record_at(s, line, kept++) = r;
        writes += r.kind & A_WRITE;
    }
    line.n = kept;
    line.writes = writes;
    add(s, line, now);
}

constexpr u32 PAGE_SHIFT = 12;

Shadow &page_of(Launch &L, u64 address) {
    RaceState &r = L.races;
    u64 page = address >> PAGE_SHIFT;
    if (page != r.last_page) {
        auto &slot = r.pages[page];
        if (!slot) {
            slot = std::make_unique<Shadow>();
            slot->reset(1u << PAGE_SHIFT);
        }
        r.last_page = page;
        r.last = slot.get();
    }
    return *r.last;
}

}  // namespace

Known::Known(const Known &o) : p(o.p) {
    if (p) p->references++;
}
Known::~Known() {
    if (p && --p->references == 0) {
        p->foreign.reset();
        pool().push_back(p);
    }
}
Known Known::make() {
    Known k;
    if (pool().empty()) {
        k.p = new Knowledge();
    } else {
        k.p = pool().back();
        pool().pop_back();
    }
    k.p->references = 1;
    return k;
}

Warp::Warp() = default;
Warp::Warp(Warp &&) noexcept = default;
Warp::~Warp() = default;

void Shadow::reset(size_t bytes) {
    size_t n = (bytes + 15) / 16;
    if (lines.size() != n) {
        lines.assign(n, Line());
        generation = 0;
    }
    extra.clear();
    generation++;
}

void races_start(Block &b) {
    Launch &L = *b.launch;
    if (!L.races.on()) return;
    if (L.races.shared) b.shadow.reset(L.shared_size);
    Known k = Known::make();
    clear(L, *k);
    b.actors = 0;
    for (Warp &w : b.warps) {
        if (!w.clocks) w.clocks = std::make_unique<WarpClocks>();
        w.epoch = 1;
        for (u32 l = 0; l < 32; l++) {
            w.clocks->known[l] = k;
            w.clocks->fences[l] = FenceState();
        }
        w.clocks->proxy_fences.clear();
    }
}

void race_shared(Warp &w, u32 lane, Block &b, u32 off, u32 bytes, u8 kind, const Actor *actor) {
    while (bytes) {
        u32 at = off & 15, n = std::min(bytes, 16 - at);
        touch(b.shadow, off >> 4, w, lane, u16(((1u << n) - 1) << at), kind, K_RACE_SHARED, off & ~15u, true, actor);
        off += n;
        bytes -= n;
    }
}

void race_global(Warp &w, u32 lane, u64 address, u32 bytes, u8 kind, const Actor *actor) {
    while (bytes) {
        u32 at = u32(address & 15), n = std::min(bytes, 16 - at);
        Shadow &s = page_of(*w.launch, address);
        touch(s, u32(address & ((1u << PAGE_SHIFT) - 1)) >> 4, w, lane, u16(((1u << n) - 1) << at), kind, K_RACE_GLOBAL,
              address & ~15ull, false, actor);
        address += n;
        bytes -= n;
    }
}

void race_landed(Warp &w, u32 lane, Block &b, u32 off, u32 bytes) {
    for (u32 line = off >> 4; line <= (off + bytes - 1) >> 4; line++) {
        Line &l = b.shadow.lines[line];
        if (l.generation != b.shadow.generation) continue;
        for (u32 k = 0; k < l.n; k++) {
            Record &r = record_at(b.shadow, l, k);
            if ((r.kind & A_FLIGHT) && r.warp == w.index && r.lanes == 1u << lane && r.block == w.block->linear) {
                r.kind &= u8(~A_FLIGHT);
                r.epoch = w.epoch;
            }
        }
    }
}

void sync_warp(Warp &w, u32 mask) {
    if (!w.launch->races.on()) return;
    Known *known = w.clocks->known;
    Known &k0 = known[first(mask)];
    bool same = true;
    for (u32 t = mask; t; t &= t - 1) same = same && known[first(t)] == k0;
    if (same && mask == w.exists) {
        if (k0->references != u32(__builtin_popcount(mask))) {
            Known fresh = copy(*k0);
            for (u32 t = mask; t; t &= t - 1) known[first(t)] = fresh;
        }
        Knowledge &k = *known[first(mask)];
        for (u32 t = mask; t; t &= t - 1) k.at[w.thread(first(t))] = w.epoch + 1;
        k.least[w.index] = w.epoch + 1;
        w.epoch++;
        return;
    }
    sync_parties({party(w, mask, true)});
}

Party party(Warp &w, u32 mask, bool learns) { return {&w, mask, learns, w.epoch++}; }

// What the parties know together.
Known sum_of(const std::vector<Party> &parties) {
    Launch &L = *parties[0].warp->launch;
    Known sum = Known::make();
    clear(L, *sum);
    u32 all = 0;
    for (const Party &p : parties) all += u32(__builtin_popcount(p.mask));
    const Knowledge *before = nullptr;
    for (const Party &p : parties) {
        for (u32 t = p.mask; t; t &= t - 1) {
            const Known &k = p.warp->clocks->known[first(t)];
            if (&*k != before) {
                // If all threads are here, each knows itself best; only what is known of copies has to be gathered.
                for (size_t j = all < L.threads ? 0 : L.warps * 32; j < sum->at.size(); j++)
                    sum->at[j] = std::max(sum->at[j], k->at[j]);
                sum->foreign = join_foreign(sum->foreign, k->foreign);
                before = &*k;
            }
        }
    }
    for (const Party &p : parties)
        for (u32 t = p.mask; t; t &= t - 1) {
            u32 &entry = sum->at[p.warp->thread(first(t))];
            entry = std::max(entry, p.epoch + 1);
        }
    for (u32 n = 0; n <= L.warps; n++) refresh_least(*sum, n);
    return sum;
}

void sync_parties(const std::vector<Party> &parties) {
    if (!parties[0].warp->launch->races.on()) return;
    Known sum = sum_of(parties);
    for (const Party &p : parties)
        if (p.learns)
            for (u32 t = p.mask; t; t &= t - 1) p.warp->clocks->known[first(t)] = sum;
}

namespace {
// The thread's knowledge with its own accesses so far, as others may take it over.
Known snapshot(Warp &w, u32 lane, const Known &base, u32 epoch) {
    Known k = copy(*base);
    k->at[w.thread(lane)] = epoch + 1;
    refresh_least(*k, w.index);
    return k;
}
void publish(SyncVar &v, u32 block, const Known &k) {
    join_entry(v.by_block, block, k);
    if (k->foreign)
        for (auto &[other, known] : *k->foreign) join_entry(v.by_block, other, known);
}
void take_into(Knowledge &mine, u32 own_block, const SyncVar &v) {
    std::shared_ptr<std::unordered_map<u32, Known>> foreign;
    for (auto &[block, k] : v.by_block) {
        if (block == own_block) {
            join(mine, *k);
        } else {
            if (!foreign)
                foreign = mine.foreign ? std::make_shared<std::unordered_map<u32, Known>>(*mine.foreign)
                                       : std::make_shared<std::unordered_map<u32, Known>>();
            join_entry(*foreign, block, k);
        }
    }
    if (foreign) mine.foreign = foreign;
}
void take(Warp &w, u32 lane, const SyncVar &v) { take_into(own(w, lane), w.block->linear, v); }
bool in_scope(const SyncVar &v, Warp &w, bool cta) {
    if (!v.cta && !cta) return true;
    for (auto &[block, k] : v.by_block)
        if (block != w.block->linear) return false;
    return true;
}
}  // namespace

void release_at(Warp &w, u32 lane, u64 key, bool cta) {
    SyncVar &v = w.launch->races.variables[key];
    v.cta = cta;
    publish(v, w.block->linear, snapshot(w, lane, w.clocks->known[lane], w.epoch));
    w.epoch++;
}
void acquire_at(Warp &w, u32 lane, u64 key, bool cta) {
    auto found = w.launch->races.variables.find(key);
    if (found != w.launch->races.variables.end() && in_scope(found->second, w, cta)) take(w, lane, found->second);
}
void tell_fenced(Warp &w, u32 lane, SyncVar &v) {
    FenceState &f = w.clocks->fences[lane];
    if (f.released) publish(v, w.block->linear, snapshot(w, lane, f.released, f.released_epoch));
}
void relaxed_write(Warp &w, u32 lane, u64 key, bool exchange) {
    FenceState &f = w.clocks->fences[lane];
    auto &variables = w.launch->races.variables;
    if (!exchange) variables.erase(key);  // a plain store starts anew, a read-modify-write carries on
    if (!f.released) return;
    SyncVar &v = variables[key];
    v.cta = f.cta;
    tell_fenced(w, lane, v);
}
void relaxed_read(Warp &w, u32 lane, u64 key) {
    auto found = w.launch->races.variables.find(key);
    if (found == w.launch->races.variables.end()) return;
    FenceState &f = w.clocks->fences[lane];
    if (!f.pending) f.pending = std::make_shared<SyncVar>();
    for (auto &[block, k] : found->second.by_block) join_entry(f.pending->by_block, block, k);
    f.pending->cta = found->second.cta;
}
void fence_lanes(Warp &w, u32 mask, bool cta) {
    if (!w.launch->races.on()) return;
    for (u32 t = mask; t; t &= t - 1) {
        u32 l = first(t);
        FenceState &f = w.clocks->fences[l];
        if (f.pending) {
            if (in_scope(*f.pending, w, cta)) take(w, l, *f.pending);
            f.pending.reset();
        }
        f.released = w.clocks->known[l];
        f.released_epoch = w.epoch;
        f.cta = cta;
    }
    w.epoch++;
}
void leave(SyncVar &v, u32 block, const Known &k) { publish(v, block, k); }
void tell(Warp &w, u32 lane, SyncVar &v) {
    publish(v, w.block->linear, snapshot(w, lane, w.clocks->known[lane], w.epoch));
    w.epoch++;
}
void learn(Warp &w, u32 mask, const SyncVar &v) {
    Known *known = w.clocks->known;
    while (mask) {  // lanes of one knowledge stay so
        u32 same = 0;
        Known old = known[first(mask)];
        for (u32 t = mask; t; t &= t - 1) same |= u32(known[first(t)] == old) << first(t);
        Known fresh = copy(*old);
        take_into(*fresh, w.block->linear, v);
        for (u32 t = same; t; t &= t - 1) known[first(t)] = fresh;
        mask &= ~same;
    }
}

Actor new_actor(Block &b) {
    u32 n = b.actors++;
    return {b.launch->warps, 1u << (n & 31), n / 32 + 1};
}
void land(SyncVar &v, Block &b, const Actor &a) {
    Known k = Known::make();
    clear(*b.launch, *k);
    k->at[a.warp * 32 + first(a.lanes)] = a.epoch + 1;
    join_entry(v.by_block, b.linear, k);
}
void learn_actor(Warp &w, u32 lane, Block &b, const Actor &a) {
    SyncVar v;
    land(v, b, a);
    learn(w, 1u << lane, v);
}
