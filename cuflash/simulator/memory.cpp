// Memory: loads, stores, atomics, asynchronous copies, matrix loads; their checks and their counters.
#include <cstdio>

#include "access.hpp"

// -- addresses

void check_aligned(Warp &w, u32 m, const u64 *a, u32 bytes) {
    if (!w.launch->check(C_ALIGN) || bytes < 2) return;
    u64 any = 0;
    LANES(m, any |= a[l])
    if (!(any & (bytes - 1))) return;
    for (u32 t = m; t; t &= t - 1)
        if (a[first(t)] & (bytes - 1)) {
            finding_at(w, K_MISALIGNED, first(t), a[first(t)]).size = bytes;
            report(w, K_MISALIGNED, first(t), a[first(t)],
                   "an access of %u bytes at an address that is no multiple of %u", bytes, bytes);
        }
}

namespace {

const Region *find_region(Launch &L, u64 a, u32 bytes) {
    u32 lo = 0, hi = L.region_count;
    while (lo < hi) {
        u32 mid = (lo + hi) / 2;
        if (L.regions[mid].hi <= a) lo = mid + 1;
        else hi = mid;
    }
    if (lo < L.region_count && L.regions[lo].lo <= a && a + bytes <= L.regions[lo].hi) return &L.regions[lo];
    return nullptr;
}

// Distinct 32-byte sectors and bytes of a warp's access.
struct Sectors {
    u64 keys[128];
    u32 masks[128];
    u32 used = 0;
    u8 order[128];
    Sectors() { memset(keys, 0xff, sizeof keys); }
    void add(u64 a, u32 bytes) {
        while (bytes) {
            u64 key = a >> 5;
            u32 at = u32(a & 31), n = std::min(bytes, 32 - at);
            u32 h = u32((key * 0x9E3779B97F4A7C15ull) >> 57);
            while (keys[h] != key && keys[h] != ~0ull) h = (h + 1) & 127;
            if (keys[h] != key) {
                keys[h] = key;
                masks[h] = 0;
                order[used++] = u8(h);
            }
            masks[h] |= u32(((1ull << n) - 1) << at);
            a += n;
            bytes -= n;
        }
    }
    u32 bytes() const {
        u32 n = 0;
        for (u32 k = 0; k < used; k++) n += u32(__builtin_popcount(masks[order[k]]));
        return n;
    }
};

void count_global(Warp &w, u32 m, const u64 *a, const u8 *sizes, u32 bytes, const Region *const *regions, bool write) {
    Launch &L = *w.launch;
    PcCount &pc = L.pc_counts[w.pc];
    u32 rest = m;
    while (rest) {
        const Region *region = regions[first(rest)];
        u32 requested = 0;
        Sectors s;
        for (u32 t = rest; t; t &= t - 1) {
            u32 l = first(t);
            if (regions[l] != region) continue;
            rest &= ~(1u << l);
            u32 n = sizes ? sizes[l] : bytes;
            if (!n) continue;
            s.add(a[l] - region->origin, n);
            requested += n;
        }
        u32 ideal = (s.bytes() + 31) / 32;
        RegionCount &c = L.region_counts[region->id];
        if (write) {
            c.write_bytes += requested;
            c.write_sectors += s.used;
            c.write_ideal += ideal;
        } else {
            c.read_bytes += requested;
            c.read_sectors += s.used;
            c.read_ideal += ideal;
        }
        pc.sectors += s.used;
        pc.sectors_ideal += ideal;
        pc.bytes += requested;
    }
}

}  // namespace

// Checks and counts an access to global memory. Sizes may differ by lane (cp.async with a source size).
void global_access(Warp &w, u32 m, const u64 *a, const u8 *sizes, u32 bytes, Access kind, bool strong,
                   const Actor *actor) {
    Launch &L = *w.launch;
    const Region *regions[32];
    bool bounds = L.check(C_BOUNDS);
    u32 &hint = L.hints[w.pc];
    if (u32 early = L.args->waits && L.check(C_TURN) ? m & ~w.waited : 0)
        report(w, K_EARLY, first(early), a[first(early)], "an access to global memory ahead of griddepcontrol.wait");
    if (L.region_count) {
        const Region *r = &L.regions[hint];
        for (u32 t = m; t; t &= t - 1) {
            u32 l = first(t), n = sizes ? sizes[l] : bytes;
            regions[l] = r;
            if (!n) continue;
            if (a[l] < r->lo || a[l] + n > r->hi) {
                const Region *found = find_region(L, a[l], n);
                if (!found) {
                    if (!bounds) continue;
                    finding_at(w, K_BOUNDS_GLOBAL, l, a[l]).size = n;
                    L.args->finding->write = kind != READ;
                    report(w, K_BOUNDS_GLOBAL, l, a[l], "a %s of %u bytes outside of every array",
                           kind == READ    ? "read"
                           : kind == WRITE ? "write"
                                           : "atomic",
                           n);
                }
                r = found;
                hint = u32(r - L.regions);
            }
            if (L.races.global && !r->readonly)
                race_global(w, l, a[l], n, u8((kind != READ ? A_WRITE : 0) | (strong ? A_STRONG : 0)), actor);
            if (kind != READ && r->readonly && bounds) {
                L.args->finding->size = n;
                L.args->finding->write = 1;
                report(w, K_READONLY, l, a[l], "a write of %u bytes to an array that is read-only", n);
            }
            regions[l] = r;
        }
    } else if (m && bounds) {
        report(w, K_BOUNDS_GLOBAL, first(m), a[first(m)], "an access to global memory; no array was passed");
    }
    if (L.check(C_COUNT) && L.region_count) {
        if (kind != WRITE) count_global(w, m, a, sizes, bytes, regions, false);
        if (kind != READ) count_global(w, m, a, sizes, bytes, regions, true);
    }
}

