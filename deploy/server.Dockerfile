# attnserve-server. Build from the root of the repository:
#   docker build -f deploy/server.Dockerfile --target cpu -t attnserve-server:cpu .
#   docker build -f deploy/server.Dockerfile --target gpu -t attnserve-server:gpu .
# Who reaches the container may do everything: see docs/operations.md for TLS and identity.
# With TLS, the health check needs settings in its environment: docs/deployment.md.
# What is compiled is compiled here, once. Both stages are of one Debian, so that the libraries that
# the data plane was linked with are those that it finds.
FROM python:3.11-bookworm AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libnghttp2-dev libssl-dev zlib1g-dev libprotozero-dev
COPY proto /src/proto
COPY kernels /src/kernels
COPY dataplane /src/dataplane
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /src/proto /src/kernels /src/dataplane

FROM python:3.11-slim-bookworm AS cpu
WORKDIR /app
RUN apt-get update \
    && apt-get install -y --no-install-recommends libnghttp2-14 libssl3 zlib1g libstdc++6 \
    && rm -rf /var/lib/apt/lists/*
COPY constraints.txt ./
COPY server ./server
COPY deploy/healthcheck.py ./
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir -c constraints.txt /wheels/*.whl './server[traces]' \
    && useradd --create-home attnserve
USER attnserve
EXPOSE 8001 8002
HEALTHCHECK --interval=5s --timeout=3s --start-period=60s CMD ["python", "/app/healthcheck.py", "127.0.0.1:8001"]
ENTRYPOINT ["attnserve-server"]
CMD ["--repository", "/models", "--host", "0.0.0.0", "--insecure", "--port", "8001", "--metrics-port", "8002"]

# The CUDA libraries come from PyPI beside onnxruntime; the driver comes from the host.
FROM cpu AS gpu
USER root
RUN pip install --no-cache-dir -c constraints.txt "onnxruntime-gpu[cuda,cudnn]"
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER attnserve
CMD ["--repository", "/models", "--host", "0.0.0.0", "--insecure", "--port", "8001", "--metrics-port", "8002", "--provider", "cuda"]
