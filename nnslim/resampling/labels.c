/* Class scores on one grid to labels on another: two-tap resampling along each axis and a running best, block by block.
 *
 * The scores on the fine grid exist only for one class of one block, in the cache. A block needs a small box of the coarse
 * scores. Results are weighted means, so a class whose largest score in the box is below the smallest of another wins
 * nowhere in the block and is left out. */
#include <stdint.h>
#include <string.h>

#ifdef _OPENMP
#define EACH_THREAD _Pragma("omp parallel for num_threads(threads) schedule(static, 1)") for (long t = 0; t < threads; t++)
#else
#define EACH_THREAD for (long t = 0; t < threads; t++)
#endif

#define LANES 8
#define DEEP 16  /* a block: outputs along the first axis, */
#define HIGH 16  /* the second, */
#define WIDE 32  /* and the third */

typedef float vec __attribute__((vector_size(LANES * 4), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(LANES * 4), aligned(4)));
#define INLINE static inline __attribute__((always_inline))

INLINE vec load(const float *p) { return *(const vec *)p; }
INLINE void store(float *p, vec v) { *(vec *)p = v; }
INLINE vec splat(float s) { return (vec){s, s, s, s, s, s, s, s}; }
INLINE ivec splati(int32_t s) { return (ivec){s, s, s, s, s, s, s, s}; }
INLINE ivec bits(vec v) { return (ivec)v; }
INLINE vec choose(ivec mask, vec a, vec b) { return (vec)((bits(a) & mask) | (bits(b) & ~mask)); }

/* One axis: output i is near[i] * x[at[i]] + far[i] * x[next[i]]; at and next never fall, next - at is 0 or 1. */
typedef struct {
    long size_in, size_out;
    const int32_t *at, *next;
    const float *near, *far;
} axis;

typedef struct {
    const void *scores;
    long half;             /* float16, else float32 */
    long classes;
    long step[4];          /* of the scores, in numbers: class and three axes */
    axis axes[3];
    void *out;
    long wide_labels;      /* 16 bits, else 8 */
    long out_step[3];
    long rounded;          /* to float16 before they are compared */
    const int32_t *labels; /* of the channels, where they are regions; else NULL */
    float above;           /* a region counts where its score is greater */
    float margin;          /* of the largest score: beyond what rounding can do */
} job;

INLINE float from_half(uint16_t h) {
    union { uint32_t u; float f; } value = {(uint32_t)(h & 0x7fff) << 13};
    value.f *= 0x1p112f; /* the exponent's bias; right for subnormal numbers, too */
    value.u |= (uint32_t)(h & 0x8000) << 16;
    return value.f;
}

/* To the nearest float16, ties to even, for numbers in its range. */
INLINE vec to_half(vec v) {
    ivec u = bits(v), magnitude = u & splati(0x7fffffff);
    ivec normal = (u + splati(0xfff) + ((u >> 13) & splati(1))) & splati(~0x1fff);
    vec subnormal = (v + splat(0.75f)) - splat(0.75f); /* multiples of 2^-24 */
    return choose(magnitude < splati(0x38800000), subnormal, (vec)normal);
}

/* A row of scores as floats: the row itself where it is one. */
INLINE const float *row_of(const job *j, long offset, long count, float *buffer) {
    long step = j->step[3];
    if (j->half) {
        const uint16_t *from = (const uint16_t *)j->scores + offset;
        if (step == 1) for (long i = 0; i < count; i++) buffer[i] = from_half(from[i]);
        else for (long i = 0; i < count; i++) buffer[i] = from_half(from[i * step]);
        return buffer;
    }
    const float *from = (const float *)j->scores + offset;
    if (step == 1) return from;
    for (long i = 0; i < count; i++) buffer[i] = from[i * step];
    return buffer;
}

/* The inputs that outputs low..high-1 need, ascending; and where each output finds its two among them. */
static long needed(const axis *a, long low, long high, int32_t *need, int32_t *first, int32_t *second) {
    long n = 0;
    for (long i = low; i < high; i++) {
        if (!n || a->at[i] > need[n - 1]) need[n++] = a->at[i];
        first[i - low] = (int32_t)(need[n - 1] == a->at[i] ? n - 1 : n - 2);
        if (a->next[i] > need[n - 1]) need[n++] = a->next[i];
        second[i - low] = (int32_t)(need[n - 1] == a->next[i] ? n - 1 : n - 2);
    }
    return n;
}

typedef struct {
    int32_t need[3][2 * WIDE], first[3][WIDE], second[3][WIDE];
    long needs[3], low[3], count[3];
} box;

static void span(const job *j, box *b, int dim, long low, long block) {
    long size = j->axes[dim].size_out;
    long high = low + block < size ? low + block : size;
    b->low[dim] = low;
    b->count[dim] = high - low;
    b->needs[dim] = needed(&j->axes[dim], low, high, b->need[dim], b->first[dim], b->second[dim]);
}

