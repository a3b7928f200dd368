// What the stand-in of TensorRT asks of that of CUDA's driver.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {
// Queues an action in a stream.
void standin_queue(void* stream, void (*action)(void*), void* argument);
// Ends the program unless so many bytes lie in memory of the GPU.
void standin_check(const void* address, size_t bytes);
}
