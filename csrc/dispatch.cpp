// Chooses a SIMD level at run time and exports the C functions of fourbit.h, each a jump through the level's table.
//
// The level is the highest one that was compiled in and that the CPU supports; the environment variable FOURBIT_CPU
// names another. setup.py defines FB_WITH_<LEVEL> for the levels it compiled.

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <atomic>

#include "fourbit.h"

#ifdef __GLIBC__
#include <malloc.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fb {

struct Kernels {
#define FB_KERNEL(name, parameters, arguments) int32_t(*name) parameters;
#include "kernels.def"
#undef FB_KERNEL
};

}  // namespace fb

#define FB_LEVEL scalar
#include "level_table.h"
#ifdef FB_WITH_AVX2
#define FB_LEVEL avx2
#include "level_table.h"
#endif
#ifdef FB_WITH_AVX512
#define FB_LEVEL avx512
#include "level_table.h"
#endif
#ifdef FB_WITH_AVX512BF16
#define FB_LEVEL avx512bf16
#include "level_table.h"
#endif
#ifdef FB_WITH_NEON
#define FB_LEVEL neon
#include "level_table.h"
#endif

namespace fb {
namespace {

bool always() { return true; }

#if defined(__x86_64__)
bool has_avx2() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
    return f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512bf16() {
    return has_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
}
#endif

struct Level {
    const char* name;
    bool (*supported)();
    const Kernels* kernels;
};

// Ascending: the last one that the CPU supports is taken.
const Level levels[] = {
    {"scalar", always, &scalar::kernels},
#ifdef FB_WITH_AVX2
    {"avx2", has_avx2, &avx2::kernels},
#endif
#ifdef FB_WITH_AVX512
    {"avx512", has_avx512, &avx512::kernels},
#endif
#ifdef FB_WITH_AVX512BF16
    {"avx512bf16", has_avx512bf16, &avx512bf16::kernels},
#endif
#ifdef FB_WITH_NEON
    {"neon", always, &neon::kernels},
#endif
};

const Level* find(const char* name) {
    for (const Level& level : levels) {
        if (strcmp(level.name, name) == 0 && level.supported()) return &level;
    }
    return nullptr;
}

char level_error[256];

const Level* choose() {
#if defined(__x86_64__)
    __builtin_cpu_init();
#endif
    const Level* best = &levels[0];
    for (const Level& level : levels) {
        if (level.supported()) best = &level;
    }
    const char* wanted = getenv("FOURBIT_CPU");
    if (!wanted || !*wanted) return best;
    if (const Level* level = find(wanted)) return level;
    snprintf(level_error, sizeof level_error, "FOURBIT_CPU is %.40s; this machine has %s.", wanted,
             fb_supported_levels());
    return best;
}

// Initialised when the library is loaded, so that a call only reads it.
std::atomic<const Level*> active{choose()};

const Kernels* table() { return active.load(std::memory_order_relaxed)->kernels; }

}  // namespace
}  // namespace fb

extern "C" {

#define FB_KERNEL(name, parameters, arguments) \
    int32_t fb_##name parameters { return fb::table()->name arguments; }
#include "kernels.def"
#undef FB_KERNEL

int32_t fb_abi_version(void) { return FB_ABI_VERSION; }

const char* fb_level_name(void) { return fb::active.load()->name; }

const char* fb_level_error(void) { return fb::level_error[0] ? fb::level_error : nullptr; }

const char* fb_supported_levels(void) {
    static char names[64];
    if (!names[0]) {
        for (const fb::Level& level : fb::levels) {
            if (!level.supported()) continue;
            if (names[0]) strcat(names, " ");
            strcat(names, level.name);
        }
    }
    return names;
}

int32_t fb_set_level(const char* name) {
    const fb::Level* level = fb::find(name);
    if (!level) return FB_UNSUPPORTED;
    fb::active.store(level);
    return FB_OK;
}

int32_t fb_keep_freed_memory(void) {
#ifdef __GLIBC__
    const int gibibyte = 1 << 30;
    const bool set = mallopt(M_MMAP_MAX, 0) && mallopt(M_TRIM_THRESHOLD, 2 * (gibibyte - 1)) &&
                     mallopt(M_TOP_PAD, 64 << 20) && mallopt(M_ARENA_MAX, 1);
    return set ? 1 : 0;
#else
    return 0;
#endif
}

}  // extern "C"
