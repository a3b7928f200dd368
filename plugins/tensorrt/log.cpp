#include "log.h"

#include <NvInferRuntime.h>
#include <stdio.h>

#include <atomic>

namespace qe {
namespace {
std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};

void Log(nvinfer1::ILogger::Severity severity, const char* message) noexcept {
  char text[512];
  snprintf(text, sizeof text, "QELinear: %s", message);
  nvinfer1::ILoggerFinder* finder = logger_finder;
  nvinfer1::ILogger* logger = finder ? finder->findLogger() : nullptr;
  if (logger) {
    logger->log(severity, text);
  } else {
    fprintf(stderr, "%s\n", text);
  }
}

}  // namespace

void SetLoggerFinder(nvinfer1::ILoggerFinder* finder) { logger_finder = finder; }

void LogError(const char* message) noexcept { Log(nvinfer1::ILogger::Severity::kERROR, message); }
void LogWarning(const char* message) noexcept { Log(nvinfer1::ILogger::Severity::kWARNING, message); }

}  // namespace qe
