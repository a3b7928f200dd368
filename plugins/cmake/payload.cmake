# One compute_80 PTX, assembled for every chip, in one fatbin per CUDA major version.
#
# CUDA 12 gets the very same PTX with a lower version in its header: it uses nothing newer than PTX 8.3, and ptxas
# refuses what it does not know. So what the emulator verified is what runs under both drivers.
#
# Chips from 9.0 on get it with the instructions that its comments hold: a kernel says "// sm_90: griddepcontrol.wait;" in
# inline PTX, which older chips lack. Without such comments they get the very same PTX, and the launcher, which asks for
# what chip a kernel was written, overlaps no launches.
#
# Kernels of clusters (qe_cluster_...) exist on the listed chips from 9.0 on alone. They are cut out of what older chips get
# and of the PTX in the fatbin, which serves chips that are not listed (cmake/below_90.cmake). A driver that is asked for one by name
# has none there.
#
# QE_FATBIN_FOLDER reuses the fatbins of another build folder: they are the same for every host architecture.
set(QE_FATBIN_FOLDER ${CMAKE_CURRENT_BINARY_DIR} CACHE PATH "Where cuda13.fatbin and cuda12.fatbin are")
set(QE_FATBIN13 ${QE_FATBIN_FOLDER}/cuda13.fatbin)
set(QE_FATBIN12 ${QE_FATBIN_FOLDER}/cuda12.fatbin)
find_program(QE_NVCC nvcc REQUIRED)
get_filename_component(QE_NVCC_REAL ${QE_NVCC} REALPATH)
get_filename_component(QE_CUDA_BIN ${QE_NVCC_REAL} DIRECTORY)
if(NOT QE_FATBIN_FOLDER STREQUAL CMAKE_CURRENT_BINARY_DIR)
  return()
endif()
find_program(QE_PTXAS ptxas HINTS ${QE_CUDA_BIN} REQUIRED)
find_program(QE_FATBINARY fatbinary HINTS ${QE_CUDA_BIN} REQUIRED)

set(QE_PTX ${CMAKE_CURRENT_BINARY_DIR}/kernels.ptx)
set(QE_PTX12 ${CMAKE_CURRENT_BINARY_DIR}/kernels12.ptx)
file(GLOB QE_KERNEL_SOURCES CONFIGURE_DEPENDS kernels/*.cu kernels/*.cuh kernels/*.h include/qe_edge/args.h include/qe_edge/sizes.h)
set(QE_KERNELS_PTX "" CACHE FILEPATH "PTX that nvcc made of these very kernels before, with the options below")
if(QE_KERNELS_PTX)
  add_custom_command(OUTPUT ${QE_PTX}
    COMMAND ${CMAKE_COMMAND} -E copy ${QE_KERNELS_PTX} ${QE_PTX} DEPENDS ${QE_KERNELS_PTX} VERBATIM)
else()
  add_custom_command(OUTPUT ${QE_PTX}
    COMMAND ${QE_NVCC} -O3 -std=c++17 -arch=compute_80 -ptx -o ${QE_PTX} ${CMAKE_CURRENT_SOURCE_DIR}/kernels/kernels.cu
    DEPENDS ${QE_KERNEL_SOURCES} VERBATIM)
endif()
add_custom_command(OUTPUT ${QE_PTX12}
  COMMAND sed "s/^\\.version .*/.version 8.3/" ${QE_PTX} > ${QE_PTX12}
  DEPENDS ${QE_PTX} VERBATIM)

function(qe_ptx_for chips from made)  # what chips below_90, or from sm_90 on, get of a PTX file
  string(REGEX REPLACE "\\.ptx$" "_${chips}.ptx" to ${from})
  set(script ${CMAKE_CURRENT_SOURCE_DIR}/cmake/${chips}.cmake)
  add_custom_command(OUTPUT ${to}
    COMMAND ${CMAKE_COMMAND} -DFROM=${from} -DTO=${to} -P ${script} DEPENDS ${from} ${script} VERBATIM)
  set(${made} ${to} PARENT_SCOPE)
endfunction()

function(qe_fatbin output from ptxas tag)
  qe_ptx_for(below_90 ${from} ptx)
  qe_ptx_for(sm_90 ${from} ptx90)
  set(images "")
  set(cubins "")
  foreach(chip ${ARGN})
    set(cubin ${CMAKE_CURRENT_BINARY_DIR}/${tag}_sm_${chip}.cubin)
    set(source ${ptx})
    if(chip GREATER_EQUAL 90)
      set(source ${ptx90})
    endif()
    add_custom_command(OUTPUT ${cubin}
      COMMAND ${ptxas} -O3 -arch=sm_${chip} ${source} -o ${cubin} DEPENDS ${source} VERBATIM)
    list(APPEND cubins ${cubin})
    list(APPEND images --image3=kind=elf,sm=${chip},file=${cubin})
  endforeach()
  add_custom_command(OUTPUT ${output}
    COMMAND ${QE_FATBINARY} -64 --compress-all --create=${output} ${images} --image3=kind=ptx,sm=80,file=${ptx}
    DEPENDS ${cubins} ${ptx} VERBATIM)
endfunction()

qe_fatbin(${QE_FATBIN13} ${QE_PTX} ${QE_PTXAS} cuda13 ${QE_CHIPS})
if(QE_PTXAS12)
  qe_fatbin(${QE_FATBIN12} ${QE_PTX12} ${QE_PTXAS12} cuda12 ${QE_CHIPS12})
else()
  message(WARNING "QE_PTXAS12 is not set: the plugin will not run under CUDA 12 drivers (JetPack 6).")
  add_custom_command(OUTPUT ${QE_FATBIN12} COMMAND ${CMAKE_COMMAND} -E touch ${QE_FATBIN12} VERBATIM)
endif()
