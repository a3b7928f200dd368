// Errors go to TensorRT's logger; before it has handed us one, to standard error.
#pragma once

namespace nvinfer1 {
class ILogger;
class ILoggerFinder;
}  // namespace nvinfer1

namespace qe {

void SetLoggerFinder(nvinfer1::ILoggerFinder* finder);
// "QELinear: " and the message. Never throw.
void LogError(const char* message) noexcept;
void LogWarning(const char* message) noexcept;

}  // namespace qe
