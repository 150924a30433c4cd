// What plan.cu is told of a step; cuflash/partition.py says why its numbers are as they are.
#pragma once
#include "schedule.cuh"

struct PlanParams {
    int* plan;            // schedule.cuh; every word is written
    Lengths lengths;
    Mask mask;
    int batch_size;
    int num_heads_kv;
    int group;  // query heads per KV head
    int rows;   // packed query rows of a row block
    int row_blocks;
    int num_blocks;       // most blocks that the plan may use
    int num_cuts;         // entries of the plan
    int divisor;          // largest divisor of the number of items in [7/8 num_blocks, num_blocks], or 0
    int cluster;          // blocks that share an item, or 1: blocks share all keys
    int num_splits;       // 0: free, n: most parts of an item
    int split_size;       // items are cut at all multiples of this many keys, or 0
    unsigned int grain;   // cuts lie at multiples of this many keys: a tile of the attention kernel, or split_size
    int min_share;        // keys per block below which cutting items further does not pay
    int most_parts;       // it does not pay either if an item has more parts than these ..
    int parted_share;     // .. and a block fewer keys than these, ..
    int few_blocks;       // .. nor do more blocks than these for few items, if these have fewer keys each; 0: they do
    int overhead;         // factor of what an item costs beyond its keys, if each sequence has no rows or ..
    int overhead_rows;    // .. so many, ..
    int overhead_short;   // .. and where shares have fewer keys than ..
    int short_share;      // .. these
    int longest_share;    // per cent of the mean share that keeping items whole may give the longest one, ..
    int longest_excess;   // .. and at most so many keys more than the mean
    int slice_sequences;  // a thread sums up the units of so many sequences, or, where that is 1,
    int slice_shift;      // those of one part of 2^slice_shift of a sequence:
    int slice_units;      // so many units
};
