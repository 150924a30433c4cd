// A share of the plan as segments. A segment is the keys of one item that a block reads in one go; with split_size, of one split.
//
// Lengths come from the call, cuts from the plan: the first part of an item begins at its real first visible key, the
// last one ends at its real last one, and a cut beyond the real end leaves an empty part. Hence a stale plan is slower
// and never wrong.
#pragma once
#include "config.cuh"
#include "params.cuh"
#include "schedule.cuh"

constexpr int kItemEnd = 0x7fffffff;

struct Segment {
    int item;
    int sequence;
    int kv_head;
    int first_row;   // of the row block, in packed rows (query position major, head minor)
    int valid_rows;  // packed rows of the row block that exist
    Sequence lengths;
    KeyRange visible;  // of the whole item
    KeyRange keys;     // of this segment
    int split;         // with split_size: number of this split in its item; negative: another block reads the item
    bool starts;       // this block reads the item's first key
    bool ends;         // this block reads the item's last key
    bool last;         // last segment of the item in this share
};

struct Share {
    Cut begin;
    Cut end;
};

// Splits of an item that sees these keys. One with more than max_splits has not enough slots for a cut: the block in which it
// begins reads all of it.
__device__ __forceinline__ int split_count(const DecodeParams& p, KeyRange visible) {
    return visible.end > visible.begin ? (visible.end - 1) / p.split_size - visible.begin / p.split_size + 1 : 0;
}

// The number of the share that this block reads, and which rows of its row blocks are this block's.
__device__ __forceinline__ int share_number() { return blockIdx.x / kRowParts; }
__device__ __forceinline__ int row_part() { return blockIdx.x % kRowParts; }

__device__ __forceinline__ Cut load_cut(const DecodeParams& p, int block) { return plan_cuts(p.plan)[block]; }

__device__ __forceinline__ Mask mask_of(const DecodeParams& p) {
    const Shard whole = {1, 0, 1};
    return {p.mask.window_left, p.mask.window_right, kHasChunk ? p.mask.attention_chunk : 0, kHasShard ? p.mask.shard : whole};
}

// The query position of a packed row.
__device__ __forceinline__ int query_of(const DecodeParams& p, int row) {
    return p.by_group.divide(row);
}

// Keys that all queries see whatever a tree mask says: those before the last seqlen_q of the sequence.
__device__ __forceinline__ int keys_before_tree(const DecodeParams& p, Sequence lengths) {
    return mask_of(p).shard.held(lengths.seqlen_k - lengths.seqlen_q);
}

// What the tree mask says of a query of a segment, or of its last one.
__device__ __forceinline__ const unsigned char* tree_row(const DecodeParams& p, const Segment& s, int query) {
    const long long start = p.lengths.cu_seqlens_q ? p.lengths.cu_seqlens_q[s.sequence] : 0;
    return p.tree.keys_of(s.sequence, start + min(query, s.lengths.seqlen_q - 1));
}

// The column of the tree mask for a key; negative: all queries see it.
__device__ __forceinline__ int tree_column(const DecodeParams& p, const Segment& s, int key) {
    return mask_of(p).shard.position(key) - (s.lengths.seqlen_k - s.lengths.seqlen_q);
}

// Whether the tree mask hides a key from the query of a row. Without a branch, so that many are asked at once.
__device__ __forceinline__ bool tree_hides(const DecodeParams& p, const Segment& s, const unsigned char* row, int key) {
    const int column = tree_column(p, s, key);
    return column >= 0 & !p.tree.sees(row, max(0, min(column, s.lengths.seqlen_q - 1)));
}

// Whether a tree mask hides a key of a segment from all of its rows.
__device__ __forceinline__ bool hidden_from_all(const DecodeParams& p, const Segment& s, int key) {
    const int first_query = query_of(p, s.first_row), last_query = query_of(p, s.first_row + s.valid_rows - 1);
    const int column = tree_column(p, s, key);  // the number of the query that mostly sees it
    return column >= 0 && !p.tree.sees(tree_row(p, s, max(first_query, min(column, last_query))), column) &&
           p.tree.hides_from_all(tree_row(p, s, first_query), last_query - first_query + 1, column);
}

// Whether the key of a segment is one whose values may be anything though only some rows do not see it: one on a page of a
// negative number, in whose place another page was read, or one that a tree mask hides from all rows.
__device__ __forceinline__ bool sees_nothing(const DecodeParams& p, const Segment& s, u32 key_of_tile) {
    const int key = min(key_of_tile, s.keys.end - 1u);  // as the loader repeats it
    if (kHasTree && hidden_from_all(p, s, key)) return true;
    if (!p.cache.page_table) return false;
    PageCursor place;
    place.enter(p.cache, s.sequence);
    place.seek(p.cache, s.lengths.leftpad + key);
    return !place.exists();
}

