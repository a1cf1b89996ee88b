/* The codec logit (docs/format.md sections 5 and 6) and the sums that its fit asks for: the same bits as logit.py, lanes.py,
   logit_model.py and logit_fit.py, tested.

   A payload is hostile: every size in it is compared with those of the shape, which the caller vouches for, before it is
   used; states, words and coefficients are values, or indices that are limited first. */

#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF /* numpy rounds products */
#endif

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(_WIN32)
#define API __declspec(dllexport)
#else
#define API __attribute__((visibility("default")))
#endif

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12
#define WIDE __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define WIDE __attribute__((target_clones("avx2", "default")))
#endif
#else
#define WIDE
#endif

#if defined(__GNUC__)
#define ALWAYS static inline __attribute__((always_inline))
#define LOWEST(bits) __builtin_ctzll(bits)
#define SET(bits) __builtin_popcountll(bits)
#else
#define ALWAYS static inline
static inline int SET(uint64_t bits) {
    int count = 0;
    for (; bits; bits &= bits - 1) count++;
    return count;
}
static inline int LOWEST(uint64_t bits) {
    int place = 0;
    while (!(bits >> place & 1)) place++;
    return place;
}
#endif

enum { RUN = 1024, SOME = 64, AHEAD = 32, NEVER = 1 << 30 }; /* weights that are coded at once; see sums_of, reached */
enum { WAYS = 4, KEPT = 15, KEEP = 128 }; /* what is done side by side; see run_of */
enum { BITS = 15, ONE = 1 << BITS, LOW = 1 << 16, WINDOW = 8192, LEVELS = 1024, SAME = 5, OTHER = 3, PIECE = 512 };
enum { ROW, INPUT, POSITION, BEFORE, MAGNITUDE, REFERENCE, ARRAYS, MAX_RANK = 8, KINDS = SAME * SAME, CLASSES = 16 };
enum { GROUP = 8, MAX_LANE = 1 << 18, HIGHEST = 32, LEAST_SIDE = 16 };
enum { INFINITE = 0x7F80, MAGNITUDES = INFINITE + 2, WORDS = 1 << 16 }; /* in bfloat16; all NaN are the last */
enum { EXTREME = 384 }; /* of the fit: log-odds in 1/32 nat that its curve goes to */

/* Counts up with every change of what stands below: a library of another source is not used. */
API int64_t maskpack_loops(void) { return 16; }

typedef struct {
    const uint16_t *hazard;   /* LEVELS entries, each at most 8 UNIT */
    const uint16_t *survival; /* WINDOW + 8 UNIT entries */
    const uint16_t *reach;    /* ONE entries */
    const int32_t *first;     /* 15 tables of 16 entries: where the slots of each coefficient begin */
} Tables;

typedef struct {
    int64_t rows, inputs, positions, width; /* bytes of a weight of the base, 2 or 4; 0 if it is not known */
    const void *weights;                    /* row-major */
    const uint8_t *reference;               /* packed bits, row-major, or NULL */
    const uint8_t *ranks;                   /* of each magnitude the part of CLASSES that it is in, if that is known */
} Given;

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* --- weights of the base -------------------------------------------------------------------------------------------- */

static inline uint32_t word_of(const Given *given, int64_t at) {
    return given->width == 4 ? ((const uint32_t *)given->weights)[at] : (uint32_t)((const uint16_t *)given->weights)[at] << 16;
}

static inline int32_t negative(uint32_t word) { return word >> 31 && word <= 0xFF800000u; } /* a NaN has no sign */

static inline uint32_t magnitude(uint32_t word) {
    uint32_t own = word & 0x7FFFFFFF;
    return own > 0x7F800000u ? INFINITE + 1 : (own + 0x7FFF + (own >> 16 & 1)) >> 16;
}

/* For each magnitude that occurs, how many of `parts` equal parts of the weights lie below its middle. */
static void ranks(const Given *given, int64_t count, int parts, uint32_t *have, uint8_t *rank) {
    int64_t below = 0;
    if (given->width == 2) /* counted by words: an addition mostly need not wait for the one before */
        for (int64_t i = 0; i < count; i++) have[((const uint16_t *)given->weights)[i]]++;
    else
        for (int64_t i = 0; i < count; i++) have[magnitude(word_of(given, i))]++;
    if (given->width == 2) {
        for (uint32_t word = 0; word < WORDS / 2; word++) have[word] += have[word + WORDS / 2];
        for (uint32_t word = INFINITE + 2; word < WORDS / 2; word++) have[INFINITE + 1] += have[word]; /* NaN */
    }
    for (int v = 0; v < MAGNITUDES; v++)
        if (have[v]) {
            rank[v] = (uint8_t)((uint64_t)parts * (2 * (uint64_t)below + have[v]) / (2 * (uint64_t)count));
            below += have[v];
        }
}

API int32_t maskpack_ranks(const Given *given, int64_t count, int32_t parts, uint8_t *rank) {
    uint32_t *have = calloc(WORDS, sizeof *have);
    if (have) ranks(given, count, parts, have, rank);
    free(have);
    return have != NULL;
}

/* For each class but the first the magnitude below it: ranks rise with magnitudes, of those that occur. */
static void below_classes(const uint8_t *rank, int16_t *under) {
    for (int c = 1, v = 0; c < CLASSES; c++) {
        while (v < MAGNITUDES && rank[v] < c) v++;
        under[c] = (int16_t)(v < MAGNITUDES ? v - 1 : 0x7FFF);
    }
}

ALWAYS void add_some_classes(const int16_t *under, const int16_t *more, int classes, const uint16_t *words, uint16_t *sums) {
    int16_t own[SOME];
    uint16_t sum[SOME];
    memcpy(sum, sums, sizeof sum);
    for (int i = 0; i < SOME; i++) own[i] = (int16_t)(words[i] & 0x7FFF);
    for (int c = 0; c < classes; c++)
        for (int i = 0; i < SOME; i++) sum[i] = (uint16_t)(sum[i] + ((own[i] > under[c] ? -1 : 0) & more[c]));
    memcpy(sums, sum, sizeof sum);
}

/* Adds to `sums` what the classes of weights in bfloat16 add: `more` for each class but the first that a weight is in or above. */
WIDE static void add_classes(const int16_t *all_under, const int16_t *all_more, const uint16_t *words, int64_t count, uint16_t *sums) {
    int16_t under[CLASSES], more[CLASSES];
    int classes = 0;
    int64_t first = 0;
    for (int c = 1; c < CLASSES; c++)
        if (all_more[c]) under[classes] = all_under[c], more[classes++] = all_more[c];
    for (; first + SOME <= count; first += SOME) add_some_classes(under, more, classes, words + first, sums + first);
    if (first == count) return;
    uint16_t own[SOME], sum[SOME];
    for (int64_t i = 0; i < SOME; i++) own[i] = first + i < count ? words[first + i] : 0, sum[i] = 0;
    for (int64_t i = first; i < count; i++) sum[i - first] = sums[i];
    add_some_classes(under, more, classes, own, sum);
    for (int64_t i = first; i < count; i++) sums[i] = sum[i - first];
}

/* Classes of weights in bfloat16, of which there are CLASSES. */
WIDE static void few_classes(const uint8_t *rank, const uint16_t *words, int64_t count, uint8_t *classes) {
    int16_t under[CLASSES], more[CLASSES];
    below_classes(rank, under);
    for (int c = 0; c < CLASSES; c++) more[c] = 1;
    for (int64_t first = 0, some; first < count; first += some) {
        uint16_t sums[PIECE] = {0};
        some = least(count - first, PIECE);
        add_classes(under, more, words + first, some, sums);
        for (int64_t i = 0; i < some; i++) {
            uint16_t word = words[first + i];
            classes[first + i] = (uint8_t)(sums[i] | (word >> 15 & (word <= 0x8000 + INFINITE)) << 7); /* a NaN has no sign */
        }
    }
}

/* Classes of `count` < 2^32 weights, of which there are `parts` for each sign; a negative weight has the bit 128. */
API int32_t maskpack_classes(const Given *given, int64_t count, int32_t parts, uint8_t *classes) {
    uint32_t *have = calloc(WORDS, sizeof *have);
    uint8_t *rank = calloc(MAGNITUDES, 1), *class = malloc(WORDS);
    int32_t done = have && rank && class;
    if (done) {
        if (given->ranks)
            memcpy(rank, given->ranks, MAGNITUDES);
        else
            ranks(given, count, parts, have, rank);
        if (given->width == 2 && parts == CLASSES) {
            few_classes(rank, given->weights, count, classes);
            count = 0;
        }
        for (uint32_t word = 0; word < WORDS && count; word++) class[word] = (uint8_t)(rank[magnitude(word << 16)] | negative(word << 16) << 7);
        for (int64_t i = 0; i < count && given->width == 2; i++) classes[i] = class[((const uint16_t *)given->weights)[i]];
        for (int64_t i = 0; i < count && given->width == 4; i++) {
            uint32_t word = word_of(given, i);
            classes[i] = (uint8_t)(rank[magnitude(word)] | negative(word) << 7);
        }
    }
    free(have);
    free(rank);
    free(class);
    return done;
}

/* --- payloads ------------------------------------------------------------------------------------------------------- */

typedef struct {
    const uint8_t *data;
    int64_t size, at;
    int bad;
} Reader;

static int64_t byte(Reader *reader) {
    if (reader->at < reader->size) return reader->data[reader->at++];
    reader->bad = 1;
    return 0;
}

static int64_t varint(Reader *reader) {
    int64_t value = 0;
    for (int shift = 0; shift < 63; shift += 7) {
        int64_t group = byte(reader);
        value |= (group & 127) << shift;
        if (group < 128) return value;
    }
    reader->bad = 1;
    return 0;
}

static const int32_t STEPS[16] = {1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32}; /* of coefficients, in 1/16 nat */

/* What a payload says before its lanes, and all that a model takes. */
typedef struct {
    int64_t offset, lanes, coefficients;
    int arrays, rank, name[ARRAYS + 2 * MAX_RANK];         /* of each array in the payload: its number, or ARRAYS and more */
    int64_t size[ARRAYS + 2 * MAX_RANK];                   /* those of U_1, V_1, ... */
    uint8_t code[ARRAYS + 2 * MAX_RANK];
    int32_t *values;                                       /* of all arrays, one after another */
    int32_t *array[ARRAYS];                                /* within them, or NULL where all is 0 */
    float *lean;                                           /* U (rows, rank) and V (rank, inputs) */
    int16_t *magnitudes;                                   /* what each magnitude adds */
    int sorted;                                            /* whether a class follows from comparing a word with `under` */
    int16_t under[CLASSES], more[CLASSES];                 /* the magnitude below a class; what it adds more than the one before */
    int32_t contexts[2 * KINDS];                           /* what the events that were counted in a kernel add, by sign */
    int32_t row_step;                                      /* coefficients of rows are multiples of it */
    uint32_t *kept[KEPT];                                  /* see sums_of */
} Model;

