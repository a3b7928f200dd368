// Errors go to TensorRT's logger; before it has handed us one, to standard error.
#pragma once

#include <NvInferRuntime.h>  // from version 11 on its classes lie in namespaces of versions: a declaration of ours would clash

namespace qe {

void SetLoggerFinder(nvinfer1::ILoggerFinder* finder);
// "QELinear: " and the message. Never throw.
void LogError(const char* message) noexcept;
void LogWarning(const char* message) noexcept;

}  // namespace qe
