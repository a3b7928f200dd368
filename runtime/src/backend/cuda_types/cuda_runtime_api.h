// The two names of CUDA's runtime that TensorRT's headers need, so that they compile without a CUDA toolkit. Both are
// pointers to what only the driver knows.
#pragma once

typedef struct CUstream_st* cudaStream_t;
typedef struct CUevent_st* cudaEvent_t;
