/* libqe_edge: answers of an exported model, in C.
 *
 * Every function that can fail returns a qe_status and takes a qe_error**. If it fails and the pointer is not null, it
 * writes an error there, which the caller frees: one sentence that says what is wrong, and one that says what to do.
 * Texts are UTF-8 and end with a zero byte. Options whose first field is `size` are initialised by their *_init.
 *
 * Threads: a qe_model may be used by several threads at once. A qe_conversation and a qe_answer are used by one thread
 * at a time, but qe_answer_cancel may be called by any. An answer keeps what it needs: its model and conversation may be
 * freed before it. */
#ifndef QE_EDGE_H
#define QE_EDGE_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define QE_API
#else
#define QE_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define QE_ABI_VERSION 1

typedef enum qe_status {
  QE_OK = 0,
  QE_END = 1,            /* an answer has no more pieces; no error */
  QE_ERROR_INPUT = 2,    /* a text, picture, option or argument that cannot be used */
  QE_ERROR_ARTIFACT = 3, /* a folder that is missing, damaged or of another version */
  QE_ERROR_TARGET = 4,   /* this machine cannot run the folder: a library or a GPU is missing, or too old */
  QE_ERROR_RESOURCE = 5, /* too little memory */
  QE_ERROR_INTERNAL = 6  /* a mistake of this library */
} qe_status;

typedef struct qe_error qe_error;
typedef struct qe_model qe_model;
typedef struct qe_conversation qe_conversation;
typedef struct qe_answer qe_answer;

/* "0.1.0"; and the version of this interface, which grows when a program has to be compiled again. */
QE_API const char* qe_version(void);
QE_API int qe_abi_version(void);

QE_API const char* qe_error_problem(const qe_error* error); /* both sentences */
QE_API void qe_error_free(qe_error* error);

/* ---- Models ---- */

typedef struct qe_model_options {
  size_t size;
  const char* onnxruntime; /* path of libonnxruntime.so; null for where the system finds it */
  int32_t threads;         /* of ONNX Runtime; 0 for one per core */
  int64_t max_context;     /* tokens of a prompt and its answer; 0 for what the model takes */
} qe_model_options;

QE_API void qe_model_options_init(qe_model_options* options);

/* Opens the output folder of `qe-edge export`, or of `qe-edge build` for ONNX Runtime or TensorRT. `options` may be null. */
QE_API qe_status qe_model_load(const char* folder, const qe_model_options* options, qe_model** model, qe_error** error);

/* For engines of `qe-edge build --target tensorrt` and its like, where the library was built with QE_EDGE_TENSORRT. What
 * is null is as in qe_model_load, which opens such folders too. This has not yet run on a GPU. */
typedef struct qe_gpu_options {
  size_t size;
  const char* tensorrt; /* path of libnvinfer.so.10; null for where the system finds it */
  const char* plugin;   /* path of libqe_plugin.so, for engines that need it; null for where the system finds it */
  void* stream;         /* a CUstream or cudaStream_t in which all work is queued, in its context, and which has to outlive
                         * the model, its conversations and answers; null for a stream of the model's own on the first GPU */
} qe_gpu_options;

QE_API void qe_gpu_options_init(qe_gpu_options* options);

/* As qe_model_load, with options for a GPU; both may be null. Answers of several threads take turns on the GPU. */
QE_API qe_status qe_model_load_gpu(const char* folder, const qe_model_options* options, const qe_gpu_options* gpu,
                                   qe_model** model, qe_error** error);
QE_API void qe_model_free(qe_model* model);

/* ---- Messages ---- */

typedef enum qe_pixel_format {
  QE_PIXEL_RGB = 0,
  QE_PIXEL_BGR = 1,
  QE_PIXEL_RGBA = 2, /* transparent pixels come onto white */
  QE_PIXEL_BGRA = 3,
  QE_PIXEL_GRAY = 4
} qe_pixel_format;