/* Returns whether the head of a payload, up to the number of lanes, is one for this shape. */
static int head(Model *model, Reader *reader, const Given *given) {
    int64_t rows = given->rows, inputs = given->inputs, positions = given->positions, units = rows * inputs;
    int64_t sizes[ARRAYS] = {rows > 1 ? rows : 0, inputs > 1 && rows * positions > 1 ? inputs : 0,
                             positions > 1 ? positions : 0, positions == 1 ? 0 : given->width ? SAME * OTHER : SAME,
                             given->width ? CLASSES : 0, given->reference ? 1 : 0};
    int flags = (int)byte(reader) >> 1;
    memset(model, 0, sizeof *model);
    model->offset = HIGHEST - varint(reader);
    if (given->width && positions == 1 && rows >= LEAST_SIDE && inputs >= LEAST_SIDE) model->rank = (int)byte(reader);
    if (reader->bad || flags >> ARRAYS || model->rank > MAX_RANK || model->offset < -LEVELS) return 0;
    for (int n = 0; n < ARRAYS; n++)
        if (flags >> n & 1) {
            if (!sizes[n]) return 0;
            model->name[model->arrays] = n;
            model->size[model->arrays++] = sizes[n];
        }
    for (int k = 0; k < 2 * model->rank; k++) {
        model->name[model->arrays] = ARRAYS + k;
        model->size[model->arrays++] = k % 2 ? inputs : rows;
    }
    for (int n = 0; n < model->arrays; n++) {
        model->code[n] = (uint8_t)byte(reader);
        model->coefficients += model->size[n];
        if (!(model->code[n] & 15)) return 0;
    }
    model->lanes = varint(reader);
    return !reader->bad && model->lanes >= 1 && model->lanes >= (units + MAX_LANE - 1) / MAX_LANE &&
           model->lanes <= (units + GROUP - 1) / GROUP;
}

static void forget(Model *model) {
    free(model->values);
    free(model->lean);
    free(model->magnitudes);
    for (int k = 0; k < KEPT; k++) free(model->kept[k]);
}

/* Multiplies out the coefficients in `values`, which are allocated; returns whether there was memory. */
static int scale(Model *model, const Given *given) {
    int32_t *at = model->values;
    int64_t rows = given->rows, inputs = given->inputs, rank = model->rank;
    if (rank && !(model->lean = malloc((size_t)(rank * (rows + inputs)) * sizeof(float)))) return 0;
    for (int n = 0; n < model->arrays; n++) {
        int32_t step = STEPS[model->code[n] >> 4], k = model->name[n] - ARRAYS;
        for (int64_t i = 1; model->name[n] == MAGNITUDE && i < CLASSES; i++) at[i] += at[i - 1];
        for (int64_t i = 0; i < model->size[n]; i++) at[i] *= step;
        if (k < 0) model->array[model->name[n]] = at;
        if (model->name[n] == ROW) model->row_step = step;
        for (int64_t i = 0; k >= 0 && i < model->size[n]; i++)
            model->lean[k % 2 ? rank * rows + k / 2 * inputs + i : i * rank + k / 2] = (float)at[i];
        at += model->size[n];
    }
    for (int i = 0; model->array[BEFORE] && i < 2 * KINDS; i++) {
        int positive = i % KINDS / SAME, minus = i % SAME;
        int same = i < KINDS ? positive : minus, other = i < KINDS ? minus : positive;
        model->contexts[i] = model->array[BEFORE][same + SAME * (!given->width ? 0 : other < OTHER ? other : OTHER - 1)];
    }
    if (model->array[MAGNITUDE]) {
        uint8_t *own = given->ranks ? NULL : calloc(MAGNITUDES, 1);
        const uint8_t *rank_of = given->ranks ? given->ranks : own;
        int done = rank_of && (!own || maskpack_ranks(given, rows * inputs * given->positions, CLASSES, own));
        model->sorted = given->width == 2 && given->positions == 1 && !model->array[REFERENCE] && !rank; /* ranks rise with magnitudes */
        done = done && (model->sorted || (model->magnitudes = malloc(MAGNITUDES * sizeof(int16_t))));
        for (int v = 0; done && !model->sorted && v < MAGNITUDES; v++)
            model->magnitudes[v] = (int16_t)model->array[MAGNITUDE][rank_of[v]];
        if (done) below_classes(rank_of, model->under);
        for (int c = 1; done && c < CLASSES; c++)
            model->more[c] = (int16_t)(model->array[MAGNITUDE][c] - model->array[MAGNITUDE][c - 1]);
        free(own);
        return done;
    }
    return 1;
}

/* Levels, limited to those that there are, of `count` weights of a row at one position, from the input `first` on.
   `seen` has what was counted in the kernel of each: SAME * positive events + negative ones, each at most 4. */
WIDE static void levels_of(const Model *model, const Given *given, int64_t position, int64_t row, int64_t first,
                           int64_t count, const uint8_t *seen, int32_t *level) {
    int32_t base = (int32_t)(LEVELS / 2 + model->offset);
    int64_t step = given->positions, place = (row * given->inputs + first) * step + position;
    if (model->array[ROW]) base += model->array[ROW][row];
    if (model->array[POSITION]) base += model->array[POSITION][position];
    if (model->array[INPUT]) {
        const int32_t *input = model->array[INPUT] + first;
        for (int64_t i = 0; i < count; i++) level[i] = base + input[i];
    } else
        for (int64_t i = 0; i < count; i++) level[i] = base;
    if (model->array[MAGNITUDE])
        for (int64_t i = 0; i < count; i++) level[i] += model->magnitudes[magnitude(word_of(given, place + i * step))];
    if (model->array[REFERENCE])
        for (int64_t i = 0; i < count; i++) {
            int64_t at = place + i * step;
            level[i] += (given->reference[at >> 3] >> (at & 7) & 1) * *model->array[REFERENCE];
        }
    if (model->array[BEFORE] && given->width)
        for (int64_t i = 0; i < count; i++)
            level[i] += model->contexts[seen[i] + (negative(word_of(given, place + i * step)) ? KINDS : 0)];
    else if (model->array[BEFORE])
        for (int64_t i = 0; i < count; i++) level[i] += model->contexts[seen[i]];
    if (model->rank) { /* only where there is one position */
        const float *left = model->lean + row * model->rank, *right = model->lean + model->rank * given->rows + first;
        float lean[PIECE];
        for (int64_t i = 0; i < count; i++) lean[i] = left[0] * right[i];
        for (int64_t k = 1; k < model->rank; k++) {
            const float own = left[k], *other = right + k * given->inputs;
            for (int64_t i = 0; i < count; i++) lean[i] += own * other[i]; /* integers below 2^24: exact */
        }
        if (given->width == 4) {
            const uint32_t *words = (const uint32_t *)given->weights + place;
            for (int64_t i = 0; i < count; i++) {
                int32_t whole = (int32_t)lean[i], sign = -negative(words[i]);
                level[i] += ((whole ^ sign) - sign) >> 4;
            }
        } else {
            const uint16_t *words = (const uint16_t *)given->weights + place;
            for (int64_t i = 0; i < count; i++) {
                int32_t whole = (int32_t)lean[i], sign = -negative((uint32_t)words[i] << 16);
                level[i] += ((whole ^ sign) - sign) >> 4;
            }
        }
    }
    for (int64_t i = 0; i < count; i++) level[i] = level[i] < 0 ? 0 : level[i] >= LEVELS ? LEVELS - 1 : level[i];
}

/* Sums of the hazards of the levels that levels_of has, of at most RUN weights: before each, and of all; then AHEAD that are
   higher than any. */
WIDE static void add_up(const Tables *tables, const Model *model, const Given *given, int64_t position, int64_t row, int64_t first,
                        int64_t count, const uint8_t *seen, uint32_t *sums) {
    const uint16_t *words = (const uint16_t *)given->weights + row * given->inputs + first;
    int32_t base = (int32_t)(LEVELS / 2 + model->offset) + (model->array[ROW] ? model->array[ROW][row] : 0);
    uint16_t hazard[RUN];
    uint32_t used = 0;
    if (model->array[REFERENCE] || model->rank || model->array[BEFORE] || model->array[POSITION] || (model->array[MAGNITUDE] && !model->sorted)) {
        int32_t level[PIECE];
        for (int64_t from = 0, some; from < count; from += some) {
            some = least(count - from, PIECE);
            levels_of(model, given, position, row, first + from, some, seen + from, level);
            for (int64_t i = 0; i < some; i++) hazard[from + i] = tables->hazard[level[i]];
        }
    } else if (model->array[INPUT]) {
        const int32_t *input = model->array[INPUT] + first;
        base += model->array[MAGNITUDE] ? model->array[MAGNITUDE][0] : 0;
        for (int64_t i = 0; i < count; i++) hazard[i] = (uint16_t)(base + input[i]);
        if (model->array[MAGNITUDE]) add_classes(model->under, model->more, words, count, hazard);
        for (int64_t i = 0; i < count; i++) {
            int16_t level = (int16_t)hazard[i];
            hazard[i] = (uint16_t)(level < 0 ? 0 : level >= LEVELS ? LEVELS - 1 : level);
        }
        for (int64_t i = 0; i < count; i++) hazard[i] = tables->hazard[hazard[i]];
    } else {
        int16_t more[CLASSES];
        uint16_t before = 0, own = 0;
        for (int c = 0; c < CLASSES; c++, before = own) {
            int32_t level = base + (model->array[MAGNITUDE] ? model->array[MAGNITUDE][c] : 0);
            own = tables->hazard[level < 0 ? 0 : level >= LEVELS ? LEVELS - 1 : level];
            more[c] = (int16_t)(own - before);
        }
        for (int64_t i = 0; i < count; i++) hazard[i] = (uint16_t)more[0];
        if (model->array[MAGNITUDE]) add_classes(model->under, more, words, count, hazard);
    }
    int64_t at = 0;
    for (; at + 4 <= count; at += 4) {
        uint32_t one = hazard[at], two = one + hazard[at + 1], three = two + hazard[at + 2];
        sums[at] = used, sums[at + 1] = used + one, sums[at + 2] = used + two, sums[at + 3] = used + three;
        used += three + hazard[at + 3];
    }
    for (; at < count; at++) {
        sums[at] = used;
        used += hazard[at];
    }
    sums[count] = used;
    for (int64_t i = count + 1; i <= count + AHEAD; i++) sums[i] = NEVER;
}

/* Weights of a lane that lie in one row, side by side: their sums as add_up has them, in which the first one is at `at`. */
typedef struct {
    const uint32_t *sums;
    int64_t at, end, unit; /* the unit of sums[0] */
} Run;

