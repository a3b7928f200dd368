// Subscribes to `image` and publishes the answer to the latest picture: pieces on `tokens`, whole answers on `answer`.
// Parameters: folder, onnxruntime, question, max_new_tokens.

#include <memory>
#include <rclcpp/rclcpp.hpp>
#include <sensor_msgs/msg/image.hpp>
#include <std_msgs/msg/string.hpp>

#include "watcher.h"

class Watch : public rclcpp::Node {
 public:
  Watch()
      : Node("qe_edge_watch"),
        model_(qe::Model::load(declare_parameter("folder", ""), {declare_parameter("onnxruntime", "")})),
        tokens_(create_publisher<std_msgs::msg::String>("tokens", 10)),
        answers_(create_publisher<std_msgs::msg::String>("answer", 10)) {
    qe::Options options;
    options.max_new_tokens = declare_parameter("max_new_tokens", 32);
    watcher_ = std::make_unique<Watcher>(
        model_, declare_parameter("question", "What is this?"), options,
        [this](const Frame&, const qe::Piece& piece) { Publish(piece); },
        [this](const Frame&, const qe::Error& error) {
          text_.clear();
          RCLCPP_ERROR(get_logger(), "%s", error.what());
        });
    pictures_ = create_subscription<sensor_msgs::msg::Image>(
        "image", rclcpp::SensorDataQoS(), [this](const sensor_msgs::msg::Image& picture) { Take(picture); });
  }

 private:
  void Publish(const qe::Piece& piece) {
    std_msgs::msg::String message;
    message.data = piece.text;
    text_ += piece.text;
    tokens_->publish(message);
    if (piece.finish == QE_FINISH_NONE) return;
    message.data = text_;
    text_.clear();
    answers_->publish(message);
  }

  void Take(const sensor_msgs::msg::Image& picture) {
    const bool bgr = picture.encoding == "bgr8";
    if (!bgr && picture.encoding != "rgb8") {
      RCLCPP_ERROR_ONCE(get_logger(), "Pictures are '%s'. Publish rgb8 or bgr8.", picture.encoding.c_str());
      return;
    }
    if (picture.step < std::size_t{picture.width} * 3 || picture.data.size() < std::size_t{picture.step} * picture.height) {
      RCLCPP_ERROR_ONCE(get_logger(), "A picture has fewer bytes than its size says. Check the camera's driver.");
      return;
    }
    Frame frame{"", static_cast<int>(picture.width), static_cast<int>(picture.height), {}};
    frame.rgb.resize(std::size_t{picture.width} * picture.height * 3);
    for (std::size_t row = 0; row < picture.height; ++row) {
      for (std::size_t column = 0; column < picture.width; ++column) {
        const auto* in = &picture.data[row * picture.step + column * 3];
        auto* out = &frame.rgb[(row * picture.width + column) * 3];
        for (int colour = 0; colour < 3; ++colour) out[colour] = in[bgr ? 2 - colour : colour];
      }
    }
    watcher_->Push(std::move(frame));
  }

  qe::Model model_;
  std::string text_;
  rclcpp::Publisher<std_msgs::msg::String>::SharedPtr tokens_, answers_;
  std::unique_ptr<Watcher> watcher_;  // ends before what it publishes to
  rclcpp::Subscription<sensor_msgs::msg::Image>::SharedPtr pictures_;
};

int main(int count, char** arguments) {
  rclcpp::init(count, arguments);
  rclcpp::spin(std::make_shared<Watch>());
  rclcpp::shutdown();
}
