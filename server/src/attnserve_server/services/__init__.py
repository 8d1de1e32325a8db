"""The gRPC methods: decode, call, encode."""
