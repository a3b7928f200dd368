// The fatbins inside the library. QE_CUDA13 and QE_CUDA12 are file names that CMake defines.
    .section .rodata
    .balign 64
    .globl qe_fatbin_cuda13
    .hidden qe_fatbin_cuda13
qe_fatbin_cuda13:
    .incbin QE_CUDA13
    .balign 64
    .globl qe_fatbin_cuda12
    .hidden qe_fatbin_cuda12
qe_fatbin_cuda12:
    .incbin QE_CUDA12
qe_fatbin_cuda12_end:
    .balign 8
    .globl qe_fatbin_cuda12_bytes
    .hidden qe_fatbin_cuda12_bytes
qe_fatbin_cuda12_bytes:
    .quad qe_fatbin_cuda12_end - qe_fatbin_cuda12
    .section .note.GNU-stack,"",%progbits