/* Least and greatest score of a class in each box of a row of boxes; returns whether a score is not finite. */
static int32_t bounds(const job *j, const box *b, long c, long blocks, const int32_t *from, const int32_t *to, float *buffer,
                   float *least, float *most, float *low, float *high) {
    long wide = j->axes[2].size_in;
    int32_t bad = 0, finite = j->half ? 0x477fe000 : 0x7f7fffff; /* the largest number, as bits */
    for (long w = 0; w < wide; w++) least[w] = 3e38f, most[w] = -3e38f;
    for (long d = 0; d < b->needs[0]; d++)
        for (long h = 0; h < b->needs[1]; h++) {
            long offset = c * j->step[0] + b->need[0][d] * j->step[1] + b->need[1][h] * j->step[2];
            const float *row = row_of(j, offset, wide, buffer);
            for (long w = 0; w < wide; w++) {
                least[w] = row[w] < least[w] ? row[w] : least[w];
                most[w] = row[w] > most[w] ? row[w] : most[w];
            }
            for (long w = 0; w < wide; w++) {
                int32_t u;
                memcpy(&u, row + w, 4);
                bad |= (u & 0x7fffffff) > finite;
            }
        }
    for (long n = 0; n < blocks; n++) {
        float l = 3e38f, m = -3e38f;
        for (long w = from[n]; w <= to[n]; w++) {
            l = least[w] < l ? least[w] : l;
            m = most[w] > m ? most[w] : m;
        }
        low[c * blocks + n] = l;
        high[c * blocks + n] = m;
    }
    return bad;
}

typedef struct {
    float best[DEEP * HIGH * WIDE];
    int32_t label[DEEP * HIGH * WIDE];
    float rows[2 * DEEP * 2 * HIGH * WIDE]; /* a class of the box, resampled along the third axis */
    float plane[2 * HIGH * WIDE];
} scratch;

static void along_rows(const job *j, const box *b, long c, float *buffer, float *rows) {
    const axis *a = &j->axes[2];
    long begin = b->need[2][0], end = b->need[2][b->needs[2] - 1] + 1, low = b->low[2], count = b->count[2];
    for (long d = 0; d < b->needs[0]; d++)
        for (long h = 0; h < b->needs[1]; h++) {
            long offset = c * j->step[0] + b->need[0][d] * j->step[1] + b->need[1][h] * j->step[2] + begin * j->step[3];
            const float *row = row_of(j, offset, end - begin, buffer) - begin;
            float *to = rows + (d * b->needs[1] + h) * WIDE;
            for (long w = 0; w < count; w++)
                to[w] = a->near[low + w] * row[a->at[low + w]] + a->far[low + w] * row[a->next[low + w]];
            for (long w = count; w < WIDE; w++) to[w] = 0;
        }
}

INLINE void compete(const job *j, vec score, float *best, int32_t *label, int first, ivec number) {
    if (j->rounded) score = to_half(score);
    if (j->labels) {
        ivec mask = score > splat(j->above);
        *(ivec *)label = (number & mask) | (*(ivec *)label & ~mask);
    } else if (first) {
        store(best, score);
        *(ivec *)label = number;
    } else {
        vec so_far = load(best);
        ivec mask = score > so_far;
        store(best, choose(mask, score, so_far));
        *(ivec *)label = (number & mask) | (*(ivec *)label & ~mask);
    }
}

/* Let a class compete on the whole block. */
static void add_class(const job *j, const box *b, long c, int first, float *buffer, scratch *s) {
    const axis *deep = &j->axes[0], *tall = &j->axes[1];
    ivec number = splati(j->labels ? j->labels[c] : (int32_t)c);
    along_rows(j, b, c, buffer, s->rows);
    long width = b->needs[1] * WIDE;
    for (long d = 0; d < b->count[0]; d++) {
        const float *one = s->rows + b->first[0][d] * width, *two = s->rows + b->second[0][d] * width;
        vec near = splat(deep->near[b->low[0] + d]), far = splat(deep->far[b->low[0] + d]);
        for (long i = 0; i < width; i += LANES) store(s->plane + i, near * load(one + i) + far * load(two + i));
        for (long h = 0; h < b->count[1]; h++) {
            const float *upper = s->plane + b->first[1][h] * WIDE, *lower = s->plane + b->second[1][h] * WIDE;
            vec near_h = splat(tall->near[b->low[1] + h]), far_h = splat(tall->far[b->low[1] + h]);
            long at = (d * HIGH + h) * WIDE;
            for (long w = 0; w < WIDE; w += LANES)
                compete(j, near_h * load(upper + w) + far_h * load(lower + w), s->best + at + w, s->label + at + w, first,
                        number);
        }
    }
}

