// Plan a decode step: cut the keys of all items into shares of equal cost, one per thread block of the attention kernel.
//
// One launch of one block, for any batch size. A unit is (sequence, row block): what the KV heads have in common. Every thread
// sums a slice of consecutive units, a block scan turns the sums into the cost before each slice, and then every thread makes
// the cut of its own number: where does cost b * total / blocks lie, and which place near it is good? The last step drops cuts
// that fell together. cuflash/planner.py is the same in NumPy, bit for bit: change both.
#include "plan_params.cuh"
#include "scan.cuh"
#include "stream.cuh"

constexpr int kOverheadPart = 32;    // an item costs this part of the mean item beyond its keys, ..
constexpr int kMostOverhead = 128;   // .. at most so many keys; short items up to twice that part, ..
constexpr int kShortOverhead = 16;   // .. at most so many
constexpr int kEmpty = 1;            // a row block that its sequence does not have costs so many
constexpr int kBlocksOfFew = 16;     // items are few if few_blocks are so many for each

__device__ bool has_rows(const PlanParams& p, Sequence sequence, int place) {
    return (long long)place * p.rows < (long long)sequence.seqlen_q * p.group;
}

// Keys that the longest of `blocks` shares may have.
__device__ long long most_keys(const PlanParams& p, long long all_keys, int blocks) {
    const long long mean = (all_keys + blocks - 1) / blocks;
    return min(p.longest_share * mean / 100, mean + p.longest_excess);
}

// Keys of the longest of `blocks` shares of whole items, or whole shares of items, at most.
__device__ long long longest_whole_share(const PlanParams& p, int items, int blocks, int longest, unsigned longest_pair) {
    if (items <= blocks || blocks == 0) return (longest * (long long)items + max(blocks, 1) - 1) / max(blocks, 1);
    const int count = items / blocks;  // of a share
    return p.row_blocks % 2 == 0 ? count / 2 * (long long)longest_pair + count % 2 * longest : count * (long long)longest;
}

// Small problems: a cluster cuts its item into equal parts, whatever the other items are.
__device__ void plan_for_clusters(const PlanParams& p, Mask mask, int items) {
    const int used = items * p.cluster;
    if (threadIdx.x < kPlanCuts) p.plan[threadIdx.x] = threadIdx.x == 0 ? used : 0;
    Cut* planned_cuts = reinterpret_cast<Cut*>(p.plan + kPlanCuts);
    #pragma unroll 1
    for (int u = threadIdx.x; u < p.num_cuts; u += blockDim.x) {
        Cut cut = {items, 0, used, used};
        if (u < used) {
            const int item = u / p.cluster, item_of_kv_head = item / p.row_blocks;
            const Sequence sequence = p.lengths.of(item_of_kv_head / p.num_heads_kv);
            const KeyRange keys = row_block_keys(mask, sequence, p.group, p.rows, item % p.row_blocks);
            cut = cluster_cut(keys, item, u % p.cluster, p.cluster, p.grain);
            cut.first_block = cut.last_block = u;
        }
        planned_cuts[u] = cut;
    }
}

