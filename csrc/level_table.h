// Declares the kernels of level FB_LEVEL and the table that points at them. Included once per level, hence no guard.

namespace fb {
namespace FB_LEVEL {

#define FB_KERNEL(name, parameters, arguments) int32_t name parameters;
#include "kernels.def"
#undef FB_KERNEL

static const Kernels kernels = {
#define FB_KERNEL(name, parameters, arguments) name,
#include "kernels.def"
#undef FB_KERNEL
};

}  // namespace FB_LEVEL
}  // namespace fb
#undef FB_LEVEL