/* The run from a unit on, in `own` where it is not kept: without classes, rows of the same coefficient have the same sums. */
static Run run_of(const Tables *tables, Model *model, const Given *given, int64_t position, int64_t unit, int64_t stop,
                  const uint8_t *seen, uint32_t *own) {
    int64_t row = unit / given->inputs, input = unit % given->inputs, first = input / RUN * RUN;
    int64_t whole = least(given->inputs - first, RUN), count = least(whole - (input - first), stop - unit);
    int alike = given->rows >= KEEP && given->positions == 1 && !model->array[MAGNITUDE] && !model->array[REFERENCE] && !model->rank;
    if (alike) {
        int k = KEPT / 2 + (model->array[ROW] ? model->array[ROW][row] / model->row_step : 0);
        int64_t runs = (given->inputs + RUN - 1) / RUN, length = RUN + 1 + AHEAD;
        uint32_t *kept = model->kept[k];
        if (!kept && (kept = model->kept[k] = malloc((size_t)(runs * length) * sizeof *kept)))
            for (int64_t r = 0; r < runs; r++)
                add_up(tables, model, given, 0, row, r * RUN, least(given->inputs - r * RUN, RUN), NULL, kept + r * length);
        if (kept) return (Run){kept + first / RUN * length, input - first, input - first + count, unit - (input - first)};
    }
    add_up(tables, model, given, position, row, input, count, seen, own);
    return (Run){own, 0, count, unit};
}

/* The first place behind `at` whose sum is at least `least`. */
ALWAYS int64_t reached(const uint32_t *sums, int64_t at, uint32_t enough) {
    for (; sums[at + AHEAD] < enough; at += AHEAD) {}
    int32_t below = 0;
    for (int k = 1; k <= AHEAD; k++) below += (int32_t)sums[at + k] < (int32_t)enough;
    return at + below + 1;
}

static inline void counted(uint8_t *seen, int minus) {
    int own = minus ? *seen % SAME : *seen / SAME;
    *seen = (uint8_t)(*seen + (own == SAME - 1 ? 0 : minus ? 1 : SAME));
}

static int64_t lane_start(int64_t units, int64_t lane, int64_t lanes) {
    int64_t groups = (units + GROUP - 1) / GROUP; /* below 2^60 / lanes: units are at most 2^40, lanes 2^31 */
    return least(GROUP * (groups / lanes * lane + groups % lanes * lane / lanes), units);
}

static int64_t share(int64_t count, int64_t lane, int64_t lanes) {
    return count / lanes * lane + count % lanes * lane / lanes;
}

typedef struct {
    uint32_t state;
    const uint8_t *word, *end; /* of two bytes each, little-endian */
} Lane;

static inline void fill(Lane *lane) {
    if (lane->state < LOW && lane->word < lane->end) {
        lane->state = lane->state << 16 | lane->word[0] | (uint32_t)lane->word[1] << 8;
        lane->word += 2;
    }
}

static inline void take(Lane *lane, uint32_t slot, uint32_t first, uint32_t size) {
    lane->state = size * (lane->state >> BITS) + slot - first;
    fill(lane);
}

/* Coefficients of a lane's part. */
static void coefficients(const Tables *tables, const Model *model, Lane *lane, int64_t from, int64_t to) {
    int n = 0;
    int64_t end = model->arrays ? model->size[0] : 0;
    for (int64_t c = from; c < to; c++) {
        while (c >= end) end += model->size[++n];
        const int32_t *own = tables->first + 16 * ((model->code[n] & 15) - 1);
        int32_t slot = (int32_t)(lane->state & (ONE - 1)), symbol = 0;
        while (symbol < 14 && own[symbol + 1] <= slot) symbol++;
        model->values[c] = symbol - 7;
        take(lane, (uint32_t)slot, (uint32_t)own[symbol], (uint32_t)(own[symbol + 1] - own[symbol]));
    }
}

/* A lane that is decoded: its units, those that were before this run at this position, and the window that is open. */
typedef struct {
    Lane lane;
    Run run;
    int64_t begin, stop, unit, position;
    uint32_t zero, slot, reach; /* the sum from which the hazard of the window is counted */
    uint8_t *seen;              /* a byte for each of its units */
    uint32_t own[RUN + 1 + AHEAD];
} Way;

static void slot_of(const Tables *tables, Way *way) {
    way->slot = way->lane.state & (ONE - 1);
    way->reach = tables->reach[way->slot] < WINDOW ? tables->reach[way->slot] : WINDOW;
}

/* Goes on to the next run of a lane; returns 0 behind the last one. */
static int next_run(const Tables *tables, Model *model, const Given *given, Way *way) {
    uint32_t used = way->run.sums ? way->run.sums[way->run.end] - way->zero : 0;
    if (way->unit == way->stop) way->unit = way->begin, way->position++;
    if (way->unit == way->stop || way->position == given->positions) return 0;
    way->run = run_of(tables, model, given, way->position, way->unit, way->stop, way->seen + (way->unit - way->begin), way->own);
    way->unit += way->run.end - way->run.at;
    way->zero = way->run.sums[way->run.at] - used;
    return 1;
}

/* Takes the next symbol of a lane; returns 0 where it is behind the run. */
ALWAYS int take_event(const Tables *tables, const Model *model, const Given *given, Way *way, uint8_t *bits) {
    static const uint8_t none[2];
    int64_t at = reached(way->run.sums, way->run.at, way->zero + way->reach);
    if (at > way->run.end) return 0;
    uint32_t sum = way->run.sums[at], low = tables->survival[sum - way->zero];
    uint32_t high = tables->survival[way->run.sums[at - 1] - way->zero], state = way->lane.state;
    uint32_t event = way->slot >= low, all = 0u - event; /* else the window ends without one; nothing may branch on chance */
    int64_t unit = way->run.unit + at - 1, weight = unit * given->positions + way->position;
    bits[weight >> 3] |= (uint8_t)(event << (weight & 7));
    if (model->array[BEFORE] && event) counted(way->seen + (unit - way->begin), given->width && negative(word_of(given, weight)));
    state = (low ^ ((low ^ (high - low)) & all)) * (state >> BITS) + way->slot - (low & all);
    const uint8_t *word = way->lane.word < way->lane.end ? way->lane.word : none;
    uint32_t more = (uint32_t)(state < LOW) & (uint32_t)(way->lane.word < way->lane.end);
    way->lane.state = state << 16 * more | ((word[0] | (uint32_t)word[1] << 8) & (0u - more));
    way->lane.word += 2 * more;
    way->run.at = at;
    way->zero = sum;
    slot_of(tables, way);
    return 1;
}

static void begin(const Tables *tables, Model *model, const Given *given, const Lane *lanes, int64_t l, Way *way) {
    int64_t units = given->rows * given->inputs;
    way->lane = lanes[l];
    way->run = (Run){NULL, 0, 0, 0};
    way->begin = way->unit = lane_start(units, l, model->lanes);
    way->stop = lane_start(units, l + 1, model->lanes);
    way->position = 0;
    if (way->seen) memset(way->seen, 0, (size_t)(way->stop - way->begin));
    slot_of(tables, way);
    next_run(tables, model, given, way);
}

/* Events of all lanes, as bits that are set; WAYS lanes at once, so that what one waits for passes with the others. `seen`: room
   for `longest` units of each of them, or NULL. Returns whether their words are just those of their weights. */
WIDE static int events_of(const Tables *tables, Model *model, const Given *given, const Lane *lanes, int64_t longest, uint8_t *seen,
                          uint8_t *bits) {
    Way ways[WAYS], *going[WAYS];
    int64_t count = 0, next = 0;
    for (; count < WAYS && next < model->lanes; count++) {
        going[count] = ways + count;
        ways[count].seen = seen ? seen + count * longest : NULL;
        begin(tables, model, given, lanes, next++, ways + count);
    }
    while (count)
        for (int64_t w = 0; w < count; w++) {
            Way *way = going[w];
            if (take_event(tables, model, given, way, bits) || next_run(tables, model, given, way)) continue;
            if (way->lane.state || way->lane.word != way->lane.end) return 0; /* they say more, or less */
            if (next < model->lanes)
                begin(tables, model, given, lanes, next++, way);
            else
                going[w] = going[--count];
        }
    return 1;
}

/* Sets the events of a payload in `bits`, which are zero. Returns 1; 0 if the payload is refused, -1 without memory. */
API int32_t maskpack_decode(const Tables *tables, const Given *given, const uint8_t *payload, int64_t size, uint8_t *bits) {
    Reader reader = {payload, size, 0, 0};
    Model model;
    int64_t units = given->rows * given->inputs, longest = 0, length = 0, total = 0;
    if (!head(&model, &reader, given) || model.lanes > size + 1) return 0;
    Lane *lanes = malloc((size_t)model.lanes * sizeof *lanes);
    uint8_t *seen = NULL;
    int32_t result = -1;
    if (!lanes || !(model.values = malloc((size_t)(model.coefficients + 1) * sizeof(int32_t)))) goto end;
    result = 0;
    for (int64_t l = 0; l < model.lanes - 1; l++) { /* ends for now, in words */
        int64_t change = varint(&reader);
        length += (change >> 1) ^ -(change & 1);
        if (reader.bad || length < 0 || length > size || (total += length) > size) goto end;
        lanes[l].state = (uint32_t)length; /* at most 2^32 words: larger payloads are refused below */
    }
    int64_t words = size - reader.at;
    if (words % 2 || words / 2 < total || !words || size >= (int64_t)1 << 32) goto end;
    const uint8_t *word = payload + reader.at;
    for (int64_t l = 0; l < model.lanes; l++) {
        const uint8_t *stop = l < model.lanes - 1 ? word + 2 * (int64_t)lanes[l].state : payload + size;
        lanes[l] = (Lane){0, word, stop};
        word = stop;
        fill(lanes + l);
        fill(lanes + l);
        coefficients(tables, &model, lanes + l, share(model.coefficients, l, model.lanes), share(model.coefficients, l + 1, model.lanes));
        longest = lane_start(units, l + 1, model.lanes) - lane_start(units, l, model.lanes) > longest
                      ? lane_start(units, l + 1, model.lanes) - lane_start(units, l, model.lanes) : longest;
    }
    result = -1;
    if (!scale(&model, given) || (model.array[BEFORE] && !(seen = malloc((size_t)(WAYS * longest))))) goto end;
    result = events_of(tables, &model, given, lanes, longest, seen, bits);
end:
    free(seen);
    free(lanes);
    forget(&model);
    return result;
}

typedef struct {
    uint16_t first, size; /* slots */
} Symbol;

/* A lane that is coded: its symbols, and its words, which are made from the last one to the first. */
typedef struct {
    Symbol *symbols;
    int64_t count;
    uint16_t *word, *end;
    uint32_t state;
} Coded;

