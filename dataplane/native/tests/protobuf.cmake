# Protobuf's own C++ messages, which the tests of wire/ compare with; nothing that is installed uses
# them. Needs protobuf-compiler and libprotobuf-dev.
find_package(Protobuf REQUIRED)

set(proto_root ${CMAKE_CURRENT_SOURCE_DIR}/../proto)
set(proto_out ${CMAKE_CURRENT_BINARY_DIR}/protobuf)
set(proto_sources)
foreach(proto attnserve/v1/attention inference/open_inference)
  add_custom_command(
    OUTPUT ${proto_out}/${proto}.pb.cc ${proto_out}/${proto}.pb.h
    COMMAND ${CMAKE_COMMAND} -E make_directory ${proto_out}
    COMMAND protobuf::protoc --proto_path=${proto_root} --cpp_out=${proto_out}
            ${proto_root}/${proto}.proto
    DEPENDS ${proto_root}/${proto}.proto
    VERBATIM)
  list(APPEND proto_sources ${proto_out}/${proto}.pb.cc)
endforeach()

add_library(wire_test_protobuf STATIC ${proto_sources})
target_compile_options(wire_test_protobuf PRIVATE -w)
target_include_directories(wire_test_protobuf SYSTEM PUBLIC ${proto_out})
target_link_libraries(wire_test_protobuf PUBLIC protobuf::libprotobuf)
target_link_libraries(wire_test PRIVATE wire_test_protobuf)
