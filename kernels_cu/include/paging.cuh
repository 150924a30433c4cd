// Where the key j of a sequence lies in the cache.
//
// A cache is (pages, page_size, heads_kv, dim). Paged caches have a table; without one each sequence owns a row of the cache,
// which counts as one page that is never left. Attention's loader and the append find keys here.
//
// On a page of a negative number there is nothing: the append writes nothing there. All rows that see such a key have no meaning,
// and no other row may get any of it. The loader of many rows copies zeros instead (rows_loader.cuh). That of few rows reads page 0
// in its place, since that costs no test, and makes zeros of its values in tiles where some rows see what others do not (decode.cu).
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
    const int* page_table;       // (rows, pages per sequence), or (n,) with page_indptr, or null: contiguous
    const int* page_indptr;      // (rows + 1,) where in page_table the pages of each row begin; without a table where in the
                                 // cache its keys begin (packed keys: pages of one key that lie in order); or null
    const int* cache_batch_idx;  // (batch,) or null: the sequence's row of the page table or of the cache, else row b
    long long page_table_stride;
    CacheStrides k;
    CacheStrides v;
    int page_size;
    FastDivisor by_page_size;
    int capacity;  // slots that a sequence has room for, as far as shapes tell

    // The sequence's row of the page table or of the cache.
    __device__ __forceinline__ int row_of(int sequence) const {
        return cache_batch_idx ? cache_batch_idx[sequence] : sequence;
    }

    // Whether a sequence has room for a key in this slot.
    __device__ __forceinline__ bool has_room(int sequence, int slot) const {
        if (!page_indptr) return slot < capacity;
        const int row = row_of(sequence);
        return slot < static_cast<long long>(page_indptr[row + 1] - page_indptr[row]) * page_size;
    }
};

// The place of one slot of a sequence after another.
class PageCursor {
public:
    // Moves to a sequence; seek() must follow before its keys are read.
    __device__ __forceinline__ void enter(const KVCache& cache, int sequence) {
        page_ = cache.row_of(sequence);
        if (cache.page_indptr && !cache.page_table) page_ = cache.page_indptr[page_];
        else pages_ = cache.page_table + (cache.page_indptr ? cache.page_indptr[page_] : page_ * cache.page_table_stride);
    }

    // Moves to a slot of the sequence, 0 <= slot < 2^31.
    __device__ __forceinline__ void seek(const KVCache& cache, u32 slot) {
        const u32 page_index = cache.by_page_size.divide(slot);
        row_ = slot - page_index * cache.page_size;
        if (cache.page_table) page_ = load_page(offset_by<4>(pages_, page_index));
    }

    // Whether there is anything: not on a page of a negative number.
    __device__ __forceinline__ bool exists() const { return page_ >= 0; }

    // Where the slot's row of head 0 begins, in 16-byte units; in page 0 if it does not exist.
    __device__ __forceinline__ u32 units(CacheStrides strides) const {
        return page() * strides.page + row_ * strides.row;
    }

    // The page, and the slot in it; of packed keys, what together is the number of the key.
    __device__ __forceinline__ int page() const { return max(page_, 0); }
    __device__ __forceinline__ int row() const { return row_; }

    // The element of the slot's scale of head 0, of scales per key and head.
    __device__ __forceinline__ long long scale(DescaleStrides strides) const {
        return page() * strides.outer + row_ * strides.row;
    }

private:
    const int* pages_;  // (pages per sequence,) of the sequence
    int page_ = 0;      // of the slot; at first the sequence's row
    u32 row_ = 0;       // in the page
};