extern "C" __global__ void __launch_bounds__(1024) plan(const PlanParams p) {
    extern __shared__ long long before[];                           // (threads + 1,) cost before each slice, for one KV head
    int2* cuts = reinterpret_cast<int2*>(before + blockDim.x + 1);  // (num_blocks,) item and key
    unsigned* starts = reinterpret_cast<unsigned*>(cuts + p.num_blocks);  // a bit for each cut: the first one of its item?
    __shared__ KeyRange slice_range[1024];                                // of the slice's last unit
    __shared__ long long warp_keys[kWarpSize];
    __shared__ int warp_shortest[kWarpSize], warp_longest[kWarpSize], warp_cuts[kWarpSize], warp_units[kWarpSize];
    __shared__ unsigned warp_longest_pair[kWarpSize];
    const int thread = threadIdx.x, threads = blockDim.x;
    const int lane = thread & (kWarpSize - 1), warp = thread / kWarpSize, warps = threads / kWarpSize;
    const Mask mask = p.mask;
    const int units = p.batch_size * p.row_blocks, items = units * p.num_heads_kv;
    const int parts = 1 << p.slice_shift;
    int* planned = p.plan + kPlanCuts + 4 * p.num_cuts;  // (3, batch_size) leftpad, seqlen_k, seqlen_q

    wait_for_turn(p);
    launch_next();
    // Pass 1: the keys of a slice, and the lengths as planned.
    int s = min((thread >> p.slice_shift) * p.slice_sequences, p.batch_size);
    int place = s < p.batch_size ? min((thread & (parts - 1)) * p.slice_units, p.row_blocks) : 0;
    const int slice_begin = s * p.row_blocks + place;  // units before the slice
    long long slice_keys = 0;
    int slice_units = 0;  // that have rows
    bool has_few_rows = false;  // whether the sequence of one of those has few
    int shortest = 2147483647, longest = 0;
    unsigned longest_pair = 0;  // of two units side by side
    #pragma unroll 1
    for (int n = 0; n < p.slice_units && s < p.batch_size && place < p.row_blocks; ++n) {
        const Sequence sequence = p.lengths.of(s);
        if (place == 0) {
            planned[s] = sequence.leftpad;
            planned[p.batch_size + s] = sequence.seqlen_k;
            planned[2 * p.batch_size + s] = sequence.seqlen_q;
        }
        const KeyRange range = row_block_keys(mask, sequence, p.group, p.rows, place);
        slice_range[thread] = range;
        const int keys = range.end - range.begin;
        slice_keys += keys;
        if (has_rows(p, sequence, place)) {
            slice_units += 1;
            has_few_rows |= (long long)sequence.seqlen_q * p.group < p.overhead_rows;
        }
        shortest = min(shortest, keys);
        longest = max(longest, keys);
        if (p.row_blocks % 2 == 0 && place % 2 == 0) {
            const KeyRange other = row_block_keys(mask, sequence, p.group, p.rows, place + 1);
            longest_pair = max(longest_pair, static_cast<unsigned>(keys) + (other.end - other.begin));
        }
        place += 1;
        if (place == p.row_blocks && parts == 1) {
            place = 0;
            s += 1;
        }
    }

    if (p.cluster > 1) return plan_for_clusters(p, mask, items);

    // Scan over the block: within each warp, then every warp scans the sums of the warps.
    const long long keys_through = inclusive_scan(slice_keys, lane);  // of this slice and those before it in the warp
    const int units_through = inclusive_scan(slice_units, lane);
    shortest = warp_min(shortest);
    longest = warp_max(longest);
    longest_pair = warp_max(longest_pair);
    if (lane == kWarpSize - 1) {
        warp_keys[warp] = keys_through;
        warp_units[warp] = units_through;
        warp_shortest[warp] = shortest;
        warp_longest[warp] = longest;
        warp_longest_pair[warp] = longest_pair;
    }
    has_few_rows = __syncthreads_or(has_few_rows);
    const long long warps_through = inclusive_scan(lane < warps ? warp_keys[lane] : 0ll, lane);
    const int warps_units_through = inclusive_scan(lane < warps ? warp_units[lane] : 0, lane);
    shortest = warp_min(lane < warps ? warp_shortest[lane] : 2147483647);
    longest = warp_max(lane < warps ? warp_longest[lane] : 0);
    longest_pair = warp_max(lane < warps ? warp_longest_pair[lane] : 0);
    const long long head_keys = __shfl_sync(kFullWarp, warps_through, kWarpSize - 1);  // keys that one KV head reads
    const long long warps_before = warp ? __shfl_sync(kFullWarp, warps_through, warp - 1) : 0;
    const int head_units = __shfl_sync(kFullWarp, warps_units_through, kWarpSize - 1);  // with rows
    const int units_before = warp ? __shfl_sync(kFullWarp, warps_units_through, warp - 1) : 0;
    const long long all_keys = head_keys * p.num_heads_kv;
    // Items of which all cost the same are cut into whole items per block, or whole blocks per item, if the GPU stays nearly full.
    // So are others that are about as long as one another: they then count as equal.
    bool even = shortest >= longest;  // also without any unit
    const bool is_small = all_keys < (long long)p.parted_share * (p.few_blocks ? p.few_blocks : p.num_blocks);
    const int min_share = max(p.min_share, is_small ? min(longest / p.most_parts, p.parted_share) : 0);
    const int most_blocks = is_small && items * (long long)kBlocksOfFew <= p.few_blocks ? min(p.few_blocks, p.num_blocks) : p.num_blocks;
    int blocks = (int)min((long long)most_blocks, max((long long)items, (all_keys + min_share - 1) / min_share));
    if (blocks) {
        const int aligned = items <= blocks ? blocks / items * items : p.divisor;
        const long long longest_share = longest_whole_share(p, items, aligned, longest, longest_pair);
        if (aligned <= blocks && aligned * 8ll >= blocks * 7ll && (even || longest_share <= most_keys(p, all_keys, blocks))) {
            even = true;
            blocks = aligned;
        }
    }

    // What an item costs beyond its keys; of long shares never so much that the keys of the longest are far from the mean.
    int overhead = 0;
    if (!even) {
        const long long most = all_keys / (kOverheadPart / 2 * ((long long)head_units * p.num_heads_kv));
        overhead = (int)max(1ll, min((long long)kMostOverhead, max(most / 2, min((long long)kShortOverhead, most))));
        overhead *= all_keys < (long long)p.short_share * blocks ? p.overhead_short : has_few_rows ? 1 : p.overhead;
    }
    const int even_cost = even ? max(longest, 1) : 0;  // of each item
    const auto cost_of = [&](long long keys, long long all, long long with_rows) {
        return even ? all * even_cost : keys + (all - with_rows) * kEmpty + with_rows * overhead;
    };
    before[thread] = cost_of(keys_through - slice_keys + warps_before, slice_begin, units_through - slice_units + units_before);
    const long long head_total = cost_of(head_keys, units, head_units);
    if (thread == 0) before[threads] = head_total;

    const long long total = head_total * p.num_heads_kv;
    long long share = 0, slack = 0;
    int rest = 0;
    if (blocks) {
        share = total / blocks;
        rest = (int)(total - share * blocks);
        if (p.split_size == 0) {  // both ends of a share together
            slack = max(0ll, (most_keys(p, all_keys, blocks) - (share + (rest > 0))) / 2);
        }
    }
    __syncthreads();

    // Pass 2: the cut of block b.
    #pragma unroll 1
    for (int b = thread; b < blocks; b += threads) {
        const long long target = b * share + (unsigned)b * (unsigned)rest / (unsigned)blocks;
        const long long head_target = target / p.num_heads_kv;
        int slice = slice_of(before, 0, threads, head_target);
        // First the sequence, then the head in it, then the row block. `goal` is the cost before the cut in one KV head, as soon
        // as the sequence is known.
        bool sequence_known = p.slice_sequences == 1;
        int head = 0;
        long long goal = 0;
        if (sequence_known) {
            const int first = slice & -parts;
            const long long offset = target - before[first] * p.num_heads_kv, cost = before[first + parts] - before[first];
            head = (int)(offset / cost);
            goal = before[first] + (offset - head * cost);
            if (parts > 1) slice = slice_of(before, first, first + parts, goal);
        }
        int sequence = (slice >> p.slice_shift) * p.slice_sequences, place = (slice & (parts - 1)) * p.slice_units;
        long long start = before[slice], sequence_start = start;
        KeyRange range = slice_range[slice];
        const auto lengths_of = [&](int s) { return Sequence{0, planned[p.batch_size + s], planned[2 * p.batch_size + s]}; };
        const auto overhead_at = [&](Sequence lengths, int place) { return has_rows(p, lengths, place) ? overhead : kEmpty; };
        #pragma unroll 1
        while (p.slice_units > 1) {
            const Sequence lengths = lengths_of(sequence);
            range = row_block_keys(mask, lengths, p.group, p.rows, place);
            const long long keys = range.end - range.begin;
            const long long end = start + (even ? even_cost : keys + overhead_at(lengths, place));
            if (sequence_known && end > goal) break;
            start = end;
            place += 1;
            if (place == p.row_blocks) {  // the sequence ends: is the cut in it?
                place = 0;
                if (start > head_target) {
                    const long long offset = target - sequence_start * p.num_heads_kv, cost = start - sequence_start;
                    head = (int)(offset / cost);
                    goal = sequence_start + (offset - head * cost);
                    sequence_known = true;
                    start = sequence_start;
                } else {
                    sequence_start = start;
                    sequence += 1;
                }
            }
        }

        const int keys = range.end - range.begin, beyond = even ? 0 : overhead_at(lengths_of(sequence), place);  // stands first
        const long long cost = even ? even_cost : (long long)keys + beyond, x = goal - start;
        unsigned key = range.begin + (unsigned)(even ? keys * x / cost : max(x - beyond, 0ll));
        bool at_begin = x <= slack, at_end = cost - x <= slack;
        if (0 < p.num_splits && p.num_splits < blocks) {
            const long long most = p.num_splits;
            // Items that equal shares would cut into more parts: equal parts instead.
            if ((cost - 1) * blocks > (most - 1) * total) {
                const long long part = (2 * most * x + cost) / (2 * cost);
                key = (unsigned)(range.begin + keys * part / most);
                at_begin = part == 0, at_end = part == most;
            }
        }
        key = (key + p.grain / 2) / p.grain * p.grain;
        if (at_begin) key = range.begin;
        else if (at_end) key = range.end;
        int item = (sequence * p.num_heads_kv + head) * p.row_blocks + place;
        const bool after = key >= (unsigned)range.end;
        if (after && x > 0) item += 1;
        if (after || key <= (unsigned)range.begin) key = 0;
        cuts[b] = make_int2(item, (int)key);
    }
    __syncthreads();

    // Drop the cuts that equal the one before them or lie at the end. In place: a cut moves only towards the front.
    int used = 0;
    #pragma unroll 1
    for (int first = 0; first < blocks; first += threads) {
        const int b = first + thread;
        const int2 cut = b < blocks ? cuts[b] : make_int2(items, 0);
        const int2 previous = 0 < b && b < blocks ? cuts[b - 1] : make_int2(-1, 0);
        const bool kept = cut.x < items && (cut.x != previous.x || cut.y != previous.y);
        const unsigned kept_lanes = __ballot_sync(kFullWarp, kept);
        if (lane == 0) warp_cuts[warp] = __popc(kept_lanes);
        __syncthreads();
        const int through = inclusive_scan(lane < warps ? warp_cuts[lane] : 0, lane);
        int place = used + __popc(kept_lanes & ((1u << lane) - 1));
        if (warp) place += __shfl_sync(kFullWarp, through, warp - 1);
        used += __shfl_sync(kFullWarp, through, kWarpSize - 1);
        if (kept) cuts[place] = cut;
        __syncthreads();
    }

    // Where the cuts of an item begin.
    const int words = (used + kWarpSize - 1) / kWarpSize;
    #pragma unroll 1
    for (int w = warp; w < words; w += warps) {
        const int u = w * kWarpSize + lane;
        const bool first = u < used && (cuts[u].y == 0 || cuts[u].x != cuts[u - 1].x);
        const unsigned first_lanes = __ballot_sync(kFullWarp, first);
        if (lane == 0) starts[w] = first_lanes;
    }
    __syncthreads();

    // The plan, with the blocks that hold a part of each item that is cut.
    if (thread < kPlanCuts) p.plan[thread] = thread == 0 ? used : 0;
    Cut* planned_cuts = reinterpret_cast<Cut*>(p.plan + kPlanCuts);
    #pragma unroll 1
    for (int u = thread; u < p.num_cuts; u += threads) {
        Cut cut = {items, 0, used, used};
        if (u < used) {
            cut = {cuts[u].x, cuts[u].y, u, u};
            if (cut.key > 0) {
                int w = u / kWarpSize;
                const unsigned through = kFullWarp >> (kWarpSize - 1 - lane);  // this lane and those before it
                unsigned here = starts[w] & through, next = starts[w] & ~through;
                while (here == 0) here = starts[--w];
                cut.first_block = w * kWarpSize + kWarpSize - 1 - __clz(here);
                if (cuts[cut.first_block].y > 0) cut.first_block -= 1;  // the item begins in the block before
                w = u / kWarpSize;
                while (next == 0 && ++w < words) next = starts[w];
                cut.last_block = (next ? w * kWarpSize + __ffs(next) - 1 : used) - 1;
            }
        }
        planned_cuts[u] = cut;
    }
}
