// Copies of boxes of a tensor (cp.async.bulk.tensor): global memory to shared memory in the 128-byte swizzle, a line of 128
// bytes for each row of the box. What is beyond the tensor becomes zeros and is not read; all bytes count at the mbarrier.
#include "access.hpp"
#include "async.hpp"

namespace {

constexpr u32 AXES = 4, LINE = 128, MAP_BYTES = 128;

struct TensorMap {  // boxes.py
    u64 magic, address, shape[AXES], strides[AXES - 1];
    u32 box[AXES], itemsize;
};
constexpr u64 MAGIC = 0x7365786F6273696D;

const TensorMap &map_at(Warp &w, u32 l, u64 a) {
    const LaunchArgs &args = *w.launch->args;
    if ((a & SPACE_MASK) != PARAM_BASE)
        report(w, K_BOUNDS_GLOBAL, l, a, "a tensor map that is no parameter of the kernel");
    u64 at = a & ~SPACE_MASK;
    if (at & 63) report(w, K_MISALIGNED, l, at, "a tensor map at an address that is no multiple of 64");
    if (at + MAP_BYTES > args.params_size)
        report(w, K_BOUNDS_LOCAL, l, at, "a tensor map of 128 bytes; the parameters have %u", u32(args.params_size));
    const TensorMap &map = *reinterpret_cast<const TensorMap *>(args.params + at);
    if (map.magic != MAGIC) report(w, K_BOUNDS_LOCAL, l, at, "no tensor map was made here");
    return map;
}

// o[0] destination, o[1] map, o[2] mbarrier, o[3..6] coordinates, o[7] blocks of the cluster; widths a, b, d
void box_to_shared(Warp &w, const Ins &i, u32 m) {
    for (u32 t = m; t; t &= t - 1) {
        u32 l = first(t);
        const TensorMap &map = map_at(w, l, operand_address(w, i.o[1], i.b, s32(i.target), l));
        u64 dst = operand_address(w, i.o[0], i.a, i.imm, l);
        if (dst & (8 * LINE - 1))
            report(w, K_MISALIGNED, l, dst, "a box at an address that is no multiple of 1024, as its swizzle wants it");
        s64 at[AXES];
        u64 rows = 1;
        for (u32 k = 0; k < AXES; k++) {
            at[k] = s32(w.reg<u32>(i.o[3 + k])[l]);
            if (k) rows *= map.box[k];
        }
        Place to = shared_place(w, l, dst, u32(rows * LINE), true);
        Place bar = shared_place(w, l, operand_address(w, i.o[2], i.d, 0, l), 8, true);
        Actor actor = new_actor(*w.block);
        auto &cluster = w.block->cluster->blocks;
        u32 blocks = i.o[7] == NONE ? 1u << w.block->rank : w.reg<u32>(i.o[7])[l] & 0xffff;
        if (!blocks || blocks >> cluster.size())
            report(w, K_BOUNDS_SHARED, l, dst, "a copy to blocks %#x of a cluster of %u", blocks, u32(cluster.size()));
        // Elements of each row that are in the tensor; a column before it is not used here.
        if (at[0] < 0) report(w, K_BOUNDS_GLOBAL, l, map.address, "a box that begins before the first column");
        s64 there = std::min<s64>(map.box[0], s64(map.shape[0]) - at[0]);
        for (u64 r = 0; r < rows; r++) {
            u64 from = map.address, rest = r;
            bool inside = true;
            for (u32 k = 1; k < AXES; k++) {
                s64 index = at[k] + s64(rest % map.box[k]);
                rest /= map.box[k];
                inside = inside && index >= 0 && u64(index) < map.shape[k];
                from += u64(index) * map.strides[k - 1];
            }
            u32 bytes = inside && there > 0 ? u32(there) * map.itemsize : 0;
            from += u64(at[0]) * map.itemsize;
            u64 chunks[32];
            u8 sizes[32];
            u32 lanes = 0;
            for (u32 k = 0; k * 16 < bytes; k++) {
                chunks[k] = from + 16 * k;
                sizes[k] = u8(std::min(16u, bytes - 16 * k));
                lanes |= 1u << k;
            }
            if (lanes) global_access(w, lanes, chunks, sizes, 16, READ, false, &actor);
            for (u32 k = 0; k < cluster.size(); k++) {
                if (!((blocks >> k) & 1)) continue;
                Block &block = *cluster[k];
                if (block.done)
                    report(w, K_BOUNDS_SHARED, l, dst, "a copy to block %u of the cluster, which has exited", k);
                Pending op{};
                op.what = Pending::LINE_TO_SHARED;
                op.actor = actor;
                op.source = from;
                op.have = bytes;
                write_later(w, l, {&block, u32(to.off + r * LINE)}, LINE, op.actor);
                op.lane = l;
                op.bytes = LINE;
                op.block = op.barrier_block = &block;
                op.destination = to.off + r * LINE;
                op.barrier = bar.off;
                start(w, std::move(op));
            }
        }
    }
}

OP("cp.async.bulk.tensor", box_to_shared)

}  // namespace