/* Places of the events among the weights of a run, from the unit on where it begins. */
ALWAYS int64_t events_in(const Given *given, const uint8_t *bits, int64_t position, int64_t unit, int64_t count, uint16_t *where) {
    int64_t events = 0;
    if (given->positions > 1) {
        for (int64_t i = 0; i < count; i++) {
            int64_t weight = (unit + i) * given->positions + position;
            where[events] = (uint16_t)i;
            events += bits[weight >> 3] >> (weight & 7) & 1;
        }
        return events;
    }
    for (int64_t i = 0, taken; i < count; i += taken) {
        int64_t from = (unit + i) >> 3, shift = (unit + i) & 7, left = (given->rows * given->inputs + 7) / 8 - from;
        uint64_t own = 0;
        if (left >= 8) /* the lowest first, as of the machine's words */
            memcpy(&own, bits + from, 8);
        else
            memcpy(&own, bits + from, (size_t)left);
        taken = least(64 - shift, count - i);
        own = own >> shift & ~(uint64_t)0 >> (64 - taken);
        for (; own; own &= own - 1) where[events++] = (uint16_t)(i + LOWEST(own));
    }
    return events;
}

/* The symbols of a lane's part of the coefficients, and of its events. `seen`: room for a byte for each of its units. */
WIDE static int64_t symbols_of(const Tables *tables, Model *model, const Given *given, const int32_t *values, const uint8_t *bits,
                               int64_t l, uint8_t *seen, Symbol *symbols) {
    int64_t units = given->rows * given->inputs, begin = lane_start(units, l, model->lanes), stop = lane_start(units, l + 1, model->lanes);
    int64_t count = 0, end = model->arrays ? model->size[0] : 0;
    int32_t n = 0;
    uint32_t used = 0, own_sums[RUN + 1 + AHEAD];
    uint16_t where[RUN + 1];
    for (int64_t c = share(model->coefficients, l, model->lanes); c < share(model->coefficients, l + 1, model->lanes); c++) {
        while (c >= end) end += model->size[++n];
        const int32_t *own = tables->first + 16 * ((model->code[n] & 15) - 1) + 7 + values[c];
        symbols[count++] = (Symbol){(uint16_t)own[0], (uint16_t)(own[1] - own[0])};
    }
    memset(seen, 0, (size_t)(stop - begin));
    for (int64_t position = 0; position < given->positions; position++)
        for (int64_t unit = begin, some; unit < stop; unit += some) {
            Run run = run_of(tables, model, given, position, unit, stop, seen + (unit - begin), own_sums);
            const uint32_t *sums = run.sums + run.at;
            uint32_t zero = sums[0] - used;
            some = run.end - run.at;
            int64_t at = 0, events = events_in(given, bits, position, unit, some, where);
            for (int64_t e = 0; e <= events; e++) {
                int64_t next = e < events ? where[e] : some;
                while (sums[next] - zero >= WINDOW) {
                    at = reached(sums, at, zero + WINDOW);
                    symbols[count++] = (Symbol){0, tables->survival[sums[at] - zero]};
                    zero = sums[at];
                }
                if (e == events) break;
                uint16_t low = tables->survival[sums[at = next + 1] - zero];
                symbols[count++] = (Symbol){low, (uint16_t)(tables->survival[sums[next] - zero] - low)};
                zero = sums[at];
                if (model->array[BEFORE])
                    counted(seen + (unit - begin) + next, given->width && negative(word_of(given, (unit + next) * given->positions + position)));
            }
            used = sums[some] - zero;
        }
    return count;
}

ALWAYS void put(Coded *lane) {
    uint32_t own = lane->symbols[--lane->count].size, full = lane->state >> 17 >= own, state = lane->state;
    lane->word[-1] = (uint16_t)state; /* of no use where it is not full: nothing may branch on chance */
    lane->word -= full;
    state >>= 16 * full;
    lane->state = (state / own << BITS) + state % own + lane->symbols[lane->count].first;
}

/* Makes the words of two lanes, side by side so that one need not wait for the other. */
static void code(Coded *first, Coded *second) {
    Coded one = *first, other = *second;
    while (one.count && other.count) {
        put(&one);
        put(&other);
    }
    while (one.count) put(&one);
    while (other.count) put(&other);
    *first = one, *second = other;
}

/* Returns the words of all lanes of a payload with this head, coefficients and events (packed bits), and each lane's in
   `lengths`; to be given back by maskpack_free. NULL without memory. */
API uint16_t *maskpack_encode(const Tables *tables, const Given *given, const uint8_t *bytes, int64_t size,
                              const int32_t *values, const uint8_t *bits, int64_t *lengths) {
    Reader reader = {bytes, size, 0, 0};
    Model model;
    int64_t units = given->rows * given->inputs, made = 0, room = 0;
    if (!head(&model, &reader, given)) return NULL;
    int64_t longest = GROUP * ((units + GROUP - 1) / GROUP / model.lanes + 1), part = 1 + model.coefficients / model.lanes;
    int64_t most = longest * given->positions + part; /* symbols of a lane */
    uint16_t *words = NULL, *own_words = malloc((size_t)(2 * (most + 3)) * sizeof *own_words);
    Symbol *symbols = malloc((size_t)(2 * most) * sizeof *symbols);
    uint8_t *seen = malloc((size_t)longest);
    int done = own_words && symbols && seen && (model.values = malloc((size_t)(model.coefficients + 1) * sizeof(int32_t)));
    if (done && model.coefficients) memcpy(model.values, values, (size_t)model.coefficients * sizeof(int32_t));
    done = done && scale(&model, given);
    for (int64_t l = 0; l < model.lanes && done; l += 2) {
        Coded lanes[2] = {{NULL, 0, NULL, NULL, 0}, {NULL, 0, NULL, NULL, 0}};
        int64_t two = least(model.lanes - l, 2);
        for (int64_t k = 0; k < two; k++) {
            uint16_t *end = own_words + (k + 1) * (most + 3);
            lanes[k] = (Coded){symbols + k * most, 0, end, end, 0};
            lanes[k].count = symbols_of(tables, &model, given, values, bits, l + k, seen, lanes[k].symbols);
        }
        code(lanes, lanes + 1);
        for (int64_t k = 0; k < two && done; k++) {
            for (; lanes[k].state; lanes[k].state >>= 16) *--lanes[k].word = (uint16_t)lanes[k].state;
            lengths[l + k] = lanes[k].end - lanes[k].word;
            if (made + lengths[l + k] > room) {
                uint16_t *more = realloc(words, (size_t)(room = 2 * (made + lengths[l + k])) * sizeof *words);
                if (!(done = more != NULL)) break;
                words = more;
            }
            memcpy(words + made, lanes[k].word, (size_t)lengths[l + k] * sizeof *words);
            made += lengths[l + k];
        }
    }
    free(seen);
    free(symbols);
    free(own_words);
    forget(&model);
    if (!done) free(words);
    return done ? words : NULL;
}

API void maskpack_free(void *words) { free(words); }

/* --- the fit -------------------------------------------------------------------------------------------------------- */

/* What weights are multiplied by, and what comes of it. */
typedef struct {
    int64_t count;
    const int32_t *along, *across; /* (count, inputs), (rows, count), or NULL */
    const double *factors;         /* of each row: what makes `across` of its images, or NULL */
    int64_t *images, *others;      /* sums over inputs (rows, count), and over rows (count, inputs) */
} Probes;

typedef struct {
    int64_t rows, inputs, positions, rank, offset; /* coefficients in 1/256 nat */
    int64_t kinds;                                 /* of weights, if cells are looked at, which are all of a kind in a row or an input; else 0 */
    const int32_t *by_row, *by_input;              /* how many weights each has, (rows, kinds), (inputs, kinds); NULL if all are of one kind */
    const uint8_t *events, *index[ARRAYS];         /* positions, rows, inputs; of those arrays that go by what is known */
    const int32_t *array[ARRAYS], *left, *right;   /* NULL where all is 0; (rows, rank), (rank, inputs) */
    const uint8_t *signs;                          /* 128 set where the base is negative */
    const int32_t *curve;                          /* for log-odds from -EXTREME to EXTREME: 2^16 p + p (1 - p), in 2^-15 */
    Probes residuals, variances;                   /* of event - p times the sign, and of p (1 - p), where positions are 1 */
} Fit;

/* event - p and p (1 - p) of `count` weights of a row from the input `first` on. */
WIDE static void residuals_of(const Fit *fit, int64_t position, int64_t row, int64_t first, int64_t count, int32_t *residual,
                              int32_t *variance) {
    int64_t place = (position * fit->rows + row) * fit->inputs + first;
    int32_t at[PIECE], base = (int32_t)fit->offset;
    if (fit->array[ROW]) base += fit->array[ROW][row];
    if (fit->array[POSITION]) base += fit->array[POSITION][position];
    if (fit->array[INPUT]) {
        const int32_t *input = fit->array[INPUT] + first;
        for (int64_t i = 0; i < count; i++) at[i] = base + input[i];
    } else
        for (int64_t i = 0; i < count; i++) at[i] = base;
    for (int n = BEFORE; n < ARRAYS; n++)
        if (fit->array[n]) {
            const int32_t *array = fit->array[n];
            const uint8_t *index = fit->index[n] + place;
            for (int64_t i = 0; i < count; i++) at[i] += array[index[i]];
        }
    if (fit->rank) {
        const uint8_t *signs = fit->signs + place;
        int32_t lean[PIECE];
        for (int64_t i = 0; i < count; i++) lean[i] = 0;
        for (int64_t k = 0; k < fit->rank; k++) {
            const int32_t own = fit->left[row * fit->rank + k], *other = fit->right + k * fit->inputs + first;
            for (int64_t i = 0; i < count; i++) lean[i] += own * other[i];
        }
        for (int64_t i = 0; i < count; i++) {
            int32_t sign = -(signs[i] >> 7);
            at[i] = (at[i] * 256 + ((lean[i] ^ sign) - sign) + 1024) >> 11;
        }
    } else
        for (int64_t i = 0; i < count; i++) at[i] = (at[i] + 4) >> 3;
    for (int64_t i = 0; i < count; i++) {
        int32_t own = at[i] < -EXTREME ? 0 : at[i] > EXTREME ? 2 * EXTREME : at[i] + EXTREME, both = fit->curve[own];
        residual[i] = (fit->events[place + i] << BITS) - (both >> 16);
        variance[i] = both & 0xFFFF;
    }
}

WIDE static int64_t summed(int64_t count, const int32_t *one, const int32_t *other) {
    int64_t sum = 0;
    for (int64_t i = 0; i < count; i++) sum += (int64_t)one[i] * other[i];
    return sum;
}

WIDE static void added(int64_t count, const int32_t *one, int32_t factor, int64_t *to) {
    for (int64_t i = 0; i < count; i++) to[i] += (int64_t)one[i] * factor;
}

WIDE static void totals(int64_t count, const int32_t *residual, const int32_t *variance, int64_t *slope, int64_t *curvature) {
    int32_t sums[2] = {0, 0};
    for (int64_t i = 0; i < count; i++) sums[0] += residual[i], sums[1] += variance[i];
    *slope += sums[0];
    *curvature += sums[1];
}

