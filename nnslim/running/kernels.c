/* Channels-last kernels for what torch and oneDNN do slowly on a CPU: passes over tall, narrow matrices.
 *
 * A tensor is rows of voxels, C floats each. Matrices of weights are row-major, (inputs, outputs padded to a multiple of
 * LANES with zeros). Every function works on rows lo..hi, shared between `threads` threads where the compiler has OpenMP;
 * without it the caller shares the rows between threads of its own. None keeps state or allocates on the heap. Built by
 * hatch_build.py for several sets of processor features. */
#include <stddef.h>
#include <string.h>

#ifdef _OPENMP
#define EACH_THREAD _Pragma("omp parallel for num_threads(threads) schedule(static, 1)") for (long t = 0; t < threads; t++)
#else
#define EACH_THREAD for (long t = 0; t < threads; t++)
#endif
#define BOUND(t) (lo + (hi - lo) * (t) / threads)

int nnslim_has_threads(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

#define LANES 8    /* what widths are padded to: half of a wide vector, where there are wide ones */
#define ROWS 12    /* rows at a time: as many accumulators of the 16 registers of AVX2 */
#define TILE 96    /* voxels at a time: their wide rows stay in the cache */
#define WIDEST 512 /* channels; the caller keeps to it */
#ifdef __AVX512VL__
#define PAIR ROWS /* rows of two vectors at a time: there are 32 registers */
#else
#define PAIR (ROWS / 2)
#endif

typedef float vec __attribute__((vector_size(LANES * 4), aligned(4)));
#define INLINE static inline __attribute__((always_inline))

INLINE vec load(const float *p) { return *(const vec *)p; }
INLINE void store(float *p, vec v) { *(vec *)p = v; }
INLINE vec splat(float s) { return (vec){s, s, s, s, s, s, s, s}; }
INLINE long padded(long n) { return (n + LANES - 1) / LANES * LANES; }

/* y[r] = bias + sum_k x[r * ldx + k * step] b[k] for `rows` rows and `vectors` vectors of columns; both are constants
 * after inlining. */
#define BLOCK(name, type)                                                                                              \
    INLINE void name(const float *x, long ldx, long step, long inner, const float *b, long ldb, const float *bias,     \
                     float *y, long ldy, int rows, int vectors) {                                                      \
        const int lanes = sizeof(type) / sizeof(float);                                                                \
        type sum[ROWS][2];                                                                                             \
        for (int r = 0; r < rows; r++)                                                                                 \
            for (int v = 0; v < vectors; v++) sum[r][v] = bias ? *(const type *)(bias + v * lanes) : (type){0};        \
        for (long k = 0; k < inner; k++) {                                                                             \
            type w[2];                                                                                                 \
            for (int v = 0; v < vectors; v++) w[v] = *(const type *)(b + k * ldb + v * lanes);                         \
            for (int r = 0; r < rows; r++)                                                                             \
                for (int v = 0; v < vectors; v++) sum[r][v] += x[r * ldx + k * step] * w[v];                           \
        }                                                                                                              \
        for (int r = 0; r < rows; r++)                                                                                 \
            for (int v = 0; v < vectors; v++) *(type *)(y + r * ldy + v * lanes) = sum[r][v];                          \
    }
BLOCK(block, vec)

/* The same for all rows, `some` rows at a time; one by one at the end. */
#define ALL_ROWS(block, some, vectors)                                                                                 \
    do {                                                                                                               \
        long r = 0;                                                                                                    \
        for (; r + (some) <= rows; r += (some))                                                                        \
            block(x + r * ldx, ldx, 1, inner, b + c, columns, at, y + r * ldy + c, ldy, some, vectors);                \
        for (; r < rows; r++) block(x + r * ldx, ldx, 1, inner, b + c, columns, at, y + r * ldy + c, ldy, 1, vectors); \
    } while (0)

#ifdef __AVX512F__
#define WIDE (2 * LANES)
#else
#define WIDE LANES
#endif
typedef float wide_vec __attribute__((vector_size(WIDE * 4), aligned(4)));
BLOCK(wide_block, wide_vec)

/* y (rows, columns) = bias + x (rows, inner) b (inner, columns); columns is a multiple of LANES. */
static void product(const float *x, long ldx, long rows, long inner, const float *b, long columns, const float *bias,
                    float *y, long ldy) {
    long c = 0;
    const float *at = bias;
#define ADVANCE(by) c += (by), at = bias ? bias + c : NULL
    for (; c + 2 * WIDE <= columns; ADVANCE(2 * WIDE)) ALL_ROWS(wide_block, PAIR, 2);
    for (; c + WIDE <= columns; ADVANCE(WIDE)) ALL_ROWS(wide_block, ROWS, 1);
    for (; c < columns; ADVANCE(LANES)) ALL_ROWS(block, ROWS, 1);
#undef ADVANCE
}

/* Like product, into rows of any width: the last columns go through a buffer. */
static void product_to(const float *x, long ldx, long rows, long inner, const float *b, long width, const float *bias,
                       float *y) {
    long columns = padded(width);
    if (columns == width) {
        product(x, ldx, rows, inner, b, columns, bias, y, width);
        return;
    }
    float buffer[ROWS * WIDEST];
    for (long r = 0; r < rows; r += ROWS) {
        long some = rows - r < ROWS ? rows - r : ROWS;
        product(x + r * ldx, ldx, some, inner, b, columns, bias, buffer, columns);
        for (long i = 0; i < some; i++) memcpy(y + (r + i) * width, buffer + i * columns, width * sizeof(float));
    }
}

/* Sums over rows lo..hi of d = z - pivot: sum (C) and, per channel, square (C); or where `full`, square (C, padded C) of
 * all products. Added up in double from short blocks in float. C is a multiple of LANES. */
static void moments(const float *z, long lo, long hi, long channels, const float *pivot, int full, double *sum,
                    double *square) {
    float tile[TILE * WIDEST], total[WIDEST], products[WIDEST];
    memset(sum, 0, channels * sizeof(double));
    memset(square, 0, channels * (full ? channels : 1) * sizeof(double));
    for (long first = lo; first < hi; first += TILE) {
        long rows = hi - first < TILE ? hi - first : TILE;
        for (long c = 0; c < channels; c += LANES) {
            vec s = splat(0), q = splat(0), p = load(pivot + c);
            for (long r = 0; r < rows; r++) {
                vec d = load(z + (first + r) * channels + c) - p;
                s += d;
                q += d * d;
                if (full) store(tile + r * channels + c, d);
            }
            store(total + c, s);
            store(products + c, q);
        }
        for (long c = 0; c < channels; c++) sum[c] += total[c];
        if (!full) {
            for (long c = 0; c < channels; c++) square[c] += products[c];
            continue;
        }
        for (long i = 0; i < channels; i += LANES)
            for (long c = i / WIDE * WIDE, width; c < channels; c += width) { /* the rest is symmetric */
                float part[LANES][2 * WIDE];
                const float *x = tile + i, *b = tile + c;
#define PART(block, vectors) block(x, 1, channels, rows, b, channels, NULL, part[0], 2 * WIDE, LANES, vectors)
                if (c + 2 * WIDE <= channels && PAIR == ROWS) width = 2 * WIDE, PART(wide_block, 2);
                else if (c + WIDE <= channels) width = WIDE, PART(wide_block, 1);
                else width = LANES, PART(block, 1);
#undef PART
                for (long k = 0; k < LANES; k++)
                    for (long l = 0; l < width; l++) square[(i + k) * channels + c + l] += part[k][l];
            }
    }
    if (full)
        for (long i = 0; i < channels; i++)
            for (long c = 0; c < i; c++) square[i * channels + c] = square[c * channels + i];
}

/* One (C) of `sum` and one (C) or (C, C) of `square` for each thread. */
void nnslim_moments(const float *z, long lo, long hi, long threads, long channels, const float *pivot, int full,
                    double *sum, double *square) {
    long each = full ? channels * channels : channels;
    EACH_THREAD moments(z, BOUND(t), BOUND(t + 1), channels, pivot, full, sum + t * channels, square + t * each);
}

INLINE void activate(float *y, long count, float slope) {
    for (long i = 0; i < count; i++) {
        float low = y[i] * slope;
        y[i] = y[i] > low ? y[i] : low;  /* NaN stays NaN */
    }
}

/* Rows lo..hi of: y = act(W z + shift), or act(scale * z + shift) where w is NULL; then outs[n] = y vs[n] + biases[n] for
 * each of `count`, and y itself to `keep` where that is not NULL (it may be z where w is NULL). `wide` is a multiple of
 * LANES; slope is at most 1. */
static void pass(const float *z, long lo, long hi, long channels, long wide, const float *w, const float *scale,
                 const float *shift, float slope, long count, const long *widths, const float *const *vs,
                 const float *const *biases, float *const *outs, float *keep) {
    float tile[TILE * WIDEST];
    for (long first = lo; first < hi; first += TILE) {
        long rows = hi - first < TILE ? hi - first : TILE;
        float *y = keep ? keep + first * wide : tile;
        if (w) {
            product(z + first * channels, channels, rows, channels, w, wide, shift, y, wide);
        } else {
            for (long r = 0; r < rows; r++)
                for (long c = 0; c < wide; c += LANES)
                    store(y + r * wide + c, load(z + (first + r) * wide + c) * load(scale + c) + load(shift + c));
        }
        if (slope != 1) activate(y, rows * wide, slope);
        for (long n = 0; n < count; n++)
            product_to(y, wide, rows, wide, vs[n], widths[n], biases[n], outs[n] + first * widths[n]);
    }
}

void nnslim_pass(const float *z, long lo, long hi, long threads, long channels, long wide, const float *w,
                 const float *scale, const float *shift, float slope, long count, const long *widths,
                 const float *const *vs, const float *const *biases, float *const *outs, float *keep) {
    EACH_THREAD pass(z, BOUND(t), BOUND(t + 1), channels, wide, w, scale, shift, slope, count, widths, vs, biases, outs,
                     keep);
}

/* Lines lo..hi of a transposed convolution whose kernel is its stride, plus `add` where that is not NULL.
 * x (D, H, W, inputs); w (inputs, kd * kh * kw * width), columns a multiple of LANES; out (D kd, H kh, W kw, width).
 * A line is one (d, h) of the input. */
static void transposed(const float *x, long lo, long hi, const long *size, long inputs, const float *w, long columns,
                       const float *bias, const long *kernel, long width, const float *add, float *out) {
    float buffer[ROWS * WIDEST * 8];
    long high = size[1], across = size[2], kd = kernel[0], kh = kernel[1], kw = kernel[2];
    for (long line = lo; line < hi; line++) {
        long d = line / high, h = line % high;
        for (long first = 0; first < across; first += ROWS) {
            long rows = across - first < ROWS ? across - first : ROWS;
            product(x + (line * across + first) * inputs, inputs, rows, inputs, w, columns, bias, buffer, columns);
            for (long a = 0; a < kd; a++)
                for (long b = 0; b < kh; b++) {
                    long start = (((d * kd + a) * high * kh + h * kh + b) * across * kw + first * kw) * width;
                    for (long r = 0; r < rows; r++) {
                        const float *from = buffer + r * columns + (a * kh + b) * kw * width;
                        long at = start + r * kw * width, n = kw * width;
                        if (add) for (long i = 0; i < n; i++) out[at + i] = from[i] + add[at + i];
                        else memcpy(out + at, from, n * sizeof(float));
                    }
                }
        }
    }
}

void nnslim_transposed(const float *x, long lo, long hi, long threads, const long *size, long inputs, const float *w,
                       long columns, const float *bias, const long *kernel, long width, const float *add, float *out) {
    EACH_THREAD transposed(x, BOUND(t), BOUND(t + 1), size, inputs, w, columns, bias, kernel, width, add, out);
}

/* The line of the input that tap (a, b) sees from an output line; NULL where that is padding. */
INLINE const float *neighbour(const float *x, const long *size, long inputs, const long *kernel, long line, long a,
                              long b) {
    long d = line / size[1] + a - kernel[0] / 2, h = line % size[1] + b - kernel[1] / 2;
    return d < 0 || d >= size[0] || h < 0 || h >= size[1] ? NULL : x + (d * size[1] + h) * size[2] * inputs;
}

/* Output lines lo..hi of a 3D convolution with stride 1 and "same" zero padding, few channels.
 * x (D, H, W, inputs); w (kd, kh, kw, inputs, outputs); out (D, H, W, outputs); outputs a multiple of LANES.
 * `scratch` holds (W + kw + 16) * inputs * kd * kh floats.
 *
 * Where there are wide vectors, WIDE voxels of a line are one, so that few outputs fill it, too. The lines that a voxel
 * sees are kept as planes, (inputs, length); the next line needs only the foremost ones anew. */
#if WIDE > LANES
#define VOXELS 3 /* vectors at a time: with LANES outputs 24 accumulators of 32 registers */

#ifdef __has_builtin
#if __has_builtin(__builtin_shufflevector)
#define PAIRED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif
#endif

INLINE void transpose(vec r[LANES]) {
#ifdef PAIRED
    vec s[LANES], t[LANES];
    for (int i = 0; i < LANES; i += 2) {
        s[i] = PAIRED(r[i], r[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        s[i + 1] = PAIRED(r[i], r[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    for (int i = 0; i < LANES; i += 4)
        for (int k = 0; k < 2; k++) {
            t[i + 2 * k] = PAIRED(s[i + k], s[i + k + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            t[i + 2 * k + 1] = PAIRED(s[i + k], s[i + k + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    for (int i = 0; i < LANES / 2; i++) {
        r[i] = PAIRED(t[i], t[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        r[i + 4] = PAIRED(t[i], t[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
#else
    float from[LANES][LANES], to[LANES][LANES];
    memcpy(from, r, sizeof(from));
    for (int i = 0; i < LANES; i++)
        for (int k = 0; k < LANES; k++) to[k][i] = from[i][k];
    memcpy(r, to, sizeof(to));
#endif
}

/* (across, inputs) -> (inputs, length), with `before` zeros in front of each plane and zeros behind it. */
static void planes(const float *line, long across, long inputs, long before, long length, float *to) {
    for (long k = 0; k < inputs; k++) {
        memset(to + k * length, 0, before * sizeof(float));
        memset(to + k * length + before + across, 0, (length - before - across) * sizeof(float));
    }
    for (long first = 0; first < across; first += LANES)
        for (long k = 0; k < inputs; k += LANES) {
            float *at = to + k * length + before + first;
            if (first + LANES <= across && k + LANES <= inputs) {
                vec r[LANES];
                for (int i = 0; i < LANES; i++) r[i] = load(line + (first + i) * inputs + k);
                transpose(r);
                for (int i = 0; i < LANES; i++) store(at + i * length, r[i]);
            } else {
                for (long i = first; i < across && i < first + LANES; i++)
                    for (long c = k; c < inputs && c < k + LANES; c++)
                        to[c * length + before + i] = line[i * inputs + c];
            }
        }
}

/* LANES outputs of `some` voxels, at most `vectors` * WIDE. */
INLINE void voxels(const float *const *lines, long at, int taps, long across, long inputs, long length, const float *w,
                   long outputs, const float *bias, float *y, long some, int vectors) {
    wide_vec sum[LANES][VOXELS];
    for (int o = 0; o < LANES; o++)
        for (int v = 0; v < vectors; v++) sum[o][v] = bias[o] + (wide_vec){0};
    for (int t = 0; t < taps; t++) {
        if (!lines[t]) continue;
        for (long k = 0; k < inputs; k++)
            for (long j = 0; j < across; j++) {
                const float *x = lines[t] + k * length + at + j, *weight = w + ((t * across + j) * inputs + k) * outputs;
                wide_vec seen[VOXELS];
                for (int v = 0; v < vectors; v++) seen[v] = *(const wide_vec *)(x + v * WIDE);
                for (int o = 0; o < LANES; o++)
                    for (int v = 0; v < vectors; v++) sum[o][v] += weight[o] * seen[v];
            }
    }
    for (int v = 0; v < vectors; v++) {
        float lane[LANES][WIDE];
        for (int o = 0; o < LANES; o++) memcpy(lane[o], &sum[o][v], sizeof(lane[o]));
        for (int half = 0; half < WIDE; half += LANES) {
            vec r[LANES];
            for (int o = 0; o < LANES; o++) r[o] = load(lane[o] + half);
            transpose(r);
            for (int i = 0; i < LANES && v * WIDE + half + i < some; i++)
                store(y + (v * WIDE + half + i) * outputs, r[i]);
        }
    }
}

static void conv(const float *x, long lo, long hi, const long *size, long inputs, const float *w, const long *kernel,
                 long outputs, const float *bias, float *out, float *scratch) {
    long across = size[2], kd = kernel[0], kh = kernel[1], kw = kernel[2];
    long length = (across + WIDE - 1) / WIDE * WIDE + kw - 1;
    const float *lines[128];
    for (long line = lo; line < hi; line++) {
        long h = line % size[1];
        for (long t = 0; t < kd * kh; t++) {
            const float *from = neighbour(x, size, inputs, kernel, line, t / kh, t % kh);
            float *kept = scratch + (t / kh * kh + (h + t % kh + kh - kh / 2) % kh) * inputs * length;
            int anew = line == lo || h == 0 || t % kh == kh - 1;
            if (from && anew) planes(from, across, inputs, kw / 2, length, kept);
            lines[t] = from ? kept : NULL;
        }
        for (long o = 0; o < outputs; o += LANES)
            for (long first = 0; first < across;) {
                long some = across - first, vectors = (some + WIDE - 1) / WIDE, parts = (vectors + VOXELS - 1) / VOXELS;
                float *y = out + (line * across + first) * outputs + o;
#define SOME(count) voxels(lines, first, kd * kh, kw, inputs, length, w + o, outputs, bias + o, y, some, count)
                vectors = (vectors + parts - 1) / parts; /* parts of about one size: a single vector is slow */
                if (vectors == 3) SOME(3);
                else if (vectors == 2) SOME(2);
                else SOME(1);
#undef SOME
                first += vectors * WIDE;
            }
    }
}
#else
/* Elsewhere LANES outputs of a voxel are a vector. */
#define SPAN 12
INLINE void span(const float *const *lines, int taps, long across, long inputs, const float *w, long outputs,
                 const float *bias, float *y, int count) {
    vec sum[SPAN];
    for (int i = 0; i < count; i++) sum[i] = load(bias);
    for (int t = 0; t < taps; t++) {
        const float *x = lines[t];
        if (x)
            for (long k = 0; k < across * inputs; k++) { /* taps along the line and inputs: one run of floats */
                vec weight = load(w + (t * across * inputs + k) * outputs);
                for (int i = 0; i < count; i++) sum[i] += splat(x[i * inputs + k]) * weight;
            }
    }
    for (int i = 0; i < count; i++) store(y + i * outputs, sum[i]);
}

/* With the number of inputs known to the compiler, the addresses of a span need no registers. */
static void spans(const float *const *lines, int taps, long across, long inputs, const float *w, long outputs,
                  const float *bias, float *y) {
    if (inputs == 8 && across == 3) span(lines, taps, 3, 8, w, outputs, bias, y, SPAN);
    else if (inputs == 16 && across == 3) span(lines, taps, 3, 16, w, outputs, bias, y, SPAN);
    else span(lines, taps, across, inputs, w, outputs, bias, y, SPAN);
}

static void conv(const float *x, long lo, long hi, const long *size, long inputs, const float *w, const long *kernel,
                 long outputs, const float *bias, float *out, float *scratch) {
    long across = size[2], kd = kernel[0], kh = kernel[1], kw = kernel[2], length = (across + kw - 1) * inputs;
    const float *lines[128], *shifted[128];
    for (long line = lo; line < hi; line++) {
        for (long t = 0; t < kd * kh; t++) {
            const float *from = neighbour(x, size, inputs, kernel, line, t / kh, t % kh);
            float *copy = scratch + t * length;
            lines[t] = from ? copy : NULL;
            if (!from) continue;
            memset(copy, 0, kw / 2 * inputs * sizeof(float));
            memcpy(copy + kw / 2 * inputs, from, across * inputs * sizeof(float));
            memset(copy + (across + kw / 2) * inputs, 0, (kw - 1 - kw / 2) * inputs * sizeof(float));
        }
        for (long o = 0; o < outputs; o += LANES)
            for (long first = 0; first < across;) {
                for (int t = 0; t < kd * kh; t++) shifted[t] = lines[t] ? lines[t] + first * inputs : NULL;
                float *y = out + (line * across + first) * outputs + o;
                if (across - first >= SPAN) {
                    spans(shifted, kd * kh, kw, inputs, w + o, outputs, bias + o, y);
                    first += SPAN;
                } else if (across - first >= 4) {
                    span(shifted, kd * kh, kw, inputs, w + o, outputs, bias + o, y, 4);
                    first += 4;
                } else {
                    span(shifted, kd * kh, kw, inputs, w + o, outputs, bias + o, y, 1);
                    first += 1;
                }
            }
    }
}
#endif

/* `scratch` holds that much for each thread. */
void nnslim_conv(const float *x, long lo, long hi, long threads, const long *size, long inputs, const float *w,
                 const long *kernel, long outputs, const float *bias, float *out, float *scratch) {
    long each = (size[2] + kernel[2] + 16) * inputs * kernel[0] * kernel[1];
    EACH_THREAD conv(x, BOUND(t), BOUND(t + 1), size, inputs, w, kernel, outputs, bias, out, scratch + t * each);
}
