/* The loops that neither torch nor numpy runs at the speed of memory. Plain C, called through ctypes; every one of them
 * has a twin in Python that gives the same bits (the build must not contract a*b+c: -ffp-contract=off).
 *
 * A mask is one bit an entry, row-major, least significant bit first, 1 = kept. `values` are the kept entries in order. */

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define FAST __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FAST
#endif

#define BIT(mask, i) ((mask)[(i) >> 3] >> ((i) & 7) & 1)

/* Number of set bits of n bytes. */
FAST int64_t count_bits(const uint8_t *mask, int64_t n)
{
    int64_t total = 0, i = 0;
    for (; i + 8 <= n; i += 8) {
        uint64_t word;
        memcpy(&word, mask + i, 8);
        total += __builtin_popcountll(word);
    }
    for (; i < n; i++)
        total += __builtin_popcount(mask[i]);
    return total;
}

/* values = dense[mask], and dense = 0, dense[mask] = values. A byte of the mask stands for eight entries, 16 or 32 bytes,
 * which one or two shuffles bring into place. There are `count` values, and none is touched behind the last. */
typedef uint8_t bytes __attribute__((vector_size(16)));

typedef struct {
    bytes to_values[256], to_dense[256], is_kept[256]; /* by mask of the entries in 16 bytes: 8 bits or 4 */
} places;

static void fill(places *p, int size)
{
    int lanes = 16 / size;
    for (int mask = 0; mask < 1 << lanes; mask++) {
        uint8_t gather[16] = {0}, scatter[16] = {0}, flags[16] = {0};
        for (int lane = 0, n = 0; lane < lanes; lane++)
            if (mask >> lane & 1) {
                for (int byte = 0; byte < size; byte++) {
                    gather[n * size + byte] = lane * size + byte;
                    scatter[lane * size + byte] = n * size + byte;
                    flags[lane * size + byte] = 255;
                }
                n++;
            }
        memcpy(p->to_values + mask, gather, 16);
        memcpy(p->to_dense + mask, scatter, 16);
        memcpy(p->is_kept + mask, flags, 16);
    }
}

/* Entry i and value n are where the loop stands; READ and WRITE are one of them each, PLACED is `group` in its new order,
 * ENTRY what to do with a single entry. */
#define CODEC(NAME, TYPE, READ, WRITE, PLACED, ENTRY)                                                                  \
    FAST void NAME(const TYPE *from, const uint8_t *mask, int64_t entries, int64_t count, TYPE *to)                    \
    {                                                                                                                  \
        enum { TOGETHER = 16 / sizeof(TYPE) };                                                                         \
        int64_t i = 0, n = 0;                                                                                          \
        places p;                                                                                                      \
        fill(&p, sizeof(TYPE));                                                                                        \
        for (; i + 8 <= entries && n + TOGETHER <= count; i += TOGETHER) {                                             \
            unsigned bits = mask[i >> 3] >> (i & 7) & ((1 << TOGETHER) - 1);                                           \
            bytes group;                                                                                               \
            memcpy(&group, from + READ, 16);                                                                           \
            group = PLACED;                                                                                            \
            memcpy(to + WRITE, &group, 16);                                                                            \
            n += __builtin_popcount(bits);                                                                             \
        }                                                                                                              \
        for (; i < entries; i++)                                                                                       \
            ENTRY;                                                                                                     \
    }
#define GATHERED __builtin_shuffle(group, p.to_values[bits])
#define GATHER_ONE                                                                                                     \
    if (BIT(mask, i) && n < count)                                                                                     \
    to[n++] = from[i]
#define SCATTERED (__builtin_shuffle(group, p.to_dense[bits]) & p.is_kept[bits])
#define SCATTER_ONE to[i] = BIT(mask, i) && n < count ? from[n++] : 0
CODEC(gather_2, uint16_t, i, n, GATHERED, GATHER_ONE)
CODEC(gather_4, uint32_t, i, n, GATHERED, GATHER_ONE)
CODEC(scatter_2, uint16_t, n, i, SCATTERED, SCATTER_ONE)
CODEC(scatter_4, uint32_t, n, i, SCATTERED, SCATTER_ONE)

/* Folding: total += weight * fixed-point values where kept; votes += 1 where pruned; counts += weight where kept. */
static void count_kept(const uint8_t *mask, int64_t entries, int64_t weight, int32_t *restrict counts)
{
    for (int64_t i = 0; i < entries; i++)
        counts[i] += (int32_t)(weight * BIT(mask, i));
}