/* Write the labels of a block; all the same number where `label` is NULL. */
static void put(const job *j, const box *b, const int32_t *label, int32_t number) {
    for (long d = 0; d < b->count[0]; d++)
        for (long h = 0; h < b->count[1]; h++) {
            long at = (b->low[0] + d) * j->out_step[0] + (b->low[1] + h) * j->out_step[1] + b->low[2] * j->out_step[2];
            const int32_t *row = label ? label + (d * HIGH + h) * WIDE : NULL;
            for (long w = 0; w < b->count[2]; w++) {
                int32_t value = row ? row[w] : number;
                if (j->wide_labels) ((uint16_t *)j->out)[at + w * j->out_step[2]] = (uint16_t)value;
                else ((uint8_t *)j->out)[at + w * j->out_step[2]] = (uint8_t)value;
            }
        }
}

/* One block: `low` and `high` are the bounds of class c at [c * stride]. Returns how many classes were resampled. */
static long solve(const job *j, const box *b, const float *low, const float *high, long stride, float *buffer, scratch *s) {
    float floor = -3e38f, scale = 0, margin;
    long done = 0, only = -1, contenders = 0;
    for (long c = 0; c < j->classes; c++) {
        floor = low[c * stride] > floor ? low[c * stride] : floor;
        scale = high[c * stride] > scale ? high[c * stride] : scale;
        scale = -low[c * stride] > scale ? -low[c * stride] : scale;
    }
    margin = j->margin * scale;
    if (!j->labels) {
        for (long c = 0; c < j->classes; c++)
            if (high[c * stride] >= floor - margin) only = c, contenders++;
        if (contenders == 1) {
            put(j, b, NULL, (int32_t)only);
            return 0;
        }
        for (long c = 0; c < j->classes; c++)
            if (high[c * stride] >= floor - margin) add_class(j, b, c, done++ == 0, buffer, s);
        put(j, b, s->label, 0);
        return done;
    }
    int32_t under = 0; /* what fills the block so far, while no class was resampled after it */
    for (long c = 0; c < j->classes; c++) {
        if (high[c * stride] <= j->above - margin) continue;
        if (low[c * stride] > j->above + margin) {
            under = j->labels[c];
            done = 0;
            continue;
        }
        if (!done)
            for (long i = 0; i < DEEP * HIGH * WIDE; i++) s->label[i] = under;
        add_class(j, b, c, 0, buffer, s);
        done++;
    }
    put(j, b, done ? s->label : NULL, under);
    return done;
}

long nnslim_labels_blocks(const job *j) {
    return ((j->axes[0].size_out + DEEP - 1) / DEEP) * ((j->axes[1].size_out + HIGH - 1) / HIGH);
}

/* Bytes that each thread needs. */
long nnslim_labels_scratch(const job *j) {
    long blocks = (j->axes[2].size_out + WIDE - 1) / WIDE;
    return (long)sizeof(scratch) + 4 * (3 * (j->axes[2].size_in + LANES) + 2 * j->classes * blocks + 2 * blocks);
}

/* Rows of blocks lo..hi-1. Returns how many classes were resampled, summed over blocks; negative where one is not finite. */
long nnslim_labels(const job *j, long lo, long hi, long threads, char *memory) {
    long total = 0, each = nnslim_labels_scratch(j);
    long blocks = (j->axes[2].size_out + WIDE - 1) / WIDE, rows = (j->axes[1].size_out + HIGH - 1) / HIGH;
    long *sums = &total;
    EACH_THREAD {
        scratch *s = (scratch *)(memory + t * each);
        float *buffer = (float *)(s + 1), *least = buffer + j->axes[2].size_in + LANES;
        float *most = least + j->axes[2].size_in + LANES, *low = most + j->axes[2].size_in + LANES;
        float *high = low + j->classes * blocks;
        int32_t *from = (int32_t *)(high + j->classes * blocks), *to = from + blocks;
        box b;
        long done = 0, bad = 0;
        for (long n = 0; n < blocks; n++) {
            span(j, &b, 2, n * WIDE, WIDE);
            from[n] = b.need[2][0];
            to[n] = b.need[2][b.needs[2] - 1];
        }
        for (long task = lo + t; task < hi; task += threads) {
            span(j, &b, 0, task / rows * DEEP, DEEP);
            span(j, &b, 1, task % rows * HIGH, HIGH);
            for (long c = 0; c < j->classes; c++)
                bad |= bounds(j, &b, c, blocks, from, to, buffer, least, most, low, high);
            for (long n = 0; n < blocks; n++) {
                span(j, &b, 2, n * WIDE, WIDE);
                done += solve(j, &b, low + n, high + n, blocks, buffer, s);
            }
        }
#ifdef _OPENMP
#pragma omp atomic
#endif
        *sums += bad ? -(1L << 40) : done;
    }
    return total;
}
