// Calls a server through gRPC's own C++ library: `attend ADDRESS`. Exits with 0 if all is as it
// should be, else says what is not.
#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <iostream>
#include <string>
#include <vector>

#include "attnserve/v1/attention.grpc.pb.h"

namespace {

namespace v1 = attnserve::v1;

void set_ones(v1::Tensor& tensor, int length) {
  tensor.set_dtype(v1::FP32);
  for (const int size : {1, 4, length, 8}) tensor.add_shape(size);
  const std::string one("\0\0\x80\x3f", 4);  // 1.0F
  std::string& data = *tensor.mutable_data();
  for (int count = 0; count < 4 * length * 8; ++count) data += one;
}

v1::AttendRequest request(int length) {
  v1::AttendRequest made;
  made.set_model("causal");
  set_ones(*made.mutable_query(), length);
  set_ones(*made.mutable_key(), length);
  set_ones(*made.mutable_value(), length);
  return made;
}

void expect(bool condition, const std::string& what) {
  if (condition) return;
  std::cerr << what << '\n';
  std::exit(1);
}

// Every element of the mean of ones is 1, but for rounding.
bool all_ones(const std::string& data, std::size_t count) {
  std::vector<float> elements(count);
  if (data.size() != count * sizeof(float)) return false;
  std::memcpy(elements.data(), data.data(), data.size());
  return std::all_of(elements.begin(), elements.end(),
                     [](float element) { return std::abs(element - 1) < 1e-5; });
}

void set_deadline(grpc::ClientContext& context, int seconds = 20) {
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(seconds));
}

}  // namespace

int main(int, char** arguments) {
  const auto channel = grpc::CreateChannel(arguments[1], grpc::InsecureChannelCredentials());
  const auto stub = v1::AttentionService::NewStub(channel);
  {
    grpc::ClientContext context;
    set_deadline(context);
    v1::ListModelsResponse models;
    const grpc::Status status = stub->ListModels(&context, v1::ListModelsRequest(), &models);
    expect(status.ok() && models.models_size() == 1, "ListModels: " + status.error_message());
  }
  // The second one is larger than HTTP/2's first window of 64 KiB.
  for (const int length : {8, 2048}) {
    grpc::ClientContext context;
    set_deadline(context);
    v1::AttendResponse answer;
    const grpc::Status status = stub->Attend(&context, request(length), &answer);
    expect(status.ok(), "Attend: " + status.error_message());
    expect(all_ones(answer.output().data(), 4 * length * 8), "Attend: not the mean of ones");
  }
  {
    grpc::ClientContext context;
    set_deadline(context);
    v1::AttendRequest asked = request(8);
    asked.set_model("none");
    v1::AttendResponse answer;
    const grpc::Status status = stub->Attend(&context, asked, &answer);
    expect(status.error_code() == grpc::StatusCode::NOT_FOUND, "Attend of none: not NOT_FOUND");
    expect(status.error_message().find("model: given 'none'") == 0, status.error_message());
  }
  {
    grpc::ClientContext context;
    set_deadline(context);
    const auto stream = stub->AttendStream(&context);
    v1::AttendStreamRequest message;
    *message.mutable_request() = request(8);
    v1::AttendStreamResponse answer;
    for (int id = 1; id <= 20; ++id) {
      message.set_request_id(id);
      expect(stream->Write(message) && stream->Read(&answer), "AttendStream has ended");
      expect(answer.request_id() == static_cast<std::uint64_t>(id), "AttendStream: another id");
      expect(all_ones(answer.response().output().data(), 4 * 8 * 8),
             "AttendStream: not the mean of ones");
    }
    stream->WritesDone();
    expect(!stream->Read(&answer), "AttendStream: more answers than requests");
    expect(stream->Finish().ok(), "AttendStream does not end well");
  }
  {
    grpc::ClientContext context;
    set_deadline(context, 1);
    const auto stream = stub->AttendStream(&context);
    v1::AttendStreamResponse answer;
    expect(!stream->Read(&answer), "AttendStream: an answer to nothing");
    expect(stream->Finish().error_code() == grpc::StatusCode::DEADLINE_EXCEEDED,
           "AttendStream: its deadline passes unseen");
  }
  std::cout << "all well\n";
  return 0;
}