/* A 16-bit value of any format is looked up in `table`, which has the fixed-point numbers of all 65536 times the weight.
 * Eight entries at a time: their values are brought into place, and zeros, whose number is 0, where there are none. */
#define FOLD_16(NAME, VOTE)                                                                                            \
    FAST void NAME(const uint16_t *restrict values, const uint8_t *restrict mask, int64_t entries, int64_t count,      \
                   const int64_t *restrict table, int64_t weight, int64_t *restrict total, VOTE *restrict votes,       \
                   int32_t *restrict counts)                                                                           \
    {                                                                                                                  \
        typedef VOTE eight __attribute__((vector_size(8 * sizeof(VOTE))));                                             \
        int64_t i = 0, n = 0;                                                                                          \
        eight pruned[256];                                                                                             \
        places p;                                                                                                      \
        fill(&p, 2);                                                                                                   \
        for (int bits = 0; bits < 256; bits++)                                                                         \
            for (int b = 0; b < 8; b++)                                                                                \
                pruned[bits][b] = !(bits >> b & 1);                                                                    \
        for (; i + 8 <= entries && n + 8 <= count; i += 8) {                                                           \
            unsigned bits = mask[i >> 3];                                                                              \
            bytes group;                                                                                               \
            eight voted;                                                                                               \
            uint16_t placed[8];                                                                                        \
            memcpy(&group, values + n, 16);                                                                            \
            group = SCATTERED;                                                                                         \
            memcpy(placed, &group, 16);                                                                                \
            for (int b = 0; b < 8; b++)                                                                                \
                total[i + b] += table[placed[b]];                                                                      \
            memcpy(&voted, votes + i, sizeof(voted));                                                                  \
            voted += pruned[bits];                                                                                     \
            memcpy(votes + i, &voted, sizeof(voted));                                                                  \
            n += __builtin_popcount(bits);                                                                             \
        }                                                                                                              \
        for (; i < entries; i++) {                                                                                     \
            if (BIT(mask, i) && n < count)                                                                             \
                total[i] += table[values[n++]];                                                                        \
            else                                                                                                       \
                votes[i] += 1;                                                                                         \
        }                                                                                                              \
        if (counts)                                                                                                    \
            count_kept(mask, entries, weight, counts);                                                                 \
    }
FOLD_16(fold_2_1, uint8_t)
FOLD_16(fold_2_2, int16_t)

/* Values that are fixed-point numbers already. */
#define FOLD_64(NAME, VOTE)                                                                                            \
    void NAME(const int64_t *restrict values, const uint8_t *restrict mask, int64_t entries, int64_t count,            \
              int64_t weight, int64_t *restrict total, VOTE *restrict votes, int32_t *restrict counts)                 \
    {                                                                                                                  \
        int64_t i = 0, n = 0;                                                                                          \
        for (; i + 8 <= entries && n + 8 < count; i += 8) {                                                            \
            unsigned bits = mask[i >> 3];                                                                              \
            for (int b = 0; b < 8; b++) {                                                                              \
                int64_t bit = bits >> b & 1;                                                                           \
                total[i + b] += weight * values[n] & -bit;                                                             \
                votes[i + b] += (VOTE)(1 - bit);                                                                       \
                n += bit;                                                                                              \
            }                                                                                                          \
        }                                                                                                              \
        for (; i < entries; i++) {                                                                                     \
            if (BIT(mask, i) && n < count)                                                                             \
                total[i] += weight * values[n++];                                                                      \
            else                                                                                                       \
                votes[i] += 1;                                                                                         \
        }                                                                                                              \
        if (counts)                                                                                                    \
            count_kept(mask, entries, weight, counts);                                                                 \
    }
FOLD_64(fold_8_1, uint8_t)
FOLD_64(fold_8_2, int16_t)

/* (high, low) += values: the sum in doubles, and what it has lost by rounding. */
FAST void add_exactly(const float *restrict values, int64_t entries, double *restrict high, double *restrict low)
{
    for (int64_t i = 0; i < entries; i++) {
        double value = values[i], total = high[i] + value, taken = total - high[i];
        low[i] += (high[i] - (total - taken)) + (value - taken);
        high[i] = total;
    }
}