// Whether a segment may have such keys: rows of one query see the same.
__device__ __forceinline__ bool may_see_nothing(const DecodeParams& p, const Segment& s) {
    return kHasTree || (p.cache.page_table && s.lengths.seqlen_q > 1);
}

// Which rows an item has, and which keys they see; the fields that depend on the item alone.
__device__ __forceinline__ void describe_item(const DecodeParams& p, int item, Segment& s) {
    const int item_of_kv_head = p.by_row_blocks.divide(item);
    s.item = item;
    s.sequence = p.by_num_heads_kv.divide(item_of_kv_head);
    s.kv_head = item_of_kv_head - s.sequence * p.num_heads_kv;
    s.lengths = p.lengths.of(s.sequence);
    const int num_rows = s.lengths.seqlen_q * p.group, place = item - item_of_kv_head * p.row_blocks;
    s.first_row = (row_block_at(place, num_rows, kRowParts * kRows) * kRowParts + row_part()) * kRows;
    s.valid_rows = max(0, min(kRows, num_rows - s.first_row));
    s.visible = {0, 0};
    if (s.valid_rows > 0) {
        s.visible = mask_of(p).visible_keys(s.lengths, query_of(p, s.first_row), query_of(p, s.first_row + s.valid_rows - 1));
    }
}

// Walks the segments of a share. The loader and the arithmetic each own a walker: the first runs ahead of the second.
struct ShareWalker {
    int item;
    int key;  // where the next segment begins, by the plan; 0 is the item's first visible key

    ShareWalker() = default;
    __device__ __forceinline__ explicit ShareWalker(const Share& share) : item(share.begin.item), key(share.begin.key) {}

    // Writes the next segment; false at the end of the share.
    __device__ __forceinline__ bool next(const DecodeParams& p, const Share& share, Segment& s) {
        for (;;) {
            if (item > share.end.item) return false;
            if (item == share.end.item && (kHasSplitSize ? share.end.key == 0 : key >= share.end.key)) return false;
            describe_item(p, item, s);
            if (s.valid_rows > 0) break;
            // Nothing to write. From an empty row block on to the next KV head, as all blocks of these items do.
            const int row_block = s.first_row / (kRowParts * kRows);
            const bool is_empty = row_block * (kRowParts * kRows) >= s.lengths.seqlen_q * p.group;
            item += is_empty ? p.row_blocks - row_block : 1;
            key = 0;
        }
        s.starts = item != share.begin.item || share.begin.key == 0;
        const bool uncut = kHasSplitSize && split_count(p, s.visible) > p.max_splits;
        const int part_end = item == share.end.item && !(uncut && s.starts) ? share.end.key : kItemEnd;
        if (kHasSplitSize && key >= part_end) return false;
        s.ends = part_end == kItemEnd;
        s.keys.begin = max(s.visible.begin, key);
        s.keys.end = min(s.visible.end, part_end);
        s.last = true;
        if constexpr (kHasSplitSize) {
            // Unsigned: behind the last split it may pass 2^31.
            const u32 split = s.keys.begin / p.split_size, split_end = (split + 1) * p.split_size;
            s.split = split - s.visible.begin / p.split_size;
            if (uncut && !s.starts) {
                s.split = -1;
                s.keys.end = s.keys.begin;
            } else if (split_end < static_cast<u32>(s.keys.end)) {
                s.keys.end = split_end;
                s.last = false;
            }
        }
        s.keys.end = max(s.keys.end, s.keys.begin);
        if (s.last) {
            ++item;
            key = 0;
        } else {
            key = s.keys.end;
        }
        return true;
    }
};

// The one segment of a block of a cluster: its part of the cluster's item. The plan is not asked.
struct ClusterWalker {
    bool is_done = false;

    ClusterWalker() = default;
    __device__ __forceinline__ explicit ClusterWalker(const Share&) {}

    __device__ __forceinline__ bool next(const DecodeParams& p, const Share&, Segment& s) {
        if (is_done) return false;
        is_done = true;
        describe_item(p, blockIdx.x / kCluster, s);
        const int part = blockIdx.x % kCluster;
        s.keys = {part_begin(s, part), part_begin(s, part + 1)};
        return true;
    }

private:
    static __device__ __forceinline__ int part_begin(const Segment& s, int part) {
        const Cut cut = cluster_cut(s.visible, s.item, part, kCluster, kGrain);
        return part == kCluster || cut.item > s.item ? s.visible.end : max(cut.key, s.visible.begin);
    }
};

#if CLUSTER > 1
using Walker = ClusterWalker;
#else
using Walker = ShareWalker;
#endif