WIDE static void columns(int64_t count, const int32_t *one, int32_t *to) {
    for (int64_t i = 0; i < count; i++) to[i] += one[i];
}

enum { BINS = 16 };

/* Slopes and curvatures of at most PIECE weights by bins: both in one number, of neighbours in different ones, so that an
   addition need not wait for the one before. */
static void binned(int64_t count, const uint8_t *index, const int32_t *residual, const int32_t *variance, int64_t size,
                   int64_t *sums) {
    int64_t both[WAYS * BINS] = {0};
    for (int64_t i = 0; i < count; i++)
        both[BINS * (i % WAYS) + index[i]] += (int64_t)residual[i] * ((int64_t)1 << 32) + variance[i];
    for (int64_t k = 0; k < size; k++)
        for (int64_t way = 0; way < WAYS; way++) {
            int64_t own = both[BINS * way + k], low = own & 0xFFFFFFFF;
            sums[size + k] += low;
            sums[k] += (own - low) / ((int64_t)1 << 32);
        }
}

static void project(const Probes *probes, int64_t row, int64_t inputs, const int32_t *held) {
    static const int32_t big = 1 << 20;
    for (int64_t k = 0; k < probes->count; k++) {
        int64_t at = row * probes->count + k;
        int32_t across = probes->across ? probes->across[at] : 0;
        if (probes->along) probes->images[at] = summed(inputs, held, probes->along + k * inputs);
        if (probes->factors) { /* rounded to the nearest, ties to even */
            double own = (double)probes->images[at] * probes->factors[row];
            own = (own < -big ? -big : own > big ? big : own) + 6755399441055744.0; /* 1.5 * 2^52 */
            int64_t whole;
            memcpy(&whole, &own, sizeof whole);
            across = (int32_t)whole;
        }
        if (probes->across || probes->factors) added(inputs, held, across, probes->others + k * inputs);
    }
}

static const int64_t BINNED[ARRAYS] = {0, 0, 0, SAME * OTHER, CLASSES, 2};

/* Counts events, of a parameter without kernels: those of each row and input, and by each index. */
API void maskpack_counts(int64_t inputs, const uint8_t *bits, int64_t bytes, const uint8_t *const *index, int64_t *const *sums) {
    int64_t row = 0, start = 0, *inputs_of = sums[INPUT], in_row = 0;
    for (int64_t first = 0; first < bytes; first += 8) {
        uint64_t ones = 0;
        memcpy(&ones, bits + first, (size_t)least(bytes - first, 8)); /* the lowest first, as of the machine's words */
        for (; ones; ones &= ones - 1) {
            int64_t place = 8 * first + LOWEST(ones);
            for (; place - start >= inputs; start += inputs, in_row = 0)
                if (sums[ROW]) sums[ROW][row++] += in_row;
            in_row++;
            if (inputs_of) inputs_of[place - start]++;
            for (int n = BEFORE; n < ARRAYS; n++)
                if (sums[n]) sums[n][index[n][place]]++;
        }
    }
    if (sums[ROW]) sums[ROW][row] += in_row;
}

/* Slope and curvature of the likelihood, in 2^-15, along all coefficients together (`total`) and along each of those arrays
   whose `sums` are not NULL: first all slopes, then all curvatures. `held`: room for four rows. */
API void maskpack_sums(const Fit *fit, int64_t *total, int64_t *const *sums, int32_t *held) {
    int32_t *variances = held + fit->inputs, *inputs = held + 2 * fit->inputs;
    memset(inputs, 0, (size_t)(2 * fit->inputs) * sizeof *inputs);
    for (int64_t position = 0; position < fit->positions; position++)
        for (int64_t row = 0; row < fit->rows; row++) {
            int64_t slope = 0, curvature = 0, count;
            for (int64_t first = 0; first < fit->inputs; first += count) {
                int32_t *residual = held + first, *variance = variances + first;
                int64_t place = (position * fit->rows + row) * fit->inputs + first;
                count = least(fit->inputs - first, PIECE);
                residuals_of(fit, position, row, first, count, residual, variance);
                totals(count, residual, variance, &slope, &curvature);
                if (sums[INPUT]) {
                    columns(count, residual, inputs + first);
                    columns(count, variance, inputs + fit->inputs + first);
                }
                for (int n = BEFORE; n < ARRAYS; n++)
                    if (sums[n]) binned(count, fit->index[n] + place, residual, variance, BINNED[n], sums[n]);
            }
            if (sums[INPUT] && (row % ONE == ONE - 1 || row == fit->rows - 1)) /* before 32 bits are full */
                for (int64_t i = 0; i < 2 * fit->inputs; i++) sums[INPUT][i] += inputs[i], inputs[i] = 0;
            total[0] += slope;
            total[1] += curvature;
            if (sums[ROW]) sums[ROW][row] += slope, sums[ROW][fit->rows + row] += curvature;
            if (sums[POSITION]) sums[POSITION][position] += slope, sums[POSITION][fit->positions + position] += curvature;
            project(&fit->variances, row, fit->inputs, variances);
            if (!fit->residuals.count) continue;
            const uint8_t *signs = fit->signs + row * fit->inputs;
            for (int64_t i = 0; i < fit->inputs; i++) held[i] = signs[i] >> 7 ? -held[i] : held[i];
            project(&fit->residuals, row, fit->inputs, held);
        }
}

/* How many of some bytes are of a kind. */
WIDE static int32_t of_kind(const uint8_t *own, int64_t count, uint8_t kind) {
    int32_t sum = 0;
    int64_t i = 0;
    while (count - i >= SOME / 2) {
        uint8_t found[SOME / 2] = {0};
        for (int turn = 0; turn < 255 && count - i >= SOME / 2; turn++, i += SOME / 2)
            for (int k = 0; k < SOME / 2; k++) found[k] = (uint8_t)(found[k] + (own[i + k] == kind));
        for (int k = 0; k < SOME / 2; k++) sum += found[k];
    }
    for (; i < count; i++) sum += own[i] == kind;
    return sum;
}

WIDE static void add_kind(const uint8_t *own, int64_t count, uint8_t kind, uint8_t *found) {
    for (int64_t i = 0; i < count; i++) found[i] = (uint8_t)(found[i] + (own[i] == kind));
}

/* Adds how many weights of each kind each row and each input has; `index`: the kind of each. Returns 0 without memory. */
API int32_t maskpack_cells(int64_t rows, int64_t inputs, int64_t kinds, const uint8_t *index, int32_t *by_row, int32_t *by_input) {
    uint8_t *found = calloc((size_t)(kinds * inputs), 1);
    for (int64_t row = 0; found && row < rows; row++) {
        for (int64_t k = 0; k < kinds; k++) {
            by_row[row * kinds + k] += of_kind(index + row * inputs, inputs, (uint8_t)k);
            add_kind(index + row * inputs, inputs, (uint8_t)k, found + k * inputs);
        }
        if (row % 255 < 254 && row < rows - 1) continue; /* before a byte is full */
        for (int64_t i = 0; i < inputs; i++)
            for (int64_t k = 0; k < kinds; k++) by_input[i * kinds + k] += found[k * inputs + i];
        memset(found, 0, (size_t)(kinds * inputs));
    }
    free(found);
    return found != NULL;
}

enum { SPREAD = 32, BIN = 32, FINER = 8, CURVE = 2 * EXTREME + 1, MOST_KINDS = 2 * CLASSES }; /* see logit_fit.py */

static int32_t on_curve(int32_t at) { return at < 0 ? 0 : at >= CURVE ? CURVE - 1 : at; }

/* p and p (1 - p) in 2^-23, of the places on the curve from `low` to `high`, on the average over the coefficients of the other
   side, of which NULL says that they are 0. */
static void smoothed(const Fit *fit, const int32_t *other, int64_t count, int32_t low, int32_t high, int64_t *p, int64_t *variance) {
    int64_t bins[2 * SPREAD + 1] = {0};
    for (int64_t i = 0; other && i < count; i++) {
        int32_t bin = (other[i] + BIN / 2) >> 5;
        bins[(bin < -SPREAD ? -SPREAD : bin > SPREAD ? SPREAD : bin) + SPREAD]++;
    }
    if (!other) bins[SPREAD] = count;
    for (int32_t at = low; at <= high; at++) p[at] = variance[at] = 0;
    for (int32_t b = -SPREAD; b <= SPREAD; b++)
        for (int32_t at = low; bins[b + SPREAD] && at <= high; at++) {
            int32_t both = fit->curve[on_curve(at + b * (BIN / 8))];
            p[at] += (both >> 16) * bins[b + SPREAD];
            variance[at] += (both & 0xFFFF) * bins[b + SPREAD];
        }
    for (int32_t at = low; at <= high; at++) p[at] = (p[at] << FINER) / count, variance[at] = (variance[at] << FINER) / count;
}

static int64_t whole_of(int64_t sum) { return (sum + (1 << (FINER - 1))) >> FINER; }

/* Sums of p and p (1 - p) over all weights as from cells: as if in each row the coefficients of inputs were spread as they are
   over all, and in each input those of rows. */
API WIDE void maskpack_sums_of_cells(const Fit *fit, int64_t *total, int64_t *const *sums) {
    int64_t p[CURVE], variance[CURVE], whole[2] = {0, 0}, of_kinds[2][MOST_KINDS] = {{0}};
    int64_t classes = fit->index[MAGNITUDE] ? CLASSES : 1;
    int32_t adds[MOST_KINDS], least_kind = INT32_MAX, most_kind = INT32_MIN;
    for (int64_t k = 0; k < fit->kinds; k++) {
        adds[k] = fit->array[MAGNITUDE] ? fit->array[MAGNITUDE][k % classes] : 0;
        adds[k] += (int32_t)fit->offset + 4 + (fit->array[REFERENCE] ? fit->array[REFERENCE][k / classes] : 0);
        least_kind = adds[k] < least_kind ? adds[k] : least_kind;
        most_kind = adds[k] > most_kind ? adds[k] : most_kind;
    }
    for (int side = ROW; side <= INPUT; side++) {
        int64_t count = side == ROW ? fit->rows : fit->inputs, others = side == ROW ? fit->inputs : fit->rows;
        const int32_t *have = side == ROW ? fit->by_row : fit->by_input, *array = fit->array[side];
        int32_t low = array ? array[0] : 0, high = low;
        if (side == INPUT && !sums[INPUT]) continue;
        for (int64_t i = 0; array && i < count; i++) low = array[i] < low ? array[i] : low, high = array[i] > high ? array[i] : high;
        low = on_curve(((low + least_kind) >> 3) + EXTREME), high = on_curve(((high + most_kind) >> 3) + EXTREME);
        smoothed(fit, fit->array[ROW + INPUT - side], others, low, high, p, variance);
        for (int64_t i = 0; i < count; i++) {
            int32_t base = array ? array[i] : 0;
            int64_t own[2] = {0, 0};
            for (int64_t k = 0; k < fit->kinds; k++) {
                int32_t at = on_curve(((base + adds[k]) >> 3) + EXTREME);
                int64_t weights = have ? have[i * fit->kinds + k] : others, one = weights * p[at], other = weights * variance[at];
                own[0] += one, own[1] += other;
                if (side == ROW) of_kinds[0][k] += one, of_kinds[1][k] += other;
            }
            if (side == ROW) whole[0] += own[0], whole[1] += own[1];
            if (sums[side]) sums[side][i] = whole_of(own[0]), sums[side][count + i] = whole_of(own[1]);
        }
    }
    for (int turn = 0; turn < 2; turn++) {
        total[turn] = whole_of(whole[turn]);
        for (int64_t c = 0; sums[MAGNITUDE] && c < classes; c++)
            sums[MAGNITUDE][turn * CLASSES + c] = whole_of(of_kinds[turn][c] + (fit->kinds > classes ? of_kinds[turn][classes + c] : 0));
        for (int64_t r = 0; sums[REFERENCE] && r < 2; r++) {
            int64_t sum = 0;
            for (int64_t c = 0; c < classes; c++) sum += of_kinds[turn][r * classes + c];
            sums[REFERENCE][turn * 2 + r] = whole_of(sum);
        }
    }
}

