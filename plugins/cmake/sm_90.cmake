# cmake -DFROM=kernels.ptx -DTO=kernels_sm_90.ptx -P sm_90.cmake: PTX for chips from 9.0 on; see payload.cmake.
file(READ ${FROM} ptx)
string(FIND "${ptx}" "// sm_90: " at)
if(NOT at EQUAL -1)
  string(REPLACE ".target sm_80" ".target sm_90" ptx "${ptx}")
  string(REPLACE "// sm_90: " "" ptx "${ptx}")
endif()
file(WRITE ${TO} "${ptx}")
