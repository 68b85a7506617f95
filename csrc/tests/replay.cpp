// Replays calls of the C interface on a machine where Python does not run, such as an emulated one.
//
//     replay < calls > results
//
// A call is the kernel's name and its arguments; a result is the status and what every buffer holds afterwards. All
// numbers are 8 bytes, little-endian; floating-point ones are doubles.
//
//     call     := length name argument...        as many arguments as the kernel has
//     argument := number                         a scalar
//              |  length bytes links link...     a buffer, or NULL where length is -1 and nothing follows
//     link     := offset argument                the address of another buffer, to be put at `offset` of this one
//
// A buffer with links is a struct such as FbWeight. The arguments a kernel takes are those of its declaration, so a new
// kernel needs nothing here. tests/parity/test_replay.py writes calls and reads results.

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <tuple>
#include <type_traits>

#include "../fourbit.h"

namespace {

void read(void* to, size_t size) {
    if (fread(to, 1, size, stdin) != size) {
        fprintf(stderr, "replay: the calls end early\n");
        exit(1);
    }
}

int64_t read_integer() {
    int64_t value;
    read(&value, sizeof value);
    return value;
}

struct Buffer {
    char* bytes;
    int64_t size;
};

// The buffers of the call at hand, in the order in which they were read.
constexpr int MOST_BUFFERS = 512;
Buffer buffers[MOST_BUFFERS];
int buffer_count = 0;

char* read_buffer() {
    const int64_t size = read_integer();
    if (size < 0) return nullptr;
    if (buffer_count == MOST_BUFFERS) abort();
    // Exactly as long as it is, so that a memory checker sees any step beyond; 64-byte aligned, as torch's tensors are.
    void* bytes = nullptr;
    if (posix_memalign(&bytes, 64, size ? (size_t)size : 1)) abort();
    buffers[buffer_count++] = {(char*)bytes, size};
    read(bytes, (size_t)size);
    for (int64_t links = read_integer(); links > 0; --links) {
        const int64_t offset = read_integer();
        char* linked = read_buffer();
        memcpy((char*)bytes + offset, &linked, sizeof linked);
    }
    return (char*)bytes;
}

template <typename T>
T read_argument() {
    if constexpr (std::is_pointer_v<T>) {
        return (T)read_buffer();
    } else if constexpr (std::is_floating_point_v<T>) {
        double value;
        read(&value, sizeof value);
        return (T)value;
    } else {
        return (T)read_integer();
    }
}

template <typename... Arguments>
int32_t call(int32_t (*kernel)(Arguments...)) {
    const std::tuple<Arguments...> arguments{read_argument<Arguments>()...};  // braces: in order
    return std::apply(kernel, arguments);
}

struct Kernel {
    const char* name;
    int32_t (*run)();
};

const Kernel kernels[] = {
#define FB_KERNEL(name, parameters, arguments) {#name, [] { return call(fb_##name); }},
#include "../kernels.def"
#undef FB_KERNEL
};

int32_t call(const char* name) {
    for (const Kernel& kernel : kernels) {
        if (strcmp(kernel.name, name) == 0) return kernel.run();
    }
    fprintf(stderr, "replay: there is no kernel named %s\n", name);
    exit(1);
}

}  // namespace

int main() {
    if (fb_level_error()) {
        fprintf(stderr, "replay: %s\n", fb_level_error());
        return 1;
    }
    for (int64_t calls = read_integer(); calls > 0; --calls) {
        char name[64] = {};
        const int64_t length = read_integer();
        if (length >= (int64_t)sizeof name) return 1;
        read(name, (size_t)length);
        const int64_t status = call(name);
        fwrite(&status, sizeof status, 1, stdout);
        for (int i = 0; i < buffer_count; ++i) {
            fwrite(&buffers[i].size, sizeof buffers[i].size, 1, stdout);
            fwrite(buffers[i].bytes, 1, (size_t)buffers[i].size, stdout);
            free(buffers[i].bytes);
        }
        buffer_count = 0;
    }
    return 0;
}