/* A picture in memory, 8 bits a channel. It is copied before a function returns. */
typedef struct qe_image {
  const uint8_t* data;
  int32_t width, height; /* pixels */
  int64_t stride;        /* bytes from one row to the next; 0 for rows without gaps */
  int32_t format;        /* a qe_pixel_format */
} qe_image;

/* A part of a message: a picture where `image` is not null, else a text. */
typedef struct qe_part {
  const char* text;
  const qe_image* image;
} qe_part;

typedef struct qe_message {
  const char* role; /* "system", "user" or "assistant" */
  const qe_part* parts;
  size_t part_count;
} qe_message;

/* ---- Answers ---- */

/* What is negative comes from the model's generation_config.json. */
typedef struct qe_answer_options {
  size_t size;
  int64_t max_new_tokens; /* negative: as many as fit */
  double temperature;     /* 0 takes the most likely token, and the lowest id of equal ones */
  int64_t top_k;          /* how many tokens take part; 0 for all */
  double top_p;           /* share of the probability that takes part */
  double min_p;           /* least probability, as a share of the highest one */
  double repetition_penalty;
  uint64_t seed;          /* the same seed gives the same answer, in Python too */
  int32_t has_seed;       /* 0: a seed that nobody knows */
  const char* const* stop; /* texts that end the answer */
  size_t stop_count;
} qe_answer_options;

QE_API void qe_answer_options_init(qe_answer_options* options);

typedef enum qe_finish {
  QE_FINISH_NONE = 0,
  QE_FINISH_STOP = 1,   /* the model ended its answer, or a stop text came */
  QE_FINISH_LENGTH = 2, /* max_new_tokens, or the context is full */
  QE_FINISH_CANCELLED = 3
} qe_finish;

/* A piece of an answer. Its pointers are good until the next call with the same answer. */
typedef struct qe_piece {
  const char* text; /* whole characters; may be empty in the last piece */
  const int64_t* token_ids;
  size_t token_count;
  qe_finish finish; /* QE_FINISH_NONE in all pieces but the last */
} qe_piece;

typedef struct qe_timings {
  double picture_seconds, prefill_seconds, decode_seconds;
  int64_t prompt_tokens, cached_tokens, answer_tokens;
} qe_timings;

/* Begins an answer to messages, through the model's chat template. Nothing is computed before the first piece. */
QE_API qe_status qe_generate(const qe_model* model, const qe_message* messages, size_t count,
                             const qe_answer_options* options, qe_answer** answer, qe_error** error);

/* Begins to continue a text that goes through no chat template. */
QE_API qe_status qe_complete(const qe_model* model, const char* text, const qe_answer_options* options,
                             qe_answer** answer, qe_error** error);

/* The next piece, or QE_END after the last one. An error ends the answer. */
QE_API qe_status qe_answer_next(qe_answer* answer, qe_piece* piece, qe_error** error);

/* Calls `callback` with every piece until it returns other than 0, which cancels the answer. */
typedef int (*qe_piece_callback)(const qe_piece* piece, void* user);
QE_API qe_status qe_answer_run(qe_answer* answer, qe_piece_callback callback, void* user, qe_error** error);

/* Ends an answer after the token that is being computed; from any thread. */
QE_API void qe_answer_cancel(qe_answer* answer);
QE_API void qe_answer_timings(const qe_answer* answer, qe_timings* timings);
QE_API void qe_answer_free(qe_answer* answer);

/* ---- Conversations ---- */

/* Several turns on one KV cache: what was read is not read again, nor is a picture encoded twice. */
QE_API qe_status qe_conversation_new(const qe_model* model, qe_conversation** conversation, qe_error** error);

/* Begins to answer messages that follow the earlier ones; its answer becomes a turn. One answer at a time.
 * A turn counts when its answer has ended, also by cancelling; one whose answer is freed before, or fails, is
 * forgotten. */
QE_API qe_status qe_conversation_ask(qe_conversation* conversation, const qe_message* messages, size_t count,
                                     const qe_answer_options* options, qe_answer** answer, qe_error** error);
QE_API void qe_conversation_free(qe_conversation* conversation);

#ifdef __cplusplus
}
#endif

#endif /* QE_EDGE_H */
