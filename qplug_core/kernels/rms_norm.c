/* y = weight * kind(x / sqrt(mean(x^2) + eps)) for rows of x[M, K]: in float32, rounded to the kind of x before the weight and after it.
 *
 * y, x, weight [K] are of one kind; K is a multiple of 16.
 */
#include "vec.h"

#include <math.h>

INLINE void norm_row(int kind, char *y, const char *x, const char *weight, long k, float eps) {
    vf a = splat(0.0f), b = splat(0.0f);
    for (long i = 0; i < k; i += VL) {
        const vf v = load_any(kind, x, i);
        if (i / VL % 2) b += v * v;
        else a += v * v;
    }
    a += b;
    float sum = 0.0f;
    for (int j = 0; j < VL; j++) sum += a[j];
    const vf by = splat(1.0f / sqrtf(sum / (float)k + eps));
    for (long i = 0; i < k; i += VL) {
        vf v = load_any(kind, x, i) * by;
        if (kind != F32) {
            _Alignas(64) uint16_t half[VL];
            store_any(kind, half, 0, v, VL);
            v = load_any(kind, half, 0);
        }
        store_any(kind, y, i, v * load_any(kind, weight, i), VL);
    }
}

EXPORT void qplug_rms_norm(void *y, const void *x, const void *weight, long m, long k, float eps, int kind, int threads) {
    const long row = k * (long)width(kind);
    if (m * k < 1 << 16) threads = 1; /* waking threads costs more */
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < m; i++) {
        char *to = (char *)y + i * row;
        const char *from = (const char *)x + i * row;
        if (kind == BF16) norm_row(BF16, to, from, weight, k, eps);
        else if (kind == F16) norm_row(F16, to, from, weight, k, eps);
        else norm_row(F32, to, from, weight, k, eps);
    }
}