// Whether every lane and the one `distance` beside it access the same place, if both do.
bool pairs_agree(u32 m, const u32 *off, u32 distance) {
    for (u32 t = m; t; t &= t - 1) {
        u32 l = first(t), other = l ^ distance;
        if (((m >> other) & 1) && off[l] != off[other]) return false;
    }
    return true;
}

// Wavefronts of a shared-memory access: banks are 4 bytes wide; 8-byte accesses go by half warps, 16-byte ones by
// quarters, and by twice as many lanes at once where neighbours, or next but one neighbours, agree. So counted ncu on an
// H200, for 23 patterns of addresses; its conflicts are the wavefronts beyond one of each such part.
void count_banks(Warp &w, u32 m, const u32 *off, u32 bytes) {
    PcCount &pc = w.launch->pc_counts[w.pc];
    u32 lanes = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8;
    if (lanes < 32 && (pairs_agree(m, off, 1) || pairs_agree(m, off, 2))) lanes *= 2;
    for (u32 from = 0; from < 32; from += lanes) {
        u32 part = lanes == 32 ? m : (m >> from) & ((1u << lanes) - 1);
        if (!part) continue;
        pc.shared_ideal++;
        u32 list[32][32], count[32] = {0}, worst = 0;
        for (u32 t = part; t; t &= t - 1) {
            u32 o = off[from + first(t)];
            for (u32 word = o >> 2; word <= (o + bytes - 1) >> 2; word++) {
                u32 bank = word & 31, n = count[bank], k = 0;
                while (k < n && list[bank][k] != word) k++;
                if (k == n) {
                    list[bank][n] = word;
                    count[bank] = n + 1;
                    if (n + 1 > worst) worst = n + 1;
                }
            }
        }
        pc.shared_real += worst;
    }
}

// -- shared memory: the block that owns an address, and its checks

void shared_bounds(Warp &w, u32 m, const u64 *a, u32 bytes, SharedAt &s, bool write) {
    Launch &L = *w.launch;
    s.own = true;
    for (u32 t = m; t; t &= t - 1) {
        u32 l = first(t);
        u32 rank = u32(a[l] >> RANK_SHIFT) & 255;
        s.block[l] = w.block;
        s.off[l] = u32(a[l] & ((1u << RANK_SHIFT) - 1));
        if (rank) {
            if (rank > L.cluster_size)
                report(w, K_BOUNDS_SHARED, l, a[l], "shared memory of block %u of a cluster of %u", rank - 1,
                       L.cluster_size);
            s.block[l] = w.block->cluster->blocks[rank - 1].get();
            if (s.block[l] != w.block) s.own = false;
            if (s.block[l]->done)
                report(w, K_BOUNDS_SHARED, l, a[l], "shared memory of block %u of the cluster, which has exited",
                       rank - 1);
        }
        if ((a[l] >> 32) != 0 || s.off[l] < L.system_shared || u64(s.off[l]) + bytes > L.shared_size) {
            finding_at(w, K_BOUNDS_SHARED, l, a[l]).size = bytes;
            L.args->finding->write = write;
            report(w, K_BOUNDS_SHARED, l, a[l], "a %s of %u bytes; the block has %u bytes of shared memory",
                   write ? "write" : "read", bytes, L.shared_size - L.system_shared);
        }
    }
}

namespace {
inline bool all_set(const u8 *p, u32 n) {
    u64 v;
    for (; n >= 8; n -= 8, p += 8) {
        memcpy(&v, p, 8);
        if (v != 0x0101010101010101ull) return false;
    }
    for (u32 k = 0; k < n; k++)
        if (!p[k]) return false;
    return true;
}
inline bool any_set(const u8 *p, u32 n) {
    u64 v;
    for (; n >= 8; n -= 8, p += 8) {
        memcpy(&v, p, 8);
        if (v) return true;
    }
    for (u32 k = 0; k < n; k++)
        if (p[k]) return true;
    return false;
}

}  // namespace

