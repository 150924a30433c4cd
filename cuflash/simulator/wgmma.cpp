// Matrix products of a warpgroup (four warps, 128 threads): wgmma.mma_async, what orders it, and setmaxnreg.
//
// A product is asynchronous: it reads shared memory and the registers of A, and writes its accumulators, at any time from
// its instruction to the wgmma.wait_group that waits for it. Here each warp computes its own 16 of the 64 rows, either at
// once or when it waits, and the checks see to it that nobody could tell. The four warps do not wait for each other, but
// have to issue the same products.
#include "access.hpp"

namespace {

enum Form : u8 { A_IN_REGISTERS = 1, TRANSPOSED_A = 2, TRANSPOSED_B = 4, MINUS_A = 8, MINUS_B = 16 };

// A matrix in shared memory, as a descriptor names it. Addresses are those of 16 bytes: T elements (8 of 16 bits, 16 of
// 8 bits) along k if the matrix is K-major, along m or n if it is MN-major. Both tables are the PTX manual's "canonical
// layouts".
struct Matrix {
    u32 start, leading, stride, width;  // bytes; width is that of a swizzled row, 0 if nothing is swizzled
    explicit Matrix(u64 d)
        : start(u32(d & 0x3fff) << 4),
          leading(u32((d >> 16) & 0x3fff) << 4),
          stride(u32((d >> 32) & 0x3fff) << 4),
          width((0x20408000u >> (8 * (d >> 62))) & 0xff) {}
    u32 swizzled(u32 a) const { return width ? a ^ (((a >> 7) & (width / 16 - 1)) << 4) : a; }
    u32 k_major(u32 row, u32 chunk) const {  // elements [row][T chunk ..]
        u32 at = start + row / 8 * stride;
        return swizzled(width ? at + row % 8 * width + 16 * chunk : at + row % 8 * 16 + chunk * leading);
    }
    u32 mn_major(u32 chunk, u32 k) const {  // elements [T chunk ..][k]
        if (!width) return start + chunk * stride + k / 8 * leading + k % 8 * 16;
        u32 wide = width / 16;
        return swizzled(start + chunk / wide * leading + chunk % wide * 16 + k / 8 * stride + k % 8 * width);
    }
};

// Calls f(address, row or first row, k or first k) for the 16-byte pieces of `rows` rows, those of a core matrix (8 of
// them, which the hardware reads at once) one after another. `depth` is the number of pieces along k, K-major: 2.
template <class F>
void pieces(const Matrix &x, bool mn_major, u32 first_row, u32 rows, u32 elements, F f) {
    if (mn_major) {
        for (u32 c = first_row / 8; c < (first_row + rows) / 8; c++)
            for (u32 k = 0; k < 16; k++) f(x.mn_major(c, k), 8 * c - first_row, k);
    } else {
        for (u32 r = first_row; r < first_row + rows; r += 8)
            for (u32 c = 0; c < 2; c++)
                for (u32 n = 0; n < 8; n++) f(x.k_major(r + n, c), r + n - first_row, c * elements);
    }
}

struct HalfElement {
    static constexpr u32 N = 8;  // of 16 bytes
    static f32 at(const u8 *p, u32 e) {
        u16 v;
        memcpy(&v, p + 2 * e, 2);
        return F16::widen(v);
    }
};
struct Bf16Element {
    static constexpr u32 N = 8;
    static f32 at(const u8 *p, u32 e) {
        u16 v;
        memcpy(&v, p + 2 * e, 2);
        return Bf16::widen(v);
    }
};
struct E4m3Element {
    static constexpr u32 N = 16;
    static f32 at(const u8 *p, u32 e) { return E4m3::widen(p[e]); }
};
struct E5m2Element {
    static constexpr u32 N = 16;
    static f32 at(const u8 *p, u32 e) { return E5m2::widen(p[e]); }
};

u32 elements(const Ins &i) { return i.b < 2 ? 8 : 16; }  // of 16 bytes
u32 columns(const Ins &i) { return 8 * (u32(i.a) + 1); }

// out[k][row]
template <class E>
void read_matrix(Warp &w, u64 descriptor, bool mn_major, u32 first_row, u32 rows, f32 *out) {
    const u8 *shared = w.block->shared;
    pieces(Matrix(descriptor), mn_major, first_row, rows, E::N, [&](u32 at, u32 row, u32 k) {
        f32 *to = out + k * rows + row, v[E::N];
        for (u32 e = 0; e < E::N; e++) v[e] = E::at(shared + at, e);
        if (mn_major) memcpy(to, v, sizeof v);
        else
            for (u32 e = 0; e < E::N; e++) to[e * rows] = v[e];
    });
}

// Fragments of A, r < 4, n elements of a register: row lane / 4 + 8 (r & 1), columns (r >> 1) 4 n + (lane & 3) n + e.
template <class E>
void read_registers(Warp &w, const Ins &i, f32 *out) {
    constexpr u32 n = E::N / 4;
    for (u32 r = 0; r < 4; r++) {
        const u32 *s = w.reg<u32>(i.o[r]);
        for (u32 l = 0; l < 32; l++) {
            u8 bytes[4];
            memcpy(bytes, &s[l], 4);
            for (u32 e = 0; e < n; e++)
                out[((r >> 1) * 4 * n + (l & 3) * n + e) * 16 + l / 4 + 8 * (r & 1)] = E::at(bytes, e);
        }
    }
}

template <class E>
void read_operands(Warp &w, const WarpProduct &p, f32 *a, f32 *b) {
    const Ins &i = *p.ins;
    if (i.c & A_IN_REGISTERS) read_registers<E>(w, i, a);
    else read_matrix<E>(w, p.a, i.c & TRANSPOSED_A, 16 * (w.index & 3), 16, a);
    read_matrix<E>(w, p.b, i.c & TRANSPOSED_B, 0, columns(i), b);
}

// The accumulator: register r of a lane is row lane / 4 + 8 (r >> 1 & 1), column 8 (r >> 2) + 2 (lane & 3) + (r & 1).
void perform(Warp &w, WarpProduct &p) {
    if (p.done) return;
    p.done = true;
    const Ins &i = *p.ins;
    const u32 N = columns(i), K = 2 * elements(i);
    alignas(64) static thread_local f32 a[32 * 16], b[32 * 256], c[16][256];
    switch (i.b) {
        case 0: read_operands<HalfElement>(w, p, a, b); break;
        case 1: read_operands<Bf16Element>(w, p, a, b); break;
        case 2: read_operands<E4m3Element>(w, p, a, b); break;
        default: read_operands<E5m2Element>(w, p, a, b);
    }
    const f32 sign = bool(i.c & MINUS_A) != bool(i.c & MINUS_B) ? -1.f : 1.f;
    const u32 *slots = w.launch->args->tables + i.target;
    for (u32 r = 0; r < N / 2; r++) {
        const f32 *s = w.reg<f32>(u16(slots[r]));
        for (u32 l = 0; l < 32; l++)
            c[l / 4 + 8 * ((r >> 1) & 1)][8 * (r >> 2) + 2 * (l & 3) + (r & 1)] = p.add ? s[l] : 0;
    }
    for (u32 row = 0; row < 16; row++) {
        f32 *sum = c[row];
        for (u32 k = 0; k < K; k++) {
            const f32 x = sign * a[k * 16 + row], *y = b + k * N;
            _Pragma("GCC ivdep") for (u32 n = 0; n < N; n++) sum[n] = fma_once(x, y[n], sum[n]);
        }
    }
    for (u32 r = 0; r < N / 2; r++) {
        u32 *d = w.reg<u32>(u16(slots[r]));
        for (u32 l = 0; l < 32; l++) {
            f32 v = c[l / 4 + 8 * ((r >> 1) & 1)][8 * (r >> 2) + 2 * (l & 3) + (r & 1)];
            d[l] = v != v ? 0x7fffffff : as_u32(v);
        }
    }
}

// -- checks of an instruction

u64 uniform(Warp &w, u16 slot, const char *what) {
    const u64 *d = w.reg<u64>(slot);
    for (u32 l = 1; l < 32; l++)
        if (d[l] != d[0])
            report(w, K_WARPGROUP, l, 0, "the descriptor of %s is %016llx here and %016llx in lane 0", what,
                   static_cast<unsigned long long>(d[l]), static_cast<unsigned long long>(d[0]));
    return d[0];
}

void check_descriptor(Warp &w, u64 d, const char *what) {
    if (d & 0x3ff1c000c000c000ull)
        report(w, K_WARPGROUP, 0, 0, "the descriptor %016llx of %s has bits that mean nothing",
               static_cast<unsigned long long>(d), what);
    if ((d >> 49) & 7)
        report(w, K_WARPGROUP, 0, 0, "the descriptor %016llx of %s has a base offset, which the simulator does not know",
               static_cast<unsigned long long>(d), what);
    Matrix x(d);
    if (x.width && x.start & (8 * x.width - 1) & ~(x.width - 1))
        report(w, K_WARPGROUP, 0, x.start,
               "the descriptor of %s starts at %u: the pattern of its swizzle begins at multiples of %u bytes", what,
               x.start, 8 * x.width);
}

// Reads of shared memory: bounds, initialisation, races, the proxy, wavefronts.
void check_matrix(Warp &w, const Ins &i, u64 descriptor, bool mn_major, u32 first_row, u32 rows, const Actor &actor,
                  const Fenced &fenced, bool counted, const char *what) {
    Launch &L = *w.launch;
    Block &b = *w.block;
    u32 core[32], n = 0;
    pieces(Matrix(descriptor), mn_major, first_row, rows, elements(i), [&](u32 at, u32, u32) {
        if (at < L.system_shared || at + 16 > L.shared_size) {
            finding_at(w, K_BOUNDS_SHARED, 0, at).size = 16;
            report(w, K_BOUNDS_SHARED, 0, at, "wgmma reads 16 bytes of %s; the block has %u bytes of shared memory",
                   what, L.shared_size - L.system_shared);
        }
        if (L.races.shared) race_shared(w, 0, b, at, 16, 0, &actor);
        check_read(w, 0, b, at, 16);
        if (L.races.shared) check_proxy(w, b, at, fenced);
        core[n++] = at;
        if (n == 8) {
            if (counted && L.check(C_COUNT)) count_banks(w, 0xff, core, 16);
            n = 0;
        }
    });
}

WarpGroup &warpgroup_of(Warp &w) {
    Block &b = *w.block;
    if (b.warpgroups.size() < (w.launch->warps + 3) / 4) b.warpgroups.resize((w.launch->warps + 3) / 4);
    return b.warpgroups[w.index / 4];
}

// The four warps come to the same instructions of wgmma in the same order, which all are .aligned: products, fences, commits and
// waits.
void check_same(Warp &w, u64 a = 0, u64 b = 0, bool add = false) {
    WarpGroup &group = warpgroup_of(w);
    if (group.issued.size() == w.products.issued) group.issued.push_back({w.pc, w.index, a, b, add});
    const IssuedProduct &first = group.issued[w.products.issued++];
    if (first.pc != w.pc) {
        Finding &f = finding_at(w, K_WARPGROUP, 0, 0);
        f.has_other = 1;
        f.other_pc = first.pc;
        f.other_block = w.block->linear;
        f.other_thread = first.warp * 32;
        report(w, K_WARPGROUP, 0, 0,
               "the warps of a warpgroup part: instruction %u of wgmma in this warp is another one in warp %u",
               w.products.issued, first.warp);
    }
    if (first.a != a || first.b != b || first.add != add)
        report(w, K_WARPGROUP, 0, 0, "%s of this product is not the same in warps %u and %u of a warpgroup",
               first.a != a   ? "the descriptor of A"
               : first.b != b ? "the descriptor of B"
                              : "scale-d",
               first.warp, w.index);
}

// The reads of a group of products; the four warps have neighbouring lanes of one actor.
Actor actor_of(Warp &w, WarpGroup &group) {
    Block &b = *w.block;
    while (group.actors.size() <= w.products.committed) {
        while (b.actors & 3) b.actors++;
        group.actors.push_back(new_actor(b));
        b.actors += 3;
    }
    Actor a = group.actors[w.products.committed];
    a.lanes <<= w.index & 3;
    return a;
}

// o[0..3] A, or o[0] its descriptor; o[4] the descriptor of B; o[5] whether D is added; the registers of D are at
// `target` of the tables. a: n / 8 - 1, b: type, c: form, d: registers were touched after the last fence, at imm
void mma_async(Warp &w, const Ins &i, u32) {
    Launch &L = *w.launch;
    Block &block = *w.block;
    if (u64(w.index / 4 + 1) * 128 > L.threads)
        report(w, K_WARPGROUP, 0, 0, "a warpgroup has 4 whole warps; this block has %u threads", L.threads);
    if (!w.products.fenced)
        report(w, K_WARPGROUP, 0, 0, "no wgmma.fence comes before the first wgmma.mma_async");
    if (i.d) {
        Finding &f = finding_at(w, K_WARPGROUP, 0, 0);
        f.has_other = 1;
        f.other_pc = u32(i.imm);
        f.other_block = block.linear;
        f.other_thread = w.thread(0);
        f.other_write = 1;
        report(w, K_WARPGROUP, 0, 0, "no wgmma.fence between an access to a register of this product and the product");
    }
    WarpProduct p{&i, w.pc, w.products.committed, 0, uniform(w, i.o[4], "B"), false, false};
    if (!(i.c & A_IN_REGISTERS)) p.a = uniform(w, i.o[0], "A");
    u32 add = w.pred(i.o[5]);
    if (add != 0 && add != FULL) report(w, K_WARPGROUP, 0, 0, "scale-d is not the same in all lanes");
    p.add = add;
    if (!(i.c & A_IN_REGISTERS)) check_descriptor(w, p.a, "A");
    check_descriptor(w, p.b, "B");
    check_same(w, p.a, p.b, p.add);
    WarpGroup &group = warpgroup_of(w);
    Actor actor{};
    Fenced fenced;
    if (L.races.shared) {
        actor = actor_of(w, group);
        fenced = fenced_writes(w);
    }
    if (!(i.c & A_IN_REGISTERS))
        check_matrix(w, i, p.a, i.c & TRANSPOSED_A, 16 * (w.index & 3), 16, actor, fenced, true, "A");
    // The four warps share what is read of B: it is counted once.
    check_matrix(w, i, p.b, i.c & TRANSPOSED_B, 0, columns(i), actor, fenced, (w.index & 3) == 0, "B");
    w.products.queue.push_back(p);
    if (L.cp_async == 1 || (L.cp_async == 2 && (L.rng() & 1)))
        for (WarpProduct &q : w.products.queue) perform(w, q);  // they accumulate in order
}

void fence(Warp &w, const Ins &, u32) {
    check_same(w);
    w.products.fenced = true;
}
void commit(Warp &w, const Ins &, u32) {
    check_same(w);
    w.products.committed++;
}
void wait(Warp &w, const Ins &i, u32) {  // imm: groups that may go on
    check_same(w);
    Products &all = w.products;
    if (all.committed < u32(i.imm)) return;
    u32 done = all.committed - u32(i.imm);
    while (!all.queue.empty() && all.queue.front().group < done) {
        perform(w, all.queue.front());
        all.queue.pop_front();
    }
    if (w.launch->races.shared) {
        WarpGroup &group = warpgroup_of(w);
        SyncVar v;
        for (; all.waited < done; all.waited++)
            if (all.waited < group.actors.size()) {
                Actor a = group.actors[all.waited];
                a.lanes <<= w.index & 3;
                land(v, *w.block, a);
            }
        if (!v.by_block.empty()) learn(w, FULL, v);
    }
    w.launch->changes++;
}

bool belongs(Warp &w, const WarpProduct &p, u16 slot) {
    const Ins &i = *p.ins;
    if (i.c & A_IN_REGISTERS)
        for (u32 r = 0; r < 4; r++)
            if (i.o[r] == slot) return true;
    const u32 *slots = w.launch->args->tables + i.target;
    for (u32 r = 0; r < columns(i) / 2; r++)
        if (slots[r] == slot) return true;
    return false;
}
// Stands before an instruction that may access a register of a product that is under way, imm further on: o[0] is that register.
void touched(Warp &w, const Ins &i, u32 m) {
    for (const WarpProduct &p : w.products.queue)
        if (belongs(w, p, i.o[0])) {
            w.pc += u32(i.imm);  // the instruction meant
            Finding &f = finding_at(w, K_WARPGROUP, first(m), 0);
            f.has_other = 1;
            f.other_pc = p.pc;
            f.other_block = w.block->linear;
            f.other_thread = w.thread(0);
            report(w, K_WARPGROUP, first(m), 0,
                   "an access to a register of a wgmma.mma_async that has not been waited for");
        }
}
// Before a plain copy, which the assembler makes a renaming: it takes the value that the register will have.
void settle(Warp &w, const Ins &, u32) {
    for (WarpProduct &p : w.products.queue) perform(w, p);
}

// -- registers

// A block has what it was launched with; who wants more waits until others have given theirs back.
void check_registers(Warp &w) {
    Launch &L = *w.launch;
    u32 total = 0, pc = w.pc;
    for (Warp &v : w.block->warps) {
        if (!v.products.registers && v.live) return;  // it may still give some back
        total += v.products.registers ? v.products.registers : L.args->registers;
        if (v.products.registers > L.args->registers) pc = v.products.registers_pc;
    }
    if (total <= L.args->registers * L.warps) return;
    w.pc = pc;
    report(w, K_REGISTERS, 0, 0,
           "the warps of the block want %u registers a thread together; launched with %u each, they have %u", total,
           L.args->registers, L.args->registers * L.warps);
}
void setmaxnreg(Warp &w, const Ins &i, u32) {  // imm: registers; a: more, not fewer
    u32 n = u32(i.imm), had = w.products.registers ? w.products.registers : w.launch->args->registers;
    if (n % 8 || n < 24 || n > 256)
        report(w, K_REGISTERS, 0, 0, "setmaxnreg %u: a multiple of 8 from 24 to 256 is wanted", n);
    if (u64(w.index / 4 + 1) * 128 > w.launch->threads)
        report(w, K_REGISTERS, 0, 0, "setmaxnreg is for whole warpgroups; this block has %u threads",
               w.launch->threads);
    if (!w.launch->args->registers) return;  // without launch bounds the assembler ignores it
    if (i.a ? n < had : n > had)
        report(w, K_REGISTERS, 0, 0, "setmaxnreg.%s to %u from %u registers", i.a ? "inc" : "dec", n, had);
    w.products.registers = n;
    w.products.registers_pc = w.pc;
    check_registers(w);
}

void proxy(Warp &w, const Ins &, u32 m) { proxy_fence(w, m); }

OP("wgmma.mma_async", mma_async)
OP("wgmma.fence", fence)
OP("wgmma.commit_group", commit)
OP("wgmma.wait_group", wait)
OP("wgmma.touched", touched)
OP("wgmma.settle", settle)
OP("setmaxnreg", setmaxnreg)
OP("fence.proxy", proxy)

}  // namespace

void check_products_exit(Warp &w) {
    for (WarpProduct &p : w.products.queue) {
        if (w.launch->check(C_WAITED)) {
            w.pc = p.pc;
            report(w, K_WARPGROUP, 0, 0, "the warp exits without having waited for this product");
        }
        perform(w, p);
    }
    w.products.queue.clear();
}

void check_warpgroups_exit(Block &b) {
    for (size_t g = 0; g < b.warpgroups.size(); g++)
        for (u32 n = 0; n < 4 && 4 * g + n < b.warps.size(); n++) {
            Warp &w = b.warps[4 * g + n];
            const auto &issued = b.warpgroups[g].issued;
            if (w.products.issued == issued.size()) continue;
            const IssuedProduct &missing = issued[w.products.issued];
            Warp &other = b.warps[missing.warp];
            other.pc = missing.pc;
            report(other, K_WARPGROUP, 0, 0, "warp %u of the warpgroup exits without coming to this instruction", w.index);
        }
    if (b.launch->args->registers)
        for (Warp &w : b.warps)
            if (w.products.registers) return check_registers(w);
}
