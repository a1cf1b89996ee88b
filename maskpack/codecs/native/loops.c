/* Inner loops of the codec logit (docs/format.md section 6.1) and of classes (section 5). The same bits as lanes.py,
   logit_model.py, logit_fit.py and classes.py, tested.

   Nothing is allocated here. All sizes come from the caller, who got them from shapes; what comes from a payload (states,
   words, coefficients) is only used as a value, or as an index that is limited first. */

#include <stdint.h>
#include <string.h>

#if defined(_WIN32)
#define API __declspec(dllexport)
#else
#define API __attribute__((visibility("default")))
#endif

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define WIDE __attribute__((target_clones("avx2", "default")))
#else
#define WIDE
#endif

enum { BITS = 15, ONE = 1 << BITS, LOW = 1 << 16, WINDOW = 8192, LEVELS = 1024, SAME = 5, OTHER = 3, PIECE = 512 };
enum { KINDS = SAME * SAME }; /* what is counted in a kernel: SAME * positive events + negative ones, each at most 4 */

/* Counts up with every change of what stands below: a library of another source is not used. */
API int64_t maskpack_loops(void) { return 1; }

typedef struct {
    const uint16_t *hazard;   /* LEVELS entries, each at most 8 UNIT */
    const uint16_t *survival; /* WINDOW + 8 UNIT entries */
    const uint16_t *reach;    /* ONE entries */
} Tables;

typedef struct {
    int64_t rows, inputs, positions, rank, offset;
    const int32_t *row, *input, *position, *before, *magnitude, *reference; /* NULL where an array is all 0 */
    const float *left, *right;                                             /* (rows, rank), (rank, inputs) */
    const uint8_t *classes, *referenced; /* of each weight, row-major, or NULL */
} Model;

typedef struct {
    int64_t *state, *at;
    const int64_t *end;
    const uint16_t *words;
} Lanes;

static inline uint32_t taken(uint32_t state, uint32_t slot, uint32_t first, uint32_t size, int64_t *at, int64_t end,
                             const uint16_t *words) {
    state = size * (state >> BITS) + slot - first;
    if (state < LOW && *at < end) state = state << 16 | words[(*at)++];
    return state;
}

/* Coefficients: every lane has an equal part of `count`; `table` says of each which of the tables in `first` it has. */
API void maskpack_coefficients(const Lanes *lanes, int64_t lane_count, int64_t count, const uint8_t *table,
                               const int32_t *first, int32_t *values) {
    for (int64_t lane = 0; lane < lane_count; lane++) {
        uint32_t state = (uint32_t)lanes->state[lane];
        int64_t at = lanes->at[lane];
        for (int64_t c = count * lane / lane_count; c < count * (lane + 1) / lane_count; c++) {
            const int32_t *own = first + 16 * table[c];
            int32_t slot = (int32_t)(state & (ONE - 1)), symbol = 0;
            while (symbol < 14 && own[symbol + 1] <= slot) symbol++;
            values[c] = symbol - 7;
            state = taken(state, (uint32_t)slot, (uint32_t)own[symbol], (uint32_t)(own[symbol + 1] - own[symbol]), &at,
                          lanes->end[lane], lanes->words);
        }
        lanes->state[lane] = state;
        lanes->at[lane] = at;
    }
}

/* Levels, limited to those that there are, of `count` weights of a row at one position, from the input `first` on.
   `seen` has what was counted in the kernel of each, `contexts` what that adds for either sign. */
WIDE static void levels_of(const Model *model, int64_t position, int64_t row, int64_t first, int64_t count,
                           const uint8_t *seen, const int32_t *contexts, int32_t *level) {
    int32_t base = (int32_t)(LEVELS / 2 + model->offset);
    int64_t step = model->positions, place = (row * model->inputs + first) * step + position;
    const uint8_t *classes = model->classes ? model->classes + place : 0;
    if (model->row) base += model->row[row];
    if (model->position) base += model->position[position];
    for (int64_t i = 0; i < count; i++) level[i] = base;
    if (model->input)
        for (int64_t i = 0; i < count; i++) level[i] += model->input[first + i];
    if (model->magnitude)
        for (int64_t i = 0; i < count; i++) level[i] += model->magnitude[classes[i * step] >> 3 & 15];
    if (model->reference)
        for (int64_t i = 0; i < count; i++) level[i] += model->referenced[place + i * step] ? *model->reference : 0;
    if (model->before)
        for (int64_t i = 0; i < count; i++) level[i] += contexts[seen[i] + (classes ? classes[i * step] >> 7 : 0) * KINDS];
    if (model->rank) { /* only where there is one position */
        float lean[PIECE];
        for (int64_t i = 0; i < count; i++) lean[i] = 0;
        for (int64_t k = 0; k < model->rank; k++) {
            const float own = model->left[row * model->rank + k], *other = model->right + k * model->inputs + first;
            for (int64_t i = 0; i < count; i++) lean[i] += own * other[i]; /* integers below 2^24: exact */
        }
        for (int64_t i = 0; i < count; i++) {
            int32_t whole = (int32_t)lean[i];
            level[i] += (classes[i] > 127 ? -whole : whole) >> 4;
        }
    }
    for (int64_t i = 0; i < count; i++) level[i] = level[i] < 0 ? 0 : level[i] >= LEVELS ? LEVELS - 1 : level[i];
}

