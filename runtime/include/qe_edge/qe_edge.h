/* The C interface of libqe_edge. */
#pragma once

typedef enum qe_status {
  QE_OK = 0,
  QE_END = 1,            /* an answer has no more pieces */
  QE_ERROR_INPUT = 2,    /* a text, picture, option or argument that cannot be used */
  QE_ERROR_ARTIFACT = 3, /* a folder that is missing, damaged or of another version */
  QE_ERROR_TARGET = 4,   /* ONNX Runtime is missing or too old */
  QE_ERROR_RESOURCE = 5, /* too little memory */
  QE_ERROR_INTERNAL = 6
} qe_status;