static double nearest(double value) { return value + 6755399441055744.0 - 6755399441055744.0; } /* 1.5 * 2^52; ties to even */

enum { COEFFICIENTS = 15, TABLES = 15 };

/* The table with which integers take the fewest bits, which go to `bits`. */
static int32_t cheapest(int64_t count, const int32_t *integers, const double *prices, double *bits) {
    int64_t have[COEFFICIENTS] = {0};
    int32_t best = 0;
    for (int64_t i = 0; i < count; i++) have[integers[i] + COEFFICIENTS / 2]++;
    for (int32_t t = 0; t < TABLES; t++) {
        double own = 0;
        for (int c = 0; c < COEFFICIENTS; c++) own += prices[COEFFICIENTS * t + c] * (double)have[c]; /* exact */
        if (!t || own < *bits) best = t, *bits = own;
    }
    return best;
}

/* Integers of little cost for coefficients in this step, of which `places` has the multiples; `lost`: bits for a unit of squared
   error. Returns the table; `found`: bits of the integers, and those that are lost. */
API WIDE int32_t maskpack_in_steps(int64_t count, double step, const double *values, const double *lost, const double *places,
                              const double *prices, int32_t *integers, double *found) {
    const int most = COEFFICIENTS / 2;
    for (int64_t i = 0; i < count; i++) {
        double own = nearest(values[i] / step);
        integers[i] = own < -most ? -most : own > most ? most : (int32_t)own;
    }
    for (int turn = 0; turn < 2; turn++) {
        const double *price = prices + COEFFICIENTS * cheapest(count, integers, prices, found);
        found[1] = 0;
        for (int64_t i = 0; i < count; i++) {
            double own = nearest(values[i] / step);
            int near = own < -most ? 0 : own > most ? 2 * most : (int)own + most;
            int first = near < most ? near : most, last = near < most ? most : near, best = first;
            double least_cost = 0, lost_by = 0;
            for (int c = first; c <= last; c++) { /* what is farther from 0 has no less of either */
                double off = values[i] - places[c], error = nearest(lost[i] * (off * off) * 256) / 256;
                if (c > first && error + price[c] >= least_cost) continue;
                least_cost = error + price[c], lost_by = error, best = c;
            }
            integers[i] = best - most;
            found[1] += lost_by;
        }
    }
    return cheapest(count, integers, prices, found);
}

/* A fit without a low rank; what is not said here is Fit's of logit_fit.py. */
typedef struct {
    Fit fit;
    int64_t number, sizes[ARRAYS];        /* of events; of the coefficients of each array */
    const int64_t *counts[ARRAYS];        /* of events by each coefficient, where cells are looked at */
    const double *prices;                 /* of coefficients in each table */
    double offset, left_over, *values[ARRAYS], worth[ARRAYS]; /* NULL where an array is not there, or is forgotten */
    int32_t *integers[ARRAYS], codes[ARRAYS];                 /* what is chosen; 0: all are 0 */
} Fitting;

/* Room for what is summed up, and for coefficients in 1/256 nat. */
typedef struct {
    int64_t total[2], *sums[ARRAYS];
    int32_t *whole[ARRAYS], *held;
} Room;

enum { NAT = 256, ROUNDS = 5, LEAST_WORTH = 12, TRIED = 9 };
static const double PRIORS[ARRAYS] = {4, 4, 1, .3, .3, .3}, LAST_PRIOR = .3, TWICE_LN2 = 2 * 0.6931471805599453;

static int64_t bins_of(const Fitting *own, int n) { return BINNED[n] ? BINNED[n] : own->sizes[n]; }
static double exact(double value) { return nearest(value * NAT) / NAT; }
static double limited(double value) { return value < -1 ? -1 : value > 1 ? 1 : value; }
static double slope_of(const Room *room, int n, int64_t i) { return (double)room->sums[n][i + (n == REFERENCE)] / ONE; }
static double curvature_of(const Fitting *own, const Room *room, int n, int64_t i) {
    return (double)room->sums[n][bins_of(own, n) + i + (n == REFERENCE)] / ONE;
}

/* Sums up along the arrays that `names` has the bits of. */
static void sum_up(Fitting *own, Room *room, int names) {
    int64_t *sums[ARRAYS] = {0};
    memset(room->total, 0, sizeof room->total);
    own->fit.offset = (int64_t)nearest(NAT * own->offset);
    for (int n = 0; n < ARRAYS; n++) {
        own->fit.array[n] = own->values[n] ? room->whole[n] : NULL;
        for (int64_t i = 0; own->values[n] && i < own->sizes[n]; i++)
            room->whole[n][i + (n == REFERENCE)] = (int32_t)nearest(NAT * own->values[n][i]);
        if (names >> n & 1) memset(sums[n] = room->sums[n], 0, (size_t)(2 * bins_of(own, n)) * sizeof(int64_t));
    }
    if (!own->fit.kinds) {
        maskpack_sums(&own->fit, room->total, sums, room->held);
        return;
    }
    maskpack_sums_of_cells(&own->fit, room->total, sums);
    room->total[0] = ONE * own->number - room->total[0];
    for (int n = 0; n < ARRAYS; n++)
        for (int64_t i = 0; sums[n] && i < bins_of(own, n); i++) sums[n][i] = ONE * own->counts[n][i] - sums[n][i];
}

WIDE static void better(Fitting *own, Room *room, int names, const double *priors) {
    sum_up(own, room, names);
    double step = (double)room->total[0] / (double)room->total[1];
    own->offset = nearest(NAT * (own->offset + limited(step))) / NAT;
    own->left_over = 0;
    for (int n = 0; n < ARRAYS; n++) {
        double prior = priors ? priors[n] : LAST_PRIOR, worth = 0;
        for (int64_t i = 0; names >> n & 1 && i < own->sizes[n]; i++) {
            double slope = slope_of(room, n, i), curvature = curvature_of(own, room, n, i), value = own->values[n][i];
            if (n != REFERENCE) slope -= step * curvature;
            double moved = (slope - prior * value) / (curvature + prior), taken = limited(moved);
            own->left_over += exact(curvature * ((moved - taken) * (moved - taken)));
            own->values[n][i] = value = exact(value + taken);
            double certain = curvature / (curvature + prior), noise = certain * certain * (own->fit.kinds ? 1.15 : 0);
            worth += exact(curvature * (value * value) - noise);
        }
        if (names >> n & 1) own->worth[n] = worth / TWICE_LN2;
    }
}

static void forget_arrays(Fitting *own) {
    for (int n = 0; n < ARRAYS; n++)
        if (own->values[n] && own->worth[n] < LEAST_WORTH) own->values[n] = NULL;
}

static double natural(double value) { /* logarithm */
    double sum = 0, whole = 0;
    for (; value >= 1; value /= 2) whole++;
    for (; value < .5; value *= 2) whole--;
    double part = (value - 1) / (value + 1);
    for (int k = 33; k > 0; k -= 2) sum = sum * (part * part) + 1. / k;
    return whole * 0.6931471805599453 + 2 * part * sum;
}

static void start(Fitting *own, Room *room) {
    int names = (own->values[MAGNITUDE] ? 1 << MAGNITUDE : 0) | (own->values[REFERENCE] ? 1 << REFERENCE : 0);
    if (!names) return;
    sum_up(own, room, names);
    int32_t both = own->fit.curve[(((int32_t)nearest(NAT * own->offset) + 4) >> 3) + EXTREME];
    double p = (double)(both >> 16) / ONE, variance = (double)(both & 0xFFFF) / ONE;
    for (int n = MAGNITUDE; n <= REFERENCE; n++)
        for (int64_t i = 0; names >> n & 1 && i < own->sizes[n]; i++) {
            double slope = slope_of(room, n, i), all = curvature_of(own, room, n, i) / variance;
            double have = all * p, rest = all * (1 - p);
            have = (have < 0 ? 0 : have) + slope, rest = (rest < 0 ? 0 : rest) - slope;
            own->values[n][i] = exact(natural(((have < 0 ? 0 : have) + 1) / ((rest < 0 ? 0 : rest) + 1)) - own->offset);
        }
}

/* Integers for this step, of coefficients, or of how each differs from the one before; returns what they cost. */
static double in_steps(const Fitting *own, int n, const double *lost, int number, int32_t *integers, int32_t *table) {
    double found[2] = {0, 0}, step = STEPS[number] / 16., places[COEFFICIENTS];
    const double *values = own->values[n];
    if (n != MAGNITUDE) {
        for (int c = 0; c < COEFFICIENTS; c++) places[c] = (c - COEFFICIENTS / 2) * step;
        *table = maskpack_in_steps(own->sizes[n], step, values, lost, places, own->prices, integers, found);
        return found[0] + found[1];
    }
    int32_t before = 0, sum = 0;
    for (int64_t i = 0; i < own->sizes[n]; i++) {
        int32_t whole = (int32_t)nearest(values[i] / step), own_part = whole - before;
        before = whole;
        integers[i] = own_part < -(COEFFICIENTS / 2) ? -(COEFFICIENTS / 2) : own_part > COEFFICIENTS / 2 ? COEFFICIENTS / 2 : own_part;
        sum += integers[i];
        double off = values[i] - sum * step;
        found[1] += exact(lost[i] * (off * off));
    }
    *table = cheapest(own->sizes[n], integers, own->prices, found);
    return found[0] + found[1];
}