void check_read(Warp &w, u32 lane, Block &b, u32 off, u32 bytes) {
    Launch &L = *w.launch;
    if (L.check(C_FLIGHT) && any_set(&b.in_flight[off], bytes)) {
        while (!b.in_flight[off]) off++;
        report(w, K_IN_FLIGHT, lane, off, "a read of %u shared bytes that an asynchronous copy is still writing",
               bytes);
    }
    if (L.check(C_INIT) && !all_set(&b.initialised[off], bytes)) {
        while (b.initialised[off]) off++;
        report(w, K_UNINITIALISED, lane, off, "a read of shared memory that nothing has written");
    }
}
void check_write(Warp &w, u32 lane, Block &b, u32 off, u32 bytes) {
    Launch &L = *w.launch;
    if (L.check(C_FLIGHT) && any_set(&b.in_flight[off], bytes)) {
        report(w, K_IN_FLIGHT, lane, off, "a write of %u shared bytes that an asynchronous copy is still writing",
               bytes);
    }
    if (L.check(C_INIT)) memset(&b.initialised[off], 1, bytes);
}

namespace {

void shared_access(Warp &w, u32 m, const u64 *a, u32 bytes, Access kind, bool strong, SharedAt &s) {
    shared_bounds(w, m, a, bytes, s, kind != READ);
    for (u32 t = m; t; t &= t - 1) {
        u32 l = first(t);
        if (w.launch->races.shared)
            race_shared(w, l, *s.block[l], s.off[l], bytes, u8((kind != READ ? A_WRITE : 0) | (strong ? A_STRONG : 0)));
        if (kind != WRITE) check_read(w, l, *s.block[l], s.off[l], bytes);
        if (kind != READ) check_write(w, l, *s.block[l], s.off[l], bytes);
    }
    if (w.launch->check(C_COUNT)) count_banks(w, m, s.off, bytes);
}

// -- pointers to the bytes of an access, whatever its space

struct Pointers {
    u8 *at[32];
};

void resolve_local(Warp &w, u32 m, const u64 *a, u32 bytes, Pointers &p) {
    u32 size = w.launch->args->local_size;
    for (u32 t = m; t; t &= t - 1) {
        u32 l = first(t);
        if (a[l] + bytes > size)
            report(w, K_BOUNDS_LOCAL, l, a[l], "an access of %u bytes; a thread has %u bytes of local memory", bytes,
                   size);
        p.at[l] = w.local + size_t(size) * l + a[l];
    }
}
void resolve_param(Warp &w, u32 m, const u64 *a, u32 bytes, Pointers &p) {
    const LaunchArgs &args = *w.launch->args;
    for (u32 t = m; t; t &= t - 1) {
        u32 l = first(t);
        if (a[l] + bytes > args.params_size)
            report(w, K_BOUNDS_LOCAL, l, a[l], "a read of %u bytes; the parameters have %u", bytes,
                   u32(args.params_size));
        p.at[l] = const_cast<u8 *>(args.params) + a[l];
    }
}
void resolve_shared(Warp &w, u32 m, const u64 *a, u32 bytes, Access kind, bool strong, Pointers &p) {
    SharedAt s;
    shared_access(w, m, a, bytes, kind, strong, s);
    for (u32 t = m; t; t &= t - 1) p.at[first(t)] = s.block[first(t)]->shared + s.off[first(t)];
}
void resolve_global(Warp &w, u32 m, const u64 *a, u32 bytes, Access kind, bool strong, Pointers &p) {
    global_access(w, m, a, nullptr, bytes, kind, strong);
    for (u32 t = m; t; t &= t - 1) p.at[first(t)] = reinterpret_cast<u8 *>(a[first(t)]);
}

void resolve(Warp &w, const Ins &i, u32 m, u64 *a, u32 bytes, u8 space, Access kind, Pointers &p) {
    check_aligned(w, m, a, bytes);
    bool strong = i.flags & STRONG;
    switch (space) {
        case GLOBAL:
        case CONST: resolve_global(w, m, a, bytes, kind, strong, p); break;
        case SHARED: resolve_shared(w, m, a, bytes, kind, strong, p); break;
        case LOCAL: resolve_local(w, m, a, bytes, p); break;
        case PARAM: resolve_param(w, m, a, bytes, p); break;
        default: {
            u32 rest = m;
            while (rest) {
                u64 top = a[first(rest)] & SPACE_MASK;
                u32 same = 0;
                for (u32 t = rest; t; t &= t - 1) same |= u32((a[first(t)] & SPACE_MASK) == top) << first(t);
                rest &= ~same;
                if (top == 0) {
                    resolve_global(w, same, a, bytes, kind, strong, p);
                    continue;
                }
                u64 offset[32];
                for (u32 t = same; t; t &= t - 1) offset[first(t)] = a[first(t)] & ~SPACE_MASK;
                if (top == SHARED_BASE) resolve_shared(w, same, offset, bytes, kind, strong, p);
                else if (top == LOCAL_BASE) resolve_local(w, same, offset, bytes, p);
                else if (top == PARAM_BASE && kind == READ) resolve_param(w, same, offset, bytes, p);
                else report(w, K_BOUNDS_GLOBAL, first(same), a[first(same)], "an address that lies in no memory");
            }
        }
    }
}

// ld: o[0..7] results, o[12] address; a elements of b bytes; c space; d bytes of the address register
template <class T>
void load(Warp &w, const Ins &i, u32 m, const Pointers &p) {
    for (u32 j = 0; j < i.a; j++) {
        if (i.o[j] == NONE) continue;
        if (sizeof(T) == 8 || (i.flags & WIDE_REG)) {
            u64 *d = w.reg<u64>(i.o[j]);
            for (u32 t = m; t; t &= t - 1) {
                u32 l = first(t);
                T v;
                memcpy(&v, p.at[l] + j * sizeof(T), sizeof(T));
                d[l] = i.flags & SIGNED ? u64(s64(std::make_signed_t<T>(v))) : u64(v);
            }
        } else {
            u32 *d = w.reg<u32>(i.o[j]);
            for (u32 t = m; t; t &= t - 1) {
                u32 l = first(t);
                T v;
                memcpy(&v, p.at[l] + j * sizeof(T), sizeof(T));
                d[l] = i.flags & SIGNED ? u32(s32(std::make_signed_t<T>(v))) : u32(v);
            }
        }
    }
}
template <class T>
void store(Warp &w, const Ins &i, u32 m, const Pointers &p) {
    for (u32 j = 0; j < i.a; j++) {
        if (sizeof(T) == 8 || (i.flags & WIDE_REG)) {
            const u64 *s = w.reg<u64>(i.o[j]);
            for (u32 t = m; t; t &= t - 1) {
                T v = T(s[first(t)]);
                memcpy(p.at[first(t)] + j * sizeof(T), &v, sizeof(T));
            }
        } else {
            const u32 *s = w.reg<u32>(i.o[j]);
            for (u32 t = m; t; t &= t - 1) {
                T v = T(s[first(t)]);
                memcpy(p.at[first(t)] + j * sizeof(T), &v, sizeof(T));
            }
        }
    }
}

// Where a release leaves its knowledge.
u64 sync_key(Warp &w, u8 space, u64 a) {
    u64 top = a & SPACE_MASK;
    if (space == SHARED) top = SHARED_BASE;
    if (top != SHARED_BASE) return a;
    u32 rank = u32(a >> RANK_SHIFT) & 255;
    u32 block = rank ? w.block->cluster->blocks[rank - 1]->linear : w.block->linear;
    return SHARED_BASE | u64(block) << RANK_SHIFT | (a & ((1u << RANK_SHIFT) - 1));
}
void order_before(Warp &w, const Ins &i, u32 m, const u64 *a, bool exchange) {  // of a strong write
    if (!(i.flags & STRONG) || !w.launch->races.on()) return;
    for (u32 t = m; t; t &= t - 1) {
        u32 l = first(t);
        u64 key = sync_key(w, i.c, a[l]);
        if (i.flags & RELEASE) release_at(w, l, key, i.flags & CTA_SCOPE);
        else relaxed_write(w, l, key, exchange);
    }
}
void order_after(Warp &w, const Ins &i, u32 m, const u64 *a) {  // of a strong read
    if (!(i.flags & STRONG) || !w.launch->races.on()) return;
    for (u32 t = m; t; t &= t - 1) {
        u32 l = first(t);
        u64 key = sync_key(w, i.c, a[l]);
        if (i.flags & ACQUIRE) acquire_at(w, l, key, i.flags & CTA_SCOPE);
        else relaxed_read(w, l, key);
    }
}

void ld(Warp &w, const Ins &i, u32 m) {
    u64 a[32];
    Pointers p;
    addresses(w, i.o[12], i.d, i.imm, m, a);
    resolve(w, i, m, a, u32(i.a) * i.b, i.c, READ, p);
    switch (i.b) {
        case 1: load<u8>(w, i, m, p); break;
        case 2: load<u16>(w, i, m, p); break;
        case 4: load<u32>(w, i, m, p); break;
        default: load<u64>(w, i, m, p);
    }
    order_after(w, i, m, a);
}
void ld_param(Warp &w, const Ins &i, u32 m) {  // the same value for all lanes
    u8 v[64];
    memcpy(v, w.launch->args->params + i.imm, u32(i.a) * i.b);
    Pointers p;
    for (u32 l = 0; l < 32; l++) p.at[l] = v;
    switch (i.b) {
        case 1: load<u8>(w, i, m, p); break;
        case 2: load<u16>(w, i, m, p); break;
        case 4: load<u32>(w, i, m, p); break;
        default: load<u64>(w, i, m, p);
    }
}
// Lanes of one store may write the same bytes only if they write the same value.
void check_lost(Warp &w, const Ins &i, u32 m, const Pointers &p, const u64 *a) {
    bool wide = i.b == 8 || (i.flags & WIDE_REG);
    for (u32 t = m; t; t &= t - 1) {
        u32 l = first(t);
        for (u32 j = 0; j < i.a; j++) {
            u64 v = wide ? w.reg<u64>(i.o[j])[l] : w.reg<u32>(i.o[j])[l];
            if (memcmp(p.at[l] + j * i.b, &v, i.b))
                report(w, i.c == SHARED ? K_RACE_SHARED : K_RACE_GLOBAL, l, a[l],
                       "lanes of one store write different values to the same bytes");
        }
    }
}
void st(Warp &w, const Ins &i, u32 m) {
    u64 a[32];
    Pointers p;
    addresses(w, i.o[12], i.d, i.imm, m, a);
    resolve(w, i, m, a, u32(i.a) * i.b, i.c, WRITE, p);
    order_before(w, i, m, a, false);
    switch (i.b) {
        case 1: store<u8>(w, i, m, p); break;
        case 2: store<u16>(w, i, m, p); break;
        case 4: store<u32>(w, i, m, p); break;
        default: store<u64>(w, i, m, p);
    }
    if (i.c != LOCAL && (w.launch->races.shared || w.launch->races.global) && (m & (m - 1))) check_lost(w, i, m, p, a);
    w.launch->changes++;
}

// -- atomics

enum AtomOp : u8 { A_ADD, A_MIN, A_MAX, A_INC, A_DEC, A_AND, A_OR, A_XOR, A_EXCH, A_CAS };
enum AtomType : u8 { T_U32, T_S32, T_F32, T_U64, T_S64, T_F64, T_F16X2, T_BF16X2, T_F16, T_BF16 };

template <class T>
T apply(u8 op, T old, T b, T c) {
    switch (op) {
        case A_ADD: return T(old + b);
        case A_MIN: return b < old ? b : old;
        case A_MAX: return b > old ? b : old;
        case A_EXCH: return b;
        default: break;
    }
    if constexpr (std::is_integral_v<T>) {
        using U = std::make_unsigned_t<T>;
        switch (op) {
            case A_INC: return U(old) >= U(b) ? T(0) : T(old + 1);
            case A_DEC: return old == 0 || U(old) > U(b) ? b : T(old - 1);
            case A_AND: return old & b;
            case A_OR: return old | b;
            case A_XOR: return old ^ b;
            case A_CAS: return old == b ? c : old;
            default: break;
        }
    }
    return old;
}
template <class H>
u32 add_halves(u8 op, u32 old, u32 b, u32 halves) {
    u32 r = 0;
    for (u32 k = 0; k < halves; k++) {
        f64 x = H::widen(u16(old >> (16 * k))), y = H::widen(u16(b >> (16 * k)));
        r |= finish<H>(op == A_MIN ? std::min(x, y) : op == A_MAX ? std::max(x, y) : x + y, 0) << (16 * k);
    }
    return r;
}

template <class S>
void atom_lanes(Warp &w, const Ins &i, u32 m, const Pointers &p) {
    S *d = i.o[0] == NONE ? nullptr : w.reg<S>(i.o[0]);
    const S *vb = w.reg<S>(i.o[1]), *vc = i.o[2] == NONE ? nullptr : w.reg<S>(i.o[2]);
    S results[32];
    u32 shift = w.launch->random ? w.launch->rng() & 31 : 0;  // lanes come in any order
    for (u32 n = 0; n < 32; n++) {
        u32 l = (n + shift) & 31;
        if (!((m >> l) & 1)) continue;
        S old = 0, b = vb[l], c = vc ? vc[l] : 0, now;
        u32 bytes = i.b >= T_F16 ? 2 : sizeof(S);
        memcpy(&old, p.at[l], bytes);
        switch (i.b) {
            case T_U32: now = S(apply<u32>(i.a, u32(old), u32(b), u32(c))); break;
            case T_S32: now = S(u32(apply<s32>(i.a, s32(old), s32(b), s32(c)))); break;
            case T_F32: now = S(as_u32(apply<f32>(i.a, as_f32(u32(old)), as_f32(u32(b)), 0))); break;
            case T_U64: now = S(apply<u64>(i.a, u64(old), u64(b), u64(c))); break;
            case T_S64: now = S(u64(apply<s64>(i.a, s64(old), s64(b), s64(c)))); break;
            case T_F64: now = S(as_u64(apply<f64>(i.a, as_f64(u64(old)), as_f64(u64(b)), 0))); break;
            case T_F16X2: now = S(add_halves<F16>(i.a, u32(old), u32(b), 2)); break;
            case T_BF16X2: now = S(add_halves<Bf16>(i.a, u32(old), u32(b), 2)); break;
            case T_F16: now = S(add_halves<F16>(i.a, u32(old), u32(b), 1)); break;
            default: now = S(add_halves<Bf16>(i.a, u32(old), u32(b), 1)); break;
        }
        memcpy(p.at[l], &now, bytes);
        results[l] = old;
    }
    if (d) {
        for (u32 t = m; t; t &= t - 1) d[first(t)] = results[first(t)];
    }
    w.launch->changes++;
}
void atom(Warp &w, const Ins &i, u32 m) {  // o[0] result, o[1] b, o[2] c, o[12] address; a operation, b type, c space
    u64 a[32];
    Pointers p;
    addresses(w, i.o[12], i.d, i.imm, m, a);
    bool wide = i.b == T_U64 || i.b == T_S64 || i.b == T_F64;
    resolve(w, i, m, a, wide ? 8 : i.b >= T_F16 ? 2 : 4, i.c, ATOMIC, p);
    order_before(w, i, m, a, true);
    if (wide) atom_lanes<u64>(w, i, m, p);
    else atom_lanes<u32>(w, i, m, p);
    order_after(w, i, m, a);
}

// -- asynchronous copies

void perform(Warp &w, const CopyOp &c, u32 l) {
    u8 *d = w.block->shared + c.dst[l];
    memcpy(d, reinterpret_cast<const void *>(c.src[l]), c.n[l]);
    memset(d + c.n[l], 0, c.bytes - c.n[l]);
}

void cp_async(Warp &w, const Ins &i,
              u32 m) {  // o[0] destination, o[1] source, o[2] source size, o[3] ignore the source; a bytes
    Launch &L = *w.launch;
    u64 dst[32], src[32];
    addresses(w, i.o[0], i.b, i.imm, m, dst);
    addresses(w, i.o[1], i.d, s32(i.target), m, src);
    check_aligned(w, m, dst, i.a);
    CopyOp op;
    op.pc = w.pc;
    op.bytes = i.a;
    u32 reads = 0;
    for (u32 t = m; t; t &= t - 1) {
        u32 l = first(t);
        u32 n = i.o[2] == NONE ? i.a : w.reg<u32>(i.o[2])[l];
        if (i.o[3] != NONE && (w.pred(i.o[3]) >> l) & 1) n = 0;
        if (n > i.a) report(w, K_BOUNDS_GLOBAL, l, src[l], "cp.async of %u bytes from a source of %u", i.a, n);
        op.n[l] = u8(n);
        op.src[l] = src[l];
        reads |= u32(n > 0) << l;
    }
    if (reads) {
        check_aligned(w, reads, src, i.a);
        global_access(w, reads, src, op.n, i.a, READ, false);
    }
    SharedAt s;
    shared_bounds(w, m, dst, i.a, s, true);
    for (u32 t = m; t; t &= t - 1) {
        u32 l = first(t);
        op.dst[l] = s.off[l];
        if (L.races.shared) race_shared(w, l, *w.block, s.off[l], i.a, A_WRITE | A_FLIGHT);
        check_write(w, l, *w.block, s.off[l], i.a);
        if (L.check(C_FLIGHT)) memset(&w.block->in_flight[s.off[l]], 1, i.a);
    }
    if (L.check(C_COUNT)) count_banks(w, m, s.off, i.a);
    op.early = L.cp_async == 1 || (L.cp_async == 2 && (L.rng() & 1));
    op.number = ++w.copies_started;
    for (u32 rest = m; rest;) {  // lanes may be in different groups
        u32 g = w.committed[first(rest)], same = 0;
        for (u32 t = rest; t; t &= t - 1) same |= u32(w.committed[first(t)] == g) << first(t);
        rest &= ~same;
        op.mask = same;
        op.group = g;
        if (op.early)
            for (u32 t = same; t; t &= t - 1) perform(w, op, first(t));
        w.copies.push_back(op);
    }
}
void cp_commit(Warp &w, const Ins &, u32 m) {
    for (u32 t = m; t; t &= t - 1) w.committed[first(t)]++;
}
void cp_wait(Warp &w, const Ins &i, u32 m) { wait_copies(w, m, u32(i.imm)); }
void cp_wait_all(Warp &w, const Ins &i, u32 m) {
    cp_commit(w, i, m);
    wait_copies(w, m, 0);
}

// -- matrices of 8 x 8 elements of 16 bits; lane l gives the address of row l % 8 of matrix l / 8

void ldmatrix(Warp &w, const Ins &i, u32 m) {  // o[0..3] results, o[12] address; a matrices, b transposed
    u64 a[32];
    addresses(w, i.o[12], i.d, i.imm, m, a);
    u32 rows = i.a == 4 ? FULL : (1u << (8 * i.a)) - 1;
    if (i.c == GENERIC)
        for (u32 t = rows; t; t &= t - 1) a[first(t)] &= ~SPACE_MASK;
    check_aligned(w, rows, a, 16);
    SharedAt s;
    shared_access(w, rows, a, 16, READ, false, s);
    for (u32 k = 0; k < i.a; k++) {
        u16 tile[8][8];
        for (u32 r = 0; r < 8; r++) memcpy(tile[r], s.block[8 * k + r]->shared + s.off[8 * k + r], 16);
        u32 *d = w.reg<u32>(i.o[k]);
        for (u32 l = 0; l < 32; l++) {
            u32 row = l >> 2, col = 2 * (l & 3);
            d[l] = i.b ? u32(tile[col][row]) | u32(tile[col + 1][row]) << 16
                       : u32(tile[row][col]) | u32(tile[row][col + 1]) << 16;
        }
    }
}
void stmatrix(Warp &w, const Ins &i, u32 m) {
    u64 a[32];
    addresses(w, i.o[12], i.d, i.imm, m, a);
    u32 rows = i.a == 4 ? FULL : (1u << (8 * i.a)) - 1;
    if (i.c == GENERIC)
        for (u32 t = rows; t; t &= t - 1) a[first(t)] &= ~SPACE_MASK;
    check_aligned(w, rows, a, 16);
    SharedAt s;
    shared_access(w, rows, a, 16, WRITE, false, s);
    for (u32 k = 0; k < i.a; k++) {
        u16 tile[8][8];
        const u32 *v = w.reg<u32>(i.o[k]);
        for (u32 l = 0; l < 32; l++) {
            u32 row = l >> 2, col = 2 * (l & 3);
            (i.b ? tile[col][row] : tile[row][col]) = u16(v[l]);
            (i.b ? tile[col + 1][row] : tile[row][col + 1]) = u16(v[l] >> 16);
        }
        for (u32 r = 0; r < 8; r++) memcpy(s.block[8 * k + r]->shared + s.off[8 * k + r], tile[r], 16);
    }
    w.launch->changes++;
}

// -- fences, printf, assert, trap

void fence(Warp &w, const Ins &i, u32 m) { fence_lanes(w, m, i.flags & CTA_SCOPE); }
void wait_for_turn(Warp &w, const Ins &, u32 m) { w.waited |= m; }
void warp_sync(Warp &w, const Ins &i, u32 m) {
    const u32 *masks = w.reg<u32>(i.o[15]);
    while (m) {  // lanes of different masks do not wait for each other
        u32 same = m & masks[first(m)];
        sync_warp(w, same);
        m &= ~same;
    }
}

u64 param64(Warp &w, u32 lane, u64 offset) {
    u64 v;
    memcpy(&v, w.local + size_t(w.launch->args->local_size) * lane + offset, 8);
    return v;
}
std::string text_at(u64 address) {  // a string of the module
    return address && !(address & SPACE_MASK) ? std::string(reinterpret_cast<const char *>(address)) : "?";
}
void print(Launch &L, const std::string &text) {
    LaunchArgs &a = *L.args;
    for (char c : text)
        if (a.output_used < a.output_size) a.output[a.output_used++] = c;
}
void vprintf_lane(Warp &w, u32 lane, u64 format, u64 arguments) {
    std::string f = text_at(format), out;
    const u8 *base = (arguments & SPACE_MASK) == LOCAL_BASE
                         ? w.local + size_t(w.launch->args->local_size) * lane + (arguments & ~SPACE_MASK)
                         : reinterpret_cast<const u8 *>(arguments);
    size_t at = 0;
    auto take = [&](size_t n) {
        at = (at + n - 1) / n * n;
        u64 v = 0;
        memcpy(&v, base + at, n);
        at += n;
        return v;
    };
    for (size_t k = 0; k < f.size(); k++) {
        if (f[k] != '%') {
            out += f[k];
            continue;
        }
        std::string spec = "%";
        bool wide = false;
        char text[256];
        for (k++; k < f.size(); k++) {
            char c = f[k];
            if (c == 'l' || c == 'h' || c == 'z' || c == 'j' || c == 't') {
                wide = wide || c != 'h';
                continue;
            }
            if (c == '*') {
                spec += std::to_string(s32(take(4)));
                continue;
            }
            if (c == '%') {
                out += '%';
            } else if (c == 's') {
                out += text_at(take(8));
            } else if (c == 'p') {
                snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(take(8)));
                out += text;
            } else if (strchr("diuxXoc", c)) {
                u64 v = take(wide ? 8 : 4);
                bool sign = c == 'd' || c == 'i';
                if (c == 'c') spec += c;
                else (spec += "ll") += c;
                if (c == 'c') snprintf(text, sizeof text, spec.c_str(), int(v));
                else
                    snprintf(text, sizeof text, spec.c_str(),
                             sign && !wide ? static_cast<long long>(s32(v)) : static_cast<long long>(v));
                out += text;
            } else if (strchr("feEgGaAF", c)) {
                spec += c;
                snprintf(text, sizeof text, spec.c_str(), as_f64(take(8)));
                out += text;
            } else {
                spec += c;
                continue;
            }
            break;
        }
    }
    print(*w.launch, out);
}
void printf_call(Warp &w, const Ins &i, u32 m) {  // imm: offsets of the two parameters and of the result, 16 bits each
    for (u32 t = m; t; t &= t - 1) {
        u32 l = first(t);
        vprintf_lane(w, l, param64(w, l, u64(i.imm) & 0xffff), param64(w, l, (u64(i.imm) >> 16) & 0xffff));
        u32 one = 1;
        memcpy(w.local + size_t(w.launch->args->local_size) * l + ((u64(i.imm) >> 32) & 0xffff), &one, 4);
    }
}
void assert_call(Warp &w, const Ins &i, u32 m) {  // imm: offsets of message, file, line
    u32 l = first(m);
    u64 imm = u64(i.imm);
    report(w, K_ASSERT, l, 0, "assertion `%s' failed (%s:%u)", text_at(param64(w, l, imm & 0xffff)).c_str(),
           text_at(param64(w, l, (imm >> 16) & 0xffff)).c_str(), u32(param64(w, l, (imm >> 32) & 0xffff)));
}
void trap(Warp &w, const Ins &, u32 m) { report(w, K_TRAP, first(m), 0, "the kernel executed a trap"); }
void mapa(Warp &w, const Ins &i,
          u32 m) {  // d = the address a in the shared memory of block b of the cluster; a: 64 bits, b: generic
    const u32 *rank = w.reg<u32>(i.o[2]);
    for (u32 t = m; t; t &= t - 1) {
        u32 l = first(t);
        u64 a = i.a ? w.reg<u64>(i.o[1])[l] : w.reg<u32>(i.o[1])[l];
        if (rank[l] >= w.launch->cluster_size)
            report(w, K_BOUNDS_SHARED, l, a, "mapa names block %u of a cluster of %u", rank[l], w.launch->cluster_size);
        // On a GPU a block's own addresses have its number in their upper bits, too: what mapa makes of 0 is no distance.
        u32 offset = u32(a & ((1u << RANK_SHIFT) - 1));
        if (offset < w.launch->system_shared || offset >= w.launch->shared_size)
            report(w, K_BOUNDS_SHARED, l, a, "mapa of an address that is not in the block's %u bytes of shared memory",
                   w.launch->shared_size - w.launch->system_shared);
        u64 r = (a & SPACE_MASK) | (a & ((1u << RANK_SHIFT) - 1)) | u64(rank[l] + 1) << RANK_SHIFT;
        if (i.a) w.reg<u64>(i.o[0])[l] = r;
        else w.reg<u32>(i.o[0])[l] = u32(r);
    }
}
void getctarank(Warp &w, const Ins &i, u32 m) {
    u32 *d = w.reg<u32>(i.o[0]);
    for (u32 t = m; t; t &= t - 1) {
        u32 l = first(t);
        u64 a = (i.a ? w.reg<u64>(i.o[1])[l] : w.reg<u32>(i.o[1])[l]) & ~SPACE_MASK;
        d[l] = a >> RANK_SHIFT ? u32(a >> RANK_SHIFT) - 1 : w.block->rank;
    }
}