/* mean = total / 2^bits / divisor, where the divisor is at least 1. */
#define MEAN(NAME, BY, DIVISOR)                                                                                        \
    FAST void NAME(const int64_t *restrict total, const BY *restrict by, int64_t entries, int64_t bits,                \
                   int64_t clients, float *restrict mean)                                                              \
    {                                                                                                                  \
        double unit = 1.0 / (double)((int64_t)1 << bits);                                                              \
        for (int64_t i = 0; i < entries; i++) {                                                                        \
            int32_t divisor = DIVISOR;                                                                                 \
            mean[i] = (float)((double)total[i] * unit / (double)(divisor < 1 ? 1 : divisor));                          \
        }                                                                                                              \
    }
MEAN(mean_1, uint8_t, (int32_t)clients - by[i])
MEAN(mean_2, int16_t, (int32_t)clients - by[i])
MEAN(mean_4, int32_t, by[i])

/* One column block of SparseGPT, transposed: `columns` is (width, rows), `upper` the block's factor (width, width). Rows do
 * not depend on each other, so a tile of them is finished in the fastest cache, and a call takes those from `from` to `to`.
 * The errors of a few columns are applied to the columns on their right at once, in the order of the columns: the same sums
 * as one by one.
 * With group > 0 `kept` is written: of every `group` columns the `prune` with the smallest scores go, ties by index; those
 * that are not kept when it comes in go first, and always. */
typedef float lane __attribute__((vector_size(32))); /* gcc moves wider ones through memory where only AVX2 is there */
#define LANES 8
#define TILE (int64_t)(LANES * sizeof(lane) / sizeof(float))
#define WIDEST 256
#define FEW 8

typedef union {
    lane lanes[LANES];
    float row[LANES * sizeof(lane) / sizeof(float)];
} column;

static int64_t smaller(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static void choose(const column *w, uint8_t *kept, int64_t rows, int64_t tile, const float *importance, int64_t group,
                   int64_t prune)
{
    column scores[WIDEST];
    for (int64_t a = 0; a < group; a++)
        for (int64_t r = 0; r < TILE; r++)
            scores[a].row[r] = w[a].row[r] * w[a].row[r] * importance[a];
    for (int64_t a = 0; a < group; a++)
        for (int64_t r = 0; r < tile; r++)
            if (!kept[a * rows + r])
                scores[a].row[r] = -1.0f;
    for (int64_t a = 0; a < group; a++) {
        int32_t before[LANES * sizeof(lane) / sizeof(float)] = {0};
        for (int64_t b = 0; b < group; b++)
            for (int64_t r = 0; r < TILE; r++)
                before[r] += scores[b].row[r] < scores[a].row[r] || (b < a && scores[b].row[r] == scores[a].row[r]);
        for (int64_t r = 0; r < tile; r++)
            kept[a * rows + r] &= before[r] >= prune;
    }
}

FAST void sparsegpt_block(float *columns, uint8_t *kept, int64_t width, int64_t rows, const float *upper,
                          const float *importance, int64_t group, int64_t prune, int64_t from, int64_t to)
{
    column w[WIDEST], errors[WIDEST];
    int64_t step = group > FEW ? group : group ? FEW / group * group : FEW; /* whole groups */
    for (int64_t first = from; first < to; first += TILE) {
        int64_t tile = smaller(TILE, to - first);
        memset(w, 0, sizeof *w * width);
        memset(errors, 0, sizeof *errors * step);
        for (int64_t j = 0; j < width; j++)
            memcpy(w[j].row, columns + j * rows + first, tile * sizeof(float));
        for (int64_t low = 0; low < width; low += step) {
            int64_t high = smaller(low + step, width);
            for (int64_t j = low; j < high; j++) {
                const float *u = upper + j * width;
                uint8_t *flags = kept + j * rows + first;
                column *error = errors + (j - low);
                if (group && j % group == 0)
                    choose(w + j, flags, rows, tile, importance + j, group, prune);
                for (int64_t r = 0; r < tile; r++) {
                    error->row[r] = flags[r] ? 0.0f : w[j].row[r] / u[j];
                    w[j].row[r] = flags[r] ? w[j].row[r] : 0.0f;
                }
                for (int64_t k = j + 1; k < high; k++)
                    for (int l = 0; l < LANES; l++)
                        w[k].lanes[l] -= u[k] * error->lanes[l];
            }
            for (int64_t k = high; k < width; k++) {
                column rest = w[k];
                for (int64_t j = low; j < high; j++)
                    for (int l = 0; l < LANES; l++)
                        rest.lanes[l] -= upper[j * width + k] * errors[j - low].lanes[l];
                w[k] = rest;
            }
        }
        for (int64_t j = 0; j < width; j++)
            memcpy(columns + j * rows + first, w[j].row, tile * sizeof(float));
    }
}