/* Chooses integers, step and table of an array, whose sums are there, and gives it what they stand for; `held`: room. */
static void round_array(Fitting *own, Room *room, int n, double *lost, int32_t *held) {
    static const int tried[TRIED] = {1, 2, 3, 5, 7, 9, 11, 12, 13};
    int64_t size = own->sizes[n];
    double none = 0, best = 0, cost;
    int at = TRIED / 2;
    int32_t table, sum = 0;
    for (int64_t i = 0; i < size; i++) {
        lost[i] = curvature_of(own, room, n, i) / TWICE_LN2;
        none += exact(lost[i] * own->values[n][i] * own->values[n][i]);
    }
    best = in_steps(own, n, lost, tried[at], own->integers[n], &table);
    own->codes[n] = tried[at] << 4 | (table + 1);
    for (int way = 1; way >= -1; way -= 2)
        for (int place = own->codes[n] >> 4 == tried[at] ? at + way : -1; place >= 0 && place < TRIED; place += way) {
            if ((cost = in_steps(own, n, lost, tried[place], held, &table)) >= best) break;
            best = cost;
            own->codes[n] = tried[place] << 4 | (table + 1);
            memcpy(own->integers[n], held, (size_t)size * sizeof *held);
        }
    if (none <= best) own->codes[n] = 0;
    for (int64_t i = 0; i < size; i++) {
        sum = n == MAGNITUDE ? sum + own->integers[n][i] : own->integers[n][i];
        own->values[n][i] = own->codes[n] ? sum * (STEPS[own->codes[n] >> 4] / 16.) : 0;
    }
}

/* Fits, and rounds; returns 0 without memory. */
API int32_t maskpack_fit(Fitting *own) {
    static const int last[ARRAYS] = {MAGNITUDE, BEFORE, POSITION, REFERENCE, INPUT, ROW};
    static const int together[3] = {1 << MAGNITUDE | 1 << POSITION | 1 << REFERENCE, 1 << BEFORE, 1 << ROW | 1 << INPUT};
    int cells = own->fit.kinds > 0;
    int64_t room_for = 2 * own->fit.inputs, longest = 0, at = 0;
    for (int n = 0; n < ARRAYS; n++) {
        room_for += 3 * bins_of(own, n) + 1;
        longest = bins_of(own, n) > longest ? bins_of(own, n) : longest;
    }
    int64_t *memory = calloc((size_t)(room_for + 2 * longest), sizeof *memory);
    if (!memory) return 0;
    Room room = {{0, 0}, {0}, {0}, NULL};
    for (int n = 0; n < ARRAYS; at += 3 * bins_of(own, n) + 1, n++) {
        room.sums[n] = memory + at;
        room.whole[n] = (int32_t *)(memory + at + 2 * bins_of(own, n));
    }
    double *lost = (double *)(memory + at);
    int32_t *held = (int32_t *)(memory + at + longest);
    room.held = (int32_t *)(memory + at + 2 * longest);
    if (cells) start(own, &room);
    for (int number = 0, done = 0; number < ROUNDS && !done; number++) {
        for (int group = 0; group < (cells ? 1 : 3); group++) {
            int names = 0;
            for (int n = 0; n < ARRAYS; n++) names |= own->values[n] && (cells || together[group] >> n & 1) ? 1 << n : 0;
            if (names) better(own, &room, names, PRIORS);
        }
        done = cells && own->left_over < 8 * LEAST_WORTH;
        if (done || number == 1) forget_arrays(own);
    }
    for (int k = 0; k < ARRAYS; k++)
        if (own->values[last[k]]) {
            better(own, &room, 1 << last[k], NULL);
            round_array(own, &room, last[k], lost, held);
        }
    for (int turn = cells; turn < 2; turn++) better(own, &room, 0, PRIORS);
    free(memory);
    return 1;
}

/* --- stored values, as steps from the base's (docs/format.md section 6.3; ulps.py) ----------------------------------- */

enum { BUCKETS = 64, SLOTS = 4096, SLOT_BITS = 12, EXPONENTS = 256, MOST_CONTEXTS = 16, MOST_LANES = 128, BLOCK = 512 };

typedef struct {
    int64_t count, lanes, contexts, top, width, mantissa; /* bytes of a value, bits of its mantissa */
    const void *base;                                     /* the base's words at the places of the values */
    const uint32_t *table;                                /* (contexts, BUCKETS): size << 18 | first << 6 | bucket */
} Steps;

static inline uint32_t stored(const void *words, int64_t width, int64_t at) {
    return width == 4 ? ((const uint32_t *)words)[at] : ((const uint16_t *)words)[at];
}

static inline uint32_t exponent_of(const Steps *steps, int64_t width, uint32_t word) {
    return (word & (width == 4 ? 0x7FFFFFFFu : 0x7FFFu)) >> steps->mantissa;
}

/* All bits where a word has the sign, else none: signs are noise, so that nothing may branch on them. */
static inline uint32_t where(uint32_t word, uint32_t sign) { return 0u - (uint32_t)((word & sign) != 0); }

/* Numbers of rising values; inverse of each other. */
static inline uint32_t ordered(uint32_t word, uint32_t sign) { return (word ^ (where(word, sign) | sign)) & (sign | (sign - 1)); }
static inline uint32_t unordered(uint32_t number, uint32_t sign) {
    return (number ^ (~where(number, sign) | sign)) & (sign | (sign - 1));
}
static inline uint32_t negated(uint32_t number, uint32_t by) { return (number ^ by) - by; }

/* The step from one word to another, away from zero: 2 |step| + (step < 0). */
static inline uint64_t step_of(uint32_t base, uint32_t value, uint32_t sign) {
    uint32_t all = sign | (sign - 1), forth = negated(ordered(value, sign) - ordered(base, sign), where(base, sign)) & all;
    uint32_t back = where(forth, sign);
    return 2 * (uint64_t)(negated(forth, back) & all) + (back & 1);
}

/* Bits of a step that stand as they are: its sign, and those of its size below the first two. */
static inline int rest_bits(int bucket) { return (bucket >> 1) + (bucket == 1); }

/* Steps and kinds, 64 exponent + bucket, of some values; without a branch, so that a compiler does several at a time.
   Twice a size and one, as a float, has in its exponent and first bit of the mantissa the bucket of the size, and 2. */
ALWAYS void kinds_of(const Steps *steps, const int64_t width, const void *values, int64_t first, int64_t count, uint64_t *found,
                     uint16_t *kinds) {
    const uint32_t sign = width == 4 ? 0x80000000u : 0x8000u;
    if (width == 2) {
        const uint16_t *base = (const uint16_t *)steps->base + first, *value = (const uint16_t *)values + first;
        const int mantissa = (int)steps->mantissa;
        uint32_t small[BLOCK];
        for (int64_t i = 0; i < count; i++) {
            uint32_t step = (uint32_t)step_of(base[i], value[i], 0x8000u), word;
            float odd = (float)(int32_t)(step | 1);
            memcpy(&word, &odd, sizeof word);
            small[i] = step;
            int32_t bucket = (int32_t)(word >> 22) - 256;
            kinds[i] = (uint16_t)(64 * (int32_t)((base[i] & 0x7FFFu) >> mantissa) + (bucket < 0 ? 0 : bucket));
        }
        for (int64_t i = 0; i < count; i++) found[i] = small[i];
        return;
    }
    for (int64_t i = 0; i < count; i++) {
        uint32_t base = stored(steps->base, width, first + i);
        found[i] = step_of(base, stored(values, width, first + i), sign);
        double odd = (double)(int64_t)(found[i] | 1);
        uint64_t word;
        memcpy(&word, &odd, sizeof word);
        int32_t bucket = (int32_t)(word >> 51) - 2048;
        kinds[i] = (uint16_t)(64 * (int32_t)exponent_of(steps, width, base) + (bucket < 0 ? 0 : bucket));
    }
}

static inline int64_t context_of(const Steps *steps, int64_t width, uint32_t word) {
    int64_t below = steps->top - (int64_t)exponent_of(steps, width, word);
    return below < 0 ? 0 : below < steps->contexts ? below : steps->contexts - 1;
}

/* How often each bucket comes with each exponent of the base, (EXPONENTS, BUCKETS); for each value 64 exponent + bucket; and
   the bits, for which there is room for eight bytes more than needed. Returns how many bytes these are. */
ALWAYS int64_t count_of(const Steps given, const int64_t width, const void *values, int64_t *counts, uint16_t *kinds,
                        uint8_t *bits) {
    const Steps *const steps = &given;
    const int64_t count = steps->count;
    int64_t others[EXPONENTS * BUCKETS] = {0}; /* of odd values: an addition need not wait for the one before */
    int64_t *const both[2] = {counts, others}, at = 0;
    uint64_t held = 0;
    int have = 0;
    for (int64_t first = 0; first < count; first += BLOCK) {
        uint64_t found[BLOCK];
        int64_t some = least(count - first, BLOCK);
        kinds_of(steps, width, values, first, some, found, kinds + first);
        for (int64_t i = 0; i < some; i++) {
            int kind = kinds[first + i], rest = rest_bits(kind & 63);
            both[i & 1][kind]++;
            held |= (found[i] & (((uint64_t)1 << rest) - 1)) << have;
            have += rest;
            memcpy(bits + at, &held, sizeof held); /* what is not whole yet is written again */
            int full = have >> 5;
            at += 4 * full;
            held = full ? held >> 32 : held;
            have &= 31;
        }
    }
    for (int64_t k = 0; k < EXPONENTS * BUCKETS; k++) counts[k] += others[k];
    memcpy(bits + at, &held, sizeof held);
    return at + (have + 7) / 8;
}

API WIDE int64_t maskpack_steps_count(const Steps *steps, const void *values, int64_t *counts, uint16_t *kinds, uint8_t *bits) {
    return steps->width == 4 ? count_of(*steps, 4, values, counts, kinds, bits) : count_of(*steps, 2, values, counts, kinds, bits);
}

/* Slots of each bucket of a table; of the bucket that comes most it has what is left. */
static void slots_of(const uint8_t *numbers, int32_t *sizes) {
    static const int32_t weights[16] = {0, 1, 2, 3, 5, 9, 16, 28, 49, 85, 149, 261, 457, 800, 1400, 2450};
    int32_t sum = 0, left = SLOTS, most = 0;
    for (int b = 0; b < BUCKETS; b++) sum += weights[numbers[b]];
    for (int b = 0; b < BUCKETS; b++) {
        int32_t own = weights[numbers[b]], size = own ? SLOTS * own / sum : 0;
        sizes[b] = own && !size ? 1 : size;
        left -= sizes[b];
        most = own > weights[numbers[most]] ? b : most;
    }
    sizes[most] += left;
}

/* Entries of the buckets of each table: slots << 18 | first slot << 6 | bucket. */
API void maskpack_steps_entries(int64_t contexts, const uint8_t *tables, uint32_t *entries) {
    for (int64_t c = 0; c < contexts; c++) {
        int32_t sizes[BUCKETS], first = 0;
        slots_of(tables + c * BUCKETS, sizes);
        for (int b = 0; b < BUCKETS; first += sizes[b++])
            entries[c * BUCKETS + b] = sizes[b] ? (uint32_t)(sizes[b] << 18 | first << 6 | b) : 0;
    }
}

