# TensorRT's headers: those of the SDK when it is installed, else the folder that QE_TENSORRT_INCLUDE names.
find_path(QE_TENSORRT_FOUND NvInferRuntime.h
  HINTS ${QE_TENSORRT_INCLUDE}
  PATHS /usr/include/${CMAKE_LIBRARY_ARCHITECTURE} /usr/local/tensorrt/include
  NO_CMAKE_FIND_ROOT_PATH)
if(NOT QE_TENSORRT_FOUND)
  message(FATAL_ERROR "NvInferRuntime.h is missing. Install TensorRT, or set QE_TENSORRT_INCLUDE to its headers.")
endif()
find_path(QE_CUDA_INCLUDE cuda_runtime_api.h
  HINTS ${QE_CUDA_BIN}/../include ${QE_CUDA_BIN}/../targets/x86_64-linux/include
  NO_CMAKE_FIND_ROOT_PATH REQUIRED)

add_library(qe_tensorrt_headers INTERFACE)
target_include_directories(qe_tensorrt_headers SYSTEM INTERFACE ${QE_TENSORRT_FOUND} ${QE_CUDA_INCLUDE})
