// The asynchronous proxy: wgmma sees what ordinary stores and cp.async wrote only if a fence.proxy.async stands between.
//
// A fence covers what its thread knew when it executed it, and serves those who know of the fence: the writer's before
// a barrier, or the reader's behind it.
#include "machine.hpp"

void proxy_fence(Warp &w, u32 mask) {
    if (!w.launch->races.shared) return;
    // Of a warp. A thread's later fence covers what its earlier ones do, but readers may know of an earlier one only: warps
    // that copy run ahead of those that read, by all places of a ring, and each of their lanes may fence by itself.
    constexpr size_t KEPT = 64;
    auto &all = w.clocks->proxy_fences;
    all.emplace_back();
    ProxyFence &f = all.back();
    f.lanes = mask;
    f.epoch = w.epoch++;
    for (u32 t = mask; t; t &= t - 1) f.known[first(t)] = w.clocks->known[first(t)];
    if (all.size() > KEPT) all.pop_front();
}

namespace {

// Stamps below which the block's threads' writes are fenced, as one lane sees it.
void fenced_for(Warp &w, u32 lane, Fenced &out) {
    const Knowledge &mine = *w.clocks->known[lane];
    out.assign(mine.at.size(), 0);
    for (Warp &v : w.block->warps) {
        auto &fences = v.clocks->proxy_fences;
        u32 open = FULL;
        const Knowledge *before = nullptr;
        for (auto f = fences.rbegin(); f != fences.rend() && open; ++f)
            for (u32 t = f->lanes & open; t; t &= t - 1) {
                u32 l = first(t), thread = v.thread(l);
                if (!(&v == &w && l == lane) && mine.at[thread] <= f->epoch) continue;
                open &= ~(1u << l);
                out[thread] = std::max(out[thread], f->epoch + 1);
                const Knowledge *k = &*f->known[l];
                if (k != before)
                    for (size_t n = 0; n < out.size(); n++) out[n] = std::max(out[n], k->at[n]);
                before = k;
            }
    }
}

// Lanes that know the same and executed the same fences see the same.
bool alike(Warp &w, u32 a, u32 b) {
    if (w.clocks->known[a] != w.clocks->known[b]) return false;
    for (const ProxyFence &f : w.clocks->proxy_fences)
        if (((f.lanes >> a) ^ (f.lanes >> b)) & 1) return false;
    return true;
}

}  // namespace

Fenced fenced_writes(Warp &w) {
    Fenced all, one;
    for (u32 l = 0; l < 32; l++) {
        if (l && alike(w, l - 1, l)) continue;
        fenced_for(w, l, l ? one : all);
        if (l)
            for (size_t n = 0; n < all.size(); n++) all[n] = std::min(all[n], one[n]);
    }
    return all;
}

void check_proxy(Warp &w, Block &b, u32 off, const Fenced &fenced) {
    Line &line = b.shadow.lines[off >> 4];
    if (line.generation != b.shadow.generation || !line.writes) return;
    for (u32 k = 0; k < line.n; k++) {
        const Record &r = record_at(b.shadow, line, k);
        if (!(r.kind & A_WRITE) || r.block != b.linear || r.warp >= w.launch->warps) continue;
        for (u32 t = r.lanes; t; t &= t - 1) {
            if (fenced[r.warp * 32 + first(t)] > r.epoch) continue;
            Finding &f = finding_at(w, K_PROXY, 0, off);
            f.has_other = f.other_write = 1;
            f.other_pc = r.pc;
            f.other_block = r.block;
            f.other_thread = r.warp * 32u + first(t);
            report(w, K_PROXY, 0, off,
                   "wgmma reads shared memory that a store or cp.async wrote, without a fence.proxy.async in between");
        }
    }
}
