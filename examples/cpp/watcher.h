// Answers the same question about the latest frame of a camera, on a thread of its own. Knows nothing of ROS.
#pragma once

#include <condition_variable>
#include <cstring>
#include <functional>
#include <mutex>
#include <optional>
#include <qe_edge/qe_edge.hpp>
#include <string>
#include <thread>
#include <vector>

// A frame with its pixels: RGB without gaps.
struct Frame {
  std::string name;
  int width = 0, height = 0;
  std::vector<std::uint8_t> rgb;
};

class Watcher {
 public:
  using Listener = std::function<void(const Frame& frame, const qe::Piece& piece)>;
  using Failed = std::function<void(const Frame& frame, const qe::Error& error)>;

  // `listener` and `failed` are called by the watcher's thread. `failed` also gets what `listener` throws, and throws
  // nothing itself. The model has to outlive the watcher.
  Watcher(const qe::Model& model, std::string question, qe::Options options, Listener listener, Failed failed)
      : model_(model),
        question_(std::move(question)),
        options_(std::move(options)),
        listener_(std::move(listener)),
        failed_(std::move(failed)),
        thread_([this] { Work(); }) {}

  // Waits for the answer that is being written, which is cancelled.
  ~Watcher() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
      latest_.reset();
      if (answer_ != nullptr) answer_->cancel();
    }
    changed_.notify_all();
    thread_.join();
  }
  Watcher(const Watcher&) = delete;
  Watcher& operator=(const Watcher&) = delete;

  // Takes a frame. One that nobody has looked at yet is dropped and counted: the newest is what counts.
  void Push(Frame frame) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (latest_) ++dropped_;
      latest_ = std::move(frame);
    }
    changed_.notify_all();
  }

  // Returns once every frame that is left was answered.
  void Wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return !latest_ && !busy_; });
  }

  long dropped() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return dropped_;
  }

 private:
  void Work() {
    for (std::unique_lock<std::mutex> lock(mutex_);;) {
      changed_.wait(lock, [this] { return latest_ || stopping_; });
      if (stopping_) return;
      const Frame frame = std::move(*latest_);
      latest_.reset();
      busy_ = true;
      lock.unlock();
      Ask(frame);
      lock.lock();
      busy_ = false;
      changed_.notify_all();
    }
  }

  void Ask(const Frame& frame) {
    try {
      auto answer = model_.generate({qe::user({frame.rgb.data(), frame.width, frame.height}, question_)}, options_);
      Hold(&answer);
      try {
        for (const auto& piece : answer) listener_(frame, piece);
      } catch (...) {
        Hold(nullptr);
        throw;
      }
      Hold(nullptr);
    } catch (const qe::Error& error) {
      failed_(frame, error);
    } catch (const std::exception& error) {  // of the listener, or no memory: a thread that throws ends the program
      failed_(frame, qe::Error(QE_ERROR_INTERNAL, error.what()));
    }
  }

  // The answer that the destructor cancels.
  void Hold(qe::Answer* answer) {
    const std::lock_guard<std::mutex> lock(mutex_);
    answer_ = answer;
    if (answer != nullptr && stopping_) answer->cancel();
  }

  const qe::Model& model_;
  const std::string question_;
  const qe::Options options_;
  const Listener listener_;
  const Failed failed_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::optional<Frame> latest_;
  qe::Answer* answer_ = nullptr;
  long dropped_ = 0;
  bool busy_ = false, stopping_ = false;
  std::thread thread_;
};
