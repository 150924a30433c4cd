// Where the key j of a sequence lies in the cache.
//
// A cache is (pages, page_size, heads_kv, dim). Paged caches have a table; without one each sequence owns a row of the cache,
// which counts as one page that is never left. Attention's loader and the append find keys here.
#pragma once
#include "descale.cuh"
#include "fast_divisor.cuh"
#include "ptx/memory.cuh"

// Strides of keys or values in units of 16 bytes: 32 bits reach 64 GiB. The host refuses what is larger or not aligned.
struct CacheStrides {
    unsigned int page;
    unsigned int row;  // from a slot of a page to the next
    unsigned int head;
};

struct KVCache {
    const int* page_table;       // (rows, pages per sequence) or null: contiguous
    const int* cache_batch_idx;  // (batch,) or null: the sequence's row of the page table or of the cache, else row b
    long long page_table_stride;
    CacheStrides k;
    CacheStrides v;
    int page_size;
    FastDivisor by_page_size;
    int capacity;  // slots that a sequence has room for
};

// The place of one slot of a sequence after another.
class PageCursor {
public:
    // Moves to a sequence; seek() must follow before its keys are read.
    __device__ __forceinline__ void enter(const KVCache& cache, int sequence) {
        page_ = cache.cache_batch_idx ? cache.cache_batch_idx[sequence] : sequence;
        pages_ = cache.page_table + page_ * cache.page_table_stride;
    }

    // Moves to a slot of the sequence, 0 <= slot < 2^31.
    __device__ __forceinline__ void seek(const KVCache& cache, u32 slot) {
        const u32 page_index = cache.by_page_size.divide(slot);
        row_ = slot - page_index * cache.page_size;
        if (cache.page_table) page_ = load_page(offset_by<4>(pages_, page_index));
    }

    // Where the slot's row of head 0 begins, in 16-byte units.
    __device__ __forceinline__ u32 units(CacheStrides strides) const { return page_ * strides.page + row_ * strides.row; }

    // The element of the slot's scale of head 0, of scales per key and head.
    __device__ __forceinline__ long long scale(DescaleStrides strides) const {
        return page_ * strides.outer + row_ * strides.row;
    }

private:
    const int* pages_;        // (pages per sequence,) of the sequence
    u32 page_ = 0, row_ = 0;  // of the slot; page_ is at first the sequence's row
};