OP("ld", ld)
OP("ld.param", ld_param)
OP("st", st)
OP("atom", atom)
OP("cp.async", cp_async)
OP("cp.async.commit_group", cp_commit)
OP("cp.async.wait_group", cp_wait)
OP("cp.async.wait_all", cp_wait_all)
OP("ldmatrix", ldmatrix)
OP("stmatrix", stmatrix)
OP("fence", fence)
OP("bar.warp.sync", warp_sync)
OP("griddepcontrol.wait", wait_for_turn)
OP("vprintf", printf_call)
OP("__assertfail", assert_call)
OP("trap", trap)
OP("mapa", mapa)
OP("getctarank", getctarank)

}  // namespace

namespace {
// The copies of some lanes of one instruction have happened and are known to have.
void land(Warp &w, CopyOp &c, u32 due) {
    Launch &L = *w.launch;
    c.mask &= ~due;
    for (; due; due &= due - 1) {
        u32 l = first(due);
        if (!c.early) perform(w, c, l);
        if (L.check(C_FLIGHT)) memset(&w.block->in_flight[c.dst[l]], 0, c.bytes);
        if (L.check(C_INIT)) memset(&w.block->initialised[c.dst[l]], 1, c.bytes);
        if (L.races.shared) race_landed(w, l, *w.block, c.dst[l], c.bytes);
    }
}
void drop_landed(Warp &w) {
    while (!w.copies.empty() && !w.copies.front().mask) w.copies.pop_front();
    w.launch->changes++;
}
}  // namespace

// Completes the copies of the lanes' groups except for the `pending_allowed` latest ones.
void wait_copies(Warp &w, u32 mask, u32 pending_allowed) {
    for (CopyOp &c : w.copies) {
        u32 due = 0;
        for (u32 t = c.mask & mask; t; t &= t - 1)
            due |= u32(s32(c.group) < s32(w.committed[first(t)] - pending_allowed)) << first(t);
        if (due) land(w, c, due);
    }
    drop_landed(w);
}

void land_copies(Warp &w, u32 lane, u32 number) {
    for (CopyOp &c : w.copies)
        if ((c.mask >> lane) & 1 && s32(c.number - number) <= 0) land(w, c, 1u << lane);
    drop_landed(w);
}

void check_exit(Warp &w, u32 mask) {
    for (CopyOp &c : w.copies) {
        u32 open = c.mask & mask;
        if (!open) continue;
        if (w.launch->check(C_WAITED)) {
            w.pc = c.pc;
            report(w, K_NEVER_WAITED, first(open), c.dst[first(open)],
                   "the thread exits without having waited for this copy");
        }
        if (!c.early)
            for (u32 t = open; t; t &= t - 1) perform(w, c, first(t));
        c.mask &= ~open;
    }
}
