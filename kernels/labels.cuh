// Label maps: one class id a pixel, of 1, 4 or 8 bytes. The width is the same for a whole launch, so asking for it at every
// read costs a branch that all threads take together, and one kernel serves uint8, int32 and int64.
#pragma once

constexpr int NO_ID = -0x7fffffff - 1;  // what 32 bits cannot hold, and so no class

__device__ inline int label_at(const void* labels, int bytes, int index) {
    if (bytes == 1) return static_cast<const unsigned char*>(labels)[index];
    if (bytes == 4) return static_cast<const int*>(labels)[index];
    const long long label = static_cast<const long long*>(labels)[index];
    return label == static_cast<int>(label) ? static_cast<int>(label) : NO_ID;
}