/* The table nearest to how often buckets come (`last`: the highest of them), and its bits and those of saying the buckets. */
static double nearest_table(const int64_t *counts, const double *bounds, const double *logs, uint8_t *numbers, int *last) {
    int32_t sizes[BUCKETS];
    int64_t most = 0;
    double bits = 0;
    *last = 0;
    for (int b = 0; b < BUCKETS; b++) most = counts[b] > most ? counts[b] : most;
    for (int b = 0; b < BUCKETS; b++) {
        double wanted = (double)counts[b] / (double)(most ? most : 1) * 2450;
        numbers[b] = counts[b] > 0;
        while (numbers[b] && numbers[b] < 15 && wanted > bounds[numbers[b] - 1]) numbers[b]++;
        if (counts[b]) *last = b;
    }
    if (!most) numbers[0] = 1;
    slots_of(numbers, sizes);
    for (int b = 0; b < BUCKETS; b++) bits += (double)counts[b] * logs[counts[b] ? sizes[b] : SLOTS];
    return bits + 8 + 4 * (*last + 1);
}

/* Chooses the tables of as many contexts as are worth it, and returns how many; `logs`: bits of each number of slots. */
API int64_t maskpack_steps_choose(const int64_t *counts, const double *bounds, const double *logs, int32_t *top, uint8_t *tables) {
    static const int tried[6] = {1, 2, 4, 8, 12, MOST_CONTEXTS};
    int bottom = -1, chosen = 0, ignored;
    double alone = 0, best = 0;
    int64_t rest[BUCKETS] = {0};
    for (int e = 0; e < EXPONENTS; e++)
        for (int b = 0; b < BUCKETS; b++)
            if (counts[e * BUCKETS + b]) *top = e, bottom = bottom < 0 ? e : bottom, rest[b] += counts[e * BUCKETS + b];
    for (int k = 0, at = 1; k < 6 && (!k || tried[k - 1] <= *top - bottom); k++) {
        uint8_t numbers[BUCKETS];
        for (; at < tried[k]; at++) { /* a table of its own for one exponent more */
            static const int64_t none[BUCKETS];
            const int64_t *own = *top - at + 1 < 0 ? none : counts + (*top - at + 1) * BUCKETS;
            for (int b = 0; b < BUCKETS; b++) rest[b] -= own[b];
            alone += nearest_table(own, bounds, logs, tables + (at - 1) * BUCKETS, &ignored);
        }
        double cost = alone + nearest_table(rest, bounds, logs, numbers, &ignored);
        if (!k || cost < best) {
            best = cost;
            chosen = tried[k];
            memcpy(tables + MOST_CONTEXTS * BUCKETS, numbers, sizeof numbers);
        }
    }
    memcpy(tables + (chosen - 1) * BUCKETS, tables + MOST_CONTEXTS * BUCKETS, BUCKETS);
    return chosen;
}

/* Writes words from the end of `words` (2 lanes + count) backwards, and returns how many. */
API int64_t maskpack_steps_encode(const Steps *steps, const uint16_t *kinds, uint16_t *words) {
    uint32_t state[MOST_LANES], entry[64 * MOST_CONTEXTS];
    double parts[64 * MOST_CONTEXTS];
    uint16_t place[EXPONENTS];
    int64_t room = 2 * steps->lanes + steps->count, at = room, lane = (steps->count - 1) % steps->lanes;
    for (int64_t e = 0; e < EXPONENTS; e++) {
        int64_t below = steps->top - e;
        place[e] = (uint16_t)(64 * (below < 0 ? 0 : below < steps->contexts ? below : steps->contexts - 1));
    }
    for (int64_t c = 0; c < steps->contexts; c++)
        for (int64_t k = 0; k < BUCKETS; k++) {
            entry[64 * c + k] = steps->table[c * BUCKETS + k];
            parts[64 * c + k] = 1.0 / (double)(entry[64 * c + k] >> 18 | !(entry[64 * c + k] >> 18));
        }
    for (int64_t l = 0; l < steps->lanes; l++) state[l] = LOW;
    for (int64_t i = steps->count - 1; i >= 0; i--) {
        int kind = place[kinds[i] >> 6] + (kinds[i] & 63);
        uint32_t size = entry[kind] >> 18, now = state[lane], full = now >> 20 >= size;
        words[at - 1] = (uint16_t)now; /* of no use where it is not full */
        at -= full;
        now >>= 16 * full;
        uint32_t part = (uint32_t)(((double)now + .5) * parts[kind]); /* now / size: no quotient is that close to the next */
        state[lane] = (part << SLOT_BITS) + now - part * size + (entry[kind] >> 6 & (SLOTS - 1));
        lane = lane ? lane - 1 : steps->lanes - 1;
    }
    for (int64_t l = steps->lanes - 1; l >= 0; l--) {
        words[--at] = (uint16_t)(state[l] >> 16);
        words[--at] = (uint16_t)state[l];
    }
    return room - at;
}

/* Returns whether words and bits are just those of so many values. `table`: the entry of each context and slot. */
ALWAYS int32_t decode_of(const Steps given, const int64_t width, const uint32_t *table, const uint16_t *words, int64_t count,
                         const uint8_t *bits, int64_t bytes, void *values) {
    const Steps *const steps = &given;
    const uint32_t sign = width == 4 ? 0x80000000u : 0x8000u, all = sign | (sign - 1);
    uint32_t state[MOST_LANES], firsts[BUCKETS]; /* the smallest size of each bucket */
    uint8_t widths[BUCKETS];
    for (int b = 0; b < BUCKETS; b++) {
        widths[b] = (uint8_t)rest_bits(b);
        firsts[b] = b < 2 ? (uint32_t)b : (uint32_t)(2 | (b & 1)) << (widths[b] - 1);
    }
    int64_t at = 2 * steps->lanes, bit = 0, end = 8 * bytes, lane = 0;
    if (count < at) return 0;
    for (int64_t l = 0; l < steps->lanes; l++) state[l] = words[2 * l] | (uint32_t)words[2 * l + 1] << 16;
    int fits = 1;
    for (int64_t i = 0; i < steps->count && fits; i++) {
        uint32_t word = stored(steps->base, width, i), own = state[lane], slot = own & (SLOTS - 1);
        uint32_t entry = table[context_of(steps, width, word) * SLOTS + slot];
        own = (entry >> 18) * (own >> SLOT_BITS) + slot - (entry >> 6 & (SLOTS - 1));
        if (own < LOW) {
            if (at >= count) {
                fits = 0;
                break;
            }
            own = own << 16 | words[at++];
        }
        state[lane] = own;
        lane = lane + 1 == steps->lanes ? 0 : lane + 1;
        int bucket = (int)(entry & 63), used = widths[bucket];
        uint64_t rest = 0;
        int64_t from = bit >> 3;
        if (from + 8 <= bytes)
            memcpy(&rest, bits + from, sizeof rest);
        else
            for (int64_t b = from; b < bytes; b++) rest |= (uint64_t)bits[b] << 8 * (b - from);
        rest = rest >> (bit & 7) & (((uint64_t)1 << used) - 1);
        bit += used;
        if (bit > end) fits = 0;
        uint32_t size = firsts[bucket] + (uint32_t)(rest >> 1);
        uint32_t forth = negated(size, (0u - (uint32_t)(rest & 1)) ^ where(word, sign));
        uint32_t found = unordered((ordered(word, sign) + forth) & all, sign);
        if (width == 4)
            ((uint32_t *)values)[i] = found;
        else
            ((uint16_t *)values)[i] = (uint16_t)found;
    }
    for (int64_t l = 0; l < steps->lanes; l++) fits &= state[l] == LOW;
    return fits && at == count && (bit + 7) >> 3 == bytes && (!(bit & 7) || !(bits[bytes - 1] >> (bit & 7)));
}

/* Returns as decode_of; -1 without memory. */
API int32_t maskpack_steps_decode(const Steps *steps, const uint16_t *words, int64_t count, const uint8_t *bits, int64_t bytes,
                                  void *values) {
    uint32_t *table = malloc((size_t)steps->contexts * SLOTS * sizeof *table);
    if (!table) return -1;
    for (int64_t k = 0; k < steps->contexts * BUCKETS; k++) {
        uint32_t entry = steps->table[k], *own = table + k / BUCKETS * SLOTS + (entry >> 6 & (SLOTS - 1));
        for (uint32_t slot = 0; slot < entry >> 18; slot++) own[slot] = entry;
    }
    int32_t done = steps->width == 4 ? decode_of(*steps, 4, table, words, count, bits, bytes, values)
                                     : decode_of(*steps, 2, table, words, count, bits, bytes, values);
    free(table);
    return done;
}

/* Copies the words at the zeros of `count` packed bits to `values`, in order, or, with `put`, back from there. */
ALWAYS void at_zeros(const int64_t width, const int put, const uint8_t *bits, int64_t count, uint8_t *words, uint8_t *values) {
    for (int64_t first = 0; first < count; first += 64, words += 64 * width) {
        int64_t some = least(count - first, 64);
        uint64_t zeros = 0;
        memcpy(&zeros, bits + first / 8, (size_t)(some + 7) / 8);
        zeros = ~zeros & (~(uint64_t)0 >> (64 - some));
        for (; zeros; zeros &= zeros - 1, values += width) {
            int64_t at = width * LOWEST(zeros);
            memcpy(put ? words + at : values, put ? values : words + at, (size_t)width);
        }
    }
}

API void maskpack_at_zeros(int64_t width, int32_t put, const uint8_t *bits, int64_t count, void *words, void *values) {
    if (width == 4)
        put ? at_zeros(4, 1, bits, count, words, values) : at_zeros(4, 0, bits, count, words, values);
    else
        put ? at_zeros(2, 1, bits, count, words, values) : at_zeros(2, 0, bits, count, words, values);
}

/* Writes the positions of the bits that are set in whole bytes, if there is room for them, and returns how many. */
API WIDE int64_t maskpack_where(const uint8_t *bits, int64_t bytes, int32_t *found) {
    int64_t count = 0;
    for (int64_t first = 0; first < bytes; first += 8) {
        uint64_t ones = 0;
        memcpy(&ones, bits + first, (size_t)least(bytes - first, 8)); /* the lowest first, as of the machine's words */
        if (!found) count += SET(ones);
        for (; ones && found; ones &= ones - 1) found[count++] = (int32_t)(8 * first + LOWEST(ones));
    }
    return count;
}

/* Writes the gaps before rising positions, and how many bytes these are is returned: 255 for as many weights without an event. */
API int64_t maskpack_gaps(int64_t count, const int32_t *where, uint8_t *steps) {
    int64_t made = 0, next = 0;
    for (int64_t i = 0; i < count; next = where[i++] + 1) {
        int64_t gap = where[i] - next;
        for (; gap >= 255; gap -= 255) steps[made++] = 255;
        steps[made++] = (uint8_t)gap;
    }
    return made;
}