/* Events of lanes, as bits that are set. `counts`: a byte for each unit of the longest lane. */
API void maskpack_events(const Tables *tables, const Model *model, const Lanes *lanes, int64_t lane_count,
                         const int64_t *bounds, uint8_t *counts, uint8_t *bits) {
    int32_t contexts[2 * KINDS], level[PIECE];
    for (int i = 0; model->before && i < 2 * KINDS; i++) {
        int positive = i % KINDS / SAME, negative = i % SAME;
        int same = i < KINDS ? positive : negative, other = i < KINDS ? negative : positive;
        contexts[i] = model->before[same + SAME * (!model->classes ? 0 : other < OTHER ? other : OTHER - 1)];
    }
    for (int64_t lane = 0; lane < lane_count; lane++) {
        uint32_t state = (uint32_t)lanes->state[lane], slot = state & (ONE - 1), used = 0, reach = tables->reach[slot];
        uint32_t limit = reach < WINDOW ? reach : WINDOW;
        int64_t at = lanes->at[lane], end = lanes->end[lane], begin = bounds[lane], stop = bounds[lane + 1], count;
        if (model->before) memset(counts, 0, (size_t)(stop - begin));
        for (int64_t position = 0; position < model->positions; position++)
            for (int64_t unit = begin; unit < stop; unit += count) {
                int64_t row = unit / model->inputs, input = unit % model->inputs;
                uint8_t *seen = counts + (unit - begin);
                count = model->inputs - input < stop - unit ? model->inputs - input : stop - unit;
                if (count > PIECE) count = PIECE;
                levels_of(model, position, row, input, count, seen, contexts, level);
                for (int64_t i = 0; i < count; i++) {
                    uint32_t hazard = tables->hazard[level[i]];
                    used += hazard;
                    if (used < limit) continue;
                    uint32_t low = tables->survival[used], size = low, first = 0;
                    if (used >= reach) { /* an event; else the window ends without one */
                        int64_t weight = (unit + i) * model->positions + position;
                        size = tables->survival[used - hazard] - low;
                        first = low;
                        bits[weight >> 3] |= (uint8_t)(1 << (weight & 7));
                        if (model->before) {
                            int negative = model->classes && model->classes[weight] > 127;
                            int own = negative ? seen[i] % SAME : seen[i] / SAME;
                            seen[i] += own == SAME - 1 ? 0 : negative ? 1 : SAME;
                        }
                    }
                    state = taken(state, slot, first, size, &at, end, lanes->words);
                    slot = state & (ONE - 1);
                    reach = tables->reach[slot];
                    limit = reach < WINDOW ? reach : WINDOW;
                    used = 0;
                }
            }
        lanes->state[lane] = state;
        lanes->at[lane] = at;
    }
}

/* What a fit asks of `count` weights whose log-odds lie at `at` in tables of `size` entries, rounded to the nearest, ties
   to even: event - p, which comes in the place of `at`, and p (1 - p). */
API void maskpack_residuals(int64_t count, double *at, const uint8_t *events, int64_t size, const double *p,
                            const double *variances, double *variance) {
    for (int64_t i = 0; i < count; i++) {
        double shifted = at[i] + 6755399441055744.0; /* 1.5 * 2^52: the integer is in the lower bits */
        int64_t place;
        memcpy(&place, &shifted, sizeof place);
        place = (int32_t)place;
        place = place < 0 ? 0 : place >= size ? size - 1 : place;
        at[i] = events[i] - p[place];
        variance[i] = variances[place];
    }
}

/* Words of lanes whose symbols begin at `first` and have `size` slots; returns how many, and each lane's in `lengths`. */
API int64_t maskpack_words(int64_t lane_count, const int64_t *ends, const int64_t *first, const int64_t *size,
                           uint16_t *words, int64_t *lengths) {
    int64_t made = 0;
    for (int64_t lane = 0; lane < lane_count; lane++) {
        int64_t begin = made, stop = lane ? ends[lane - 1] : 0;
        uint32_t state = 0;
        for (int64_t i = ends[lane]; i-- > stop;) {
            uint32_t own = (uint32_t)size[i];
            if (state >> 17 >= own) {
                words[made++] = (uint16_t)state;
                state >>= 16;
            }
            state = (state / own << BITS) + state % own + (uint32_t)first[i];
        }
        for (; state; state >>= 16) words[made++] = (uint16_t)state;
        for (int64_t a = begin, b = made - 1; a < b; a++, b--) {
            uint16_t kept = words[a];
            words[a] = words[b];
            words[b] = kept;
        }
        lengths[lane] = made - begin;
    }
    return made;
}

/* Classes of `count` < 2^32 bfloat16 weights. `have`: 2^15 zeros. `table`: 2^16 bytes. */
API void maskpack_classes(int64_t count, const uint16_t *weights, uint32_t *have, uint8_t *table, uint8_t *classes) {
    enum { INFINITE = 0x7F80, NAN_ = INFINITE + 1, NEGATIVE = 0x8000 };
    int64_t below = 0;
    for (int64_t i = 0; i < count; i++) have[weights[i] & (NEGATIVE - 1)]++;
    for (int v = NAN_ + 1; v < NEGATIVE; v++) have[NAN_] += have[v]; /* all NaN are one magnitude */
    for (int v = 0; v <= NAN_; v++)
        if (have[v]) {
            table[v] = (uint8_t)(128 * (2 * below + have[v]) / (2 * count));
            table[NEGATIVE | v] = (uint8_t)(table[v] + (v <= INFINITE ? 128 : 0));
            below += have[v];
        }
    for (int v = NAN_; have[NAN_] && v < NEGATIVE; v++) table[v] = table[NEGATIVE | v] = table[NAN_];
    for (int64_t i = 0; i < count; i++) classes[i] = table[weights[i]];
}
